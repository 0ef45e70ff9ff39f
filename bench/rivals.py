"""The implementations of conv + BN + ReLU that are timed against each other, each on the same weights and
data."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import gconv

from .match import Problem, results

__all__ = ["LABELS", "RIVALS", "Rival", "Unavailable", "build"]

RIVALS = ("eager_nchw", "eager_channels_last", "compile", "onnxruntime", "openvino")
LABELS = {
    "gconv": "gconv",
    "eager_nchw": "eager NCHW",
    "eager_channels_last": "eager channels_last",
    "compile": "torch.compile",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
}
# Inputs rotate so that a call finds its data where a network leaves it, in the outer caches, and never only
# in the innermost ones: enough buffers to fill this much, but at most so many.
ROTATE_BYTES = 24 << 20
MAX_BUFFERS = 8


class Unavailable(Exception):
    """This rival cannot run here; the message says why."""


class Rival:
    """A callable with its rotating inputs. Training is a whole step of the layer: forward, then backward to
    the gradients of x, weight, gamma and beta, running statistics updated, gradients of the step before
    already dropped."""

    def __init__(
        self, name: str, module: nn.Module, problem: Problem, mode: str, layout: torch.memory_format
    ):
        self.name, self.module, self.problem, self.mode, self.layout = name, module, problem, mode, layout
        self.call: Callable[[Tensor], Tensor] = module
        size = problem.x.numel() * problem.x.element_size()
        buffers = max(2, min(MAX_BUFFERS, ROTATE_BYTES // size))
        generator = torch.Generator().manual_seed(1)

        def like(t: Tensor) -> Tensor:
            made = torch.randn(t.shape, generator=generator).to(t.dtype)
            return made.contiguous(memory_format=layout)

        self.xs = [like(problem.x).requires_grad_(mode == "training") for _ in range(buffers)]
        self.dys = [like(problem.dy) for _ in range(buffers)] if mode == "training" else []
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
        if self.mode == "inference":
            with torch.no_grad():
                return self.call(self.x)
        y = self.call(self.x)
        y.backward(self.dy)
        return y

    def results(self, problem: Problem) -> dict[str, Tensor]:
        found = results(self.module, problem, self.mode, self.layout, self.call)
        self.module.train(self.mode == "training")
        return found


def _stock(problem: Problem, layout: torch.memory_format) -> nn.Module:
    return copy.deepcopy(problem.stock).to(memory_format=layout)


def _eager(name: str, layout: torch.memory_format):
    def make(problem: Problem, mode: str) -> Rival:
        return Rival(name, _stock(problem, layout), problem, mode, layout)

    return make


def _gconv(problem: Problem, mode: str) -> Rival:
    shape = problem.shape
    module = gconv.ConvBNReLU(
        shape.in_channels, shape.out_channels, 3, shape.stride, shape.padding, groups=shape.groups
    )
    module.conv.to(problem.dtype)
    module.load_state_dict(problem.stock.state_dict())
    return Rival("gconv", module, problem, mode, torch.channels_last)


def _compile(problem: Problem, mode: str) -> Rival:
    """torch.compile (inductor) at its best: channels_last, static shapes, weights frozen into the code for
    inference."""
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # else the shapes of the layers before make this one dynamic, and slower
    rival = Rival("compile", _stock(problem, torch.channels_last), problem, mode, torch.channels_last)
    with warnings.catch_warnings(), inductor.patch(freezing=mode == "inference"):
        warnings.simplefilter("ignore")
        rival.call = torch.compile(rival.module, dynamic=False)
        rival.run()
    return rival


def _require(problem: Problem, mode: str, *packages: str) -> None:
    """The conditions of the inference engines, in the order in which a reader wants to hear of them."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")
    if mode != "inference":
        raise Unavailable("runs inference only")
    if problem.dtype != torch.float32:
        raise Unavailable("runs in float32 only here")


def _onnxruntime(problem: Problem, mode: str) -> Rival:
    _require(problem, mode, "onnxruntime", "onnx", "onnxscript")
    import io

    import onnxruntime

    rival = Rival(
        "onnxruntime", _stock(problem, torch.contiguous_format), problem, mode, torch.contiguous_format
    )
    file = io.BytesIO()
    torch.onnx.export(rival.module, (rival.xs[0],), file, dynamo=False, input_names=["x"], output_names=["y"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would otherwise spin on the cores while the next rival is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    rival.call = lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    rival.run()
    return rival


def _openvino(problem: Problem, mode: str) -> Rival:
    _require(problem, mode, "openvino")
    import openvino

    rival = Rival(
        "openvino", _stock(problem, torch.contiguous_format), problem, mode, torch.contiguous_format
    )
    converted = openvino.convert_model(rival.module, example_input=rival.xs[0], input=[list(problem.x.shape)])
    compiled = openvino.compile_model(
        converted,
        "CPU",
        {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"},
    )
    request = compiled.create_infer_request()
    rival.call = lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])
    rival.run()
    return rival


_BUILDERS = {
    "gconv": _gconv,
    "eager_nchw": _eager("eager_nchw", torch.contiguous_format),
    "eager_channels_last": _eager("eager_channels_last", torch.channels_last),
    "compile": _compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
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
