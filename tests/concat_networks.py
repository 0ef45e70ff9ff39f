"""Networks that concatenate, by gconv.Concat and by torch.cat: the twins of its tests."""

import copy

import torch
import torch.nn.functional as F
from checks import assert_same_bits
from torch import nn

import gconv


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
