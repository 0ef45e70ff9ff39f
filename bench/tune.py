"""The search behind the tables of tiles in gconv.kernels, on a GPU; what it finds is committed by hand.

A module of STEMS has TILES, by keys, and `candidates(key)`: the tiles that a key may have. For each key the
problems (gconv.bench.tune_problems) are found that look it up, and each candidate runs on them: its results
are held to the op's `_ref` beside those of the tile in the table, then it is timed, with a cold L2. What does
not compile, spills registers or is wrong drops out and is named. Nothing is searched when the kernels run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import machine, match, records
from .screen import Cell, Screen, say
from .tune_problems import LAYERS, Layer, Problem, kernels_of, names_of, precision, problems, select

__all__ = [
    "COLUMNS", "STEMS", "Options", "Trial", "chosen", "lookups", "run", "search", "table_text", "tile_at",
]  # fmt: skip

STEMS = ("pointwise_conv", "grouped_conv", "grouped_conv_wgrad", "batch_norm")
PER_KEY = 4  # problems that a key is timed on, of different ops before different layers
GAIN = 0.98  # of the time of the table's tile: by less than that nothing is replaced
ULPS = 64  # of float32, where the tile in the table happens to be exact
SANE = 10.0  # times the error of torch's own that the tile in the table may have; others 2 times that tile's
COLUMNS = (
    "date", "commit", "device", "torch", "triton", "batch", "stem", "key", "tile", "in_table", "ms", "ratio",
    "chosen", "problems", "note",
)  # fmt: skip


# ------------------------------------------------------------------------------------------ tables


@contextlib.contextmanager
def tile_at(module, key: tuple, tile: tuple) -> Iterator[None]:
    """The table of `module` with another tile at `key`."""
    before, module.TILES[key] = module.TILES[key], tile
    try:
        yield
    finally:
        module.TILES[key] = before


class _Noting(dict):
    """A table that notes which keys are looked up."""

    def __init__(self, table: dict):
        super().__init__(table)
        self.seen: set[tuple] = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)


@contextlib.contextmanager
def lookups(module) -> Iterator[set[tuple]]:
    """The keys of TILES that are looked up meanwhile."""
    table = module.TILES
    module.TILES = noting = _Noting(table)
    try:
        yield noting.seen
    finally:
        module.TILES = table


@contextlib.contextmanager
def _launches(instead: Callable) -> Iterator[None]:
    """Kernels are launched by `instead(launch, kernel, grid, *args, **meta)`."""
    from gconv.kernels import verbs

    launch = verbs.launch
    verbs.launch = lambda *args, **meta: instead(launch, *args, **meta)
    try:
        yield
    finally:
        verbs.launch = launch


def keys_of(problem: Problem, images: int) -> set[tuple]:
    """The keys that a problem looks up, by running it on tensors without data."""
    args = problem.make(images, "meta")
    with lookups(kernels_of(problem.stem)) as seen, _launches(lambda *args, **meta: None):
        problem.call(args)
    return seen


def problems_of_keys(stem: str, layers: Sequence[Layer], images: int) -> dict[tuple, list[Problem]]:
    """For every key of a stem the problems to time it on; none where no layer looks it up."""
    found: dict[tuple, list[Problem]] = {key: [] for key in kernels_of(stem).TILES}
    for problem in problems(stem, layers):
        for key in keys_of(problem, images):
            found[key].append(problem)
    return {key: _different(of_key) for key, of_key in found.items()}


def _different(candidates: Sequence[Problem]) -> list[Problem]:
    """At most PER_KEY of them: those first whose op, then dtype, network and layer are not there yet."""
    left, taken = list(candidates), []

    def novelty(problem: Problem) -> tuple[bool, ...]:
        facts = [(p.op, p.dtype, p.layer.model, p.layer) for p in (problem, *taken)]
        return tuple(mine not in others for mine, *others in zip(*facts))

    while left and len(taken) < PER_KEY:
        taken.append(max(left, key=novelty))
        left.remove(taken[-1])
    return taken


def _text(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def key_text(key: tuple) -> str:
    return f"({', '.join(map(_text, key))})"


def tile_text(tile: tuple) -> str:
    return f"Tile({', '.join(map(str, tile))})"


def table_text(table: dict) -> str:
    """A table as its module's source has it."""
    lines = [f"    {key_text(key)}: {tile_text(tile)},\n" for key, tile in table.items()]
    return f"TILES = {{\n{''.join(lines)}}}\n"


# ------------------------------------------------------------------------------------------ the search


@dataclass(frozen=True)
class Trial:
    """A tile and its time over all problems of a key, or why it has none."""

    tile: tuple
    ms: float | None
    note: str = ""


class DeviceLost(Exception):
    """Nothing can run on the device any more."""


def search(
    current: tuple, candidates: Sequence[tuple], trial: Callable[[tuple], Trial], left: Callable[[], float]
) -> list[Trial]:
    """The trial of the tile in the table, then of the others while `left()` seconds are left."""
    trials = [trial(current)]
    for tile in candidates:
        if left() <= 0:
            break
        if tile != current:
            trials.append(trial(tile))
    return trials


def chosen(trials: Sequence[Trial]) -> tuple:
    """The fastest tile, but the first one, the table's, unless another is faster by more than 1 - GAIN."""
    timed = [trial for trial in trials if trial.ms is not None]
    if not timed:
        return trials[0].tile
    best, first = min(timed, key=lambda trial: trial.ms), trials[0]
    keep = first.ms is not None and best.ms > GAIN * first.ms
    return first.tile if keep else best.tile


class Bench:
    """The problems of one key with their data: `trial(tile)` checks a tile and times it."""

    def __init__(self, key: tuple, problems: Sequence[Problem], images: int, device: str, timer: Callable):
        self.key, self.module, self.device, self.timer = key, kernels_of(problems[0].stem), device, timer
        self.prepared = []
        for problem in problems:
            args = problem.make(images, device)
            current, exact = problem.call(problem.apart(args)), problem.exact(args)
            own = problem.defined(problem.apart(args))
            verdict = match.compare(current, exact, [own], SANE, _floors(current))
            if not verdict.ok:
                raise ArithmeticError(f"the table's own tile is wrong: {problem}: {verdict.text}")
            self.prepared.append((problem, args, current, exact))

    def trial(self, tile: tuple) -> Trial:
        total = 0.0
        for problem, args, current, exact in self.prepared:
            try:
                with tile_at(self.module, self.key, tile):
                    note, ms = self._timed(problem, args, current, exact)
            except Exception as error:  # whatever a compiler or a driver has to say
                note, ms = _first_line(error), 0.0
                self._check_device(note)
            if note:
                return Trial(tile, None, f"{problem}: {note}")
            total += ms
        return Trial(tile, total)

    def _timed(self, problem, args, current, exact) -> tuple[str, float]:
        spilled = set()

        def note(launch, kernel, *args, **meta):
            compiled = launch(kernel, *args, **meta)
            if getattr(compiled, "n_spills", None):
                spilled.add(f"{kernel.__name__} spills {compiled.n_spills} registers")
            return compiled

        with _launches(note):
            got = problem.call(problem.apart(args))
        if spilled:
            return "; ".join(sorted(spilled)), 0.0
        verdict = match.compare(got, exact, [current], floor=_floors(got))
        if not verdict.ok:
            return f"wrong: {verdict.text}", 0.0
        with precision(problem.precision):
            op = getattr(self.module, problem.op)
            return "", self.timer(lambda: op(*args))

    def _check_device(self, note: str) -> None:
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceLost(note) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _floors(got: dict[str, torch.Tensor]) -> Callable[[str], float]:
    """The error that each result may have however exact what it is compared with is."""
    return lambda name: torch.finfo(got[name].dtype).eps * (ULPS if got[name].dtype is torch.float32 else 1)


# ------------------------------------------------------------------------------------------ the run


@dataclass(frozen=True)
class Options:
    stems: tuple[str, ...] = STEMS
    layers: str | None = None
    batch: int = 256
    seconds: float = 480.0
    device: str = "cuda"


@dataclass
class Result:
    """tables: those of the stems searched, with the tiles chosen; unsearched: what was not, and why;
    failed: whether that was for another reason than time."""

    rows: list[dict] = field(default_factory=list)
    tables: dict[str, dict] = field(default_factory=dict)
    unsearched: list[str] = field(default_factory=list)
    failed: bool = False


def check_device(device: str) -> None:
    """ValueError, in one line, where nothing can be timed."""
    from gconv import gpu

    missing = gpu.missing_triton()
    if missing is None and not torch.cuda.is_available():
        missing = "torch finds none here"
    if missing is None and gpu.interpreting():
        missing = "TRITON_INTERPRET=1 asks for the CPU"
    if device != "cuda" or missing:
        raise ValueError(f"device: want a CUDA GPU to time tiles on, got {device!r}: {missing or 'no GPU'}")


def check_names(options: Options) -> None:
    """ValueError names the stems and the layers that there are."""
    unknown = [stem for stem in options.stems if stem not in STEMS]
    if unknown:
        raise ValueError(f"stem: want some of {', '.join(STEMS)}, got {', '.join(unknown)}")
    there = dict.fromkeys(layer for stem in options.stems for layer in LAYERS[stem])
    if not names_of(options.layers) <= {name for layer in there for name in (layer.layer, str(layer))}:
        raise ValueError(f"layers: want some of {', '.join(map(str, there))}, got {options.layers!r}")


def _rank(key: tuple) -> int:
    """16-bit types first, then TF32."""
    return 0 if "16-bit" in key or 2 in key else 1 if "tf32" in key else 2


def cold_median(call: Callable[[], Any]) -> float:
    """Median milliseconds of a call, with a cold L2."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


def run(
    options: Options, timer: Callable = cold_median, clock: Callable[[], float] = time.perf_counter
) -> Result:
    """Searches the keys of the stems in turn until the seconds are used up."""
    check_names(options)
    began, result, facts = clock(), Result(), _facts(options)
    work = [
        (stem, key, of_key)
        for stem in options.stems
        for key, of_key in problems_of_keys(stem, select(stem, options.layers), options.batch).items()
    ]
    work.sort(key=lambda item: _rank(item[1]))
    result.tables = {stem: dict(kernels_of(stem).TILES) for stem in options.stems}

    def left() -> float:
        return options.seconds - (clock() - began)

    columns = (
        ("key", "left", 52),
        ("tile", "left", 36),
        ("ms", "right", 9),
        ("ratio", "right", 6),
        ("", "left", 6),
    )
    total = sum(len(kernels_of(stem).candidates(key)) for stem, key, of_key in work if of_key)
    lost = ""
    title = f"tiles on {facts['device']}, N = {options.batch}, cold L2"
    with Screen(title, columns, total, "tiles") as screen:
        for stem, key, of_key in work:
            name = f"{stem} {key_text(key)}"
            if lost or not of_key or left() <= 0:
                why = lost or ("out of time" if of_key else "no layer looks it up")
                result.unsearched.append(f"{name}: {why}")
                continue
            screen.step(name)
            tiles = kernels_of(stem).candidates(key)
            try:
                bench = Bench(key, of_key, options.batch, options.device, timer)
                trials = search(result.tables[stem][key], tiles, bench.trial, left)
            except Exception as error:  # too little memory for the layers, or the table's own tile fails
                what = _first_line(error)
                lost = f"the GPU was lost at {name}" if isinstance(error, DeviceLost) else ""
                result.unsearched.append(f"{name}: {what}")
                result.failed = True
                continue
            finally:
                bench = None
                if options.device == "cuda" and not lost:
                    torch.cuda.empty_cache()
            untried = len({*tiles, trials[0].tile}) - len(trials)
            if untried:
                result.unsearched.append(f"{name}: {untried} of {len(tiles)} tiles: out of time")
            best = result.tables[stem][key] = chosen(trials)
            for trial in trials:
                row = _row(stem, key, trial, trials[0], best)
                result.rows.append(facts | row | {"problems": "; ".join(map(str, of_key))})
                screen.row(_cells(name, row))
    return result


def _facts(options: Options) -> dict:
    import triton

    facts = machine.facts()
    device = torch.cuda.get_device_name() if options.device == "cuda" else facts["device"]
    return {
        "date": facts["date"],
        "commit": facts["commit"],
        "device": device,
        "torch": facts["torch"],
        "triton": triton.__version__,
        "batch": options.batch,
    }


def _row(stem: str, key: tuple, trial: Trial, first: Trial, best: tuple) -> dict:
    return {
        "stem": stem,
        "key": key_text(key),
        "tile": tile_text(trial.tile),
        "in_table": int(trial is first),
        "ms": trial.ms,
        "ratio": trial.ms / first.ms if trial.ms is not None and first.ms else None,
        "chosen": int(trial.tile == best),
        "note": trial.note,
    }


def _cells(name: str, row: dict) -> list[str]:
    mood = "bad" if row["note"] else "good" if row["chosen"] and not row["in_table"] else ""
    mark = "chosen" if row["chosen"] else "table" if row["in_table"] else ""
    if row["ms"] is None:
        return [name, Cell(row["tile"], mood), "-", "-", Cell(row["note"], mood)]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
    return [name, Cell(row["tile"], mood), f"{row['ms']:.4f}", ratio, Cell(mark, mood)]


def report(result: Result, folder: str) -> str:
    """Says what was not searched and the tables, writes all trials to a CSV and returns its path."""
    path = os.path.join(folder, "tune.csv")
    if os.path.exists(path):
        os.remove(path)
    records.append(path, result.rows, COLUMNS)
    for name in result.unsearched:
        say(f"not searched: {name}", "dim")
    searched = {row["stem"] for row in result.rows}
    for stem, table in result.tables.items():
        if stem not in searched:
            continue
        changed = sum(tile != kernels_of(stem).TILES[key] for key, tile in table.items())
        say(f"\nkernels/{stem}.py, {changed} of {len(table)} tiles changed:", "good" if changed else "")
        say(table_text(table))
    return path
