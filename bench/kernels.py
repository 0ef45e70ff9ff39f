"""The kernel benchmark: one operation at a time, against the copy bandwidth and the floor of the same run.

Of every 3x3 layer the convolution's forward, its input gradient and its weight gradient; of the 1x1 layers
around them the forward with the normalisation and ReLU on load and the statistics, beside the matrix product
alone; and the two passes of batch norm. Gradients are asked for one by one through autograd, so that whoever
competes runs its own kernels and no others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import gconv

from . import machine, records, roofs
from .layers import DTYPES, Run, Subject, conditions
from .match import ALLOWED, NONSENSE, compare, plain_cudnn
from .rivals import LABELS, VARIANTS, buffers, missing_variants, on_backend, ours_on
from .screen import Cell, Screen
from .shapes import ConvShape, PixelShape, pixel_shapes, whose
from .timing import interleave, ratio_interval

__all__ = ["PARTS", "Options", "run"]

PARTS = ("forward", "bwd_input", "bwd_weight", "pointwise", "batch_norm")
CONTESTANTS = {  # others than gconv, by the memory layout they get
    "eager_nchw": torch.contiguous_format,
    "eager_channels_last": torch.channels_last,
}
PRODUCT = "product"  # cuBLAS's: the matrix product that a 1x1 convolution is, with nothing around it
NAMES = LABELS | {PRODUCT: "matrix product alone"}
_COLUMNS = (
    ("model", "left", 15), ("layer", "left", 6), ("channels, per group, image", "left", 26),
    ("kernel", "left", 15), ("contestant", "left", 20), ("match", "right", 7), ("ms", "right", 8),
    ("speed-up", "right", 8), ("95 %", "right", 11), ("GB/s", "right", 6), ("% copy", "right", 6),
    ("% floor", "right", 7), ("bound", "left", 7),
)  # fmt: skip
_OPTIONAL = ("95 %", "bound", "GB/s", "channels, per group, image")

Results = dict[str, Tensor]


@dataclass
class Options(Subject):
    parts: tuple[str, ...] = PARTS


@dataclass(frozen=True)
class Task:
    """One operation on one layer.

    flops, bytes: what none can avoid. inputs(generator, where): float32 tensors by name; what has four
    dimensions gets the dtype of the run. start(name, tensors): contestant `name`'s call on such tensors, all
    that is not timed done already; it returns what `keys` name. A call whose name is PRODUCT is not compared.
    """

    part: str
    kernel: str
    shape: ConvShape | PixelShape
    flops: int
    elements: int
    contestants: tuple[str, ...]
    inputs: Callable[[torch.Generator], Results]
    start: Callable[[str, Results], Callable[[], tuple[Tensor, ...]]]
    keys: tuple[str, ...]


class _Call:
    """A contestant at a task, with rotating inputs."""

    def __init__(self, name: str, task: Task, sets: list[Results], backend: str | None):
        self.name, self.backend = name, backend
        with on_backend(backend):
            self.calls = [task.start(name, tensors) for tensors in sets]
        self.prepare(0)

    def prepare(self, i: int) -> None:
        self.call = self.calls[i % len(self.calls)]

    def run(self) -> tuple[Tensor, ...]:
        with on_backend(self.backend):
            return self.call()


def _random(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=generator, device=generator.device)


# ------------------------------------------------------------------------------------------------- the tasks


def _conv_inputs(shape: ConvShape, batch: int, generator: torch.Generator) -> Results:
    c, k = shape.in_channels, shape.out_channels
    weight = _random(generator, k, shape.channels_per_group, 3, 3)
    return {
        "x": _random(generator, batch, c, shape.size, shape.size),
        "dy": _random(generator, batch, k, shape.out_size, shape.out_size),
        "weight": weight * (2 / (9 * shape.channels_per_group)) ** 0.5,
    }


def _start_conv(shape: ConvShape, part: str, name: str, tensors: Results) -> Callable:
    x, weight, dy = (tensors[key] for key in ("x", "weight", "dy"))
    conv = F.conv2d if name in CONTESTANTS else gconv.functional.grouped_conv
    geometry = (None, shape.stride, shape.padding, 1, shape.groups)
    if part == "forward":

        def forward() -> tuple[Tensor]:
            with torch.no_grad():
                return (conv(x, weight, *geometry),)

        return forward
    of = (x if part == "bwd_input" else weight).detach().requires_grad_()
    y = conv(of, weight, *geometry) if part == "bwd_input" else conv(x, of, *geometry)
    return lambda: torch.autograd.grad(y, of, dy, retain_graph=True)


def _conv_task(part: str, shape: ConvShape, batch: int, device: str) -> Task:
    x = batch * shape.in_channels * shape.size**2
    y = batch * shape.out_channels * shape.out_size**2
    return Task(
        part,
        f"conv {part}",
        shape,
        shape.flops(batch, "inference"),
        x + y + shape.weights,
        (*ours_on(device), *CONTESTANTS),
        partial(_conv_inputs, shape, batch),
        partial(_start_conv, shape, part),
        ({"forward": "y", "bwd_input": "dx", "bwd_weight": "dweight"}[part],),
    )


def _pixel_inputs(shape: PixelShape, batch: int, generator: torch.Generator) -> Results:
    c, k = shape.in_channels, shape.out_channels
    act = torch.stack((1 + 0.2 * _random(generator, c), 0.2 * _random(generator, c)))
    return {
        "x": _random(generator, batch, c, shape.size, shape.size),
        "weight": _random(generator, k, c, 1, 1) * (2 / c) ** 0.5,
        "act": act,
    }


def _activated(x: Tensor, act: Tensor) -> Tensor:
    """relu(a*x + b) in x's dtype."""
    a, b = (vector.view(1, -1, 1, 1) for vector in act)
    return torch.relu(a * x + b).to(x.dtype)


def _start_pointwise(name: str, tensors: Results) -> Callable:
    x, weight, act = (tensors[key] for key in ("x", "weight", "act"))
    if name == PRODUCT:
        rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        columns = weight.flatten(1).t()
        return lambda: (torch.mm(rows, columns),)
    if name not in CONTESTANTS:
        return lambda: torch.ops.gconv.pointwise_conv_fwd_stats(x, weight, [1, 1], act)

    def eager() -> tuple[Tensor, ...]:
        y = F.conv2d(_activated(x, act), weight)
        var, mean = torch.var_mean(y if y.dtype == torch.float64 else y.float(), (0, 2, 3), correction=0)
        return y, mean, var

    return eager


def _start_normalise(name: str, tensors: Results) -> Callable:
    x, act = tensors["x"], tensors["act"]
    if name in CONTESTANTS:
        zeros, ones = torch.zeros_like(act[0]), torch.ones_like(act[0])
        return lambda: (F.batch_norm(x, zeros, ones, *act, False, 0.0, 0.0).relu_(),)
    return lambda: (torch.ops.gconv.batch_norm_apply(x, act, None, None, True),)


def _start_bwd_normalise(name: str, tensors: Results) -> Callable:
    x = tensors["x"].detach().requires_grad_()
    gamma, beta = (vector.detach().requires_grad_() for vector in tensors["act"])
    if name in CONTESTANTS:
        z = F.batch_norm(x, None, None, gamma, beta, True, 0.1, 1e-5).relu()
    else:
        z = gconv.functional.batch_norm(x, None, None, gamma, beta, True, relu=True)
    return lambda: torch.autograd.grad(z, (x, gamma, beta), tensors["dz"], retain_graph=True)


def _pixel_tasks(shape: PixelShape, batch: int, device: str) -> list[Task]:
    x, y = (batch * channels * shape.size**2 for channels in (shape.in_channels, shape.out_channels))
    inputs = partial(_pixel_inputs, shape, batch)

    def with_dz(generator: torch.Generator) -> Results:
        found = inputs(generator)
        return found | {"dz": _random(generator, *found["x"].shape)}

    ours, variants = ("gconv",), [name for name in ours_on(device) if name != "gconv"]
    return [
        Task(
            "pointwise", "1x1 act + stats", shape, 2 * x * shape.out_channels, x + y + shape.weights,
            (*ours, *CONTESTANTS, PRODUCT), inputs, _start_pointwise, ("y", "mean", "var"),
        ),
        Task(
            "batch_norm", "bn apply", shape, 3 * x, 2 * x, (*ours, *CONTESTANTS), inputs, _start_normalise,
            ("z",),
        ),
        Task(
            "batch_norm", "bn backward", shape, 8 * x, 5 * x, (*ours, *variants, *CONTESTANTS), with_dz,
            _start_bwd_normalise, ("dx", "dgamma", "dbeta"),
        ),
    ]  # fmt: skip


def tasks(options: Options) -> list[Task]:
    """All that the options ask for, kernel by kernel."""
    batch, device = options.batch, options.device.name
    found = [_conv_task(part, shape, batch, device) for part in PARTS[:3] for shape in options.shapes]
    for model in dict.fromkeys(shape.model for shape in options.shapes):
        layers = {shape.layer for shape in options.shapes if shape.model == model}
        for shape in pixel_shapes(model):
            if shape.beside in layers:
                found += _pixel_tasks(shape, batch, device)
    return sorted((task for task in found if task.part in options.parts), key=lambda t: PARTS.index(t.part))


# ----------------------------------------------------------------------------------------------- the figures


def _tensors(task: Task, seed: int, dtype: torch.dtype, where: torch.device) -> Results:
    """The task's inputs: activations and weights, that is to say whatever has four dimensions, in dtype."""
    found = task.inputs(torch.Generator(where).manual_seed(seed))
    return {name: t.to(dtype) if t.dim() == 4 else t for name, t in found.items()}


def _as(tensors: Results, layout: torch.memory_format, dtype: torch.dtype | None = None) -> Results:
    def made(t: Tensor) -> Tensor:
        t = t.to(dtype or t.dtype)
        return t.contiguous(memory_format=layout) if t.dim() == 4 else t

    return {name: made(t) for name, t in tensors.items()}


def _layout(name: str) -> torch.memory_format:
    return CONTESTANTS.get(name, torch.channels_last)


def _kernel_of(call: _Call) -> tuple[str, str]:
    """Which of gconv's kernels run while a call is set up and run, and what fell back."""
    with gconv.trace() as trace:
        call.run()
    return " ".join(sorted({row.kernel for row in trace})), "; ".join(
        sorted({row.reason for row in trace if row.reason and row.kernel.startswith("torch.")})
    )


def _measure(task: Task, options: Options, screen: Screen, skipped: dict[str, str]) -> list[dict]:
    dtype, device = DTYPES[options.dtype], options.device
    what = f"{task.shape.layer} {task.kernel}"
    screen.step(f"{what}: float64 reference")
    given = _tensors(task, 0, dtype, device.where)
    with plain_cudnn():
        exact = task.start("eager_nchw", _as(given, torch.contiguous_format, torch.float64))()
    exact = dict(zip(task.keys, (t.detach() for t in exact)))
    more = [_tensors(task, seed, dtype, device.where) for seed in range(1, buffers(given["x"]))]
    entered, found = {}, {}
    for name in task.contestants:
        screen.step(f"{what}: check {NAMES[name]}")
        try:
            sets = [_as(tensors, _layout(name)) for tensors in (given, *more)]
            call = _Call(name, task, sets, VARIANTS.get(name))
            found[name] = dict(zip(task.keys, (t.detach() for t in call.run())))
            entered[name] = call
        except RuntimeError as error:
            if name not in VARIANTS:
                raise
            skipped[f"{NAMES[name]}, {what}"] = f"failed: {str(error).splitlines()[0][:160]}"
    torchs = [found[name] for name in CONTESTANTS]
    base = {
        "model": task.shape.model, "layer": task.shape.layer, "op": task.kernel,
        "in_channels": task.shape.in_channels, "out_channels": task.shape.out_channels,
        "groups": task.shape.groups, "size": task.shape.size, "stride": task.shape.stride,
        "batch": options.batch, "dtype": options.dtype, "conditions": conditions(options.plan, device, dtype),
        "flops": task.flops, "bytes": task.elements * dtype.itemsize,
    }  # fmt: skip
    rows = []
    for name in list(entered):
        row = base | {"contestant": name, "match": True, "note": ""}
        if name == PRODUCT:
            row["note"] = "the product alone: not compared"
        else:
            ours = name not in CONTESTANTS
            verdict = compare(found[name], exact, torchs, ALLOWED if ours else NONSENSE)
            row |= {"match": verdict.ok, "error_ratio": verdict.error_ratio, "worst": verdict.worst}
            row["note"] = "" if verdict.ok else verdict.text
            if ours:
                row["kernel"], fell = _kernel_of(entered[name])
                row["note"] = "; ".join(filter(None, (row["note"], fell)))
            if not verdict.ok:
                del entered[name]  # a wrong result gets no figure
        rows.append(row)
    del exact, found, torchs
    screen.step(f"{what}: timing", options.plan.min_rounds)
    result = interleave(list(entered.values()), options.plan, screen.tick, device=device)
    others = [name for name in entered if name in CONTESTANTS or name == PRODUCT]
    best = min(others, key=lambda name: result.timings[name].p50)
    for row in rows:
        timing = result.timings.get(row["contestant"])
        row["best"] = best
        if timing is None:
            continue
        row |= {"ms": timing.p50, "ms_p20": timing.p20, "ms_p80": timing.p80}
        row["ratio"] = result.timings[best].p50 / timing.p50
        row["ratio_low"], row["ratio_high"] = ratio_interval(result.timings[best], timing)
        row |= {"gflops": row["flops"] / timing.p50 / 1e6, "gbps": row["bytes"] / timing.p50 / 1e6}
        row |= {"rounds": result.rounds, "dropped": result.dropped, "noisy": result.noisy}
        row["host_ms"] = result.host_ms.get(row["contestant"])
    return rows


def _against_roofs(rows: list[dict], measured: roofs.Roofs) -> None:
    for row in rows:
        row["copy_gbps"], row["gemm_gflops"] = measured.copy_gbps, measured.gemm_gflops
        row["floor_ms"] = roofs.roof_ms(row["flops"], row["bytes"], measured)
        row["bound"] = roofs.bound_by(row["flops"], row["bytes"], measured)
        if row.get("ms"):
            row["copy_percent"] = 100 * row["gbps"] / measured.copy_gbps
            row["floor_percent"] = 100 * row["floor_ms"] / row["ms"]


def _cells(row: dict) -> list[Cell]:
    ours = row["contestant"] not in CONTESTANTS and row["contestant"] != PRODUCT
    image = f"{row['size']}×{row['size']}" + (f" /{row['stride']}" if row["stride"] > 1 else "")
    head = [
        Cell(row["model"]), Cell(row["layer"]),
        Cell(f"{row['in_channels']}→{row['out_channels']}, {row['in_channels'] // row['groups']}, {image}"),
        Cell(row["op"]), Cell(NAMES[row["contestant"]], "good" if ours else ""),
    ]  # fmt: skip
    if not row["match"]:
        return [*head, Cell("✗", "bad"), *[Cell("–")] * 7]
    ratio = row.get("error_ratio")
    is_best = row["contestant"] == row["best"]
    mood = "good" if row["ratio_low"] > 1 else "bad" if row["ratio_high"] < 1 else ""
    return [
        *head,
        Cell("–" if ratio is None else f"✓ {ratio:.2f}×"),
        Cell(f"{row['ms']:.4f}" + "*" * row["noisy"]),
        Cell(f"{row['ratio']:.2f}×", mood if ours else ""),
        Cell("best other" if is_best else f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}", "dim"),
        Cell(f"{row['gbps']:.0f}"),
        Cell(f"{row['copy_percent']:.0f}"),
        Cell(f"{row['floor_percent']:.0f}"),
        Cell(row["bound"]),
    ]


def run(options: Options) -> Run:
    """Checks and times every kernel of the options and shows the rows as they come."""
    device, dtype = options.device, DTYPES[options.dtype]
    facts = machine.facts(device)
    where = records.where(facts)
    todo = tasks(options)
    rows: list[dict] = []
    skipped = missing_variants(device.name)
    title = (
        f"kernels one by one, {whose(shape.model for shape in options.shapes)}, batch {options.batch}, "
        f"{options.dtype}, {machine.describe(facts)}"
    )
    with Screen(title, _COLUMNS, len(todo), "kernels", _OPTIONAL) as screen, warnings.catch_warnings():
        warnings.simplefilter("ignore", gconv.FallbackWarning)
        screen.step("roofs: copy and GEMM")
        device.set_up()
        measured = roofs.measure(dtype, device=device)
        for task in todo:
            if options.budget.over:
                skipped[f"{task.shape.layer} {task.kernel}"] = options.budget.text
                continue
            found = _measure(task, options, screen, skipped)
            _against_roofs(found, measured)
            for row in found:
                rows.append(where | row)
                screen.row(_cells(row))
        screen.step("roofs again")
        measured = measured.better(roofs.measure(dtype, device=device))
    _against_roofs(rows, measured)
    return Run(rows, measured, facts, skipped)
