"""Pairs of modules run fused, or one by one where fusing would change something; odd batch norms beside
torch's."""

import pytest
import torch
from torch import nn
from twins import INPUT, close, twins, values

import gconv
from gconv.functional import fuse_modules_forward

# -------------------------------------------------------------------------------- modules that must be called


def calls_of(conv, bn, x=None, **kwargs):
    with gconv.trace() as t:
        z = fuse_modules_forward(values(*INPUT) if x is None else x, conv, bn, **kwargs)
    return z, [(row.kernel, row.reason) for row in t]


@pytest.mark.parametrize("child", ["conv", "bn"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_children_run(ops, child, kind):
    modules = {"conv": gconv.Conv2d(4, 4, 3, padding=1), "bn": nn.BatchNorm2d(4)}
    seen = []
    handle = getattr(modules[child], f"register_{kind}_hook")(lambda *args: seen.append(kind))
    z, calls = calls_of(**modules, x=values(*INPUT).requires_grad_())
    z.sum().backward()
    assert seen == [kind]
    assert ("modules", f"called one by one: {child}: has hooks") in calls
    handle.remove()
    assert calls_of(**modules)[1] == [("cpu.conv_bn_relu", None)]


def test_foreign_modules_are_called(ops):
    conv, bn = gconv.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    spectral = nn.utils.parametrizations.spectral_norm(gconv.Conv2d(4, 4, 3, padding=1)).eval()
    doubled = nn.BatchNorm2d(4)
    doubled.forward = lambda x: x * 2
    for pair, reason in (
        ((conv, nn.SyncBatchNorm(4).eval()), "bn: want BatchNorm2d or FrozenBatchNorm2d, got SyncBatchNorm"),
        ((conv, nn.GroupNorm(2, 4)), "bn: want BatchNorm2d or FrozenBatchNorm2d, got GroupNorm"),
        ((nn.Sequential(conv), bn), "conv: want Conv2d, got Sequential"),
        ((spectral, bn), "conv: want Conv2d, got ParametrizedConv2d"),
        ((conv, doubled), "bn: its forward is replaced"),
    ):
        bn.reset_running_stats()
        z, calls = calls_of(*pair, residual=values(2, 4, 6, 5))
        assert calls[-1] == ("modules", f"called one by one: {reason}")
        bn.reset_running_stats()
        close(z, torch.relu(pair[1](pair[0](values(*INPUT))) + values(2, 4, 6, 5)))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_padding_modes_are_fused(ops, mode, padding):
    conv, bn = gconv.Conv2d(4, 4, 3, padding=padding, groups=2, padding_mode=mode), nn.BatchNorm2d(4)
    z, calls = calls_of(conv, bn)
    assert calls == [("cpu.conv_bn_relu", None)]
    close(z, torch.relu(nn.BatchNorm2d(4)(nn.Conv2d.forward(conv, values(*INPUT)))))


@pytest.mark.parametrize(
    "options, kernels, reason",
    [
        ({"kernel_size": 1, "stride": 2}, ["cpu.conv_bn_relu"], None),
        (
            {"kernel_size": 1, "groups": 2},
            ["torch.conv2d", "cpu.batch_norm"],
            "by design: groups: want 1 with a 1x1 kernel, got 2",
        ),
        (
            {"kernel_size": 5},
            ["torch.conv2d", "cpu.batch_norm"],
            "by design: kernel_size: want 3x3 or 1x1, got 5x5",
        ),
    ],
)
def test_a_convolution_that_is_not_3x3(ops, options, kernels, reason):
    conv, bn = nn.Conv2d(4, 6, **options), nn.BatchNorm2d(6)
    shape = conv(values(*INPUT)).shape
    z, calls = calls_of(conv, bn, residual=values(*shape))
    assert [kernel for kernel, _ in calls] == kernels and calls[0][1] == reason
    close(z, torch.relu(nn.BatchNorm2d(6)(conv(values(*INPUT))) + values(*shape)))


# ------------------------------------------------------------------------------- the state of a batch norm


def test_running_statistics_after_a_1x1_convolution(ops):
    ours, stock = nn.BatchNorm2d(6, momentum=None), nn.BatchNorm2d(6, momentum=None)
    conv = nn.Conv2d(4, 6, 1)
    for step in range(3):
        x = values(*INPUT, seed=step)
        close(fuse_modules_forward(x, conv, ours, None, False), stock(conv(x)))
    for a, b in zip(ours.buffers(), stock.buffers()):
        torch.testing.assert_close(a, b)


def test_buffers_in_bfloat16(ops):
    ours, stock = twins()
    for block in (ours, stock):
        block.to(torch.bfloat16)
    with torch.no_grad():
        a, b = ours(values(*INPUT).bfloat16()), stock(values(*INPUT).bfloat16())
    close(a.float(), b.float(), 3e-2)
    for (name, p), (_, q) in zip(ours.named_buffers(), stock.named_buffers()):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-2, msg=name)


def test_one_buffer_missing_is_torchs_business(ops):
    for training in (True, False):
        outcomes = []
        for block in twins():
            block.bn.running_var = None
            block.train(training)
            try:
                outcomes.append(block(values(*INPUT)))
            except (RuntimeError, ValueError) as error:
                outcomes.append(type(error))
        assert type(outcomes[0]) is type(outcomes[1])
        if isinstance(outcomes[0], torch.Tensor):
            close(*outcomes)
