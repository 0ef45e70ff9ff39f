"""Memory against depth: DenseNets of several depths, and of each contestant what a training step keeps and
what it allocates at its peak. Every contestant has a process of its own, with one thread, and is checked
against float64; nothing is timed, so as many of them run side by side as torch has threads."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass

import torch

from . import entries, machine, records
from .entries import Entry
from .networks import CONTESTANTS, EAGER, Contestant, Job
from .screen import Cell, Screen
from .workers import WorkerDied

__all__ = ["CHOICE", "MODEL", "Options", "Run", "run"]

MODEL = "densenet_bc"
MODE = "training"
CHOICE = ("gconv_shared", "gconv_ultra", "eager_channels_last", "checkpoint", "compile")
LAYERS_STEP, LAYERS_REST = 6, 4  # L = 6 n + 4: three blocks of n layers with two convolutions each
_COLUMNS = (
    ("L", "right", 4), ("contestant", "left", 19), ("match", "right", 7), ("MB kept", "right", 8),
    ("per image", "right", 9), ("MB allocated", "right", 12), ("per image", "right", 9),
    ("MB resident", "right", 11), ("compiled", "right", 8),
)  # fmt: skip
_OPTIONAL = ("MB resident", "compiled")


@dataclass
class Options:
    """growth: k; compile_seconds: how long contestants that compile may take in all; depths beyond that are
    left out."""

    depths: tuple[int, ...] = (40, 64, 100, 136, 190)
    growth: int = 12
    size: int = 32
    batch: int = 4
    dtype: str = "float32"
    contestants: tuple[str, ...] = CHOICE
    compile_seconds: float = 60.0

    def __post_init__(self) -> None:
        wrong = [
            depth for depth in self.depths if depth <= LAYERS_REST or (depth - LAYERS_REST) % LAYERS_STEP
        ]
        if wrong or not self.depths:
            raise ValueError(f"depth: depths: want 6 n + 4 layers, as in 40,100,190, got {wrong}")
        self.depths = tuple(sorted(set(self.depths)))

    def job(self, depth: int) -> Job:
        arguments = (("depth", depth), ("growth_rate", self.growth))
        return Job(MODEL, self.size, self.batch, self.dtype, MODE, arguments)


@dataclass
class Run:
    """rows as in records.DEPTH_COLUMNS; the machine's facts; and what was left out, and why."""

    rows: list[dict]
    facts: dict
    skipped: dict[str, str]

    @property
    def wrong(self) -> list[dict]:
        return [row for row in self.rows if not row["match"]]


class _Budget:
    """Seconds for compiling. A network of n times the layers is taken to need n times the seconds."""

    def __init__(self, seconds: float):
        self.all = self.left = seconds
        self.per_layer = 0.0

    def reason(self, depth: int) -> str | None:
        """Why so many layers are not compiled, or None."""
        if self.per_layer * depth <= self.left:
            return None
        return f"compiling would take longer than what is left of {self.all:g} s (--compile-seconds)"

    def took(self, seconds: float, depth: int) -> None:
        self.left -= seconds
        self.per_layer = seconds / depth


def _choose(
    job: Job, depth: int, options: Options, budget: _Budget, skipped: dict[str, str]
) -> list[Contestant]:
    """The contestants that can run the job."""
    chosen = []
    for contestant in (CONTESTANTS[name] for name in options.contestants):
        reason = contestant.missing(job) or (contestant.compiles and budget.reason(depth))
        if reason:
            skipped[f"{contestant.label}, L = {depth}"] = reason
        else:
            chosen.append(contestant)
    return chosen


def _enter(
    job: Job,
    depth: int,
    chosen: list[Contestant],
    folder: str,
    screen: Screen,
    entered: list[Entry],
    budget: _Budget,
) -> dict[str, str]:
    """Fills `entered` with those that run, each set up, its results in the folder; returns by label why
    others do not."""
    failed = {}
    waiting: list[Entry] = []

    def start(count: int) -> None:
        for contestant in chosen[len(waiting) : count]:
            worker = entries.start(contestant.label, job, MODE, folder, 1, "--contestant", contestant.name)
            waiting.append(Entry(contestant, worker, {}))
            entered.append(waiting[-1])

    for i in range(len(chosen)):
        start(i + torch.get_num_threads())
        entry = waiting[i]
        compiles = entry.contestant.compiles
        began = time.monotonic()
        try:
            entry.ready = entries.await_ready(
                entry.worker,
                screen,
                f"L = {depth}: {entry.contestant.label}",
                budget.left if compiles else None,
            )
        except WorkerDied as died:
            if not compiles:
                raise
            failed[entry.contestant.label] = entry.failed(died)
            entered.remove(entry)
        if compiles:
            budget.took(time.monotonic() - began, depth)
    return failed


def _row(entry: Entry, depth: int, options: Options) -> dict:
    ready = entry.ready
    row = {
        "model": MODEL,
        "depth": depth,
        "growth": options.growth,
        "size": options.size,
        "batch": options.batch,
        "dtype": options.dtype,
        "mode": MODE,
        "contestant": entry.name,
        "parameters": ready["parameters"],
        "kernel": ", ".join(f"{kernel} ×{calls}" for kernel, calls in sorted(ready["kernels"].items())),
        "match": entry.verdict.ok,
        "error_ratio": entry.verdict.error_ratio,
        "worst": entry.verdict.worst,
        "note": "; ".join(
            filter(None, ["" if entry.verdict.ok else entry.verdict.text, *ready["fallbacks"]])
        ),
    }
    if entry.contestant.compiles:
        row["compile_s"] = ready["first_seconds"]
    if not entry.verdict.ok:
        return row  # a wrong result gets no figure
    row |= {"kept_mb": ready["kept_mb"], "allocated_mb": ready["allocated_mb"]}
    if ready["peak_mb"] is not None:
        row |= {"peak_mb": ready["peak_mb"], "step_mb": max(0.0, ready["peak_mb"] - ready["before_mb"])}
    return row


def _measure(
    depth: int, options: Options, screen: Screen, budget: _Budget, skipped: dict[str, str]
) -> list[dict]:
    job, what = options.job(depth), f"L = {depth}"
    entered: list[Entry] = []
    with tempfile.TemporaryDirectory() as folder:
        reference = "weights and float64 reference"
        exact = entries.start(reference, job, MODE, folder, torch.get_num_threads(), "--exact")
        try:
            entries.await_ready(exact, screen, f"{what}: {reference}")
        finally:
            exact.close()
        try:
            chosen = _choose(job, depth, options, budget, skipped)
            failed = _enter(job, depth, chosen, folder, screen, entered, budget)
            entries.check(MODE, folder, entered, failed)
            skipped |= {f"{label}, {what}": reason for label, reason in failed.items()}
        finally:
            for entry in entered:
                entry.worker.close()
    return [_row(entry, depth, options) for entry in entered]


def _cells(row: dict) -> list[Cell]:
    def number(value: float | None, digits: int, after: str = "") -> Cell:
        return Cell("–" if value is None else f"{value:.{digits}f}{after}")

    def each(key: str) -> list[Cell]:
        value = row.get(key)
        return [number(value, 1), number(None if value is None else value / row["batch"], 2)]

    match = Cell(f"✓ {row['error_ratio']:.2f}×", "good") if row["match"] else Cell("✗ wrong", "bad")
    contestant = CONTESTANTS[row["contestant"]]
    return [
        Cell(row["depth"]),
        Cell(contestant.label, "good" if contestant.ours else ""),
        match,
        *each("kept_mb"),
        *each("allocated_mb"),
        number(row.get("step_mb"), 0),
        number(row.get("compile_s"), 0, " s"),
    ]


def run(options: Options) -> Run:
    """Checks and measures every contestant at every depth and shows the rows as they come."""
    if not set(EAGER) & set(options.contestants):
        raise ValueError("depth: contestants: want an eager one, whose error is the measure, got none")
    facts = machine.facts()
    where = records.where(facts) | {"threads": 1}
    rows: list[dict] = []
    skipped: dict[str, str] = {}
    title = (
        f"DenseNet-BC, k = {options.growth}, {options.size}×{options.size}, batch {options.batch}, "
        f"{options.dtype}: memory of a training step against the number of layers L"
    )
    total = len(options.depths) * len(options.contestants)
    budget = _Budget(options.compile_seconds)
    with Screen(title, _COLUMNS, total, "rows", _OPTIONAL) as screen:
        for depth in options.depths:
            for row in _measure(depth, options, screen, budget, skipped):
                rows.append(where | row)
                screen.row(_cells(row))
    return Run(rows, facts, skipped)
