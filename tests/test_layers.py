"""Conv2d and ConvBNReLU against torch.nn's own: signature, initialisation, state, values, and what users do
to
modules: copy, pickle, parametrize, hook, trace, compile, swap children."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import gconv
from gconv import backend

CONVS = [
    {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 2},
    {"in_channels": 6, "out_channels": 12, "kernel_size": 3, "stride": 2, "groups": 3, "bias": False},
    {"in_channels": 5, "out_channels": 7, "kernel_size": 3, "padding": "same", "dilation": 2},
    {
        "in_channels": 5,
        "out_channels": 5,
        "kernel_size": (3, 3),
        "padding": "valid",
        "stride": (1, 2),
        "groups": 5,
    },
    {"in_channels": 4, "out_channels": 6, "kernel_size": 1},
    {"in_channels": 3, "out_channels": 6, "kernel_size": (5, 2), "stride": 3, "padding": (3, 1), "groups": 3},
]


@pytest.fixture(autouse=True)
def quiet():
    """These tests use what the kernels cover and what they do not; the policy has its own tests."""
    with gconv.set_policy("silent"):
        yield


def pair_of_convs(**arguments):
    """nn.Conv2d and gconv.Conv2d made from one seed."""
    torch.manual_seed(0)
    stock = nn.Conv2d(**arguments)
    torch.manual_seed(0)
    return stock, gconv.Conv2d(**arguments)


def image(channels, dtype=torch.float32, n=2, h=11, w=10, seed=1):
    return torch.randn(n, channels, h, w, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual, expected, **kwargs):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, **kwargs)


# ----------------------------------------------------------------------------------------------------- Conv2d


def test_conv2d_has_the_signature_of_torch():
    assert inspect.signature(gconv.Conv2d) == inspect.signature(nn.Conv2d)
    assert issubclass(gconv.Conv2d, nn.Conv2d)


@pytest.mark.parametrize("arguments", CONVS)
def test_conv2d_is_torchs_in_init_state_repr_and_random_numbers(arguments):
    stock, ours = pair_of_convs(**arguments)
    after_ours = torch.rand(1)
    torch.manual_seed(0)
    nn.Conv2d(**arguments)
    assert torch.equal(after_ours, torch.rand(1)), "as many random numbers are drawn"
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), stock.state_dict().values()))
    assert ours.__dict__.keys() == stock.__dict__.keys()
    assert ours.load_state_dict(stock.state_dict()) == stock.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("arguments", CONVS)
def test_conv2d_values_and_gradients_are_torchs(arguments, padding_mode):
    stock, ours = pair_of_convs(**arguments, padding_mode=padding_mode)
    x = image(arguments["in_channels"])
    x_stock, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_stock, y_ours = stock(x_stock), ours(x_ours)
    assert_close(y_ours, y_stock)
    dy = torch.randn(y_stock.shape, generator=torch.Generator().manual_seed(2))
    y_stock.backward(dy)
    y_ours.backward(dy)
    assert_close(x_ours.grad, x_stock.grad)
    for name, parameter in stock.named_parameters():
        assert_close(getattr(ours, name).grad, parameter.grad)


def test_conv2d_runs_on_our_kernel_in_every_padding_mode(ops):
    for padding_mode in ("zeros", "reflect", "replicate", "circular"):
        backend.reset_counts()
        gconv.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode=padding_mode)(image(4))
        assert backend.counts() == {"cpu.grouped_conv": 1}, padding_mode


def test_conv2d_pads_beyond_two_when_the_mode_pads_itself(ops):
    stock, ours = pair_of_convs(
        in_channels=4, out_channels=4, kernel_size=3, padding=4, padding_mode="circular"
    )
    backend.reset_counts()
    assert_close(ours(image(4)), stock(image(4)))
    assert backend.counts() == {"cpu.grouped_conv": 1}


def test_conv2d_keeps_the_layout_and_takes_unbatched_input(ops):
    stock, ours = pair_of_convs(**CONVS[0])
    for x in (image(8), image(8).to(memory_format=torch.channels_last), image(8)[0]):
        assert ours(x).stride() == stock(x).stride()
        assert_close(ours(x), stock(x))


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 3}, "divisible"),
        ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 0}, "groups"),
        ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding_mode": "mirror"}, "padding_mode"),
        ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": "same", "stride": 2}, "strided"),
    ],
)
def test_conv2d_refuses_at_construction_what_torch_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        gconv.Conv2d(**arguments)


def test_conv2d_names_what_does_not_fit():
    conv = gconv.Conv2d(8, 8, 3, groups=2)
    with pytest.raises(ValueError, match=r"weight: want .* got \[8, 4, 3, 3\]"):
        conv(image(6))
    with pytest.raises(ValueError, match=r"x: want \[N, C, H, W\]"):
        conv(torch.zeros(8, 9))
    with pytest.raises(ValueError, match="dtype"):
        conv(image(8, torch.float64))


def test_conv2d_survives_copies(tmp_path):
    conv = gconv.Conv2d(**CONVS[0], dtype=torch.float64).requires_grad_(False)
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    x = image(8, torch.float64)
    for other in (
        copy.deepcopy(conv),
        pickle.loads(pickle.dumps(conv)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is gconv.Conv2d and other.weight is not conv.weight
        assert not other.weight.requires_grad and torch.equal(other(x), conv(x))
    meta = gconv.Conv2d(**CONVS[0], device="meta")
    assert meta(torch.zeros(1, 8, 5, 5, device="meta")).shape == (1, 8, 5, 5)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_conv2d_under_a_parametrization(kind):
    stock, ours = pair_of_convs(**CONVS[0])
    for conv in (stock, ours):
        torch.manual_seed(1)
        getattr(nn.utils.parametrizations, kind)(conv)
    x = image(8)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert_close(ours(x), stock(x))
    ours(x).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    nn.utils.parametrize.remove_parametrizations(ours, "weight")
    assert type(ours) is gconv.Conv2d
    assert ours(x).shape == stock(x).shape


def test_conv2d_under_the_old_weight_norm_hook():
    stock, ours = pair_of_convs(**CONVS[0])
    with pytest.warns(FutureWarning, match="weight_norm"):
        stock, ours = nn.utils.weight_norm(stock), nn.utils.weight_norm(ours)
    assert_close(ours(image(8)), stock(image(8)))


def test_conv2d_from_torch_shares_parameters_hooks_and_mode():
    stock = nn.Conv2d(**CONVS[0]).eval()
    calls = []
    stock.register_forward_hook(lambda *_: calls.append("hook"))
    ours = gconv.Conv2d.from_torch(stock)
    assert type(ours) is gconv.Conv2d and type(stock) is nn.Conv2d
    assert ours.weight is stock.weight and ours.bias is stock.bias and not ours.training
    assert_close(ours(image(8)), stock(image(8)))
    assert calls == ["hook", "hook"]
    ours.bias = None
    assert stock.bias is not None, "the registries are the layer's own"
    assert gconv.Conv2d.from_torch(ours).weight is stock.weight


def test_conv2d_from_torch_refuses_what_it_would_change():
    class Scaled(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match=r"conv: want a plain torch\.nn\.Conv2d, got Scaled"):
        gconv.Conv2d.from_torch(Scaled(4, 4, 3))
    with pytest.raises(ValueError, match="got a parametrized Conv2d"):
        gconv.Conv2d.from_torch(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    with pytest.raises(ValueError, match="got Linear"):
        gconv.Conv2d.from_torch(nn.Linear(4, 4))


def test_conv2d_is_a_leaf_of_fx_and_traceable_as_root():
    model = nn.Sequential(gconv.Conv2d(**CONVS[0]), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in traced.graph.nodes][1] == ("call_module", "0")
    assert torch.equal(traced(image(8)), model(image(8)))
    root = torch.fx.symbolic_trace(model[0])
    assert_close(root(image(8)), model[0](image(8)))


def test_conv2d_compiles_without_graph_breaks_and_without_recompiles_on_batch_size(ops):
    torch._dynamo.reset()
    conv = gconv.Conv2d(**CONVS[0])
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(conv, fullgraph=True, backend=counter, dynamic=True)
    for n in (2, 3, 5, 8):
        assert_close(compiled(image(8, n=n)), conv(image(8, n=n)))
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------------------------- ConvBNReLU


class Stock(nn.Module):
    """ConvBNReLU of torch.nn, with the same children."""

    def __init__(self, relu=True, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, **conv):
        super().__init__()
        self.conv = nn.Conv2d(**{"bias": False, **conv})
        self.bn = nn.BatchNorm2d(conv["out_channels"], eps, momentum, affine, track_running_stats)
        self.relu = relu

    def forward(self, x, residual=None):
        y = self.bn(self.conv(x))
        y = y if residual is None else y + residual
        return torch.relu(y) if self.relu else y


def pair_of_blocks(**arguments):
    torch.manual_seed(0)
    stock = Stock(**arguments)
    torch.manual_seed(0)
    ours = gconv.ConvBNReLU(**arguments)
    if stock.bn.affine:
        for block in (stock, ours):
            torch.manual_seed(3)
            nn.init.normal_(block.bn.weight)
            nn.init.normal_(block.bn.bias)
    return stock, ours


def assert_same_step(stock, ours, x, residual=None):
    """One forward and backward: output, input gradients, parameter gradients and running statistics."""
    results = []
    for block in (stock, ours):
        block.zero_grad()
        inputs = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
        y = block(*inputs)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
        results.append(
            (y.detach(), [t.grad for t in inputs], {n: p.grad for n, p in block.named_parameters()})
        )
    assert_close(results[1][0], results[0][0])
    assert_close(results[1][1], results[0][1])
    assert_close(results[1][2], results[0][2])
    assert_close(dict(ours.named_buffers()), dict(stock.named_buffers()))


BLOCKS = [
    {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 2},
    {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "stride": 2, "groups": 4, "bias": True},
    {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 2, "dilation": 2, "momentum": None},
    {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 1, "affine": False, "eps": 0.1},
    {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 1, "track_running_stats": False},
    {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 1, "relu": False, "groups": 6},
    {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"in_channels": 6, "out_channels": 9, "kernel_size": 1},
    {"in_channels": 6, "out_channels": 9, "kernel_size": 5, "stride": 3, "groups": 3},
]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("arguments", BLOCKS)
def test_block_trains_and_evaluates_as_torchs(arguments, with_residual):
    stock, ours = pair_of_blocks(**arguments)
    assert list(ours.state_dict()) == list(stock.state_dict())
    x = image(arguments["in_channels"], n=3)
    residual = (
        torch.randn(stock(x).shape, generator=torch.Generator().manual_seed(5)) if with_residual else None
    )
    ours.load_state_dict(stock.state_dict())
    for _ in range(2):
        assert_same_step(stock, ours, x, residual)
    stock.eval()
    ours.eval()
    assert_same_step(stock, ours, x, residual)
    with torch.no_grad():
        assert_close(ours(x, residual), stock(x, residual))


def test_block_has_the_documented_keys_and_repr():
    block = gconv.ConvBNReLU(8, 8, 3, padding=1, groups=2)
    assert list(block.state_dict()) == [
        "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
    ]  # fmt: skip
    assert type(block.conv) is gconv.Conv2d and type(block.bn) is nn.BatchNorm2d
    assert (
        "relu=False" in repr(gconv.ConvBNReLU(8, 8, 3, relu=False)) and "relu" not in repr(block).lower()[10:]
    )
    meta = gconv.ConvBNReLU(8, 8, 3, device="meta", dtype=torch.float16)
    assert {p.device.type for p in meta.parameters()} == {"meta"} and meta.bn.weight.dtype == torch.float16


def test_block_is_one_call_of_our_kernel(ops):
    block, x = gconv.ConvBNReLU(8, 8, 3, padding=1, groups=2), image(8)
    for mode in (True, False):
        block.train(mode)
        backend.reset_counts()
        block(x)
        assert backend.counts() == {"cpu.conv_bn_relu": 1}


def test_block_with_a_swapped_norm_runs_the_swapped_norm(ops):
    stock, ours = pair_of_blocks(**BLOCKS[0])
    ours.bn = nn.GroupNorm(2, 8)
    stock.bn = ours.bn
    with gconv.trace() as t:
        assert_close(ours(image(8)), stock(image(8)))
    assert any("GroupNorm" in (row.reason or "") for row in t) and "cpu.grouped_conv" in {
        row.kernel for row in t
    }
    ours.bn = stock.bn = nn.Identity()
    assert_close(ours(image(8)), stock(image(8)))


def test_block_after_convert_sync_batchnorm_calls_it_and_says_so():
    stock, ours = pair_of_blocks(**BLOCKS[0])
    keys = list(ours.state_dict())
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours).eval()
    assert type(ours.bn) is nn.SyncBatchNorm and list(ours.state_dict()) == keys
    with gconv.trace() as t:
        assert_close(ours(image(8)), stock.eval()(image(8)))
    assert any("SyncBatchNorm" in (row.reason or "") for row in t)


@pytest.mark.parametrize("child", ["conv", "bn"])
def test_block_hooks_on_children_fire(child):
    stock, ours = pair_of_blocks(**BLOCKS[0])
    seen = []
    getattr(ours, child).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x = image(8)
    assert_close(ours(x), stock(x))
    assert seen == [(2, 8, 11, 10)]


def test_block_survives_copies_and_parametrization():
    block = gconv.ConvBNReLU(**BLOCKS[0]).eval()
    x = image(8)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x)) and other.conv.weight is not block.conv.weight
    expected = block(x)
    nn.utils.parametrizations.weight_norm(block.conv)
    assert_close(block(x), expected)


def test_block_from_torch_shares_everything():
    conv, bn = nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8).eval()
    block = gconv.ConvBNReLU.from_torch(conv, bn, relu=False)
    assert block.conv.weight is conv.weight and block.bn is bn and not block.training
    assert_close(block(image(8)), bn(conv(image(8))))


def test_block_is_a_leaf_of_fx_and_traceable_as_root():
    model = nn.Sequential(gconv.ConvBNReLU(**BLOCKS[0]), nn.MaxPool2d(2)).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert torch.equal(traced(image(8)), model(image(8)))
    root = torch.fx.symbolic_trace(model[0], concrete_args={"residual": None})
    assert [node.target for node in root.graph.nodes if node.op == "call_module"] == ["conv", "bn"]
    assert_close(root(image(8)), model[0](image(8)))


def test_block_refuses_a_residual_of_another_shape():
    block = gconv.ConvBNReLU(**BLOCKS[0])
    with pytest.raises((ValueError, RuntimeError), match="residual"):
        block(image(8), image(8, h=5))


def test_block_compiles_without_graph_breaks(ops):
    torch._dynamo.reset()
    stock, ours = pair_of_blocks(**BLOCKS[0])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same_step(stock, compiled._orig_mod, image(8))
    y = compiled(image(8))
    assert_close(y, stock(image(8)))
    assert int(ours.bn.num_batches_tracked) == int(stock.bn.num_batches_tracked) == 2


def test_block_under_autocast(ops):
    stock, ours = pair_of_blocks(**BLOCKS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = stock(image(8)), ours(image(8))
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)
