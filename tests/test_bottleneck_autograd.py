"""Derivatives of the bottleneck chain: what the graph keeps, both orders, function transforms, checkpoints,
compilers, training steps."""

import copy

import checks
import pytest
import torch
from bottleneck_blocks import BLOCKS, block_input, twins
from checks import assert_same_bits
from fused_checks import assert_close, compare_transforms, run
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from gconv import batch_norm as bn_module
from gconv import bottleneck as chain_module
from gconv import grouped_conv as conv_module
from gconv import pointwise_conv

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

# ------------------------------------------------------------------------------------------- what is kept


def kept_activations(run):
    """(z, {data_ptr: tensor}) of the activations that the graph of `run()` holds."""
    held = {}

    def pack(t):
        if t.dim() == 4 and t.shape[0] > 1 and t.shape[2] > 3:
            held[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z = run()
    return z, held


@pytest.mark.parametrize("down", [False, True], ids=["identity", "downsample"])
def test_nothing_normalised_is_kept(ops, down):
    """x, the raw outputs and z, where stock keeps the input and the output of nearly every module."""
    stock, ours = twins("kept", (16, 32, 32, 64 if down else 16), groups=8, down=down)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    seen = {}
    for name, conv in (("y1", ours.conv1), ("y2", ours.conv2), ("y3", ours.conv3)):
        seen[name] = x.shape[0] * conv.out_channels * 64
    z, held = kept_activations(lambda: ours(x))
    elements = sorted(t.numel() for t in held.values())
    want = [x.numel(), *seen.values(), z.numel(), *([z.numel()] if down else [])]
    assert elements == sorted(want)
    assert {x.untyped_storage().data_ptr(), z.untyped_storage().data_ptr()} <= set(held)
    _, stock_held = kept_activations(lambda: stock(x))
    normalised = seen["y1"] + seen["y2"]
    assert sum(t.numel() for t in stock_held.values()) == sum(elements) + normalised


# ----------------------------------------------------------------------------------- derivatives of all kinds


@pytest.fixture
def reference_ops(monkeypatch):
    """The Functions on references, so that they take float64."""
    for module, names in (
        (chain_module, ("fwd", "fwd_stats", "bwd")),
        (conv_module, ("fwd", "bwd_input", "bwd_weight", "bwd")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(conv_module, f"grouped_conv_{name}_ref"))
    for name in ("fwd", "fwd_stats", "bwd"):
        monkeypatch.setattr(pointwise_conv, name, getattr(pointwise_conv, f"pointwise_conv_{name}_ref"))
    names = {"fold": "fold", "apply_affine": "apply"}
    names |= {name: name for name in ("bwd_finish", "bwd_reduce", "bwd_reduce_pair")}
    for name, stem in names.items():
        monkeypatch.setattr(chain_module, name, getattr(bn_module, f"batch_norm_{stem}_ref"))


@pytest.mark.parametrize("shortcut", ["x", "given", "down"])
@pytest.mark.parametrize("batch", [(True,) * 4, (False,) * 4, (True, False, True, False)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_gradcheck(reference_ops, shortcut, batch, affine):
    """Both orders, along random directions."""
    c, a, b, k = (4, 4, 6, 4 if shortcut == "x" else 5)
    stride = (1, 1) if shortcut == "x" else (2, 1)
    down = shortcut == "down"
    gen = checks.generator("gradcheck", shortcut, batch, affine)

    def double(*shape):
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    widths = (a, b, k, k) if down else (a, b, k)
    shapes = [(a, c, 1, 1), (b, a // 2, 3, 3), (k, b, 1, 1), *([(k, c, 1, 1)] if down else [])]
    none = [] if down else [None]
    weights = [double(*shape).requires_grad_() for shape in shapes]
    gammas = [double(w).requires_grad_() for w in widths] if affine else [None] * len(widths)
    betas = [double(w).requires_grad_() for w in widths] if affine else [None] * len(widths)
    means = [None if by else double(w) for w, by in zip(widths, batch)]
    variances = [None if by else double(w).abs() + 0.5 for w, by in zip(widths, batch)]
    x = double(2, c, 5, 4).requires_grad_()
    residual = double(2, k, 3, 4).requires_grad_() if shortcut == "given" else None
    conf = chain_module.Conf(
        (1, 1), (stride, (1, 1), (1, 1), 2), (1, 1), stride if down else None, shortcut, (1e-3,) * 4,
        (*batch[: len(widths)], *([False] if not down else [])),
    )  # fmt: skip
    fours = [*weights, *none, *gammas, *none, *betas, *none, *means, *none, *variances, *none]
    args = [x, residual, *fours]
    places = [i for i, t in enumerate(args) if t is not None and t.requires_grad]

    def function(*tensors):
        full = list(args)
        for i, t in zip(places, tensors):
            full[i] = t
        return chain_module._train_apply(*full, conf)[0]

    leaves = [args[i] for i in places]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@modes
@pytest.mark.parametrize("down", [False, True], ids=["identity", "downsample"])
def test_second_order_on_the_kernels(ops, training, down):
    case = BLOCKS[3] if down else BLOCKS[1]
    channels, options, size = case
    stock, ours = twins("second", channels, training=training, **options)
    x = block_input(stock, size, "second")

    def both_orders(block, dtype):
        block = copy.deepcopy(block).to(dtype)
        leaf = x.detach().to(dtype).requires_grad_()
        tensors = [leaf, *block.parameters()]
        z = block(leaf)
        dz = torch.randn(z.shape, generator=checks.generator("second")).to(dtype)
        plain = torch.autograd.grad(z, tensors, dz, retain_graph=True)
        first = torch.autograd.grad(z, tensors, dz, create_graph=True)
        for one, other in zip(plain, first, strict=True):
            assert_same_bits(one, other.detach())
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors, allow_unused=True)
        return [*first, *second]

    exact, got = both_orders(stock, torch.float64), both_orders(ours, torch.float32)
    for i, (want, value) in enumerate(zip(exact, got, strict=True)):
        assert_close(value, want, 2e-3, i)


@modes
def test_function_transforms(ops, training):
    channels, options, size = BLOCKS[3]
    pair = twins("transforms", channels, training=training, track_running_stats=not training, **options)
    x = block_input(pair[0], size, "transforms").detach()
    compare_transforms(*pair, x)


def test_checkpoint_gives_the_same_gradients(ops):
    channels, options, size = BLOCKS[3]
    _, ours = twins("checkpoint", channels, track_running_stats=False, **options)
    x = block_input(ours, size, "checkpoint").detach()
    results = []
    for call in (ours, *(lambda x, r=r: checkpoint(ours, x, use_reentrant=r) for r in (False, True))):
        ours.zero_grad()
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in ours.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("down", [False, True], ids=["identity", "downsample"])
def test_compiled_in_one_graph(ops, training, down):
    torch._dynamo.reset()
    channels, options, size = BLOCKS[3] if down else BLOCKS[1]
    _, ours = twins("compile", channels, training=training, **options)
    twin = copy.deepcopy(ours)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = block_input(ours, size, "compile")
    dz = torch.randn(ours(x).shape)
    ours.load_state_dict(twin.state_dict())
    for _ in range(2):
        want = run(ours, x, dz, None)
        leaf = x.detach().requires_grad_()
        z = compiled(leaf)
        z.backward(dz)
        got = {"z": z.detach(), "dx": leaf.grad}
        got |= {f"d{name}": p.grad for name, p in twin.named_parameters()} | dict(twin.named_buffers())
        for name, value in want.items():
            if value is not None:
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_compiled_inference_is_one_op_per_convolution(ops, grad_mode):
    torch._dynamo.reset()
    channels, options, size = BLOCKS[3]
    _, ours = twins("compiled inference", channels, training=False, **options)
    x = block_input(ours, size, "compiled inference").detach()
    seen = []

    def capture(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(
        ours.requires_grad_(grad_mode), fullgraph=True, backend=aot_autograd(fw_compiler=capture)
    )
    with torch.set_grad_enabled(grad_mode):
        torch.testing.assert_close(compiled(x), ours(x), rtol=1e-4, atol=1e-4)
    ops_seen = sorted(target for target in seen if target.startswith("gconv."))
    assert ops_seen == ["gconv.grouped_conv_fwd.default", *["gconv.pointwise_conv_fwd.default"] * 3]


def test_exported(ops):
    channels, options, size = BLOCKS[3]
    _, ours = twins("export", channels, training=False, **options)
    x = block_input(ours, size, "export").detach()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(ours, (x,), dynamic_shapes={"x": {0: batch}})
    more = torch.cat([x, x, x])
    torch.testing.assert_close(program.module()(more), ours(more), rtol=1e-5, atol=1e-5)


def test_training_steps_follow_stock(ops):
    """Parity over steps: SGD with momentum, from the same weights on the same batches."""
    channels, options, _ = BLOCKS[3]
    stock, ours = twins("steps", channels, **options)
    exact = copy.deepcopy(stock).double()
    gen = checks.generator("steps")
    batches = [torch.randn(4, channels[0], 9, 9, generator=gen) for _ in range(5)]
    states = []
    for block, dtype in ((exact, torch.float64), (stock, torch.float32), (ours, torch.float32)):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.01, momentum=0.9)
        for x in batches:
            optimizer.zero_grad()
            block(x.to(dtype)).square().mean().backward()
            optimizer.step()
        states.append(block.state_dict())
    for name, want in states[0].items():
        if not want.is_floating_point():
            assert torch.equal(states[2][name], want), name
            continue
        own = (states[1][name].double() - want).abs().max()
        error = (states[2][name].double() - want).abs().max()
        assert error <= 4 * own + 1e-5 * want.abs().max(), f"{name}: {error:.1e}, stock's own {own:.1e}"
