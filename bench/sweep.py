"""Does a layer keep its rate at other batches and numbers of threads? One contestant against itself: every
batch and number of threads takes turns, and the images per second are compared with those of the reference
batch at as many threads."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field

import torch

import gconv

from . import machine, records
from .devices import CPU, Cpu, Cuda
from .layers import DTYPES, MODES, conditions, describe, kernel_of
from .match import Problem, compare, exact_results
from .rivals import LABELS, Rival, build
from .screen import Cell, Screen
from .shapes import ConvShape
from .timing import Plan, interleave, ratio_interval

__all__ = ["CLIFF", "Options", "Run", "run"]

CLIFF = 0.75  # of the reference's images per second


@dataclass
class Options:
    shapes: tuple[ConvShape, ...]
    batches: tuple[int, ...] = (1, 8, 32)
    threads: tuple[int, ...] = (1, 2)
    reference: int = 8
    dtype: str = "float32"
    modes: tuple[str, ...] = MODES
    contestant: str = "gconv"
    plan: Plan = field(default_factory=Plan)
    device: Cpu | Cuda = CPU


@dataclass
class Run:
    """rows as in records.SWEEP_COLUMNS, and the machine's facts."""

    rows: list[dict]
    facts: dict

    @property
    def wrong(self) -> list[dict]:
        return [row for row in self.rows if not row["match"]]

    @property
    def cliffs(self) -> list[dict]:
        return [row for row in self.rows if row.get("relative") and row["relative"] < CLIFF]


class _At:
    """A rival at a batch of its own and so many threads."""

    def __init__(self, rival: Rival, batch: int, threads: int):
        self.rival, self.batch, self.threads = rival, batch, threads
        self.name = f"{batch} on {threads}"
        self.run = rival.run

    def prepare(self, i: int) -> None:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        self.rival.prepare(i)


def _checked(shape: ConvShape, mode: str, batch: int, options: Options) -> tuple[Rival, dict]:
    """The rival at this batch, and what its row says of its result."""
    problem = Problem.make(shape, batch, DTYPES[options.dtype], where=options.device.where)
    checked = problem.without_kinks() if mode == "training" else problem
    rival = build(options.contestant, problem, mode)
    eager = ("eager_nchw", "eager_channels_last")
    torchs = [build(name, problem, mode).results(checked) for name in eager]
    verdict = compare(rival.results(checked), exact_results(checked, mode), torchs)
    found = {"match": verdict.ok, "error_ratio": verdict.error_ratio, "worst": verdict.worst}
    return rival, found | {"kernel": kernel_of(rival)[0]}


def _measure(shape: ConvShape, mode: str, options: Options, screen: Screen) -> list[dict]:
    what = f"{shape.layer} {mode}"
    entrants, found = [], {}
    for batch in sorted({*options.batches, options.reference}):
        screen.step(f"{what}: check batch {batch}")
        rival, found[batch] = _checked(shape, mode, batch, options)
        entrants += [_At(rival, batch, threads) for threads in options.threads]
    timed = [entrant for entrant in entrants if found[entrant.batch]["match"]]
    screen.step(f"{what}: timing", options.plan.min_rounds)
    result = interleave(timed, options.plan, screen.tick, device=options.device)
    rows = []
    for entrant in entrants:
        row = {
            **asdict(shape),
            "batch": entrant.batch,
            "threads": entrant.threads,
            "dtype": options.dtype,
            "mode": mode,
            "conditions": conditions(options.plan, options.device, DTYPES[options.dtype]),
            "contestant": options.contestant,
            "reference": options.reference,
            **found[entrant.batch],
        }
        rows.append(row)
        timing = result.timings.get(entrant.name)
        base = result.timings.get(f"{options.reference} on {entrant.threads}")
        if timing is None:
            continue  # a wrong result gets no figure
        row |= {"ms": timing.p50, "ms_p20": timing.p20, "ms_p80": timing.p80}
        row |= {"images_per_s": 1e3 * entrant.batch / timing.p50}
        row |= {"rounds": result.rounds, "dropped": result.dropped, "noisy": result.noisy}
        if base is not None:
            scale = entrant.batch / options.reference
            row["relative"] = scale * base.p50 / timing.p50
            low, high = ratio_interval(base, timing)
            row |= {"relative_low": scale * low, "relative_high": scale * high}
    return rows


def _line(rows: list[dict], batches: list[int], reference: int) -> list[Cell]:
    """One line of the table: a layer in a mode on so many threads, at every batch."""
    by_batch = {row["batch"]: row for row in rows}
    first, base = rows[0], by_batch[reference]
    cells = [Cell(first["model"]), Cell(first["layer"]), Cell(describe(first)), Cell(first["mode"])]
    cells.append(Cell(first["threads"]))
    cells.append(Cell("–" if not base.get("ms") else f"{base['images_per_s']:.0f}{'*' * base['noisy']}"))
    for batch in batches:
        row = by_batch[batch]
        if row.get("relative") is None:
            cells.append(Cell("wrong" if not row["match"] else "–", "bad"))
        else:
            mood = "bad" if row["relative_high"] < CLIFF else "good" if row["relative_low"] > CLIFF else ""
            text = f"{row['relative']:.2f} ({row['relative_low']:.2f}–{row['relative_high']:.2f})"
            cells.append(Cell(text, mood))
    return cells


def run(options: Options) -> Run:
    """Checks and times the layers at every batch and number of threads, and shows the rates as they come."""
    facts = machine.facts(options.device)
    where = records.where(facts)
    batches = sorted({*options.batches} - {options.reference})
    columns = (
        ("model", "left", 15), ("layer", "left", 5), ("channels, per group, image", "left", 26),
        ("mode", "left", 9), ("threads", "right", 7), (f"images/s at N = {options.reference}", "right", 17),
        *((f"N = {batch}", "right", 17) for batch in batches),
    )  # fmt: skip
    title = (
        f"{LABELS[options.contestant]}, conv 3x3 + BN + ReLU, {options.dtype}: images per second at other "
        f"batches, those of N = {options.reference} being 1; {facts['device']}"
    )
    total = len(options.shapes) * len(options.modes) * len(options.threads)
    rows: list[dict] = []
    before = torch.get_num_threads()
    with (
        Screen(title, columns, total, "rows", ("channels, per group, image", "model")) as screen,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", gconv.FallbackWarning)
        options.device.set_up()
        try:
            for mode in options.modes:
                for shape in options.shapes:
                    found = [where | row for row in _measure(shape, mode, options, screen)]
                    rows += found
                    for threads in options.threads:
                        mine = [row for row in found if row["threads"] == threads]
                        screen.row(_line(mine, batches, options.reference))
        finally:
            torch.set_num_threads(before)
    return Run(rows, facts)
