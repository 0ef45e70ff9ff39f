"""The benchmark of whole networks: inference and training steps of a model, its contestants in processes of
their own that take turns step by step, checked first, then timed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from gconv.models import get_model_builder

from . import entries, machine, networks, records, roofs
from .budget import Budget
from .devices import CPU, Cpu, Cuda
from .entries import Entry
from .layers import MODES, Run, ratio_mood
from .networks import CONTESTANTS, DTYPES, EAGER, PARTS, Job, is_ours
from .screen import Cell, Screen
from .timing import Plan, Result, Turn, interleave, ratio_interval
from .workers import WorkerDied

__all__ = ["Options", "default_size", "ours_and_best", "pick", "run"]

SMALL = ("resnext_digits", "densenet*_k*")  # models for 32x32 images
LEAST_MB = 4.0  # of a step: engines that allocate when they load take nothing, and are no measure
CONDITIONS = "a process each, reused memory"
_COLUMNS = (
    ("mode", "left", 9), ("contestant", "left", 19), ("precision", "left", 17), ("match", "right", 7),
    ("ms/image", "right", 8), ("images/s", "right", 8), ("speed", "right", 6), ("95 %", "right", 11),
    ("% GEMM", "right", 6), ("MB a step", "right", 9), ("memory", "right", 6), ("MB in all", "right", 9),
    ("MB kept", "right", 7), ("per image", "right", 9), ("compiled", "right", 8),
    *((f"ms {part}", "right", 11) for part in PARTS),
)  # fmt: skip
_OPTIONAL = (
    *(f"ms {part}" for part in PARTS), "% GEMM", "95 %", "MB in all", "compiled", "precision", "MB kept",
    "images/s",
)  # fmt: skip


@dataclass
class Options:
    model: str = "resnext50_32x4d"
    size: int = 224
    batch: int = 8
    dtype: str = "float32"
    modes: tuple[str, ...] = MODES
    contestants: tuple[str, ...] = tuple(CONTESTANTS)
    plan: Plan = field(default_factory=lambda: Plan(min_rounds=5, seconds=60.0))
    device: Cpu | Cuda = CPU
    budget: Budget = field(default_factory=Budget)

    def job(self, mode: str) -> Job:
        return Job(self.model, self.size, self.batch, self.dtype, mode, device=self.device.name)

    @property
    def conditions(self) -> str:
        return ", ".join(filter(None, (CONDITIONS, self.device.precision(DTYPES[self.dtype]))))


def default_size(model: str) -> int:
    """The size of the images that a model is made for."""
    return 32 if any(fnmatchcase(model, pattern) for pattern in SMALL) else 224


def pick(
    model: str,
    without: str | None = None,
    among: Sequence[str] = tuple(CONTESTANTS),
    device: str = "cpu",
) -> tuple[str, ...]:
    """The contestants for a model on a device, less those of the comma-separated `without` (names or labels).
    ValueError names what exists."""
    if model not in networks.FAMILIES:
        get_model_builder(model)
    suitable = {name: CONTESTANTS[name] for name in among if CONTESTANTS[name].suits(model, device)}
    names = {key.lower(): name for name, c in suitable.items() for key in (name, c.label) if not c.ours}
    parts = {part.strip().lower() for part in (without or "").split(",") if part.strip()}
    if not parts <= set(names):
        want = ", ".join(c.label for c in suitable.values() if not c.ours)
        raise ValueError(f"bench: without: want some of {want}, got {without!r}")
    kept = tuple(name for name in suitable if name not in {names[part] for part in parts})
    if not set(EAGER) & set(kept):
        raise ValueError(
            f"bench: without: want an eager contestant kept, whose error is the measure, got {without!r}"
        )
    return kept


def ours_and_best(rows: list[dict], mode: str) -> tuple[list[dict], dict | None]:
    """gconv's rows of a mode and that of the fastest other; None where there is none."""
    found = {row["contestant"]: row for row in rows if row["mode"] == mode}
    best = next((found.get(row["best"]) for row in found.values()), None)
    return [row for row in found.values() if is_ours(row)], best


def _enter(
    mode: str, options: Options, folder: str, screen: Screen, skipped: dict[str, str], entered: list[Entry]
) -> None:
    """Fills `entered` with those that can run the mode, each set up, its results in the folder."""
    # What compiles comes last: it may take as long as the budget has left.
    for contestant in sorted(
        (CONTESTANTS[name] for name in options.contestants), key=lambda contestant: contestant.compiles
    ):
        missing = contestant.missing(options.job(mode))
        if missing:
            skipped[contestant.label] = missing
            continue
        limit = options.budget.compile_seconds if contestant.compiles else None
        if limit == 0:
            skipped[f"{contestant.label}, {mode}"] = options.budget.text
            continue
        who = ("--contestant", contestant.name)
        threads = torch.get_num_threads()
        worker = entries.start(contestant.label, options.job(mode), mode, folder, threads, *who)
        entry = Entry(contestant, worker, {})
        entered.append(entry)
        try:
            entry.ready = entries.await_ready(worker, screen, f"{mode}, {contestant.label}", limit)
        except WorkerDied as died:
            if not contestant.compiles and contestant.backend is None:
                raise
            skipped[f"{contestant.label}, {mode}"] = entry.failed(died)
            entered.remove(entry)


def _take(entry: Entry, index: int, calls: int) -> Turn:
    entry.worker.tell(json.dumps({"index": index, "calls": calls}))
    heard = entry.worker.hear("turn")
    return Turn(np.array(heard["ms"]), heard["disturbed"])


def _note(entry: Entry, last: dict) -> str:
    seconds = entry.ready["seconds"]
    parts = [
        entry.problem,
        entry.contestant.remark,
        "; ".join(entry.ready["fallbacks"]),
        # Of several precisions the fastest was taken: say what the others took.
        ", ".join(f"{precision}: {1e3 * s:.0f} ms" for precision, s in seconds.items()),
        "" if last["finite"] else "the loss of the last step is not finite",
    ]
    return "; ".join(filter(None, parts))


def _row(entry: Entry, mode: str, options: Options, result: Result, best: str, last: dict) -> dict:
    """One contestant's row, without what needs the roofs or the row of the best."""
    kernels = entry.ready["kernels"]
    row = {
        "model": options.model,
        "size": options.size,
        "batch": options.batch,
        "dtype": options.dtype,
        "mode": mode,
        "conditions": options.conditions,
        "contestant": entry.name,
        "precision": entry.ready["precision"],
        "kernel": ", ".join(f"{kernel} ×{calls}" for kernel, calls in sorted(kernels.items())),
        "fallbacks": "; ".join(entry.ready["fallbacks"]),
        "match": entry.verdict.ok,
        "error_ratio": entry.verdict.error_ratio,
        "worst": entry.verdict.worst,
        "best": best,
        "note": _note(entry, last),
    }
    if kernels:
        # A call of ours may be several convolutions (a bottleneck), one of torch's is one.
        torchs = sum(calls for kernel, calls in kernels.items() if kernel.startswith("torch.conv"))
        convolutions = entry.ready["convolutions"]
        row |= {"own_convolutions": convolutions - torchs, "convolutions": convolutions}
    if entry.contestant.compiles:
        row["compile_s"] = entry.ready["first_seconds"]
    timing = result.timings.get(entry.name)
    if timing is None:
        return row  # a wrong result gets no figure
    fastest = result.timings[best]
    low, high = ratio_interval(fastest, timing)
    row |= {"ms": timing.p50, "ms_p20": timing.p20, "ms_p80": timing.p80}
    row |= {"ms_per_image": timing.p50 / options.batch, "images_per_s": 1e3 * options.batch / timing.p50}
    row |= {"ratio": fastest.p50 / timing.p50, "ratio_low": low, "ratio_high": high}
    row |= {"rounds": result.rounds, "dropped": result.dropped, "noisy": result.noisy}
    if entry.ready["peak_mb"] is not None:
        row["peak_mb"] = entry.ready["peak_mb"]
        row["step_mb"] = max(0.0, entry.ready["peak_mb"] - entry.ready["before_mb"])
    row["kept_mb"] = entry.ready["kept_mb"]
    row |= {f"{part}_ms": ms for part, ms in last["parts"].items()}
    return row


def _measure(mode: str, options: Options, folder: str, screen: Screen, skipped: dict[str, str]) -> list[dict]:
    entered: list[Entry] = []
    try:
        _enter(mode, options, folder, screen, skipped, entered)
        screen.step(f"{mode}: compare with float64")
        entries.check(mode, folder, entered, skipped)
        timed = [entry for entry in entered if entry.verdict.ok]
        screen.step(f"{mode}: timing", options.plan.min_rounds)
        plan = replace(options.plan, seconds=min(options.plan.seconds, max(options.budget.left, 0.0)))
        result = interleave(timed, plan, screen.tick, _take, options.device)
        best = min(
            (name for name in result.timings if not CONTESTANTS[name].ours),
            key=lambda name: result.timings[name].p50,
        )
        rows = []
        for entry in entered:
            entry.worker.tell("stop")
            rows.append(_row(entry, mode, options, result, best, entry.worker.hear("done")))
    finally:
        for entry in entered:
            entry.worker.close()
    base = next(row for row in rows if row["contestant"] == best).get("step_mb")
    flops = networks.flops(options.job(mode))
    for row in rows:
        row["gflop"] = flops / 1e9
        if row.get("ms"):
            row["gflops"] = flops / row["ms"] / 1e6
            if base and base >= LEAST_MB and row.get("step_mb") is not None:
                row["memory_ratio"] = row["step_mb"] / base
    return rows


def _cells(row: dict) -> list[Cell]:
    def number(key: str, digits: int, after: str = "") -> Cell:
        return Cell("–" if row.get(key) is None else f"{row[key]:.{digits}f}{after}")

    head = [Cell(row["mode"]), Cell(CONTESTANTS[row["contestant"]].label), Cell(row["precision"])]
    head[1].mood = "good" if is_ours(row) else ""
    match = Cell(f"✓ {row['error_ratio']:.2f}×", "good") if row["match"] else Cell("✗ wrong", "bad")
    if not row.get("ms"):
        return [*head, match, *[Cell("–")] * (len(_COLUMNS) - 4)]
    is_best = row["contestant"] == row["best"]
    return [
        *head,
        match,
        Cell(f"{row['ms_per_image']:.{3 if machine.is_gpu(row) else 2}f}" + ("*" if row["noisy"] else "")),
        number("images_per_s", 1),
        Cell(f"{row['ratio']:.2f}×", ratio_mood(row) if is_ours(row) else ""),
        Cell("best other" if is_best else f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}", "dim"),
        Cell(f"{100 * row['gflops'] / row['gemm_gflops']:.0f}"),
        number("step_mb", 0),
        number("memory_ratio", 2, "×"),
        number("peak_mb", 0),
        number("kept_mb", 0),
        Cell("–" if row.get("kept_mb") is None else f"{row['kept_mb'] / row['batch']:.1f}"),
        number("compile_s", 0, " s"),
        *(number(f"{part}_ms", 1) for part in PARTS),
    ]


def run(options: Options) -> Run:
    """Checks and times a network in every mode of the options and shows the rows as they come."""
    device = options.device
    facts = machine.facts(device)
    rows: list[dict] = []
    skipped: dict[str, str] = {}
    title = (
        f"{options.model}, {options.size}×{options.size}, batch {options.batch}, {options.dtype}, "
        f"{machine.describe(facts)}"
    )

    def against(measured: roofs.Roofs, of: list[dict]) -> None:
        for row in of:
            row["copy_gbps"], row["gemm_gflops"] = measured.copy_gbps, measured.gemm_gflops

    total = len(options.modes) * len(options.contestants)
    with (
        tempfile.TemporaryDirectory() as folder,
        Screen(title, _COLUMNS, total, "rows", _OPTIONAL) as screen,
    ):
        screen.step("roofs: copy and GEMM")
        measured = roofs.measure(DTYPES[options.dtype], device=device)
        device.release()
        modes = ",".join(options.modes)
        job, threads = options.job(options.modes[0]), torch.get_num_threads()
        exact = entries.start("the float64 reference", job, modes, folder, threads, "--exact")
        try:
            entries.await_ready(exact, screen, "weights")
        finally:
            exact.close()
        for mode in options.modes:
            if options.budget.over:
                skipped[mode] = options.budget.text
                continue
            found = _measure(mode, options, folder, screen, skipped)
            against(measured, found)
            rows += [records.where(facts) | row for row in found]
            for row in rows[-len(found) :]:
                screen.row(_cells(row))
        screen.step("roofs again")
        measured = measured.better(roofs.measure(DTYPES[options.dtype], device=device))
    against(measured, rows)
    return Run(rows, measured, facts, skipped)
