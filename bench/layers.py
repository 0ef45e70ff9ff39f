"""The layer benchmark: conv + BN + ReLU of named layers against the best of what torch offers, checked,
then timed."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

import gconv

from . import machine, records, roofs
from .budget import Budget
from .devices import CPU, Cpu, Cuda, peak_memory_mb
from .match import ALLOWED, NONSENSE, Problem, compare, exact_results
from .rivals import LABELS, RIVALS, VARIANTS, Rival, Unavailable, build, missing_variants, ours_on
from .screen import Cell, Screen
from .shapes import ConvShape, is_whole, whose
from .timing import Plan, Result, interleave, ratio_interval, redrawn_medians

__all__ = [
    "DTYPES", "MODES", "Options", "Run", "Subject", "best_ms", "conditions", "describe", "gemm_percent",
    "kernel_of", "ratio_mood", "run", "total",
]  # fmt: skip

MODES = ("inference", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COLUMNS = (
    ("model", "left", 15), ("layer", "left", 5), ("channels, per group, image", "left", 26),
    ("mode", "left", 9), ("match", "right", 7), ("gconv ms", "right", 8), ("best ms", "right", 7),
    ("of the others", "left", 19),
    ("speed-up", "right", 8), ("95 %", "right", 11), ("GFLOP/s", "right", 7), ("GB/s", "right", 5),
    ("% GEMM", "right", 6), ("% roof", "right", 6),
)  # fmt: skip
_OPTIONAL = ("GB/s", "95 %", "GFLOP/s", "% roof", "channels, per group, image", "% GEMM")
TOTAL_DRAWS = 1000


@dataclass
class Subject:
    """What is measured of layers, how long and on what."""

    shapes: tuple[ConvShape, ...]
    batch: int = 8
    dtype: str = "float32"
    plan: Plan = field(default_factory=Plan)
    device: Cpu | Cuda = CPU
    budget: Budget = field(default_factory=Budget)


@dataclass
class Options(Subject):
    modes: tuple[str, ...] = MODES
    rivals: tuple[str, ...] = RIVALS


@dataclass
class Run:
    """rows as in records.COLUMNS, with one for each mode that sums up all layers where all of a model were
    measured, or, of whole networks, as in records.MODEL_COLUMNS; roofs; the machine's facts; and why a rival
    was left out, by its label."""

    rows: list[dict]
    roofs: roofs.Roofs
    facts: dict
    skipped: dict[str, str]

    @property
    def wrong(self) -> list[dict]:
        return [row for row in self.rows if not row["match"]]


def conditions(plan: Plan, device: Cpu | Cuda, dtype: torch.dtype) -> str:
    """What a record says about caches, memory and, where the dtype leaves it open, rounding."""
    return ", ".join(filter(None, (plan.conditions, device.precision(dtype))))


def kernel_of(rival: Rival) -> tuple[str, str]:
    """Which code ran gconv's call, from its own trace, and why it fell back, if it did."""
    with gconv.trace() as trace:
        rival.prepare(0)
        rival.run()
    kernels = sorted({row.kernel for row in trace})
    reasons = sorted({row.reason for row in trace if row.reason and row.kernel.startswith("torch.")})
    return " ".join(kernels), "; ".join(reasons)


def _measure(
    shape: ConvShape, mode: str, options: Options, screen: Screen, skipped: dict[str, str]
) -> tuple[dict, Result]:
    """One row, without what needs the roofs, and the times behind it."""
    dtype, device = DTYPES[options.dtype], options.device
    problem = Problem.make(shape, options.batch, dtype, where=device.where)
    checked = problem.without_kinks() if mode == "training" else problem
    what = f"{shape.layer} {mode}"

    screen.step(f"{what}: float64 reference")
    exact = exact_results(checked, mode)
    rivals, found, ours = {}, {}, ours_on(device.name)
    for name in (*ours, *options.rivals):
        screen.step(f"{what}: {'compile' if name == 'compile' else 'check'} {LABELS[name]}")
        try:
            if name == "compile":
                options.budget.spend(Unavailable)
            rivals[name] = build(name, problem, mode)
            found[name] = rivals[name].results(checked)
        except Unavailable as reason:
            rivals.pop(name, None)
            # A rival that never runs here is named once; one that fails on a layer is named with that layer.
            never = "not installed" in str(reason) or "only" in str(reason)
            skipped[LABELS[name] if never else f"{LABELS[name]}, {what}"] = str(reason)
    torchs = [found[name] for name in ("eager_nchw", "eager_channels_last") if name in found]
    verdict = compare(found["gconv"], exact, torchs)
    spoiled = []  # backends of gconv with a wrong result: the row is wrong then
    for name in [n for n in rivals if n != "gconv"]:
        other = compare(found[name], exact, torchs, NONSENSE if name not in ours else ALLOWED)
        if not other.ok and name in ours:
            spoiled.append(f"{LABELS[name]}: {other.text}")
            del rivals[name]
        elif not other.ok:
            skipped[f"{LABELS[name]}, {what}"] = f"wrong result: {other.text}"
            del rivals[name]
    del exact, found, torchs
    kernel, fallback = kernel_of(rivals["gconv"])
    right = verdict.ok and not spoiled
    row = {
        **asdict(shape),
        "batch": options.batch,
        "dtype": options.dtype,
        "mode": mode,
        "conditions": conditions(options.plan, device, dtype),
        "kernel": kernel,
        "match": right,
        "error_ratio": verdict.error_ratio,
        "worst": verdict.worst,
        "flops": shape.flops(options.batch, mode),
        "bytes": shape.bytes(options.batch, mode, dtype.itemsize),
        "note": "; ".join(filter(None, ["" if verdict.ok else verdict.text, *spoiled, fallback])),
    }
    if not right:
        del rivals["gconv"]  # a wrong result gets no figure

    screen.step(f"{what}: timing", options.plan.min_rounds)
    result = interleave(list(rivals.values()), options.plan, screen.tick, device=device)
    row |= {"rounds": result.rounds, "dropped": result.dropped, "noisy": result.noisy}
    for name, timing in result.timings.items():
        row |= {f"{name}_ms": timing.p50, f"{name}_ms_p20": timing.p20, f"{name}_ms_p80": timing.p80}
    others = [name for name in result.timings if name not in ours]
    best = min(others, key=lambda name: result.timings[name].p50)
    row["best"] = best
    row["best_peak_mb"] = _peak(rivals[best], device)
    row["best_host_ms"] = result.host_ms.get(best)
    if right:
        taken = result.timings["gconv"]
        row["ratio"] = result.timings[best].p50 / taken.p50
        row["ratio_low"], row["ratio_high"] = ratio_interval(result.timings[best], taken)
        row["gflops"] = row["flops"] / taken.p50 / 1e6
        row["gbps"] = row["bytes"] / taken.p50 / 1e6
        row["gconv_peak_mb"] = _peak(rivals["gconv"], device)
        row["gconv_host_ms"] = result.host_ms.get("gconv")
    return row, result


def total(rows: list[dict], results: list[Result]) -> dict | None:
    """The row of all layers of one mode, each as often as the model has it: gconv's medians summed, against
    the sum of every layer's best. None if a result was wrong. The interval comes from redrawing the rounds
    of every layer on its own."""
    if not all(row["match"] for row in rows):
        return None

    def weighted(key: str) -> float:
        return sum(row["count"] * row[key] for row in rows)

    first = rows[0]
    keys = ("model", "batch", "dtype", "mode", "conditions")
    row = {key: first[key] for key in keys}
    row |= {"layer": records.ALL, "best": records.EACH, "match": True, "note": ""}
    row |= {key: weighted(key) for key in ("gconv_ms", "gconv_ms_p20", "gconv_ms_p80", "flops", "bytes")}
    row |= {"count": sum(row["count"] for row in rows), "kernel": "", "worst": ""}
    row["error_ratio"] = max(row["error_ratio"] for row in rows)
    for name in (*RIVALS, *VARIANTS):
        if all(row.get(f"{name}_ms") for row in rows):
            row |= {f"{name}_ms{end}": weighted(f"{name}_ms{end}") for end in ("", "_p20", "_p80")}
    best, ours = (
        sum(
            row["count"] * redrawn_medians(result.timings[row["best"] if other else "gconv"], TOTAL_DRAWS, i)
            for i, (row, result) in enumerate(zip(rows, results))
        )
        for other in (True, False)
    )
    row["ratio"] = sum(row["count"] * row[f"{row['best']}_ms"] for row in rows) / row["gconv_ms"]
    row["ratio_low"], row["ratio_high"] = (float(q) for q in np.percentile(best / ours, [2.5, 97.5]))
    row["gflops"] = row["flops"] / row["gconv_ms"] / 1e6
    row["gbps"] = row["bytes"] / row["gconv_ms"] / 1e6
    row["rounds"] = min(row["rounds"] for row in rows)
    row["dropped"] = max(row["dropped"] for row in rows)
    row["noisy"] = any(row["noisy"] for row in rows)
    return row


def _peak(rival: Rival, device: Cpu | Cuda) -> float | None:
    rival.prepare(0)
    return peak_memory_mb(rival.run, device)


def _against_roofs(rows: list[dict], measured: roofs.Roofs) -> None:
    for row in rows:
        row["copy_gbps"], row["gemm_gflops"] = measured.copy_gbps, measured.gemm_gflops
        if records.is_total(row):
            layers = [r for r in rows if r["mode"] == row["mode"] and not records.is_total(r)]
            row["roof_ms"] = sum(r["count"] * r["roof_ms"] for r in layers)
            row["bound"] = "both" if len({r["bound"] for r in layers}) > 1 else layers[0]["bound"]
        else:
            row["roof_ms"] = roofs.roof_ms(row["flops"], row["bytes"], measured)
            row["bound"] = roofs.bound_by(row["flops"], row["bytes"], measured)
        if row.get("gconv_ms"):
            row["roof_percent"] = 100 * row["roof_ms"] / row["gconv_ms"]


def gemm_percent(row: dict) -> float:
    """The rate of the nominal operations, as a share of the matrix product's in the same run."""
    return 100 * row["gflops"] / row["gemm_gflops"]


def best_ms(row: dict) -> float:
    """The best of the others; in a row that sums up layers, the best of each."""
    return row["ratio"] * row["gconv_ms"] if records.is_total(row) else row[row["best"] + "_ms"]


def ratio_mood(row: dict) -> str:
    """A win or a loss is coloured as one only if its interval leaves out 1."""
    if row.get("ratio") is None:
        return "bad"
    return "good" if row["ratio_low"] > 1 else "bad" if row["ratio_high"] < 1 else ""


def describe(row: dict, per_group: str = "", stride: str = " /") -> str:
    """Channels in and out, channels per group, image, and the stride where it is not 1."""
    if records.is_total(row):
        return f"all {row['count']} layers"
    return (
        f"{row['in_channels']}→{row['out_channels']}, {row['in_channels'] // row['groups']}{per_group}, "
        f"{row['size']}×{row['size']}" + (f"{stride}{row['stride']}" if row["stride"] > 1 else "")
    )


def _cells(row: dict) -> list[Cell]:
    digits = 3 if machine.is_gpu(row) else 2
    best = Cell(f"{best_ms(row):.{digits}f}")
    head = [Cell(row["model"]), Cell(row["layer"]), Cell(describe(row)), Cell(row["mode"])]
    label = Cell("best of each layer" if records.is_total(row) else LABELS[row["best"]])
    if not row["match"]:
        return [*head, Cell("✗", "bad"), Cell("–"), best, label, Cell("wrong", "bad"), *[Cell("–")] * 5]
    return [
        *head,
        Cell(f"✓ {row['error_ratio']:.2f}×", "good"),
        Cell(f"{row['gconv_ms']:.{digits}f}" + ("*" if row["noisy"] else "")),
        best,
        label,
        Cell(f"{row['ratio']:.2f}×", ratio_mood(row)),
        Cell(f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}", "dim"),
        Cell(f"{row['gflops']:.0f}"),
        Cell(f"{row['gbps']:.{0 if machine.is_gpu(row) else 1}f}"),
        Cell(f"{gemm_percent(row):.0f}"),
        Cell(f"{row['roof_percent']:.0f}"),
    ]


def run(options: Options) -> Run:
    """Checks and times every layer of the options and shows the rows as they come."""
    device = options.device
    facts = machine.facts(device)
    where = records.where(facts)
    dtype = DTYPES[options.dtype]
    rows: list[dict] = []
    skipped = missing_variants(device.name)
    models = [shape.model for shape in options.shapes]
    title = (
        f"conv 3x3 + BN + ReLU, {whose(models)}, "
        f"batch {options.batch}, {options.dtype}, {machine.describe(facts)}"
    )
    count = len(options.shapes) * len(options.modes)
    columns, drop = (_COLUMNS, 0) if len(set(models)) > 1 else (_COLUMNS[1:], 1)
    with Screen(title, columns, count, "layers", _OPTIONAL) as screen, warnings.catch_warnings():
        warnings.simplefilter("ignore", gconv.FallbackWarning)  # the note of a row says it
        screen.step("roofs: copy and GEMM")
        device.set_up()
        measured = roofs.measure(dtype, device=device)
        for mode in options.modes:
            group, results = [], []
            for shape in options.shapes:
                if options.budget.over:
                    skipped[f"{shape.layer} {mode}"] = options.budget.text
                    continue
                row, result = _measure(shape, mode, options, screen, skipped)
                group.append(where | row)
                results.append(result)
                _against_roofs(group[-1:], measured)
                screen.row(_cells(group[-1])[drop:])
            whole = is_whole(options.shapes) and len(group) == len(options.shapes)
            summed = total(group, results) if whole else None
            if summed:
                group.append(where | summed)
                _against_roofs(group, measured)
                screen.row(_cells(group[-1])[drop:])
            rows += group
        screen.step("roofs again")
        measured = measured.better(roofs.measure(dtype, device=device))
    _against_roofs(rows, measured)
    return Run(rows, measured, facts, skipped)
