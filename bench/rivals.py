"""The implementations of conv + BN + ReLU that are timed against each other, each on the same weights and
data."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import gconv
from gconv import gpu

from .match import Problem, results

__all__ = [
    "LABELS",
    "RIVALS",
    "VARIANTS",
    "Rival",
    "Unavailable",
    "buffers",
    "build",
    "compiled",
    "missing_backend",
    "missing_package",
    "missing_variants",
    "on_backend",
    "onnxruntime_call",
    "openvino_call",
    "ours_on",
]  # fmt: skip

RIVALS = ("eager_nchw", "eager_channels_last", "compile", "onnxruntime", "openvino")
# gconv's backends one by one, on a GPU; "gconv" is what it chooses by itself.
VARIANTS = {"gconv_triton": "triton", "gconv_cuda": "cuda"}
LABELS = {
    "gconv": "gconv",
    "gconv_triton": "gconv triton",
    "gconv_cuda": "gconv cuda",
    "eager_nchw": "eager NCHW",
    "eager_channels_last": "eager channels_last",
    "compile": "torch.compile",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
}
ONNXRUNTIME, OPENVINO = ("onnxruntime", "onnx", "onnxscript"), ("openvino",)  # packages that they need
# Inputs rotate so that a call finds its data where a network leaves it, in the outer caches, and never only
# in the innermost ones: enough buffers to fill this much, but at most so many.
ROTATE_BYTES = 24 << 20
MAX_BUFFERS = 8


class Unavailable(Exception):
    """This rival cannot run here; the message says why."""


def buffers(x: Tensor) -> int:
    """How many inputs like x rotate."""
    return max(2, min(MAX_BUFFERS, ROTATE_BYTES // (x.numel() * x.element_size())))


def on_backend(name: str | None):
    """A block in which gconv runs on that backend, forward and backward; None: on what it chooses."""
    return contextlib.nullcontext() if name is None else gconv.use_backend(name)


class Rival:
    """A callable with its rotating inputs. Training is a whole step of the layer: forward, then backward to
    the gradients of x, weight, gamma and beta, running statistics updated, gradients of the step before
    already dropped."""

    def __init__(
        self, name: str, module: nn.Module, problem: Problem, mode: str, layout: torch.memory_format
    ):
        self.name, self.module, self.problem, self.mode, self.layout = name, module, problem, mode, layout
        self.call: Callable[[Tensor], Tensor] = module
        self.backend: str | None = None  # gconv's, if it is not to choose by itself
        where = problem.x.device
        generator = torch.Generator(where).manual_seed(1)

        def like(t: Tensor) -> Tensor:
            made = torch.randn(t.shape, generator=generator, device=where).to(t.dtype)
            return made.contiguous(memory_format=layout)

        turns = range(buffers(problem.x))
        self.xs = [like(problem.x).requires_grad_(mode == "training") for _ in turns]
        self.dys = [like(problem.dy) for _ in turns] if mode == "training" else []
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        module.train(mode == "training")
        self.prepare(0)

    def prepare(self, i: int) -> None:
        i %= len(self.xs)
        self.x = self.xs[i]
        if self.mode == "training":
            self.dy = self.dys[i]
            self.x.grad = None
            for parameter in self.parameters:
                parameter.grad = None

    def run(self) -> Tensor:
        with on_backend(self.backend):
            if self.mode == "inference":
                with torch.no_grad():
                    return self.call(self.x)
            y = self.call(self.x)
            y.backward(self.dy)
            return y

    def results(self, problem: Problem) -> dict[str, Tensor]:
        with on_backend(self.backend):
            found = results(self.module, problem, self.mode, self.layout, self.call)
        self.module.train(self.mode == "training")
        return found


def _stock(problem: Problem, layout: torch.memory_format) -> nn.Module:
    return copy.deepcopy(problem.stock).to(memory_format=layout)


def _eager(name: str, layout: torch.memory_format):
    def make(problem: Problem, mode: str) -> Rival:
        return Rival(name, _stock(problem, layout), problem, mode, layout)

    return make


def missing_backend(name: str) -> str | None:
    """Why a GPU's kernels cannot run here, in one line, or None."""
    return {"triton": gpu.missing_triton, "cuda": gpu.missing_cuda}[name]()


def missing_variants(device: str) -> dict[str, str]:
    """By label, those of gconv's backends on a device that cannot run here, and why."""
    reasons = {LABELS[name]: missing_backend(which) for name, which in VARIANTS.items() if device == "cuda"}
    return {label: reason for label, reason in reasons.items() if reason is not None}


def ours_on(device: str) -> tuple[str, ...]:
    """gconv on a device, as it chooses by itself and with each of its backends there."""
    there = [name for name, which in VARIANTS.items() if device == "cuda" and missing_backend(which) is None]
    return ("gconv", *there)


def _gconv(problem: Problem, mode: str) -> Rival:
    shape = problem.shape
    module = gconv.ConvBNReLU(
        shape.in_channels, shape.out_channels, 3, shape.stride, shape.padding, groups=shape.groups
    )
    module.conv.to(problem.dtype)
    module.to(problem.x.device).load_state_dict(problem.stock.state_dict())
    rival = Rival("gconv", module, problem, mode, torch.channels_last)
    if mode == "inference":
        gconv.freeze(module)  # the other compiled and packed ones pack their weights once too
    return rival


def _variant(name: str):
    def make(problem: Problem, mode: str) -> Rival:
        rival = _gconv(problem, mode)
        rival.name, rival.backend = name, VARIANTS[name]
        rival.run()
        return rival

    return make


def compiled(module: nn.Module, mode: str, run: Callable[[Callable[[Tensor], Tensor]], object]) -> Callable:
    """torch.compile (inductor) at its best: static shapes, and for inference weights frozen into the code.
    `run(call)` makes the first call, which compiles."""
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # else the shapes of the layers before make this one dynamic, and slower
    with warnings.catch_warnings(), inductor.patch(freezing=mode == "inference"):
        warnings.simplefilter("ignore")
        call = torch.compile(module, dynamic=False)
        run(call)
    return call


def _compile(problem: Problem, mode: str) -> Rival:
    rival = Rival("compile", _stock(problem, torch.channels_last), problem, mode, torch.channels_last)

    def first(call: Callable) -> None:
        rival.call = call
        rival.run()

    compiled(rival.module, mode, first)
    return rival


def missing_package(*packages: str) -> str | None:
    """Which of the packages is not installed, in words, or None."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None


def _require(problem: Problem, mode: str, *packages: str) -> None:
    """The conditions of the inference engines, in the order in which a reader wants to hear of them."""
    missing = missing_package(*packages)
    if missing:
        raise Unavailable(missing)
    if problem.x.device.type != "cpu":
        raise Unavailable("runs on the CPU only here")
    if mode != "inference":
        raise Unavailable("runs inference only")
    if problem.dtype != torch.float32:
        raise Unavailable("runs in float32 only here")


def onnxruntime_call(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """`module` in evaluation as an onnxruntime session for inputs like x (NCHW, float32), on as many threads
    as torch has."""
    import io

    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(module, (x,), file, dynamo=False, input_names=["x"], output_names=["y"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would otherwise spin on the cores while the next rival is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def openvino_call(module: nn.Module, x: Tensor, precision: str = "f32") -> Callable[[Tensor], Tensor]:
    """`module` in evaluation as an OpenVINO model for inputs like x (NCHW, float32), on as many threads as
    torch has; precision: that of its arithmetic, f32 or bf16."""
    import openvino

    converted = openvino.convert_model(module, example_input=x, input=[list(x.shape)])
    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    request = openvino.compile_model(converted, "CPU", hints).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0])


def _engine(name: str, packages: tuple[str, ...], make: Callable[[nn.Module, Tensor], Callable]):
    def build(problem: Problem, mode: str) -> Rival:
        _require(problem, mode, *packages)
        layout = torch.contiguous_format
        rival = Rival(name, _stock(problem, layout), problem, mode, layout)
        rival.call = make(rival.module, rival.xs[0])
        rival.run()
        return rival

    return build


_BUILDERS = {
    "gconv": _gconv,
    **{name: _variant(name) for name in VARIANTS},
    "eager_nchw": _eager("eager_nchw", torch.contiguous_format),
    "eager_channels_last": _eager("eager_channels_last", torch.channels_last),
    "compile": _compile,
    "onnxruntime": _engine("onnxruntime", ONNXRUNTIME, onnxruntime_call),
    "openvino": _engine("openvino", OPENVINO, openvino_call),
}


def build(name: str, problem: Problem, mode: str) -> Rival:
    """The rival `name` for this problem, ready to run. Raises Unavailable, in one line, where it cannot."""
    try:
        return _BUILDERS[name](problem, mode)
    except Unavailable:
        raise
    except Exception as error:
        if name in ("gconv", "eager_nchw", "eager_channels_last"):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unavailable(f"failed: {reason[:160]}") from error
