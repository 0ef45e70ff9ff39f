"""What the tests of fused blocks share: a stock module and ours side by side, each result held to float64."""

import copy

import checks
import pytest
import torch
from checks import KINK_MARGIN, LAYOUTS, assert_accurate, assert_same_bits, place
from torch import nn
from torch.func import functional_call, grad, vmap

import gconv

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def memory_formats(test):
    """Runs a test for every pair of `x_format` and `weight_format`."""
    for name in ("x", "weight"):
        ids = [f"{name}_{layout}" for layout in FORMATS]
        test = pytest.mark.parametrize(f"{name}_format", FORMATS.values(), ids=ids)(test)
    return test


class FrozenBatchNorm2d(nn.Module):
    """torchvision's and detectron2's: statistics and affine are buffers."""

    def __init__(self, features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(
                name, torch.ones(features) if name in ("weight", "running_var") else torch.zeros(features)
            )

    def forward(self, x):
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).view(1, -1, 1, 1)
        return (x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)).to(
            x.dtype
        )


def randomize(conv, bn, key):
    """Parameters and buffers away from their trivial initial values."""
    gen = checks.generator("parameters", key)
    with torch.no_grad():
        for t in (*conv.parameters(),):
            t.copy_(torch.randn(t.shape, generator=gen) * (2 / t[0].numel()) ** 0.5)
        for name, t in (*bn.named_parameters(), *bn.named_buffers()):
            if name == "running_var":
                t.copy_(torch.rand(t.shape, generator=gen) + 0.5)
            elif t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=gen) * 0.5 + (name == "weight"))


def randomized_twins(stock, key):
    """(stock, ours) of the same random state, of a block of torch's modules."""
    for i, pair in enumerate(stock.all_pairs()):
        randomize(*pair, (key, i))
    ours = copy.deepcopy(stock)
    ours.stock = False
    return stock, ours


# Distance from the kink of an inner ReLU under which rounding may put a value on either side: its gradient
# would be there in one result and not in the other, and neither be wrong.
INNER_MARGIN = {torch.float32: 2e-6, torch.bfloat16: 0.03, torch.float16: 4e-3}


def clear_input(block, channels, size, key, dtype=torch.float32):
    """An input [N, channels, H, W] whose values stay clear of the kinks of `block.inner`, the ReLUs inside:
    a random one, moved by gradient descent for as long as some are near. The last ReLU is compare's
    business."""
    exact = copy.deepcopy(block).double().requires_grad_(False)
    exact.stock, margin, seen = True, INNER_MARGIN[dtype], []
    exact.inner.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().flatten()))
    for attempt in range(50):
        gen = checks.generator("block input", key, attempt)
        x = torch.randn(size[0], channels, *size[1:], generator=gen).double().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=margin)
        for _ in range(100):
            seen.clear()
            with checks.one_thread():
                exact(x.detach().to(dtype).double() + (x - x.detach()))
                distance = torch.cat(seen)
                if distance.min() > margin:
                    return place(x.detach().to(dtype), checks.rotate(LAYOUTS, key)).requires_grad_()
                optimizer.zero_grad()
                (2 * margin - distance).relu().square().sum().backward()
            optimizer.step()
    raise AssertionError("no input is clear of the kinks")


def run(module, x, dz, residual, steps=1):
    """Named results of `steps` calls with their backward: the last output and input gradients, the summed
    parameter gradients and the running statistics."""
    leaf = x.detach().requires_grad_(x.requires_grad)
    extra = None if residual is None else residual.detach().requires_grad_(residual.requires_grad)
    for _ in range(steps):
        z = module(leaf) if extra is None else module(leaf, extra)
        if dz is None:
            return {"z": z.detach()}
        leaf.grad = None
        if extra is not None:
            extra.grad = None
        if z.requires_grad:
            z.backward(dz.to(z.dtype))
    results = {"z": z.detach(), "dx": leaf.grad, "dresidual": None if extra is None else extra.grad}
    results |= {f"d{name}": p.grad for name, p in module.named_parameters()}
    results |= dict(module.named_buffers())
    return results


def assert_same_results(got, want, label=""):
    """Named results equal to the bit."""
    for name, value in want.items():
        if value is not None and value.is_floating_point():
            assert_same_bits(got[name], value, f"{name} {label}")


def assert_repeats(threads, run):
    """The same results from run to run and for any number of threads (a fixture's setter)."""
    results = []
    for number in (2, 2, 1, 3):
        threads(number)
        results.append(run())
    for other in results[1:]:
        assert_same_results(other, results[0])


def reformatted(memory_format, *tensors):
    return [
        None
        if t is None
        else t.detach().contiguous(memory_format=memory_format).requires_grad_(t.requires_grad)
        for t in tensors
    ]


def measure(stock, ours, x, residual, dtype=torch.float32, steps=1, autocast=None, key=""):
    """(float64 results, stock's own for NCHW and for channels_last, ours), each by name."""
    exact_module = copy.deepcopy(stock).double()
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (x, residual)]
    precision = autocast or dtype
    with torch.no_grad(), checks.one_thread():
        z = run(copy.deepcopy(exact_module), wide[0], None, wide[1])["z"]
    dz = torch.randn(z.shape, generator=checks.generator("dz", key, tuple(z.shape)))
    # Where rounding may decide on which side of ReLU a value falls, neither gradient is wrong: none is sent
    # there.
    dz = (
        torch.where(z.abs() < KINK_MARGIN[precision], 0, dz).to(precision) if stock.relu else dz.to(precision)
    )
    with checks.one_thread():
        exact = run(exact_module, wide[0], dz.double(), wide[1], steps)
    cast = torch.autocast("cpu", autocast, enabled=autocast is not None)
    own = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with cast, checks.one_thread():
            own.append(
                run(copy.deepcopy(stock).to(dtype), *reformatted(memory_format, x, dz, residual), steps)
            )
    gconv.backend.reset_counts()
    with cast:
        got = run(ours, x, dz, residual, steps)
    return exact, own, got


def compare(stock, ours, x, residual, dtype=torch.float32, steps=1, autocast=None, key=""):
    """Runs both modules, stock also in float64, and holds ours to the oracle. Returns our results."""
    exact, own, got = measure(stock, ours, x, residual, dtype, steps, autocast, key)
    hold(exact, own, got, autocast or dtype)
    return got


def hold(exact, own, got, precision):
    """Asserts that our results are those of the oracle, in stock's dtypes."""
    for name, want in exact.items():
        if want is None:
            assert got[name] is None, f"{name}: want no gradient"
        elif not want.is_floating_point():
            assert torch.equal(got[name], want), f"{name}: want {want}, got {got[name]}"
        else:
            assert got[name].dtype == own[0][name].dtype, (
                f"{name}: want {own[0][name].dtype}, got {got[name].dtype}"
            )
            statistics = "running" in name
            baselines = [o[name] for o in own]
            assert_accurate(
                got[name],
                want,
                baselines,
                name,
                None if statistics and precision == torch.float32 else precision,
            )


def together(results):
    """Several draws of named results as one."""
    return {n: None if v is None else torch.stack([r[n] for r in results]) for n, v in results[0].items()}


def compare_draws(draws, dtype, autocast=None, steps=1):
    """`compare` of several (stock, ours, x) together: of a few values, some of stock are right by luck."""
    measured = [
        measure(*draw, None, dtype if autocast is None else torch.float32, steps, autocast, i)
        for i, draw in enumerate(draws)
    ]
    exact, own, got = zip(*measured, strict=True)
    own = [together(results) for results in zip(*own, strict=True)]
    hold(together(exact), own, together(got), dtype)
    return got[0]


def assert_close(got, want, tolerance, label=""):
    """Within `tolerance` of the largest wanted value; of a want of zeros, nothing or next to it."""
    if want is None or not want.any():
        assert got is None or got.abs().max() < 1e-3, label
        return
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error < tolerance, f"{label}: {error:.1e}"


def compare_transforms(stock, ours, x, more=()):
    """torch.func's transforms of a loss over both blocks: of the parameters, of x, per sample, twice. `more`
    are functions of that loss, of the parameters and of x, that return a tensor."""
    xs = torch.stack([x, 0.7 * x.flip(2), x.roll(1, 3)])

    def loss_of(block):
        buffers = dict(block.named_buffers())
        return lambda p, x: functional_call(block, (p, buffers), (x,)).mul(0.3).sin().sum()

    parameters = {name: p.detach() for name, p in stock.named_parameters()}
    for i, transform in enumerate((
        lambda f: grad(f)(parameters, x),
        lambda f: vmap(grad(f), (None, 0))(parameters, xs),
        lambda f: {"x": vmap(grad(f, 1), (None, 0))(parameters, xs)},
        lambda f: {"x": grad(lambda x: grad(f, 1)(parameters, x).cos().sum())(x)},
        *(lambda f, m=m: {"more": m(f, parameters, x)} for m in more),
    )):  # fmt: skip
        got, want = transform(loss_of(ours)), transform(loss_of(stock))
        for name, value in want.items():
            assert value.any(), f"{i} {name}: a wanted value of zeros proves nothing"
            assert_close(got[name], value, 2e-3, f"{i} {name}")
