"""gconv.Concat: the values and gradients of torch.cat without its copy, and bad input in one clear line."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import assert_accurate, assert_same_bits
from concat_networks import Dense, UNet, assert_same_step, image, step, twins
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gconv
from gconv import functional as GF

pytestmark = pytest.mark.usefixtures("ops")


# --------------------------------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", [UNet, Dense])
def test_networks_train_as_with_cat(model, dtype, layout, training, nan_filled_memory):
    one, other = (m.to(dtype).train(training) for m in twins(model))
    assert_same_step(one, other, image(dtype=dtype).to(memory_format=layout))


@pytest.mark.parametrize("model", [UNet, Dense])
def test_networks_are_accurate(model):
    """Against float64: where not even the layers are shared with the twin."""
    one, other = twins(model)
    exact = copy.deepcopy(other).double()
    x = image()
    with gconv.use_backend("torch"):
        _, want_dx, want = step(exact, x.double())
        _, torchs_dx, torchs = step(other, x)
    _, dx, state = step(one, x)
    assert_accurate(dx, want_dx, torchs_dx, "dx")
    for name, parameter in one.named_parameters():
        assert_accurate(parameter.grad, want[name], torchs[name], name)
    assert len(state) > len(list(one.named_parameters()))


@pytest.mark.parametrize("model", [UNet, Dense])
def test_float64_runs_on_torch(model):
    (y, dx, state), want = (step(m.double(), image(dtype=torch.float64)) for m in twins(model))
    for actual, wanted in zip((y, dx, *state.values()), (*want[:2], *want[2].values())):
        assert torch.allclose(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", [UNet, Dense])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(model, context):
    one, other = twins(model)
    for training in (True, False):
        with context():
            y, want = one.train(training)(image()), other.train(training)(image())
        assert_same_bits(y.contiguous(), want.contiguous())
        assert not y.requires_grad


def test_frozen_layers():
    one, other = twins(UNet)
    for model in (one, other):
        model.down1.requires_grad_(False)
        model.middle.requires_grad_(False)
    assert_same_step(one, other, image())
    x = image()
    one.requires_grad_(False)
    assert not one(x).requires_grad


def test_checkpoint_around_everything():
    one, other = twins(Dense)
    inner = one.forward
    one.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    for model in (one, other):
        model.eval()  # a recomputed forward counts twice
    assert_same_step(one, other, image())


def test_autocast():
    one, other = twins(Dense)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(one, other, image())
        y = one(image())
    assert y.dtype == torch.bfloat16


def test_data_parallel_threads_share_nothing():
    one, other = (m.eval() for m in twins(UNet))
    inputs = [image(seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(one, inputs))
    for y, x in zip(results, inputs):
        assert_same_bits(y.detach().contiguous(), other(x).detach().contiguous())


# -------------------------------------------------------------------------------------------------- no copies


class Log(TorchDispatchMode):
    """The ops with results of at least `least` elements, and the sizes of these results' storages."""

    def __init__(self, least=0):
        super().__init__()
        self.least, self.names, self.storages, self.keep = least, [], {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.numel() >= self.least:
                self.names.append(func.overloadpacket.__name__)
                self.keep.append(value)  # no memory is used twice
                self.storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return result


def test_a_dense_block_copies_nothing():
    x = image().to(memory_format=torch.channels_last)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    slot = 4 * pixels  # larger than any parameter
    copying = {"copy_", "clone", "_to_copy", "contiguous", "cat"}
    for model, with_cat in zip(twins(Dense), (False, True)):
        with Log(slot) as forward:
            y = model(x)
        dy = torch.randn_like(y)
        with Log(slot) as backward:
            y.backward(dy)
        assert ("cat" in forward.names) == with_cat and "add" in backward.names
        if not with_cat:
            assert not copying & set(forward.names) and not copying & set(backward.names)
        widths = [sum(model.channels[:i]) for i in range(2, len(model.channels) + 1)]
        sizes = list(forward.storages.values())
        found = [width for width in widths if 4 * width * pixels in sizes]
        assert found == (widths if with_cat else widths[-1:])


@pytest.mark.parametrize("relu", [True, False])
def test_slots_prefixes_and_gradients_are_one_memory(relu):
    block, conv = gconv.ConvBNReLU(3, 5, 3, padding=1, relu=relu), gconv.Conv2d(3, 7, 1)
    last = gconv.Conv2d(12, 4, 3, padding=1)
    x, concat = image(), gconv.Concat(5, 7)
    slots = block(x, into=concat[0]), conv(x, into=concat[1])
    prefix, again = concat.read(), concat.prefix(1)
    pointer = prefix.data_ptr()
    assert again.data_ptr() == pointer and slots[0].data_ptr() == pointer
    assert slots[1].data_ptr() == pointer + 5 * 4
    assert prefix.is_contiguous(memory_format=torch.channels_last)
    assert [t.stride() for t in slots] == [prefix.stride()] * 2
    grads = {}
    for name, tensor in (("prefix", prefix), ("first", slots[0]), ("second", slots[1])):
        tensor.register_hook(lambda grad, name=name: grads.__setitem__(name, grad))
    last(prefix).sum().backward()
    whole = grads["prefix"]
    assert grads["first"].data_ptr() == whole.data_ptr()
    assert grads["second"].data_ptr() == whole.data_ptr() + 5 * 4
    assert grads["first"].stride() == whole.stride() == grads["second"].stride()


def test_less_is_kept_for_the_backward():
    """A skip connection that something else saves, too, is kept once and not twice."""

    def kept(model):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        assert y.requires_grad
        return sum(storages.values())

    x = image()
    pixels = 4 * x.shape[0] * x.shape[2] * x.shape[3]
    one, other = twins(UNet)
    assert kept(other) - kept(one) == one.base * pixels + 2 * one.base * pixels // 4
    one, other = twins(Dense)
    copies = sum(sum(one.channels[:i]) for i in range(1, len(one.channels)))
    assert kept(other) - kept(one) == (copies - sum(one.channels)) * pixels


# ----------------------------------------------------------------------------------------- every way to write


def bn_of(channels, frozen=False):
    bn = nn.BatchNorm2d(channels)
    with torch.no_grad():
        bn.weight.uniform_(0.5, 1.5)
        bn.bias.uniform_(0.1, 0.5)  # shift > 0: a padded tap is not relu(shift)
        bn.running_mean.uniform_(-1, 1)
    return bn.eval() if frozen else bn


def residual(x):
    return torch.randn(2, 6, *x.shape[2:]).to(x.dtype)


WRITERS = {
    "grouped_conv": (lambda x, w, **kw: GF.grouped_conv(x, w, None, 1, 1, 1, 2, **kw), (6, 4, 3, 3)),
    "stride 2": (lambda x, w, **kw: GF.conv2d(x, w, torch.arange(6).to(x), 2, 1, 1, 2, **kw), (6, 4, 3, 3)),
    "dilated": (lambda x, w, **kw: GF.conv2d(x, w, None, 1, 2, 2, 2, **kw), (6, 4, 3, 3)),
    "winograd": (lambda x, w, **kw: GF.conv2d(x, w, None, 1, 1, **kw), (32, 8, 3, 3)),
    "pointwise_conv": (lambda x, w, **kw: GF.pointwise_conv(x, w, torch.arange(6).to(x), **kw), (6, 8, 1, 1)),
    "pointwise stride": (lambda x, w, **kw: GF.pointwise_conv(x, w, None, 2, **kw), (6, 8, 1, 1)),
    "7x7 on torch": (lambda x, w, **kw: GF.conv2d(x, w, None, 2, 3, **kw), (6, 8, 7, 7)),
    "train": (lambda x, w, **kw: GF.conv_bn_relu(x, w, bn_of(6), None, 1, 1, 1, 2, **kw), (6, 4, 3, 3)),
    "train, no ReLU": (
        lambda x, w, **kw: GF.conv_bn_relu(x, w, bn_of(6), torch.ones(6).to(x), 1, 1, 1, 2, relu=False, **kw),
        (6, 4, 3, 3),
    ),
    "train + residual": (
        lambda x, w, **kw: GF.conv_bn_relu(x, w, bn_of(6), residual=residual(x), **kw), (6, 8, 1, 1),
    ),
    "infer": (lambda x, w, **kw: GF.conv_bn_relu(x, w, bn_of(6, True), None, 1, 1, 1, 2, **kw), (6, 4, 3, 3)),
    "infer + residual": (
        lambda x, w, **kw: GF.conv_bn_relu(x, w, bn_of(6, True), residual=residual(x), **kw), (6, 8, 1, 1),
    ),
    "fuse": (
        lambda x, w, **kw: GF.fuse_modules_forward(x, conv_of(w), bn_of(6), relu=False, **kw), (6, 8, 3, 3),
    ),
    "modules": (
        lambda x, w, **kw: GF.fuse_modules_forward(x, conv_of(w), nn.InstanceNorm2d(6), **kw), (6, 8, 3, 3),
    ),
}  # fmt: skip


def conv_of(weight):
    conv = nn.Conv2d(8, 6, 3, padding=1, bias=False)
    del conv.weight
    conv.weight = weight  # with its gradient
    return conv


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer(name, dtype, layout, grad, nan_filled_memory):
    op, size = WRITERS[name]
    x = image(c=8, dtype=dtype)
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    if layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.cat((x, x), 1).to(memory_format=torch.channels_last)[:, :8]
    results = []
    for concat in (gconv.Concat(3, size[0], 5), None):
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight)]
        torch.manual_seed(2)
        with torch.set_grad_enabled(grad):
            y = op(*leaves) if concat is None else op(*leaves, into=concat[1])
            if concat is not None:
                last = concat.put(2, torch.full((2, 5, *y.shape[2:]), 5.0, dtype=dtype))
                first = concat.put(0, torch.full((2, 3, *y.shape[2:]), 3.0, dtype=dtype))
                whole = concat.read()
                assert whole.data_ptr() == first.data_ptr() == y.data_ptr() - 3 * x.element_size()
                assert (first == 3).all() and (last == 5).all() and torch.equal(whole[:, 3:-5], y)
            if grad:
                (y if concat is None else whole[:, 3:-5]).square().sum().backward()
        results.append((y.detach().contiguous(), *[leaf.grad for leaf in leaves]))
    for actual, want, label in zip(*results, ("y", "dx", "dweight")):
        assert (actual is None) == (want is None) == (not grad and label != "y")
        if want is not None:
            assert_same_bits(actual.contiguous(), want.contiguous(), f"{name}: {label}")


def test_three_dimensions_and_empty_batches():
    conv = gconv.Conv2d(3, 5, 3, padding=1)
    concat, x = gconv.Concat(5), image(1)
    y = conv(x[0], into=concat[0])
    assert y.shape == (5, 8, 12) and torch.equal(concat.read()[0], y) and torch.equal(y, conv(x[0]))
    concat = gconv.Concat(5, 2)
    conv(x[:0], into=concat[0])
    concat.put(1, torch.zeros(0, 2, 8, 12))
    concat.read().sum().backward()
    assert concat.read().shape == (0, 7, 8, 12) and (conv.weight.grad == 0).all()


def test_running_statistics_move_once():
    torch.manual_seed(0)
    one = gconv.ConvBNReLU(3, 5, 3, padding=1, bias=True)
    other = copy.deepcopy(one)
    one(image(), into=gconv.Concat(5, 1)[0])
    other(image())
    assert one.bn.num_batches_tracked == 1
    for name, value in other.bn.named_buffers():
        assert_same_bits(getattr(one.bn, name), value, name)


def test_slots_unpack_and_are_named():
    concat = gconv.Concat(4, 2)
    first, second = concat
    assert (first.index, second.index, concat[-1].index, len(concat)) == (0, 1, 1, 2)
    assert repr(second) == "<slot 1 of Concat(4, 2)>" and repr(gconv.Concat(3)) == "Concat(3)"


# -------------------------------------------------------------------------------------------------- bad input


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) < 160
    return message


@pytest.mark.parametrize("channels", [(), (0,), (3, -1), (2.5,), ("3",), ((3, 4),)], ids=str)
def test_bad_channels(channels):
    with pytest.raises(
        ValueError, match="Concat: channels: want one or more ints of at least 1, got"
    ) as error:
        gconv.Concat(*channels)
    one_line(error)


@pytest.mark.parametrize(
    "x, message",
    [
        (image(c=4), r"slot 1: want \[N, 5, H, W\], got \[2, 4, 8, 12\]"),
        (image(c=5)[0], r"slot 1: want \[N, 5, H, W\], got \[5, 8, 12\]"),
        (image(c=5, n=3), r"slot 1: want \[2, 5, 8, 12\] as of slot 0, got \[3, 5, 8, 12\]"),
        (image(c=5, w=11), r"slot 1: want \[2, 5, 8, 12\] as of slot 0, got \[2, 5, 8, 11\]"),
        (image(c=5).half(), r"slot 1: want dtype torch.float32 as of slot 0, got torch.float16"),
        (image(c=5).to("meta"), r"slot 1: want device cpu as of slot 0, got meta"),
        ([1], r"slot 1: want a tensor, got list"),
    ],
)
@pytest.mark.parametrize("transform", [False, True], ids=["eager", "vmap"])
def test_what_does_not_fit(x, message, transform):
    def function(y):
        concat = gconv.Concat(3, 5)
        concat.put(0, y)
        concat.put(1, x)
        return concat.read()

    if transform:
        function = torch.func.vmap(function)
    with pytest.raises(ValueError, match=message) as error:
        function(image()[None] if transform else image())
    one_line(error)


def test_a_convolution_that_does_not_fit_leaves_the_slot_free():
    conv, concat = gconv.ConvBNReLU(3, 5, 3, padding=1), gconv.Concat(4, 5)
    with pytest.raises(ValueError, match=r"slot 0: want \[N, 4, H, W\], got \[2, 5, 8, 12\]"):
        conv(image(), into=concat[0])
    assert conv.bn.num_batches_tracked == 0
    conv(image(), into=concat[1])
    concat.put(0, image(c=4))
    concat.read()


def test_misuse():
    conv = gconv.Conv2d(3, 4, 3, padding=1)
    concat = gconv.Concat(4, 4, 4)
    conv(image(), into=concat[0])
    with pytest.raises(RuntimeError, match=r"slot 0: want one write, got a second .*new Concat") as error:
        conv(image(), into=concat[0])
    one_line(error)
    with pytest.raises(RuntimeError, match=r"prefix\(3\): want its slots written, slot 1 is not") as error:
        concat.read()
    one_line(error)
    for slots in (0, 4, -1):
        with pytest.raises(ValueError, match=f"prefix: want 1 to 3 slots, got {slots}"):
            concat.prefix(slots)
    with pytest.raises(IndexError, match="slot: want one of 3, got 3"):
        concat[3]
    assert concat.prefix(1).shape == (2, 4, 8, 12)


@pytest.mark.parametrize(
    "into", [torch.zeros(2, 4, 8, 12), gconv.Concat(4), 0], ids=["tensor", "concat", "int"]
)
def test_into_is_a_slot(into):
    weight, x = torch.randn(4, 3, 1, 1), image()
    calls = {
        "grouped_conv": lambda: GF.grouped_conv(x, weight, into=into),
        "pointwise_conv": lambda: GF.pointwise_conv(x, weight, into=into),
        "conv_bn_relu": lambda: gconv.ConvBNReLU(3, 4, 1)(x, into=into),
    }
    for name, call in calls.items():
        with pytest.raises(
            ValueError, match=f"{name}: into: want a slot of a gconv.Concat, such as"
        ) as error:
            call()
        one_line(error)
