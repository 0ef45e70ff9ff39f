"""The layer benchmark: conv + BN + ReLU of named layers against the best of what torch offers, checked,
then timed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch

import gconv

from . import machine, roofs
from .match import NONSENSE, Problem, compare, exact_results
from .rivals import LABELS, RIVALS, Rival, Unavailable, build
from .screen import Cell, Screen
from .shapes import ConvShape
from .timing import Plan, interleave, peak_memory_mb, ratio_interval

__all__ = ["DTYPES", "MODES", "Options", "Run", "run"]

MODES = ("inference", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COLUMNS = (
    ("layer", "left", 5), ("channels, per group, image", "left", 26), ("mode", "left", 9),
    ("match", "right", 7), ("gconv ms", "right", 8), ("best ms", "right", 7), ("of the others", "left", 19),
    ("speed-up", "right", 8), ("95 %", "right", 11), ("GFLOP/s", "right", 7), ("GB/s", "right", 5),
    ("% roof", "right", 6),
)  # fmt: skip
_OPTIONAL = ("GB/s", "95 %", "GFLOP/s", "% roof", "channels, per group, image")


@dataclass
class Options:
    shapes: tuple[ConvShape, ...]
    batch: int = 8
    dtype: str = "float32"
    modes: tuple[str, ...] = MODES
    rivals: tuple[str, ...] = RIVALS
    plan: Plan = field(default_factory=Plan)


@dataclass
class Run:
    """rows as in records.COLUMNS; roofs; the machine's facts; and why a rival was left out, by its label."""

    rows: list[dict]
    roofs: roofs.Roofs
    facts: dict
    skipped: dict[str, str]

    @property
    def wrong(self) -> list[dict]:
        return [row for row in self.rows if not row["match"]]


def _kernel(rival: Rival) -> tuple[str, str]:
    """Which code ran gconv's call, from its own trace, and why it fell back, if it did."""
    with gconv.trace() as trace:
        rival.prepare(0)
        rival.run()
    kernels = sorted({row.kernel for row in trace})
    reasons = sorted({row.reason for row in trace if row.reason and row.kernel.startswith("torch.")})
    return " ".join(kernels), "; ".join(reasons)


def _measure(shape: ConvShape, mode: str, options: Options, screen: Screen, skipped: dict[str, str]) -> dict:
    """One row, without what needs the roofs."""
    dtype = DTYPES[options.dtype]
    problem = Problem.make(shape, options.batch, dtype)
    checked = problem.without_kinks() if mode == "training" else problem
    what = f"{shape.layer} {mode}"

    screen.step(f"{what}: float64 reference")
    exact = exact_results(checked, mode)
    rivals, found = {}, {}
    for name in ("gconv", *options.rivals):
        screen.step(f"{what}: {'compile' if name == 'compile' else 'check'} {LABELS[name]}")
        try:
            rivals[name] = build(name, problem, mode)
            found[name] = rivals[name].results(checked)
        except Unavailable as reason:
            rivals.pop(name, None)
            # A rival that never runs here is named once; one that fails on a layer is named with that layer.
            never = "not installed" in str(reason) or "only" in str(reason)
            skipped[LABELS[name] if never else f"{LABELS[name]}, {what}"] = str(reason)
    torchs = [found[name] for name in ("eager_nchw", "eager_channels_last") if name in found]
    verdict = compare(found["gconv"], exact, torchs)
    for name in [n for n in rivals if n != "gconv"]:
        other = compare(found[name], exact, torchs, NONSENSE)
        if not other.ok:
            skipped[f"{LABELS[name]}, {what}"] = f"wrong result: {other.text}"
            del rivals[name]
    kernel, fallback = _kernel(rivals["gconv"])
    row = {
        "model": shape.model,
        "layer": shape.layer,
        "count": shape.count,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "groups": shape.groups,
        "size": shape.size,
        "stride": shape.stride,
        "batch": options.batch,
        "dtype": options.dtype,
        "mode": mode,
        "conditions": options.plan.conditions,
        "kernel": kernel,
        "match": verdict.ok,
        "error_ratio": verdict.error_ratio,
        "worst": verdict.worst,
        "flops": shape.flops(options.batch, mode),
        "bytes": shape.bytes(options.batch, mode, dtype.itemsize),
        "note": "; ".join(filter(None, ["" if verdict.ok else verdict.text, fallback])),
    }
    if not verdict.ok:
        del rivals["gconv"]  # a wrong result gets no figure

    screen.step(f"{what}: timing", options.plan.min_rounds)
    result = interleave(list(rivals.values()), options.plan, screen.tick)
    row |= {"rounds": result.rounds, "dropped": result.dropped, "noisy": result.noisy}
    for name, timing in result.timings.items():
        row |= {f"{name}_ms": timing.p50, f"{name}_ms_p20": timing.p20, f"{name}_ms_p80": timing.p80}
    others = [name for name in result.timings if name != "gconv"]
    best = min(others, key=lambda name: result.timings[name].p50)
    row["best"] = best
    row["best_peak_mb"] = _peak(rivals[best])
    if verdict.ok:
        ours = result.timings["gconv"]
        row["ratio"] = result.timings[best].p50 / ours.p50
        row["ratio_low"], row["ratio_high"] = ratio_interval(result.timings[best], ours)
        row["gflops"] = row["flops"] / ours.p50 / 1e6
        row["gbps"] = row["bytes"] / ours.p50 / 1e6
        row["gconv_peak_mb"] = _peak(rivals["gconv"])
    return row


def _peak(rival: Rival) -> float | None:
    rival.prepare(0)
    return peak_memory_mb(rival.run)


def _against_roofs(row: dict, measured: roofs.Roofs) -> None:
    row["copy_gbps"], row["gemm_gflops"] = measured.copy_gbps, measured.gemm_gflops
    row["roof_ms"] = roofs.roof_ms(row["flops"], row["bytes"], measured)
    row["bound"] = roofs.bound_by(row["flops"], row["bytes"], measured)
    if row.get("gconv_ms"):
        row["roof_percent"] = 100 * row["roof_ms"] / row["gconv_ms"]


def ratio_mood(row: dict) -> str:
    """A win or a loss is coloured as one only if its interval leaves out 1."""
    if row.get("ratio") is None:
        return "bad"
    return "good" if row["ratio_low"] > 1 else "bad" if row["ratio_high"] < 1 else ""


def _cells(row: dict, shape: ConvShape) -> list[Cell]:
    best = Cell(f"{row[row['best'] + '_ms']:.2f}")
    head = [Cell(row["layer"]), Cell(shape.describe()), Cell(row["mode"])]
    if not row["match"]:
        blank = Cell("–")
        return [
            *head,
            Cell("✗", "bad"),
            blank,
            best,
            Cell(LABELS[row["best"]]),
            Cell("wrong", "bad"),
            *[blank] * 4,
        ]
    return [
        *head,
        Cell(f"✓ {row['error_ratio']:.2f}×", "good"),
        Cell(f"{row['gconv_ms']:.2f}" + ("*" if row["noisy"] else "")),
        best,
        Cell(LABELS[row["best"]]),
        Cell(f"{row['ratio']:.2f}×", ratio_mood(row)),
        Cell(f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}", "dim"),
        Cell(f"{row['gflops']:.0f}"),
        Cell(f"{row['gbps']:.1f}"),
        Cell(f"{row['roof_percent']:.0f}"),
    ]


def run(options: Options) -> Run:
    """Checks and times every layer of the options and shows the rows as they come."""
    facts = machine.facts()
    dtype = DTYPES[options.dtype]
    rows: list[dict] = []
    skipped: dict[str, str] = {}
    title = (
        f"conv 3x3 + BN + ReLU, {options.shapes[0].model}, batch {options.batch}, {options.dtype}, "
        f"{facts['threads']} threads of {facts['device']} ({facts['isa'] or 'no extension'})"
    )
    total = len(options.shapes) * len(options.modes)
    with Screen(title, _COLUMNS, total, "layers", _OPTIONAL) as screen, warnings.catch_warnings():
        warnings.simplefilter("ignore", gconv.FallbackWarning)  # the note of a row says it
        screen.step("roofs: copy and GEMM")
        measured = roofs.measure(dtype)
        for mode in options.modes:
            for shape in options.shapes:
                row = _measure(shape, mode, options, screen, skipped)
                _against_roofs(row, measured)
                rows.append(facts_of_row(facts) | row)
                screen.row(_cells(row, shape))
        screen.step("roofs again")
        measured = measured.better(roofs.measure(dtype))
    for row in rows:
        _against_roofs(row, measured)
    return Run(rows, measured, facts, skipped)


def facts_of_row(facts: dict) -> dict:
    keys = ("date", "commit", "machine", "device", "cores", "isa", "threads", "gconv", "torch", "python")
    return {key: facts[key] for key in keys}
