"""The contestants of the whole-network benchmark, each on the same weights, images and labels.

`CONTESTANTS` is a table to add to: a contestant is a module (built from torch.nn or from gconv's layers), a
memory layout, and what turns the module into the call that is timed.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import gconv
from gconv import models
from gconv.dense_layers import DenseLayer

from .checkpointed import checkpoint_layers
from .devices import CPU, DEVICES, Cpu, Cuda
from .match import plain_cudnn
from .rivals import (
    LABELS as LAYER_LABELS,
)
from .rivals import (
    ONNXRUNTIME,
    OPENVINO,
    VARIANTS,
    buffers,
    compiled,
    missing_backend,
    missing_package,
    on_backend,
    onnxruntime_call,
    openvino_call,
)
from .shapes import TRAINING_FLOPS

__all__ = [
    "CONTESTANTS", "DTYPES", "EAGER", "FAMILIES", "OURS", "PARTS", "Contestant", "Job", "Network", "data",
    "exact_results", "flops", "is_ours", "make_state", "results",
]  # fmt: skip

LABELS = LAYER_LABELS | {
    "gconv_frozen": "gconv frozen",
    "gconv_shared": "gconv shared",
    "gconv_ultra": "gconv ultra",
    "checkpoint": "checkpointing",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
RATE, MOMENTUM = 1e-3, 0.9  # of SGD
BRANCH = 0.1  # how much of a residual branch is added, see make_state
SHIFT = 1.0  # of the batch norms in a dense layer, see make_state
MOVED = 0.1  # how far the running statistics are from those of the images, see make_state
EAGER = ("eager_nchw", "eager_channels_last")  # their error is torch's own

OURS = ("gconv", "gconv_frozen", *VARIANTS, "gconv_shared", "gconv_ultra")
DENSENETS = "densenet*"  # their layers can be told what to keep for the backward

MODEL, AUTOCAST, HINT = "model in bfloat16", "autocast", "bfloat16 hint"  # precisions
FLOAT32 = "float32"
PARTS = ("forward", "backward", "update")  # of a training step


def _densenet_bc(depth: int, growth_rate: int, **options) -> nn.Module:
    """DenseNet-BC for 32x32 images and ten classes, of any depth L = 6 n + 4 (arXiv 1608.06993, table 2)."""
    blocks = ((depth - 4) // 6,) * 3
    return models.DenseNet(growth_rate, blocks, 2 * growth_rate, num_classes=10, small_images=True, **options)


FAMILIES = {"densenet_bc": _densenet_bc}  # more than one model each, by their arguments


@dataclass(frozen=True)
class Job:
    """What every contestant is given: N = batch images of [size, size] for the model of that name, one of
    gconv.models or FAMILIES, built with these arguments, on a device of that name."""

    model: str
    size: int
    batch: int
    dtype: str
    mode: str
    arguments: tuple[tuple[str, int], ...] = ()
    device: str = "cpu"

    def build(self, **options) -> nn.Module:
        build = FAMILIES.get(self.model) or models.get_model_builder(self.model)
        return build(**dict(self.arguments), **options)


def _stock(job: Job) -> nn.Module:
    return job.build(stock=True)


def _checkpointed(job: Job) -> nn.Module:
    return checkpoint_layers(_stock(job))


def _memory(how: str) -> Callable[[Job], nn.Module]:
    """Builds a DenseNet of gconv that keeps for the backward what `how` says."""
    return lambda job: job.build(memory=how)


def _as_it_is(module: nn.Module, network: Network) -> Callable[[Tensor], Tensor]:
    return module


def _frozen(module: nn.Module, network: Network) -> Callable[[Tensor], Tensor]:
    return gconv.freeze(module)


def _compile(module: nn.Module, network: Network) -> Callable[[Tensor], Tensor]:
    def first(call: Callable) -> None:
        network.call = call
        network.run()

    return compiled(module, network.job.mode, first)


def _onnxruntime(module: nn.Module, network: Network) -> Callable[[Tensor], Tensor]:
    return onnxruntime_call(module, network.x)


def _openvino(module: nn.Module, network: Network) -> Callable[[Tensor], Tensor]:
    return openvino_call(module, network.x, "bf16" if network.precision == HINT else "f32")


@dataclass(frozen=True)
class Contestant:
    """build: the module for a job. make: from the module, with the job's weights, and its `Network`
    the call that is timed. bfloat16: the ways to run a mode in that dtype, of which the fastest counts; a
    mode without any is float32 only. packages: what has to be installed. models: for which models, as a
    shell pattern, less those of the pattern `but`. twice: its step updates running statistics twice, so they
    are not compared. devices: where it runs. backend: gconv's, if it is not to choose by itself."""

    name: str
    label: str
    layout: str = "channels_last"
    build: Callable[[Job], nn.Module] = _stock
    make: Callable[[nn.Module, Network], Callable[[Tensor], Tensor]] = _as_it_is
    modes: tuple[str, ...] = ("inference", "training")
    bfloat16: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("inference", (MODEL, AUTOCAST)),
        ("training", (AUTOCAST,)),
    )
    packages: tuple[str, ...] = ()
    models: str = "*"
    but: str = ""
    twice: bool = False
    devices: tuple[str, ...] = DEVICES
    backend: str | None = None

    @property
    def ours(self) -> bool:
        return self.name in OURS

    @property
    def remark(self) -> str:
        """What a reader of its row has to know."""
        return "updates running statistics twice per step, which are not compared" if self.twice else ""

    def answers_for(self, key: str) -> bool:
        """Whether a result of that name is compared."""
        return not (self.twice and ".running_" in key)

    def precisions(self, job: Job) -> tuple[str, ...]:
        if job.dtype == "float32":
            return (FLOAT32,)
        ways = dict(self.bfloat16).get(job.mode, ())
        # On a GPU autocast is never the faster one, and every way costs a compilation.
        return ways[:1] if job.device == "cuda" else ways

    @property
    def compiles(self) -> bool:
        """Whether the first call does more than run."""
        return self.make is not _as_it_is

    def suits(self, model: str, device: str = "cpu") -> bool:
        return device in self.devices and fnmatchcase(model, self.models) and not fnmatchcase(model, self.but)

    def missing(self, job: Job) -> str | None:
        """Why it cannot run this job here, in one line, or None."""
        missing = missing_package(*self.packages)
        if missing:
            return missing
        if self.backend is not None and missing_backend(self.backend):
            return missing_backend(self.backend)
        if job.mode not in self.modes:
            return f"{job.mode}: runs {' and '.join(self.modes)} only"
        return None if self.precisions(job) else f"{job.mode} runs in float32 only"


def is_ours(row: dict) -> bool:
    """Whether a row is of one of gconv's own contestants."""
    return row["contestant"] in OURS


def _engine(name: str, **options) -> Contestant:
    return Contestant(name, LABELS[name], layout="NCHW", modes=("inference",), devices=("cpu",), **options)


def _backends() -> tuple[Contestant, ...]:
    """gconv's backends on a GPU, each on its own."""
    return tuple(
        Contestant(name, LABELS[name], build=Job.build, but=DENSENETS, devices=("cuda",), backend=backend)
        for name, backend in VARIANTS.items()
    )


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant("gconv", LABELS["gconv"], build=Job.build, but=DENSENETS),
        Contestant(
            "gconv_frozen",
            LABELS["gconv_frozen"],
            build=Job.build,
            make=_frozen,
            modes=("inference",),
            devices=("cpu",),
        ),
        *_backends(),
        Contestant("gconv_shared", LABELS["gconv_shared"], build=_memory("shared"), models=DENSENETS),
        Contestant(
            "gconv_ultra",
            LABELS["gconv_ultra"],
            build=_memory("ultra"),
            modes=("training",),
            models=DENSENETS,
        ),
        Contestant("eager_nchw", LABELS["eager_nchw"], layout="NCHW"),
        Contestant("eager_channels_last", LABELS["eager_channels_last"]),
        Contestant(
            "checkpoint",
            LABELS["checkpoint"],
            build=_checkpointed,
            modes=("training",),
            models=DENSENETS,
            twice=True,
        ),
        Contestant("compile", LABELS["compile"], make=_compile),
        _engine("onnxruntime", make=_onnxruntime, bfloat16=(), packages=ONNXRUNTIME),
        _engine("openvino", make=_openvino, bfloat16=(("inference", (HINT,)),), packages=OPENVINO),
    )
}


def _ends(module: nn.Module) -> tuple[int, int]:
    """Channels of the images and number of classes."""
    first = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    return first.in_channels, last.out_features


def flops(job: Job) -> int:
    """Of one call: convolutions and matrix products, a multiply-add counted as two; training is three times
    the forward. (torch's counter takes the weight gradient of a grouped convolution for a dense one.)"""
    with torch.device("meta"):
        module = _stock(job)
    images = data(job, module)[0].to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(images)
    return counter.get_total_flops() * (TRAINING_FLOPS if job.mode == "training" else 1)


def data(job: Job, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Images [N, channels, size, size] and labels [N], the same for every contestant."""
    generator = torch.Generator().manual_seed(1)
    channels, classes = _ends(module)
    images = torch.randn(job.batch, channels, job.size, job.size, generator=generator)
    return images, torch.randint(0, classes, (job.batch,), generator=generator)


@torch.no_grad()
def make_state(job: Job) -> dict[str, Tensor]:
    """Weights as initialised, batch norms with random scales and shifts and with running statistics next to
    those of the images (MOVED standard deviations off, so that an update of them that is missing shows).

    The last batch norm of every residual block is scaled down: as initialised, one rounding error at a
    ReLU's kink in an early block grows with every block behind it, until a gradient in bfloat16 has nothing
    left to compare. A dense layer has no branch to scale, and the batch norms that read its output undo any
    scale; there the batch norms are shifted up instead, so that fewer elements lie next to the kink.
    """
    torch.manual_seed(0)
    module = _stock(job)
    images = data(job, module)[0].to(job.device)
    generator = torch.Generator().manual_seed(2)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.copy_(1 + 0.2 * torch.randn(norm.weight.shape, generator=generator))
        norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=generator))
    for block in module.modules():
        if isinstance(block, (models.Bottleneck, models.BasicBlock)):
            last = block.bn3 if isinstance(block, models.Bottleneck) else block.bn2
            last.weight.mul_(BRANCH)
            last.bias.mul_(BRANCH)
        if isinstance(block, DenseLayer):
            for norm in block.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.bias.add_(SHIFT)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with plain_cudnn():
        module.to(job.device).train()(images)
    module.cpu()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.num_batches_tracked.zero_()
        mean, var = norm.running_mean, norm.running_var
        mean.add_(MOVED * var.sqrt() * torch.randn(mean.shape, generator=generator))
        var.mul_(1 + MOVED * torch.rand(var.shape, generator=generator))
    return module.state_dict()


def results(
    module: nn.Module, call: Callable[[Tensor], Tensor], mode: str, images: Tensor, labels: Tensor, context
) -> dict[str, Tensor]:
    """Logits, and of one training step also the gradients of all parameters and the running statistics after
    it. The module is left as it was."""
    if mode == "inference":
        module.eval()
        with torch.no_grad(), context():
            return {"logits": call(images).detach().clone()}
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.train()
    module.zero_grad(set_to_none=True)
    with context():
        logits = call(images)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    found = {"logits": logits.detach().clone()}
    found |= {f"d {name}": p.grad.clone() for name, p in module.named_parameters()}
    found |= {name: b.clone() for name, b in module.named_buffers() if name.split(".")[-1].startswith("run")}
    module.zero_grad(set_to_none=True)
    module.load_state_dict(state)
    return found


def exact_results(job: Job, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float64 answer, in plain torch.nn."""
    module = _stock(job).double()
    module.load_state_dict(state)
    images, labels = (t.to(job.device) for t in data(job, module))
    module.to(job.device)
    with plain_cudnn():
        return results(module, module, job.mode, images.double(), labels, contextlib.nullcontext)


class Network:
    """A contestant at its job in one precision, with rotating images.

    Training is a whole step: forward, cross-entropy, backward, SGD with momentum; the gradients of the step
    before are dropped by `prepare`. `first_seconds` is what the first call took, compiling included. `stamps`
    has the device's time at the start and after each of PARTS of every step since it was last emptied.
    """

    def __init__(
        self,
        contestant: Contestant,
        job: Job,
        precision: str,
        state: dict[str, Tensor],
        device: Cpu | Cuda = CPU,
    ):
        self.name, self.job, self.precision = contestant.name, job, precision
        self.backend, self.device = contestant.backend, device
        self.stamps: list[list] = []
        self.layout = LAYOUTS[contestant.layout]
        self.module = contestant.build(job)
        self.module.load_state_dict(state)
        self.module.to(device.where, memory_format=self.layout)
        self.dtype = torch.bfloat16 if precision == MODEL else torch.float32
        self.module.to(self.dtype).train(job.mode == "training")
        images, labels = data(job, self.module)
        self.labels = labels.to(device.where)
        self.images = self._as_input(images)
        self.xs = [
            self.images,
            *(self._as_input(torch.randn_like(images)) for _ in range(buffers(images) - 1)),
        ]
        self.optimizer = torch.optim.SGD(self.module.parameters(), RATE, MOMENTUM)
        self.loss: Tensor | None = None
        self.prepare(0)
        began = time.perf_counter()
        self.call = contestant.make(self.module, self)
        self.run()
        device.synchronise()
        self.first_seconds = time.perf_counter() - began

    def _as_input(self, images: Tensor) -> Tensor:
        return images.to(self.device.where, self.dtype).contiguous(memory_format=self.layout)

    def context(self):
        if self.precision == AUTOCAST:
            return torch.autocast(self.device.where.type, torch.bfloat16)
        return contextlib.nullcontext()

    def prepare(self, i: int) -> None:
        self.x = self.xs[i % len(self.xs)]
        self.optimizer.zero_grad(set_to_none=True)

    def run(self) -> Tensor:
        if self.job.mode == "inference":
            with torch.no_grad(), self.context(), on_backend(self.backend):
                return self.call(self.x)
        self.stamps.append([self.device.stamp()])
        return self.backward(self.forward())

    def _done(self) -> None:
        """A part of the step is."""
        if self.stamps:
            self.stamps[-1].append(self.device.stamp())

    def parts(self) -> dict[str, float]:
        """Milliseconds of each of PARTS, medians over the steps that `stamps` has; empties it."""
        steps, self.stamps = self.stamps, []
        self.device.synchronise()
        spans = [[self.device.ms(*pair) for pair in itertools.pairwise(step)] for step in steps]
        return {part: statistics.median(taken) for part, taken in zip(PARTS, zip(*spans))}

    def forward(self) -> Tensor:
        """The first half of a training step, to the loss."""
        with self.context(), on_backend(self.backend):
            loss = F.cross_entropy(self.call(self.x), self.labels)
        self._done()
        return loss

    def backward(self, loss: Tensor) -> Tensor:
        """The second half: gradients, and the step of the optimizer."""
        with on_backend(self.backend):
            loss.backward()
        self._done()
        self.optimizer.step()
        self._done()
        self.loss = loss.detach()
        return self.loss

    def results(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the function of that name, from these weights."""
        self.module.load_state_dict(state)
        self.optimizer.state.clear()
        with on_backend(self.backend):
            found = results(self.module, self.call, self.job.mode, self.images, self.labels, self.context)
        self.module.train(self.job.mode == "training")
        self.prepare(0)
        return found
