"""gconv.Concat: the values and gradients of torch.cat, without its copy; misuse is an error, never a wrong
result."""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from checks import assert_accurate, assert_same_bits
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gconv
from gconv import functional as GF

pytestmark = pytest.mark.usefixtures("ops")


class CatOfCopies:
    """What Concat computes, by torch.cat: the twin of every test here."""

    def __init__(self, *channels):
        self.slots = [None] * len(channels)

    def __getitem__(self, index):
        return self, index

    def put(self, index, x):
        self.slots[index] = x
        return x

    def prefix(self, slots):
        return torch.cat(self.slots[:slots], 1)

    def read(self):
        return self.prefix(len(self.slots))


def write(layer, into, *args):
    """layer(*args, into=into), or the same in a CatOfCopies."""
    if isinstance(into[0] if isinstance(into, tuple) else into, CatOfCopies):
        concat, index = into
        return concat.put(index, layer(*args))
    return layer(*args, into=into)


class UNet(nn.Module):
    """Two levels; the skip connections are read by a pooling, too."""

    def __init__(self, concat=gconv.Concat, base=8):
        super().__init__()
        self.concat, self.base = concat, base
        self.down1 = gconv.ConvBNReLU(3, base, 3, padding=1)
        self.down2 = gconv.ConvBNReLU(base, 2 * base, 3, padding=1, groups=4)
        self.middle = gconv.ConvBNReLU(2 * base, 2 * base, 3, padding=1)
        self.up2 = gconv.ConvBNReLU(4 * base, base, 3, padding=1, groups=2)
        self.up1 = gconv.ConvBNReLU(2 * base, base, 3, padding=1)
        self.head = gconv.Conv2d(base, 5, 1)

    def forward(self, x):
        outer, inner = self.concat(self.base, self.base), self.concat(2 * self.base, 2 * self.base)
        skip1 = write(self.down1, outer[0], x)
        skip2 = write(self.down2, inner[0], F.max_pool2d(skip1, 2))
        y = self.middle(F.max_pool2d(skip2, 2))
        inner.put(1, F.interpolate(y, scale_factor=2))
        outer.put(1, F.interpolate(self.up2(inner.read()), scale_factor=2))
        return self.head(self.up1(outer.read()))


class Dense(nn.Module):
    """A dense block by hand (Huang et al. 2017): each layer reads all slots before its own."""

    def __init__(self, concat=gconv.Concat, growth=4, layers=4):
        super().__init__()
        self.concat, self.channels = concat, (6, *[growth] * layers)
        widths = [sum(self.channels[: i + 1]) for i in range(layers)]
        self.stem = gconv.Conv2d(3, 6, 3, padding=1)
        self.bottlenecks = nn.ModuleList(gconv.ConvBNReLU(width, 8, 1) for width in widths)
        self.convs = nn.ModuleList(gconv.Conv2d(8, growth, 3, padding=1, bias=False) for _ in widths)

    def forward(self, x):
        concat = self.concat(*self.channels)
        write(self.stem, concat[0], x)
        for i, (bottleneck, conv) in enumerate(zip(self.bottlenecks, self.convs), 1):
            write(conv, concat[i], bottleneck(concat.prefix(i)))
        return concat.read()


def twins(model, **kwargs):
    torch.manual_seed(0)
    one = model(**kwargs)
    other = copy.deepcopy(one)
    other.concat = CatOfCopies
    return one, other


def step(model, x):
    """(output, dx, gradients and buffers by name) of a forward and backward."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y, memory_format=torch.contiguous_format))
    state = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return y.detach(), x.grad, state


def assert_same_step(one, other, x):
    (y, dx, state), (want_y, want_dx, want_state) = step(one, x), step(other, x)
    assert_same_bits(y.contiguous(), want_y.contiguous(), "output")
    assert_same_bits(dx.contiguous(), want_dx.contiguous(), "dx")
    assert state.keys() == want_state.keys()
    for name, value in want_state.items():
        if value is None:
            assert state[name] is None
        else:
            assert_same_bits(state[name].contiguous(), value.contiguous(), name)


def image(n=2, c=3, h=8, w=12, dtype=torch.float32, seed=3):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


def residual(k=6, h=8, w=12):
    return torch.randn(2, k, h, w)


WRITERS = {
    "grouped_conv": (lambda x, w, **kw: GF.grouped_conv(x, w, None, 1, 1, 1, 2, **kw), (6, 4, 3, 3)),
    "stride 2": (lambda x, w, **kw: GF.conv2d(x, w, torch.arange(6.0), 2, 1, 1, 2, **kw), (6, 4, 3, 3)),
    "dilated": (lambda x, w, **kw: GF.conv2d(x, w, None, 1, 2, 2, 2, **kw), (6, 4, 3, 3)),
    "winograd": (lambda x, w, **kw: GF.conv2d(x, w, None, 1, 1, **kw), (32, 8, 3, 3)),
    "pointwise_conv": (lambda x, w, **kw: GF.pointwise_conv(x, w, torch.arange(6.0), **kw), (6, 8, 1, 1)),
    "pointwise stride": (lambda x, w, **kw: GF.pointwise_conv(x, w, None, 2, **kw), (6, 8, 1, 1)),
    "7x7 on torch": (lambda x, w, **kw: GF.conv2d(x, w, None, 2, 3, **kw), (6, 8, 7, 7)),
    "train": (lambda x, w, **kw: GF.conv_bn_relu(x, w, bn_of(6), None, 1, 1, 1, 2, **kw), (6, 4, 3, 3)),
    "train, no ReLU": (
        lambda x, w, **kw: GF.conv_bn_relu(x, w, bn_of(6), torch.ones(6), 1, 1, 1, 2, relu=False, **kw),
        (6, 4, 3, 3),
    ),
    "train + residual": (
        lambda x, w, **kw: GF.conv_bn_relu(x, w, bn_of(6), residual=residual(), **kw), (6, 8, 1, 1),
    ),
    "infer": (lambda x, w, **kw: GF.conv_bn_relu(x, w, bn_of(6, True), None, 1, 1, 1, 2, **kw), (6, 4, 3, 3)),
    "infer + residual": (
        lambda x, w, **kw: GF.conv_bn_relu(x, w, bn_of(6, True), residual=residual(), **kw), (6, 8, 1, 1),
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
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer(name, layout, grad, nan_filled_memory):
    op, size = WRITERS[name]
    x, weight = image(c=8), torch.randn(size, generator=torch.Generator().manual_seed(1))
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
                last = concat.put(2, torch.full((2, 5, *y.shape[2:]), 5.0))
                first = concat.put(0, torch.full((2, 3, *y.shape[2:]), 3.0))
                whole = concat.read()
                assert whole.data_ptr() == first.data_ptr() == y.data_ptr() - 12
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


# -------------------------------------------------------------------------------------------------- gradients


def test_gradients_of_several_readers_add_up():
    results = []
    for concat in (gconv.Concat(2, 3, 1), CatOfCopies(2, 3, 1)):
        x = image(c=3, dtype=torch.float64).requires_grad_()
        slot = concat.put(0, x[:, :2] * 2)
        concat.put(1, x.sin())
        first = concat.prefix(2)
        concat.put(2, first.sum(1, keepdim=True).square())  # after a prefix is read
        loss = (first * 3).sum() + concat.prefix(2).square().sum() + concat.read().cos().sum() + slot.sum()
        loss.backward()
        results.append(x.grad)
    assert torch.allclose(*results, rtol=1e-12)


def test_a_slot_nobody_reads_and_parts_without_gradient():
    x, weight = image(), torch.randn(4, 3, 1, 1, requires_grad=True)
    concat = gconv.Concat(3, 4, 4)
    constant = concat.put(0, x)
    concat.put(1, GF.pointwise_conv(x, weight))
    unread = GF.pointwise_conv(x, weight, into=concat[2])
    prefix = concat.prefix(2)
    assert not constant.requires_grad and prefix.requires_grad and unread.requires_grad
    prefix.sum().backward()
    want = torch.autograd.grad(F.conv2d(x, weight).sum(), weight)[0]
    assert torch.allclose(weight.grad, want)
    assert not concat.prefix(1).requires_grad


def test_gradcheck_of_any_order():
    def function(a, b):
        concat = gconv.Concat(2, 3)
        slot = concat.put(1, b * b)
        concat.put(0, a.sin())
        return concat.read() * concat.prefix(2).cos(), concat.prefix(1), slot

    args = [torch.randn(2, c, 2, 3, dtype=torch.float64, requires_grad=True) for c in (2, 3)]
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


def test_batched_gradients():
    x = torch.randn(1, 2, 2, 2, requires_grad=True)
    concat = gconv.Concat(2, 2)
    concat.put(0, x * 2)
    concat.put(1, x * 3)
    y = concat.read()
    eye = torch.eye(y.numel()).view(-1, *y.shape)
    (jacobian,) = torch.autograd.grad(y, x, eye, is_grads_batched=True)
    jacobian = jacobian.reshape(16, 8)
    assert torch.equal(jacobian, torch.cat((2 * torch.eye(8), 3 * torch.eye(8))))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_double_backward_on_the_kernels(training):
    results = []
    for model in twins(UNet):
        model.train(training)
        x = image().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        results.append((x.grad, *[p.grad for p in model.parameters() if p.grad is not None]))
    assert len(results[0]) == len(results[1]) > 10
    for actual, want in zip(*results):
        assert torch.allclose(actual, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


# ---------------------------------------------------------------------------------------- in-place operations


# What torch says of a saved tensor that has another version now; the second of a saved prefix.
COUNTER = "modified by an inplace operation|another view of its base has been modified inplace"


def saved():
    """A Concat whose first slot a convolution has saved; the second is written after that."""
    x = image().requires_grad_()
    concat = gconv.Concat(4, 5)
    conv, reader = gconv.Conv2d(3, 4, 3, padding=1), gconv.Conv2d(4, 5, 3, padding=1)
    first = conv(x, into=concat[0])
    second = reader(first, into=concat[1])
    return SimpleNamespace(first=first, second=second, prefix=concat.read())


def test_writing_a_slot_spoils_nothing():
    F.conv2d(saved().prefix, torch.randn(2, 9, 1, 1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("victim", ["first", "second", "prefix"])
@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
def test_what_spoils_saved_values_raises(victim, recorded):
    tensors = saved()
    y = F.conv2d(tensors.prefix, torch.randn(2, 9, 1, 1, requires_grad=True))
    tensor = getattr(tensors, victim)
    if recorded and victim == "prefix":
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            tensor.mul_(2)
    with torch.set_grad_enabled(recorded and victim != "prefix"):
        tensor.mul_(2)
    with pytest.raises(RuntimeError, match=COUNTER):
        y.sum().backward()


@pytest.mark.parametrize("alias", [lambda t: t.detach(), lambda t: t[:, 1:3], lambda t: t.view_as(t)])
def test_views_of_slots_share_the_counter(alias):
    tensors = saved()
    y = F.conv2d(tensors.prefix, torch.randn(2, 9, 1, 1, requires_grad=True))
    with torch.no_grad():
        alias(tensors.first).zero_()
    with pytest.raises(RuntimeError, match=COUNTER):
        y.sum().backward()


def test_a_slot_may_be_changed_before_anyone_reads_it():
    results = []
    for concat in (gconv.Concat(3, 2), CatOfCopies(3, 2)):
        x = image().requires_grad_()
        concat.put(1, x[:, :2] * 2)
        slot = concat.put(0, x * 3)
        slot.sin_()
        y = concat.read()
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for actual, want in zip(*results):
        assert torch.equal(actual, want)


def test_a_slot_changed_after_it_was_read_raises():
    """Nothing but the prefix knows: its values are others than its history says."""
    tensors = saved()
    tensors.second.relu_()
    with pytest.raises(RuntimeError, match=COUNTER):
        tensors.prefix.sum().backward()


def test_a_changed_prefix_is_refused_or_raises():
    prefix = saved().prefix
    with pytest.raises(RuntimeError, match="modified inplace"):
        F.relu(prefix, inplace=True)
    with torch.no_grad():
        prefix.relu_()
    with pytest.raises(RuntimeError, match="inplace"):
        (prefix * 2).sum().backward()


@pytest.mark.parametrize("which", ["slot", "prefix"])
def test_gradients_cannot_be_brought_in_by_the_back_door(which):
    """In-place by a tensor with gradients, where slots and prefix have none: the other would not know."""
    concat, w = gconv.Concat(3, 1), torch.ones(1, requires_grad=True)
    slot = concat.put(0, image())
    prefix = concat.prefix(1)
    with pytest.raises(RuntimeError, match="modified inplace"):
        (slot if which == "slot" else prefix).mul_(w)
    slot.mul_(2)  # without gradients it is plain memory
    assert torch.equal(prefix, 2 * image())


# -------------------------------------------------------------------------------------- compilers, transforms


def test_compile_is_cat():
    one, other = (m.eval() for m in twins(UNet))
    torch.compiler.reset()
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    x, x2 = image().requires_grad_(), image().requires_grad_()
    y, want = compiled(x), other(x2)
    y.square().sum().backward()
    want.square().sum().backward()
    assert torch.allclose(y, want, atol=1e-5) and torch.allclose(x.grad, x2.grad, rtol=1e-4, atol=1e-4)


def test_a_concat_that_crosses_into_compiled_code():
    concat, x = gconv.Concat(3, 3), image().requires_grad_()
    concat.put(0, x * 2)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def rest(concat, x):
        concat.put(1, x * 3)
        return concat.read()

    y = rest(concat, x)
    with gconv.trace() as calls:
        again = concat.read()
    assert [row.kernel for row in calls] == ["torch.cat"] and "transform" in calls.rows[0].reason
    assert torch.equal(y, torch.cat((2 * x, 3 * x), 1)) and torch.equal(again, y)
    (y + again).sum().backward()
    assert (x.grad == 10).all()


def test_export_and_fx_and_jit_trace():
    one, other = (m.eval() for m in twins(UNet))
    x = image()
    want = other(x)
    exported = torch.export.export(one, (x,))
    assert torch.allclose(exported.module()(x), want, atol=1e-5)
    graph = torch.fx.symbolic_trace(one)
    assert "torch.cat" in graph.code and torch.equal(graph(x), want)
    traced = torch.jit.trace(one, (x,), check_trace=False)
    other_x = image(n=3, seed=9)
    assert torch.allclose(traced(other_x), other(other_x), atol=1e-5)


def test_layers_still_script():
    for layer in (gconv.Conv2d(3, 4, 3, padding=1), gconv.ConvBNReLU(3, 4, 3, padding=1).eval()):
        assert torch.allclose(torch.jit.script(layer)(image()), layer(image()), atol=1e-5)


def test_function_transforms():
    one, other = (m.eval() for m in twins(Dense))
    x = image()

    def loss(model):
        def of(parameters, x):
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        return of

    gradients = []
    for model in (one, other):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        per_sample = torch.func.vmap(torch.func.grad(loss(model)), (None, 0))
        gradients.append(per_sample(parameters, x))
    for name, want in gradients[1].items():
        assert torch.equal(gradients[0][name], want), name
    with gconv.trace() as calls:
        torch.func.grad(lambda x: one(x).sum())(x)
    rows = [row for row in calls if row.kernel == "torch.cat"]
    assert rows and all(row.reason == "by design: a function transform" for row in rows)


def test_forward_mode():
    def function(x):
        concat = gconv.Concat(3, 3)
        concat.put(0, x.sin())
        concat.put(1, x * 2)
        return concat.read()

    x, tangent = image(), image(seed=4)
    _, dy = torch.func.jvp(function, (x,), (tangent,))
    assert torch.equal(dy, torch.cat((x.cos() * tangent, 2 * tangent), 1))
    with forward_ad.dual_level():
        dy = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
        assert torch.equal(dy, torch.cat((x.cos() * tangent, 2 * tangent), 1))


def test_trace_and_explain_show_copies():
    model = twins(UNet)[0]
    with gconv.trace() as calls:
        model(image())
    copies = [row for row in calls if row.kernel == "torch.copy_"]
    assert [row.shape for row in copies] == [(2, 16, 4, 6), (2, 8, 8, 12)]
    assert all(row.reason == "by design: copied into a slot of Concat" for row in copies)
    assert "torch.cat" not in [row.kernel for row in calls]
    explained = gconv.explain(model, (2, 3, 8, 12))
    assert [row.kernel for row in explained] == [row.kernel for row in calls]
    with gconv.use_backend("torch"), gconv.trace() as calls:
        model(image())
    assert sum(row.calls for row in calls if row.kernel == "torch.copy_") == 4


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
