"""torch.compile, torch.export and AOTInductor: one graph, no recompiles on the batch size, eager's numbers.

Function transforms inside torch.compile must be right or raise; the kernels' Functions are inlined there, so
gconv leaves those calls to torch.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap

import gconv
from gconv.functional import batch_norm, conv_bn_relu, fuse_modules_forward, grouped_conv

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A fused 3x3 convolution and a 1x1 one, each with the input as residual, or neither."""

    def __init__(self, residual=True, bias=False, track=True, momentum=0.1):
        super().__init__()
        self.conv1 = gconv.Conv2d(8, 8, 3, padding=1, groups=2, bias=bias)
        self.bn1 = nn.BatchNorm2d(8, momentum=momentum, track_running_stats=track)
        self.conv2 = nn.Conv2d(8, 8, 1)
        self.bn2 = nn.BatchNorm2d(8, momentum=momentum, track_running_stats=track)
        self.residual = residual

    def forward(self, x):
        y = fuse_modules_forward(x, self.conv1, self.bn1, x if self.residual else None)
        return fuse_modules_forward(y, self.conv2, self.bn2, x if self.residual else None)


def net(training=True, memory_format=torch.contiguous_format, **arguments):
    torch.manual_seed(0)
    model = Net(**arguments).train(training).to(memory_format=memory_format)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            torch.nn.init.uniform_(buffer, *((0.5, 1.5) if "var" in name else (-0.2, 0.2)))
    return model


def images(n=2, seed=0, memory_format=torch.contiguous_format):
    x = torch.randn(n, 8, 7, 6, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=memory_format)


def step(model, run, x):
    """Output, every gradient, every buffer of one training step."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    z = run(leaf)
    (z * torch.arange(z.numel()).view_as(z).sin()).sum().backward()
    biases = [
        name for name, _ in model.named_parameters() if name.startswith("conv") and name.endswith("bias")
    ]
    results = {"z": z.detach(), "dx": leaf.grad}
    results |= {f"d{name}": p.grad for name, p in model.named_parameters() if name not in biases}
    return results | {name: b.float() + 1 for name, b in model.named_buffers()}


def close(got, want, tolerance=1e-4, label=""):
    assert got.shape == want.shape, label
    scale = want.abs().max().item()
    assert scale > 0, f"{label}: a wanted value of zeros proves nothing"
    error = (got - want).abs().max().item()
    assert error <= tolerance * scale, f"{label}: error {error:.2e}, largest value {scale:.2e}"


def compare(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        close(got[name], value, label=name)


@pytest.mark.parametrize(
    "backend,memory_format,training,residual",
    [("aot_eager", *rest) for rest in itertools.product(FORMATS, [True, False], [True, False])]
    + [
        ("inductor", memory_format, training, False)
        for memory_format in FORMATS
        for training in (True, False)
    ],
    ids=str,
)
def test_a_step_in_one_graph(ops, backend, memory_format, training, residual):
    model = net(training, memory_format, residual=residual, bias=True)
    twin = copy.deepcopy(model)
    x = images(memory_format=memory_format)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for _ in range(2):
        got, want = step(twin, compiled, x), step(model, model, x)
        compare(got, want)
        assert got["z"].stride() == want["z"].stride()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_graph_holds_our_ops(ops, training):
    seen = []

    def capture(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    model = net(training)
    torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=capture, bw_compiler=capture))(
        images()
    ).sum().backward()
    # In evaluation the convolutions' epilogues are the normalisation.
    forward = ("fwd_stats", "batch_norm_apply") if training else ("fwd",)
    for name in (
        f"grouped_conv_{forward[0]}",
        f"pointwise_conv_{forward[0]}",
        *forward[1:],
        "grouped_conv_bwd",
    ):
        assert seen.count(f"gconv.{name}.default") >= 1, name
    assert not any("native_batch_norm" in name for name in seen)


def test_cumulative_statistics_in_one_graph(ops):
    model = net(momentum=None)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        compare(step(twin, compiled, images(seed=seed)), step(model, model, images(seed=seed)))


@pytest.mark.parametrize("training,backend", [(True, "aot_eager"), (False, "aot_eager"), (True, "inductor")])
def test_no_recompiles_on_the_batch_size(ops, training, backend):
    """A fixed size first, then every other size in one graph for all."""
    model = net(training)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for n in (4, 3, 7, 2, 9):
        compare(step(twin, compiled, images(n)), step(model, model, images(n)))
    assert counter.frame_count == 2


def test_functional_forms_without_gradients(ops):
    weight, bn = torch.randn(6, 4, 3, 3), nn.BatchNorm2d(6).eval()
    weight.requires_grad_()

    def forward(x):
        y = conv_bn_relu(x, weight, bn, padding=1, groups=2)
        return batch_norm(grouped_conv(y, weight[:, :3], padding="same", groups=2), None, None, training=True)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            close(compiled(images()), forward(images()))


def test_autocast_in_one_graph(ops):
    model = net()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")

    def cast(run):
        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return run(x).float()

        return forward

    compare(step(twin, cast(compiled), images()), step(model, cast(model), images()))


# ------------------------------------------------------------------------- function transforms inside compile


def conv(x, weight):
    return grouped_conv(x, weight, None, 1, 1, 1, 2)


def loss(x, weight):
    return conv(x, weight).sin().sum()


WEIGHT = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(3))
TRANSFORMS = {
    "grad of x": (lambda f: grad(f, 0), False),
    "grad of weight": (lambda f: grad(f, 1), False),
    "grad of grad": (lambda f: grad(lambda x, w: grad(f)(x, w).cos().sum(), 1), False),
    "vmap": (lambda f: vmap(f, (0, None)), True),
    "vmap of grad": (lambda f: vmap(grad(f, 1), (0, None)), True),
}


@pytest.mark.parametrize(
    "backend,name", [*(("aot_eager", name) for name in TRANSFORMS), ("inductor", "vmap of grad")]
)
def test_transforms_inside_compile_are_right(ops, backend, name):
    transform, batch = TRANSFORMS[name]
    x = torch.stack((images(), images(seed=1))) if batch else images()
    with gconv.set_policy("silent"):
        got = torch.compile(transform(loss), fullgraph=True, backend=backend)(x, WEIGHT)
    close(got, transform(loss)(x, WEIGHT))


def test_jvp_inside_compile_is_right(ops):
    x, direction = images(), images(seed=1)
    with gconv.set_policy("silent"):
        tangent = torch.compile(
            lambda x, v: jvp(lambda x: conv(x, WEIGHT), (x,), (v,))[1], fullgraph=True, backend="aot_eager"
        )(x, direction)
    close(tangent, conv(direction, WEIGHT))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_func_grad_of_a_model_inside_compile_is_right(ops, training, residual):
    model = net(training, residual=residual, bias=True, track=not training)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def model_loss(parameters, x):
        return functional_call(model, (parameters, buffers), (x,)).sin().sum()

    with gconv.set_policy("silent"):
        got = torch.compile(grad(model_loss), fullgraph=True, backend="aot_eager")(parameters, images())
    want = grad(model_loss)(parameters, images())
    for name, value in want.items():
        if not (training and name.startswith("conv") and name.endswith("bias")):
            close(got[name], value, label=name)


def test_a_transform_inside_compile_says_that_torch_runs(ops):
    with gconv.set_policy("warn_once"), pytest.warns(gconv.FallbackWarning, match="a function transform"):
        torch.compile(grad(loss), fullgraph=True, backend="eager")(images(), WEIGHT)


def test_transforms_of_a_compiled_function_are_right(ops):
    x = images()
    compiled = torch.compile(loss, backend="aot_eager")
    close(grad(compiled, 1)(x, WEIGHT), grad(loss, 1)(x, WEIGHT))


def test_double_backward_of_a_compiled_function_raises_as_torchs(ops):
    x = images().requires_grad_()
    y = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, WEIGHT)
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.square().sum().backward()


# -------------------------------------------------------------------------------------------------- export


def exported(training, strict):
    model = net(training)
    shapes = {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    return model, torch.export.export(model, (images(),), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export_with_a_dynamic_batch(ops, training, strict):
    model, program = exported(training, strict)
    run, x = program.module(), images(5, seed=2)
    before = {name: b.clone() for name, b in model.named_buffers()}
    got = run(x)
    model.load_state_dict(before, strict=False)
    close(got, model(x))
    moved = dict(run.named_buffers())
    for name, buffer in model.named_buffers():
        if training:
            torch.testing.assert_close(moved[name], buffer, msg=name)
    targets = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert any(target.startswith("gconv.grouped_conv_fwd") for target in targets)


def test_export_survives_saving(ops, tmp_path):
    model, program = exported(False, False)
    torch.export.save(program, tmp_path / "net.pt2")
    close(torch.export.load(tmp_path / "net.pt2").module()(images(3)), model(images(3)))


def test_aot_inductor(ops, tmp_path):
    model, program = exported(False, False)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for n in (2, 5):
        close(run(images(n)), model(images(n)))
