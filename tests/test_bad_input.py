"""Bad input: what torch accepts works the same, what it refuses is refused in one clear line, and nothing
crashes.

The wording is part of the promise: every refusal names the argument and shows what was given.
"""

import itertools
import math
import re

import checks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import assert_accurate
from torch import nn

import gconv

REFUSALS = (ValueError, RuntimeError, TypeError)
X, W, B = torch.randn(2, 8, 6, 7), torch.randn(12, 2, 3, 3), torch.randn(12)


@pytest.fixture(autouse=True)
def silent_fallbacks():
    with gconv.set_policy("silent"):
        yield


def refused(call, *words):
    """`call` raises one line that contains every word."""
    with pytest.raises(REFUSALS) as info:
        call()
    message = str(info.value)
    for word in words:
        assert word in message, f"the message does not contain {word!r}: {message}"
    assert "\n" not in message.strip(), f"more than one line: {message}"


def conv(function, x=X, weight=W, bias=None, stride=1, padding=1, dilation=1, groups=4):
    return function(x, weight, bias, stride, padding, dilation, groups)


# name: (arguments other than the good ones, words of our message). torch refuses every one of them too.
REFUSED = {
    "x of 2 dimensions": ({"x": X[0, 0]}, ("x:", "[6, 7]")),
    "x of 5 dimensions": ({"x": X[None]}, ("x:", "[1, 2, 8, 6, 7]")),
    "x of no dimension": ({"x": torch.ones(())}, ("x:", "[]")),
    "weight of 3 dimensions": ({"weight": W[0]}, ("weight:", "[2, 3, 3]")),
    "weight of 5 dimensions": ({"weight": W[None]}, ("weight:", "[1, 12, 2, 3, 3]")),
    "channels": ({"x": X[:, :7]}, ("7", "4", "[12, 2, 3, 3]")),
    "channels of the weight": (
        {"weight": torch.ones(12, 3, 3, 3)},
        ("weight:", "C/groups = 2", "[12, 3, 3, 3]"),
    ),
    "channels unbatched": ({"x": X[0, :7]}, ("7",)),
    "groups do not divide C": ({"groups": 3}, ("groups", "3")),
    "groups do not divide K": ({"weight": W[:10]}, ("weight:", "groups = 4", "[10, 2, 3, 3]")),
    "groups 0": ({"groups": 0}, ("groups:", "0")),
    "groups negative": ({"groups": -4}, ("groups:", "-4")),
    "no output channel": ({"weight": W[:0]}, ("weight:", "[0, 2, 3, 3]")),
    "bias of another size": ({"bias": B[:11]}, ("bias:", "12", "[11]")),
    "bias of 2 dimensions": ({"bias": B[None]}, ("bias:", "[1, 12]")),
    "bias of no dimension": ({"bias": B[0]}, ("bias:", "[]")),
    "dtype of weight": ({"weight": W.double()}, ("weight:", "float32", "float64")),
    "low dtype of weight": ({"weight": W.bfloat16()}, ("weight:", "float32", "bfloat16")),
    "low dtype of x": ({"x": X.half()}, ("weight:", "float16", "float32")),
    "dtype of bias": ({"bias": B.double()}, ("bias:", "float32", "float64")),
    "float32 bias of bfloat16": (
        {"x": X.bfloat16(), "weight": W.bfloat16(), "bias": B},
        ("bias:", "bfloat16", "float32"),
    ),
    "image smaller than the kernel": ({"x": X[..., :2, :2], "padding": 0}, ("x:", "3x3", "2x2")),
    "image narrower than the kernel": ({"x": X[..., :2], "padding": (2, 0)}, ("x:", "x2")),
    "image smaller than the dilated kernel": ({"dilation": 5}, ("x:", "11x11", "8x9")),
    "image of height 0": ({"x": X[:, :, :0]}, ("x:", "0x7")),
    "image of height 0 with padding": ({"x": X[:, :, :0], "padding": 2}, ("x:",)),
    "stride 0": ({"stride": 0}, ("stride:", "0")),
    "stride negative": ({"stride": -1}, ("stride:", "-1")),
    "one stride negative": ({"stride": (1, -1)}, ("stride:", "(1, -1)")),
    "three strides": ({"stride": (1, 1, 1)}, ("stride:", "(1, 1, 1)")),
    "no stride": ({"stride": ()}, ("stride:", "()")),
    "padding negative": ({"padding": -1}, ("padding:", "-1")),
    "one padding negative": ({"padding": (0, -1)}, ("padding:", "(0, -1)")),
    "three paddings": ({"padding": (1, 1, 1)}, ("padding:", "(1, 1, 1)")),
    "unknown padding": ({"padding": "full"}, ("padding:", "'same'", "'valid'", "'full'")),
    "same with a stride": ({"padding": "same", "stride": 2}, ("padding:", "same", "2")),
    "dilation 0": ({"dilation": 0}, ("dilation:", "0")),
    "dilation negative": ({"dilation": -1}, ("dilation:", "-1")),
    "three dilations": ({"dilation": (1, 1, 1)}, ("dilation:", "(1, 1, 1)")),
    "a huge padding": ({"padding": 2**62}, ("padding",)),
    "stride as a string": ({"stride": "1"}, ("stride", "'1'")),
    "stride as a float": ({"stride": 1.5}, ("stride", "1.5")),
    "stride None": ({"stride": None}, ("stride", "None")),
    "padding as a float": ({"padding": 1.5}, ("padding", "1.5")),
    "padding None": ({"padding": None}, ("padding", "None")),
    "padding with a float": ({"padding": (1.0, 1)}, ("padding",)),
    "dilation as a string": ({"dilation": "1"}, ("dilation", "'1'")),
    "groups as a float": ({"groups": 4.0}, ("groups", "4.0")),
    "groups as a string": ({"groups": "4"}, ("groups", "4")),
    "groups None": ({"groups": None}, ("groups", "None")),
    "x is a list": ({"x": [1.0]}, ("x", "list")),
    "x is None": ({"x": None}, ("x", "None")),
    "x is an array": ({"x": X.numpy()}, ("x", "ndarray")),
    "weight is None": ({"weight": None}, ("weight", "None")),
    "bias is a float": ({"bias": 1.0}, ("bias", "float")),
    "sparse x": ({"x": X.to_sparse()}, ("sparse",)),
    "boolean x": ({"x": X > 0, "weight": W > 0}, ()),
}


@pytest.mark.parametrize("changes, words", REFUSED.values(), ids=list(REFUSED))
def test_conv2d_refuses_what_torch_refuses(changes, words):
    with pytest.raises((*REFUSALS, NotImplementedError)):
        conv(F.conv2d, **changes)
    refused(lambda: conv(gconv.functional.conv2d, **changes), *words)


# torch takes these with a meta tensor among CPU tensors and returns memory nobody has written.
DEVICE_MIX = {
    "weight": {"weight": W.to("meta")}, "bias": {"bias": B.to("meta")}, "x": {"x": X.to("meta")},
}  # fmt: skip


@pytest.mark.parametrize("name", DEVICE_MIX)
def test_conv2d_refuses_a_mix_of_devices(name):
    changes = {"bias": B, **DEVICE_MIX[name]}
    refused(
        lambda: conv(gconv.functional.conv2d, **changes),
        "bias:" if name == "bias" else "weight:",
        "cpu",
        "meta",
    )


ACCEPTED = {
    "unbatched": {"x": X[0]},
    "no input channel": {"x": X[:, :0], "weight": W[:, :0]},
    "zero batch": {"x": X[:0]},
    "pair of strides": {"stride": (2, 1)},
    "list of strides": {"stride": [1, 2]},
    "one stride in a tuple": {"stride": (2,)},
    "torch.Size": {"stride": torch.Size([2, 2]), "padding": torch.Size([1, 0])},
    "stride as numpy integer": {"stride": np.int64(2)},
    "padding as numpy integer": {"padding": np.int32(1)},
    "dilation as numpy integer": {"dilation": np.int64(2)},
    "groups as numpy integer": {"groups": np.int64(4)},
    "stride as tensor": {"stride": torch.tensor(2)},
    "groups as tensor": {"groups": torch.tensor(4)},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "large stride": {"stride": 3},
    "larger than the image": {"stride": 2**40},
    "large padding": {"padding": 5},
    "large dilation": {"dilation": 3, "padding": 3},
    "1x1": {"weight": W[:, :, :1, :1]},
    "1x3": {"weight": W[:, :, :1]},
    "5x5": {"weight": torch.randn(12, 2, 5, 5)},
    "even kernel, same": {"weight": W[:, :, :2, :2], "padding": "same"},
    "float64": {"x": X.double(), "weight": W.double()},
    "float64 with bias": {"x": X.double(), "weight": W.double(), "bias": B.double()},
    "integers": {"x": (8 * X).int(), "weight": (8 * W).int()},
    "complex": {"x": torch.complex(X, X), "weight": torch.complex(W, W)},
    "bfloat16": {"x": X.bfloat16(), "weight": W.bfloat16(), "bias": B.bfloat16()},
    "bias": {"bias": B},
    "sliced x": {"x": torch.randn(3, 9, 9, 9)[1:, 1:, 2:8, 1:8]},
    "transposed x": {"x": X.transpose(2, 3)},
    "expanded x": {"x": X[:1, :1].expand(2, 8, 6, 7)},
    "flipped x": {"x": X.flip(3)},
    "sliced weight": {"weight": torch.randn(24, 4, 5, 3)[::2, 1:3, 1:4]},
    "strided bias": {"bias": torch.randn(24)[::2]},
    "expanded bias": {"bias": B[:1].expand(12)},
    "parameter": {"weight": nn.Parameter(W)},
    "one pixel": {"x": X[..., :1, :1]},
    "mkldnn": {"x": X.to_mkldnn(), "weight": W.to_mkldnn()},
    "meta": {"x": X.to("meta"), "weight": W.to("meta")},
    "NaN": {"x": X.masked_fill(X > 2, math.nan)},
    "infinity": {"x": X.masked_fill(X > 2, math.inf), "weight": W.abs()},
    "huge": {"x": X * 1e30, "weight": W * 1e6},
    "subnormal": {"x": X * 1e-42},
}


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=list(ACCEPTED))
def test_conv2d_accepts_what_torch_accepts(changes):
    want = conv(F.conv2d, **changes)
    got = conv(gconv.functional.conv2d, **changes)
    assert (
        got.shape == want.shape
        and got.dtype == want.dtype
        and got.device == want.device
        and got.layout == want.layout
    )
    if got.device.type == "meta":
        return
    got, want = (t.detach().to_dense() for t in (got, want))
    largest = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    tolerance = {torch.bfloat16: 1e-2}.get(want.dtype, 2e-6)
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * largest, equal_nan=True)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_of_odd_but_good_calls(backend):
    """Zero batch, unbatched and single-pixel input: the gradients have torch's shapes and values."""
    for changes in ({"x": X[:0]}, {"x": X[0]}, {"x": X[..., :1, :1]}, {"stride": 2, "padding": (0, 2)}):
        grads = []
        for function in (F.conv2d, gconv.functional.conv2d):
            x, w, b = (t.detach().clone().requires_grad_() for t in (changes.get("x", X), W, B))
            with gconv.use_backend(backend):
                y = conv(function, **{**changes, "x": x, "weight": w, "bias": b})
            grads.append(torch.autograd.grad(y, (x, w, b), torch.full_like(y, 0.5)))
        for want, got in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


# ------------------------------------------------------------------------------------------------
# conv_bn_relu, ConvBNReLU, batch_norm


def block(**changes):
    options = {"x": X, "weight": W, "bn": nn.BatchNorm2d(12), "padding": 1, "groups": 4} | changes
    return lambda: gconv.functional.conv_bn_relu(**options)


Y = torch.randn(2, 12, 6, 7)
BLOCK = {
    "x of 5 dimensions": ({"x": X[None]}, ("x:", "[1, 2, 8, 6, 7]")),
    "channels": ({"x": X[:, :7]}, ("7",)),
    "groups": ({"groups": 3}, ("groups", "3")),
    "bn of other channels": ({"bn": nn.BatchNorm2d(11)}, ("11", "12")),
    "residual of another shape": ({"residual": Y[:, :, :5]}, ("residual:", "[2, 12, 6, 7]", "[2, 12, 5, 7]")),
    "residual that would broadcast": ({"residual": Y[:1]}, ("residual:", "[2, 12, 6, 7]", "[1, 12, 6, 7]")),
    "residual of another dtype": ({"residual": Y.double()}, ("residual:", "float32", "float64")),
    "residual on another device": ({"residual": Y.to("meta")}, ("residual:", "cpu", "meta")),
    "weight on another device": ({"weight": W.to("meta")}, ("weight:", "cpu", "meta")),
    "dtype of weight": ({"weight": W.double()}, ("weight:", "float32", "float64")),
    "empty output": ({"x": X[..., :2, :2], "padding": 0}, ("x:", "3x3", "2x2")),
    "stride 0": ({"stride": 0}, ("stride:", "0")),
    "one value per channel": ({"x": X[:1, :, :1, :1]}, ("more than 1 value per channel", "[1, 12, 1, 1]")),
}


@pytest.mark.parametrize("changes, words", BLOCK.values(), ids=list(BLOCK))
def test_conv_bn_relu_refuses(changes, words):
    refused(block(**changes), *words)


@pytest.mark.parametrize("changes", [v[0] for v in BLOCK.values()], ids=list(BLOCK))
def test_a_refused_call_changes_no_state(changes):
    """The running statistics and the batch count stay as they were."""
    bn = changes.get("bn", nn.BatchNorm2d(12))
    with pytest.raises(REFUSALS):
        block(**{**changes, "bn": bn})()
    assert torch.equal(bn.running_mean, torch.zeros_like(bn.running_mean)), "running_mean moved"
    assert torch.equal(bn.running_var, torch.ones_like(bn.running_var)), "running_var moved"


BATCH_NORM = {
    "running_mean of other channels": ({"running_mean": torch.zeros(11)}, ("running_mean", "12", "11")),
    "running_var of other channels": ({"running_var": torch.ones(11)}, ("running_var", "12", "11")),
    "weight of other channels": ({"weight": torch.ones(11)}, ("weight", "12", "11")),
    "bias of other channels": ({"bias": torch.ones(11)}, ("bias", "12", "11")),
    "residual of another shape": ({"residual": Y[:, :, :5]}, ("residual:", "[2, 12, 6, 7]", "[2, 12, 5, 7]")),
    "residual of another dtype": ({"residual": Y.double()}, ("residual:", "float32", "float64")),
    "eps negative": ({"eps": -1.0}, ("eps", "-1")),
    "x of 1 dimension": ({"x": Y[0, 0, 0]}, ()),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("changes, words", BATCH_NORM.values(), ids=list(BATCH_NORM))
def test_batch_norm_refuses(changes, words, training):
    options = {
        "x": Y,
        "running_mean": torch.zeros(12),
        "running_var": torch.ones(12),
        "training": training,
    } | changes
    refused(lambda: gconv.functional.batch_norm(**options), *words)


def test_layers_refuse_as_torchs_do():
    for arguments in (
        {"groups": 3},
        {"groups": 0},
        {"padding": "full"},
        {"padding": "same", "stride": 2},
        {"padding_mode": "none"},
    ):
        options = {"in_channels": 8, "out_channels": 12, "kernel_size": 3, **arguments}
        for layer in (nn.Conv2d, gconv.Conv2d, gconv.ConvBNReLU):
            with pytest.raises(ValueError):
                layer(**options)
    layer = gconv.ConvBNReLU(8, 12, 3, padding=1, groups=4)
    refused(lambda: layer(X[:, :6]), "6")
    refused(lambda: layer(X.double()), "float64", "float32")
    refused(lambda: layer(X, Y[..., :6]), "residual:", "[2, 12, 6, 7]", "[2, 12, 6, 6]")
    assert layer(X).shape == Y.shape


# ------------------------------------------------------------------------------------------------
# the C++ ops, called directly: they check for themselves, for nothing may read out of bounds

W1 = torch.randn(12, 8, 1, 1)
ACT2, ACT4, AFFINE, FINISH = torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 12), torch.ones(6, 12)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


GEOMETRY = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 4}
OPS = {
    "grouped_conv_fwd": {
        "x": X, "weight": W, **GEOMETRY, "act": ACT2, "affine": AFFINE, "residual": Y, "relu": True,
    },
    "grouped_conv_fwd_into": {
        "x": X, "weight": W, **GEOMETRY, "act": ACT2, "affine": AFFINE, "residual": Y, "relu": True,
        "want_stats": False, "y": channels_last(Y),
    },
    "grouped_conv_fwd_stats": {"x": X, "weight": W, **GEOMETRY, "act": ACT2},
    "grouped_conv_bwd_input": {
        "dy": Y, "weight": W, "input_size": [2, 8, 6, 7], **GEOMETRY, "y": Y, "finish": FINISH, "x": X,
        "act": ACT4,
    },
    "grouped_conv_bwd_weight": {
        "dy": Y, "x": X, "weight_size": [12, 2, 3, 3], **GEOMETRY, "y": Y, "finish": FINISH, "act": ACT2,
    },
    "grouped_conv_bwd": {
        "dy": Y, "x": X, "weight": W, **GEOMETRY, "y": Y, "finish": FINISH, "act": ACT4, "want_dx": True,
        "want_dweight": True, "channels_last": False,
    },
    "pointwise_conv_fwd_into": {
        "x": X, "weight": W1, "stride": [1, 1], "act": ACT2, "affine": AFFINE, "residual": Y, "relu": True,
        "want_stats": False, "y": channels_last(Y),
    },
    "pointwise_conv_bwd_add": {
        "dy": Y, "x": X, "weight": W1, "stride": [1, 1], "y": Y, "finish": FINISH, "act": ACT4,
        "dx": channels_last(X), "want_dweight": True, "channels_last": False,
    },
    "batch_norm_stats": {"x": X},
    "batch_norm_fold": {
        "mean": torch.ones(8), "var": torch.ones(8), "gamma": torch.ones(8), "beta": torch.ones(8),
        "eps": 1e-5,
    },
    "batch_norm_apply": {"x": X, "affine": ACT2, "residual": X, "residual_affine": ACT2, "relu": True},
    "batch_norm_apply_into": {
        "x": X, "affine": ACT2, "residual": X, "residual_affine": ACT2, "relu": True, "y": channels_last(X),
    },
    "batch_norm_pool": {"x": X, "affine": ACT2},
    "batch_norm_pool_bwd": {
        "dy": X[:, :, :3, :3], "x": X, "act": ACT4, "want_y": True, "dx": channels_last(X),
    },
    "batch_norm_bwd_reduce": {
        "dz": X, "x": X, "mean": torch.ones(8), "rstd": torch.ones(8), "gamma": torch.ones(8),
        "affine": ACT2, "z": None, "want_g": True,
    },
    "batch_norm_bwd_reduce_pair": {
        "dz": X, "z": X, "x": X, "mean": torch.ones(8), "rstd": torch.ones(8), "gamma": torch.ones(8),
        "other_x": X, "other_mean": torch.ones(8), "other_rstd": torch.ones(8), "other_gamma": torch.ones(8),
    },
    "batch_norm_bwd_finish": {
        "sums": ACT2, "mean": torch.ones(8), "rstd": torch.ones(8), "gamma": torch.ones(8), "count": 9,
    },
    "batch_norm_bwd_apply": {"dz": X, "x": X, "finish": torch.ones(6, 8), "z": X, "want_g": True},
    "batch_norm_update_running": {
        "running_mean": torch.ones(8), "running_var": torch.ones(8), "num_batches_tracked": torch.tensor(3),
        "mean": torch.ones(8), "var": torch.ones(8), "shift": torch.ones(8), "count": 9, "momentum": 0.1,
    },
    "conv_bn_relu_fwd_train": {
        "x": X, "weight": W, **GEOMETRY, "gamma": torch.ones(12), "beta": torch.ones(12), "eps": 1e-5,
        "residual": Y, "relu": True, "running_mean": torch.ones(12), "running_var": torch.ones(12),
        "num_batches_tracked": torch.tensor(3), "shift": torch.ones(12), "momentum": 0.1,
    },
    "conv_bn_relu_bwd": {
        "dz": Y, "x": X, "weight": W, **GEOMETRY, "y": Y, "mean": torch.ones(12), "rstd": torch.ones(12),
        "gamma": torch.ones(12), "affine": AFFINE, "z": Y, "want_dx": True, "want_dweight": True,
        "want_g": True, "weight_channels_last": False,
    },
}  # fmt: skip
ACTIVATIONS = ("x", "dx", "dy", "y", "residual", "dz", "z", "other_x")


def wrong_tensors(name, t):
    """(what, tensor) in every way an argument can be wrong."""
    if name == "weight":
        shapes = {
            "rank": t[0],
            "K": t[:10],
            "C/groups": t[:, :1],
            "kernel": F.pad(t, (0, 1)),
            "empty": t[:0],
            "rank 5": t[None],
        }
    elif name in ACTIVATIONS:
        shapes = {
            "rank": t[0],
            "rank 5": t[None],
            "C": t[:, :-1],
            "H": t[:, :, :-1],
            "W": t[..., :-1],
            "N": t[:1],
        }
    elif t.dim() == 2:
        shapes = {"rows": t[:1], "channels": t[:, :-1], "rank": t[0], "rank 3": t[None], "empty": t[:0]}
    elif t.dim() == 0:
        shapes = {"rank": t[None], "empty": t[None][:0]}
    else:
        shapes = {"channels": t[:-1], "rank": t[None], "scalar": t[0], "empty": t[:0]}
    dtypes = {
        "float64": t.double(),
        "int32": t.int(),
        "bool": t.bool(),
        "complex": t + 0j,
        "bfloat16": t.bfloat16(),
    }
    return shapes | dtypes


# Nothing else in these calls says what the size or dtype should be.
NO_CONTRADICTION = {
    *(("batch_norm_stats", "x", what) for what in ("C", "H", "W", "N", "bfloat16")),
    *(("batch_norm_pool", "x", what) for what in ("H", "W", "N", "bfloat16")),
    *(("grouped_conv_fwd_stats", "x", what) for what in ("H", "W", "N")),
    ("grouped_conv_fwd_stats", "x", "bfloat16"),  # beside float32 weights: test_float_weights.py
    ("grouped_conv_fwd_stats", "dilation", "[3, 1]"),
    ("batch_norm_bwd_finish", "count", "1"),
}


def op_cases():
    for op, good in OPS.items():
        for name, value in good.items():
            if isinstance(value, torch.Tensor):
                for what, wrong in wrong_tensors(name, value).items():
                    if (op, name, what) in NO_CONTRADICTION:
                        continue
                    yield op, name, wrong
                yield op, name, value.numpy()
                yield op, name, "x"
            elif isinstance(value, list):
                pairs = [
                    [],
                    [1],
                    [1, 1, 1],
                    [1, -1],
                    [-1, 1],
                    [2**62, 1],
                    [1, 2**62],
                    [-(2**63), 1],
                    ["1", 1],
                    [1.5, 1],
                ]
                pairs += (
                    [[0, 1], [3, 1]]
                    if name in ("stride", "dilation")
                    else [[3, 1]]
                    if name == "padding"
                    else []
                )
                if name.endswith("size"):
                    wrong_sizes = (
                        [2],
                        value[:3],
                        [*value, 1],
                        [-1, *value[1:]],
                        [*value[:3], 0],
                        [2**62, *value[1:]],
                    )
                    pairs = [
                        *wrong_sizes,
                        [*value[:3], 2**62],
                        [value[0], value[1] + 1, *value[2:]],
                        [*value[:2], 9, 9],
                        "2233",
                    ]
                for wrong in pairs:
                    if (op, name, str(wrong)) in NO_CONTRADICTION:
                        continue
                    yield op, name, wrong
            elif name == "groups":
                for wrong in (0, -1, 3, 5, 2**62, -(2**63), 1, 8, "4", 4.5, None):
                    yield op, name, wrong
            elif name == "count":
                for wrong in (1, 0, -1, -(2**63), "9", 4.5, None):
                    if (op, name, str(wrong)) in NO_CONTRADICTION:
                        continue
                    yield op, name, wrong
            else:
                yield op, name, "x"


OP_CASES = list(op_cases())


def verify_refused(ops, op, name, wrong):
    good = OPS[op]
    getattr(ops, op)(**good)
    with pytest.raises(REFUSALS) as info:
        getattr(ops, op)(**{**good, name: wrong})
    message = str(info.value)
    if f"gconv::{op}() Expected a value of type" in message:
        assert f"argument '{name}'" in message, (
            "torch's dispatcher refuses an argument of another Python type, in its words"
        )
    else:
        # Two arguments that contradict each other: either may be the one that is named.
        assert re.fullmatch(r"\w+: \w+: want .+, got .+", message), (
            f"want one line 'op: argument: want ..., got ...': {message}"
        )


@pytest.mark.parametrize("op", OPS)
def test_ops_refuse(ops, op):
    cases = [case for case in OP_CASES if case[0] == op]
    assert cases
    for case in cases:
        verify_refused(ops, *case)


@pytest.mark.parametrize(
    "op", [o for o, a in OPS.items() if sum(isinstance(v, torch.Tensor) for v in a.values()) > 1]
)
def test_ops_refuse_a_tensor_of_another_device(ops, op):
    """A meta tensor among CPU tensors has no memory behind it: an error (as of torch's batch_norm), not a
    result."""
    accepted = []
    for name, value in OPS[op].items():
        if isinstance(value, torch.Tensor):
            try:
                getattr(ops, op)(**{**OPS[op], name: value.to("meta")})
                accepted.append(name)
            except REFUSALS as error:
                assert "meta" in str(error) or "CPU" in str(error), f"{name}: {error}"
    assert not accepted, f"{op} takes on device meta: {', '.join(accepted)}"


PARTNERS = (
    ("grouped_conv_bwd_input", "y", "finish"), ("grouped_conv_bwd_input", "finish", "y"),
    ("grouped_conv_bwd_input", "x", "act"), ("grouped_conv_bwd_input", "act", "x"),
    ("grouped_conv_bwd_weight", "y", "finish"), ("grouped_conv_bwd_weight", "finish", "y"),
)  # fmt: skip


@pytest.mark.parametrize("op, missing, left", PARTNERS)
def test_ops_refuse_one_of_two_that_belong_together(ops, op, missing, left):
    refused(lambda: getattr(ops, op)(**{**OPS[op], missing: None}), op, missing, left)


NEEDED = ("x", "dy", "weight", "dz", "mean", "finish", "running_mean", "running_var")


@pytest.mark.parametrize("op, name", [(o, n) for o in OPS for n in OPS[o] if n in NEEDED])
def test_ops_refuse_none_for_what_they_need(ops, op, name):
    if op == "grouped_conv_bwd_input" and name == "x":
        refused(lambda: getattr(ops, op)(**{**OPS[op], name: None}), "act", "x")
        return
    with pytest.raises((*REFUSALS, NotImplementedError)):
        getattr(ops, op)(**{**OPS[op], name: None})


VECTORS = [
    (o, n) for o, a in OPS.items() for n, v in a.items() if isinstance(v, torch.Tensor) and 0 < v.dim() < 3
]


@pytest.mark.parametrize("op, name", VECTORS)
def test_ops_never_misread_a_strided_vector(ops, op, name):
    """A per-channel table that is a view: refused, or read as what it is."""
    good = OPS[op]
    values = torch.rand(good[name].shape, generator=checks.generator(op, name)) + 0.5
    view = torch.stack([values, values + 7], -1)[..., 0]
    assert not view.is_contiguous()
    want = getattr(ops, op)(**{**good, name: values})
    try:
        got = getattr(ops, op)(**{**good, name: view})
    except REFUSALS as error:
        assert name in str(error) and "contiguous" in str(error)
        return
    for a, b in zip(
        (got,) if isinstance(got, torch.Tensor) else got,
        (want,) if isinstance(want, torch.Tensor) else want,
        strict=True,
    ):
        checks.assert_same_bits(a, b)


def test_ops_refuse_more_memory_than_there_is(ops):
    """Sizes whose products pass 2^63 must not wrap round to a small allocation."""
    huge = torch.ones(()).expand(2**40, 8, 4, 4)
    for n, h in ((2**40, 4), (2**20, 2**30), (2**55, 4)):
        x = torch.ones(()).expand(n, 8, 4, h)
        with pytest.raises(REFUSALS):
            ops.grouped_conv_fwd(x, W, [1, 1], [1, 1], [1, 1], 4, None, None, None, False)
    with pytest.raises(REFUSALS):
        ops.batch_norm_apply(huge, ACT2, None, None, False)
    dy = torch.ones(()).expand(2**40, 12, 4, 4)
    with pytest.raises(REFUSALS):
        ops.grouped_conv_bwd_input(dy, W, [2**40, 8, 4, 4], [1, 1], [1, 1], [1, 1], 4, None, None, None, None)


def test_ops_refuse_other_layouts_and_devices(ops):
    sparse, mkldnn = X.to_sparse(), X.to_mkldnn()
    for x in (sparse, mkldnn, torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)):
        with pytest.raises((*REFUSALS, NotImplementedError)):
            ops.grouped_conv_fwd(x, W, [1, 1], [1, 1], [1, 1], 4, None, None, None, False)
        with pytest.raises((*REFUSALS, NotImplementedError)):
            ops.batch_norm_apply(x, ACT2, None, None, False)
    with pytest.raises((*REFUSALS, NotImplementedError)):
        ops.grouped_conv_fwd(X, W.to_sparse(), [1, 1], [1, 1], [1, 1], 4, None, None, None, False)


def test_ops_take_a_largest_dilation(ops):
    """A dilation at the end of its range with the padding to match is still an empty output, computed without
    overflow."""
    for dilation in (2**31 - 1, 2**30):
        with pytest.raises(REFUSALS):  # an output of 2^64 pixels
            padding = [2 * dilation, 2 * dilation]
            ops.grouped_conv_fwd(X, W, [1, 1], padding, [dilation] * 2, 4, None, None, None, False)
        refused(
            lambda d=dilation: ops.grouped_conv_fwd(X, W, [1, 1], [2, 2], [d, d], 4, None, None, None, False),
            "grouped_conv_fwd",
        )


def test_ops_survive_random_calls(ops):
    """A thousand calls with arguments drawn from good and bad ones: each returns or raises, and what returns
    is right."""
    gen = checks.generator("random calls")

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=gen))]

    accepted = 0
    for _ in range(1000):
        groups = pick([1, 2, 3, 4])
        channels = groups * pick([1, 2, 3]) + pick([0, 0, 0, 0, 1])
        x = torch.randn(
            pick([0, 1, 2]), channels, pick([0, 1, 3, 5, 6, 8]), pick([2, 4, 5, 7]), generator=gen
        )
        w = torch.randn(
            groups * pick([1, 2, 3]),
            pick([channels // groups] * 4 + [2]),
            3,
            pick([3] * 7 + [1]),
            generator=gen,
        )
        geometry = [
            [pick(v), pick(v)]
            for v in (
                [1, 1, 1, 1, 2, 2, 2, 2, 3, 0],
                [0, 0, 1, 1, 1, 2, 2, 2, 3, -1],
                [1, 1, 1, 1, 1, 1, 2, 2, 3, 0],
            )
        ]
        args = (x, w, *geometry, groups)
        try:
            y = ops.grouped_conv_fwd(*args, None, None, None, False)
        except REFUSALS as error:
            assert "grouped_conv_fwd: " in str(error)
            # What we refuse is bad, or beyond the kernels' range.
            (s, p, d) = geometry
            if (
                max(s) <= 2
                and max(p) <= 2
                and w.shape[3] == 3
                and min(*s, *d) > 0
                and min(p) >= 0
                and x.shape[2] > 0
            ):
                with pytest.raises(REFUSALS):
                    F.conv2d(*args[:2], None, *geometry, groups)
            continue
        accepted += 1
        exact = F.conv2d(x.double(), w.double(), None, *geometry, groups)
        assert_accurate(y, exact, F.conv2d(x, w, None, *geometry, groups), str(args[2:]))
    assert accepted > 100, f"only {accepted} calls were good: the mix proves little"


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=2)))
def test_inputs_that_need_gradients_or_are_inference_tensors(flags):
    """Inference tensors and leaf parameters mix as they do in torch."""
    inference, needs_grad = flags
    with torch.inference_mode(inference):
        x = X.clone()
    w = W.clone().requires_grad_(needs_grad)
    results = []
    for function in (F.conv2d, gconv.functional.conv2d):
        try:
            results.append(conv(function, x=x, weight=w).detach())
        except RuntimeError:
            results.append(None)
    if results[0] is not None:
        torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)
