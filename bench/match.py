"""Is a result right? Its error against float64, beside the error of torch's own kernels in the same dtype."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .shapes import ConvShape

__all__ = [
    "ALLOWED", "NONSENSE", "Problem", "Verdict", "compare", "exact_results", "plain_cudnn", "results",
]  # fmt: skip

ALLOWED = 2.0  # our error may be this many times torch's own, plus one unit in the last place
NONSENSE = 100.0  # a rival is left out only if it is plainly wrong
# ReLU's derivative jumps at 0. Where the exact value lies within this distance of 0, rounding alone decides
# the side and two right answers differ by the whole gradient; there the upstream gradient is set to 0, for
# everyone.
KINK = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


KINDS = ("rms", "max")
SHOWN = 14  # failures that a verdict names


@dataclass
class Problem:
    """One layer with its data: what every rival is given. The modules share names, so state dicts go both
    ways."""

    shape: ConvShape
    batch: int
    dtype: torch.dtype
    stock: nn.Sequential  # conv, bn, relu from torch.nn
    x: Tensor
    dy: Tensor

    @classmethod
    def make(
        cls,
        shape: ConvShape,
        batch: int,
        dtype: torch.dtype,
        seed: int = 0,
        where: torch.device | str = "cpu",
    ) -> Problem:
        """Random weights, data and batch norm parameters on the device `where`; the convolution's weight and
        the activations have `dtype`."""
        generator = torch.Generator(where).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=where)

        bn = nn.BatchNorm2d(shape.out_channels)
        conv = nn.Conv2d(
            shape.in_channels,
            shape.out_channels,
            3,
            shape.stride,
            shape.padding,
            groups=shape.groups,
            bias=False,
        )
        with torch.no_grad():
            conv.weight.copy_(normal(*conv.weight.shape) * (2 / (9 * shape.channels_per_group)) ** 0.5)
            bn.weight.copy_(1 + 0.2 * normal(shape.out_channels))
            bn.bias.copy_(0.2 * normal(shape.out_channels))
            bn.running_mean.copy_(0.1 * normal(shape.out_channels))
            bn.running_var.copy_((1 + 0.2 * normal(shape.out_channels)).abs() + 0.1)
        stock = nn.Sequential(OrderedDict(conv=conv.to(dtype), bn=bn, relu=nn.ReLU())).to(where)
        x = normal(batch, shape.in_channels, shape.size, shape.size).to(dtype)
        dy = normal(batch, shape.out_channels, shape.out_size, shape.out_size).to(dtype)
        return cls(shape, batch, dtype, stock, x, dy)

    def without_kinks(self) -> Problem:
        """The same problem with the upstream gradient zeroed where the exact input of the ReLU is next to
        0."""
        exact = _double(self.stock).train()
        with torch.no_grad(), plain_cudnn():
            near = exact.bn(exact.conv(self.x.double())).abs() < KINK[self.dtype]
        return Problem(self.shape, self.batch, self.dtype, self.stock, self.x, self.dy.masked_fill(near, 0))


def _double(module: nn.Module) -> nn.Sequential:
    """A float64 copy in plain torch.nn with the same state."""
    conv, bn = module.conv, module.bn
    copy = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                3,
                conv.stride,
                conv.padding,
                groups=conv.groups,
                bias=False,
            ),
            bn=nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum),
            relu=nn.ReLU(),
        )
    ).double()
    copy.load_state_dict(module.state_dict())
    return copy.to(conv.weight.device)


def results(
    module: nn.Module, problem: Problem, mode: str, layout: torch.memory_format, call: Callable | None = None
) -> dict[str, Tensor]:
    """What `module` (or `call`, its compiled form) makes of the problem in this memory layout: y, and in
    training every gradient and running statistic. The module starts from the problem's state and is left in
    it."""
    call = call or module
    module.load_state_dict(problem.stock.state_dict())
    dtype = module.conv.weight.dtype
    x = problem.x.to(dtype).contiguous(memory_format=layout)
    if mode == "inference":
        module.eval()
        with torch.no_grad():
            return {"y": call(x).detach().clone()}
    module.train()
    x = x.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = call(x)
    y.backward(problem.dy.to(dtype).contiguous(memory_format=layout))
    found = {
        "y": y.detach().clone(),
        "dx": x.grad,
        "dweight": module.conv.weight.grad,
        "dgamma": module.bn.weight.grad,
        "dbeta": module.bn.bias.grad,
        "running_mean": module.bn.running_mean.clone(),
        "running_var": module.bn.running_var.clone(),
    }
    module.zero_grad(set_to_none=True)
    module.load_state_dict(problem.stock.state_dict())
    return found


def exact_results(problem: Problem, mode: str) -> dict[str, Tensor]:
    """The float64 answer, in plain torch.nn."""
    with plain_cudnn():
        return results(_double(problem.stock), problem, mode, torch.contiguous_format)


@contextlib.contextmanager
def plain_cudnn():
    """cuDNN tries no algorithms in the block, for what is not timed."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Verdict:
    """ok; the worst error as a multiple of torch's; the tensor it is in; and a line for people."""

    ok: bool
    error_ratio: float
    worst: str
    text: str


def _errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative root-mean-square and maximal error; infinite if anything is not finite or a size differs."""
    if got.shape != want.shape:
        return float("inf"), float("inf")
    want = want.double()
    difference = got.double() - want
    if not bool(torch.isfinite(difference).all()):
        return float("inf"), float("inf")
    rms = difference.square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-300)
    most = difference.abs().max() / want.abs().max().clamp_min(1e-300)
    return float(rms), float(most)


def compare(
    got: dict[str, Tensor],
    exact: dict[str, Tensor],
    torchs: list[dict[str, Tensor]],
    allowed: float = ALLOWED,
    floor: Callable[[str], float] | None = None,
    kinds: Callable[[str], tuple[str, ...]] = lambda key: KINDS,
) -> Verdict:
    """Checks every tensor of `exact`: error <= allowed x torch's own (the larger of `torchs`) + one ulp,
    RMS and max. `floor(key)` stands in for the ulp, `kinds(key)` says which of the two errors count."""
    worst_ratio, worst, failed = 0.0, "", []
    for key, want in exact.items():
        if key not in got or got[key] is None:
            return Verdict(False, float("inf"), key, f"✗ {key} is missing")
        least = floor(key) if floor else torch.finfo(got[key].dtype).eps
        own = [max(pair) for pair in zip(*(_errors(result[key], want) for result in torchs))]
        for kind, error, base in zip(KINDS, _errors(got[key], want), own):
            if kind not in kinds(key):
                continue
            # The floor keeps a lucky, exactly rounded result of torch from making the ratio meaningless.
            ratio = error / (base + least)
            if not ratio <= worst_ratio:
                worst_ratio, worst = ratio, f"{key} ({kind})"
            if not error <= allowed * base + least:
                failed.append(f"{key} {kind} {error:.1e}, torch {base:.1e}")
    if failed:
        more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        return Verdict(False, worst_ratio, worst, "✗ " + "; ".join(failed[:SHOWN]) + more)
    return Verdict(True, worst_ratio, worst, f"✓ {worst_ratio:.2f}× torch's error, worst in {worst}")
