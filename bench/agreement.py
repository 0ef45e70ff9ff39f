"""Do stock torch.nn and gconv train the same network? Loss curves, gradients and predictions, held together.

Two right implementations of a ReLU network drift apart: rounding decides the side of the ReLU's kink where
its input is next to 0, one such element moves a gradient by up to a percent, and every step builds on the
last. How far is not a constant, so it is measured: stock torch.nn runs in both memory layouts, which
differ by rounding and nothing else, and gconv may stray from stock by a few times what stock strays from
itself. What drift would hide is checked where there is none: the first loss, the gradients of an untrained
network and the predictions of the trained one, against float64 on the same weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .match import ALLOWED, Verdict, compare

__all__ = ["Check", "check_curves", "check_gradients", "check_network", "check_predictions"]

FACTOR = 5.0  # gconv's drift may be this many times stock's own
LOOKAHEAD = 8  # steps: at which step an element first falls on the other side of the kink is chance
FIRST_ULPS = 64  # of the first loss, which is computed from equal weights
KINK = 2e-2  # relative error of one parameter's gradient that a few elements at the kink can make
ULPS = 64  # of the largest logit


@dataclass
class Check:
    """One thing that was compared: whether it agrees, and one line about it."""

    name: str
    ok: bool
    text: str


def check_curves(stock: list[float], ours: list[float], twin: list[float]) -> tuple[Check, list[float]]:
    """Compares the losses step by step; also returns what was allowed at each.

    The first loss may differ by FIRST_ULPS. Later ones by that and FACTOR x the largest |twin - stock| up to
    LOOKAHEAD steps further on.
    """
    a, b, c = (np.asarray(curve, dtype=np.float64) for curve in (stock, ours, twin))
    if not len(a) == len(b) == len(c):
        raise ValueError(
            f"check_curves: want curves of one length, got {len(a)}, {len(b)} and {len(c)} steps"
        )
    drift = np.maximum.accumulate(np.abs(c - a))
    drift = np.concatenate([drift[LOOKAHEAD:], np.full(min(LOOKAHEAD, len(a)), drift[-1])])
    drift[0] = 0
    allowed = FACTOR * drift + FIRST_ULPS * np.finfo(np.float32).eps * np.maximum(np.abs(a), 1.0)
    apart = np.abs(b - a)
    inside = apart <= allowed  # False for NaN
    if not (np.isfinite(a).all() and np.isfinite(c).all()):
        ok, text = False, "the loss of stock torch.nn itself is not finite: nothing to compare with"
    elif inside.all():
        ok = True
        text = (
            f"the loss curves lie on each other within float noise: gconv is at most {apart.max():.1e} from "
            f"stock, stock at most {np.abs(c - a).max():.1e} from itself in the other layout, over "
            f"{len(a)} steps"
        )
    else:
        ok = False
        step = int(np.argmin(inside))
        text = (
            f"the loss curves part at step {step + 1} of {len(a)}: {a[step]:.6g} with stock and "
            f"{b[step]:.6g} with gconv differ by {apart[step]:.1e}, float noise allows {allowed[step]:.1e}"
        )
    return Check("loss curves", ok, text), allowed.tolist()


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.train()
    F.cross_entropy(model(x), y).backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def _worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error (Euclidean norm) of a parameter's gradient, and whose it is."""
    errors = {name: float((got[name] - g).norm() / g.norm()) for name, g in want.items()}
    # NaN counts as the largest, which max() alone would not see to.
    name = max(errors, key=lambda name: float("inf") if np.isnan(errors[name]) else errors[name])
    return errors[name], name


def check_gradients(stock: nn.Module, ours: nn.Module, x: Tensor, y: Tensor) -> Check:
    """Every parameter's gradient of the whole network on one batch, against stock torch.nn in float64: its
    relative error may be FACTOR x that of stock's more exact layout, and KINK.

    stock, ours: float32 models with equal weights and parameter names; both are left unchanged.
    """
    layouts = (torch.contiguous_format, torch.channels_last)
    exact = _gradients(copy.deepcopy(stock).double(), x.double(), y)
    own = min(
        _worst(_gradients(_in(stock, layout), x.contiguous(memory_format=layout), y), exact)[0]
        for layout in layouts
    )
    error, name = _worst(_gradients(_in(ours, layouts[1]), x.contiguous(memory_format=layouts[1]), y), exact)
    allowed = FACTOR * own + KINK
    text = (
        f"gradients of the untrained network: relative error {error:.1e} ({name}), stock's own {own:.1e}, "
        f"{allowed:.1e} allowed"
    )
    return Check("gradients", error <= allowed, text)


def _in(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=layout)


@torch.no_grad()
def check_predictions(stock: nn.Module, ours: nn.Module, x: Tensor) -> Check:
    """The logits of two models with equal weights in evaluation, against stock torch.nn in float64."""
    layout = torch.channels_last
    exact = copy.deepcopy(stock).double().eval()(x.double())
    scale = float(exact.abs().max())
    own = float((_in(stock, layout).eval()(x.contiguous(memory_format=layout)) - exact).abs().max()) / scale
    found = _in(ours, layout).eval()(x.contiguous(memory_format=layout))
    error = float((found - exact).abs().max()) / scale
    allowed = FACTOR * own + ULPS * torch.finfo(torch.float32).eps
    differing = int((found.argmax(1) != exact.argmax(1)).sum())
    text = (
        f"predictions of the trained network: relative error {error:.1e}, stock's own {own:.1e}, "
        f"{allowed:.1e} allowed; {differing} of {len(x)} images are classified otherwise than in float64"
    )
    return Check("predictions", error <= allowed, text)


def check_network(
    got: dict[str, Tensor],
    exact: dict[str, Tensor],
    torchs: list[dict[str, Tensor]],
    allowed: float = ALLOWED,
) -> Verdict:
    """A whole network's logits and, in training, every parameter's gradient ("d <name>") and the running
    statistics, against float64: error <= allowed x torch's own (the larger of `torchs`) and KINK for a
    gradient, in the root mean square, or ULPS of float32 for all else, in the mean and at the worst
    element."""

    def is_gradient(key: str) -> bool:
        return key.startswith("d ")

    return compare(
        got,
        exact,
        torchs,
        allowed,
        floor=lambda key: KINK if is_gradient(key) else ULPS * torch.finfo(torch.float32).eps,
        kinds=lambda key: ("rms",) if is_gradient(key) else ("rms", "max"),
    )
