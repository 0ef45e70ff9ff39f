"""The dense block against stock modules: outputs, every gradient, running statistics, and what runs where."""

import copy
import itertools

import checks
import pytest
import torch
import torch.nn.functional as F
from checks import DTYPES, LAYOUTS, assert_accurate, assert_same_bits, place
from dense_blocks import BLOCKS, SMALL_BLOCKS, assert_shared, block_input, case_id, reference_stages, twins
from fused_checks import assert_repeats, assert_same_results, compare, compare_draws, memory_formats, run
from torch import nn

import gconv
from gconv import dense_block as dense_module
from gconv import dense_stages
from gconv.functional import dense_block

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

blocks = pytest.mark.parametrize("case", BLOCKS, ids=case_id)
small_blocks = pytest.mark.parametrize("case", SMALL_BLOCKS, ids=case_id)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@blocks
@modes
def test_every_result_in_float32(isa, case, training):
    """Three steps: running statistics move once in each."""
    shape, options, size = case
    stock, ours = twins(str(case), *shape, training=training, **options)
    got = compare(stock, ours, block_input(stock, size, str(case)), None, steps=3, key=str(case))
    assert_shared(3)
    assert all(got[name] is not None for name in got if name != "dresidual")
    assert all(int(got[n]) == 3 * training for n in got if n.endswith("num_batches_tracked"))


@blocks
@modes
def test_what_is_kept_does_not_change_a_bit(isa, case, training):
    shape, options, size = case
    results = []
    for memory in ("shared", "ultra"):
        _, ours = twins(str(case), *shape, training=training, memory=memory, **options)
        x = torch.randn(size[0], shape[0], *size[1:], generator=checks.generator("kept", size))
        dz = torch.randn(copy.deepcopy(ours)(x).shape, generator=checks.generator("kept dz", size))
        results.append(run(ours, x.requires_grad_(), dz, None))
    assert_same_results(*results)


def draws(case, dtype, training):
    """(stock, ours, x) with other weights and inputs each time."""
    shape, options, size = case
    for draw in range(8):
        key = (str(case), draw)
        stock, ours = twins(key, *shape, training=training, **options)
        yield stock, ours, block_input(stock, size, key, dtype)


@small_blocks
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=checks.dtype_name)
@modes
def test_every_result_in_low_precision(ops, case, dtype, training):
    low = [(stock.to(dtype), ours.to(dtype), x) for stock, ours, x in draws(case, dtype, training)]
    compare_draws(low, dtype)
    assert_shared()


@small_blocks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=checks.dtype_name)
@modes
def test_autocast(ops, case, dtype, training):
    """x as a layer before would leave it."""
    got = compare_draws(list(draws(case, dtype, training)), dtype, autocast=dtype)
    assert got["z"].dtype == dtype and got["dlayers.0.conv1.weight"].dtype == torch.float32
    assert_shared()


# --------------------------------------------------------------------------------- the algebra, in float64


@pytest.fixture
def exact_stages(monkeypatch):
    """The stages on references, taking float64, in the place of the kernels."""
    reference_stages(monkeypatch)


def other_norms(block):
    """eps and momentum of their own."""
    for i, (_, norm) in enumerate(block.all_pairs()):
        norm.eps, norm.momentum = 10.0 ** -(2 + i % 4), 0.1 * (i + 1)


def freeze_some(block):
    """The first normalisation of one layer, the second of another, that of the end."""
    block.layers[1].norm1.eval()
    block.layers[2].norm2.eval()
    block.norm.eval()


# name: (options, training, what is done to a block)
SETTINGS = {
    "train": ({}, True, None),
    "eps and momentum": ({}, True, other_norms),
    "cumulative": ({"momentum": None}, True, None),
    "momentum 0": ({"momentum": 0.0}, True, None),
    "untracked": ({"track_running_stats": False}, True, None),
    "untracked, eval": ({"track_running_stats": False}, False, None),
    "plain": ({"affine": False}, True, None),
    "plain, untracked": ({"affine": False, "track_running_stats": False}, True, None),
    "plain, eval": ({"affine": False}, False, None),
    "eval": ({}, False, None),
    "some in eval": ({}, True, freeze_some),
    "frozen": ({"frozen": True}, True, None),
    "dropout": ({"dropout": 0.2}, True, None),
    "dropout, eval": ({"dropout": 0.2}, False, None),
    "dropout of all": ({"dropout": 1.0}, True, None),
    "dropout, some in eval": ({"dropout": 0.5}, True, freeze_some),
}
settings = pytest.mark.parametrize("setting", SETTINGS)
ends = pytest.mark.parametrize("end", [11, "relu", None], ids=["pool", "relu", "buffer"])


@pytest.fixture
def same_masks(monkeypatch):
    """Dropout that keeps the same in every precision, by the sizes alone."""

    def noise(shape, p):
        return torch.rand(shape, generator=checks.generator("dropout", tuple(shape))) >= p

    def dropout(h, p, training=True):
        return h * noise(h.shape, p) * (1 / (1 - p) if p < 1 else 0.0) if training else h

    def kept(x, layer):
        shape = (x.shape[0], layer.growth, *x.shape[2:])
        return noise(shape, layer.dropout).contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(dense_module, "_noise", kept)


def in_setting(setting, end, memory="shared"):
    """((stock, ours), their input)"""
    options, training, change = SETTINGS[setting]
    pair = twins(
        (setting, end), 6, 4, 4, width=16, end=end, training=training, memory=memory, **options
    )  # fmt: skip
    if change is freeze_some and end is None:
        change = lambda block: (block.layers[1].norm1.eval(), block.layers[2].norm2.eval())  # noqa: E731
    for block in pair if change is not None else ():
        change(block)
    return pair, block_input(pair[0], (4, 6, 8), (setting, end))


def relative_errors(stock, ours, x, steps=3):
    """The error of every result of `steps` steps, each on another input, relative to its norm, by name; all
    in float64."""
    leaves = [x.detach().double().requires_grad_() for _ in range(2)]
    shape = copy.deepcopy(stock)(leaves[0]).shape
    dz = torch.randn(shape, dtype=torch.float64, generator=checks.generator("errors", tuple(shape)))
    errors = {}
    for step in range(steps):
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(1.25).add_(0.1 * step)
        want, got = (run(block, leaf, dz, None) for block, leaf in zip((stock, ours), leaves))
        for name, value in want.items():
            if value is None:
                assert got[name] is None, name
            elif not value.is_floating_point():
                assert torch.equal(got[name], value), name
            else:
                error = (got[name] - value).norm() / max(value.norm(), 1e-30)
                errors[name] = max(errors.get(name, 0.0), error.item())
    return errors


@settings
@ends
@pytest.mark.parametrize("memory", ["shared", "ultra"])
def test_algebra_in_float64(exact_stages, same_masks, setting, end, memory):
    pair, x = in_setting(setting, end, memory)
    gconv.backend.reset_counts()
    errors = relative_errors(*(block.double() for block in pair), x)
    assert gconv.backend.counts()["cpu.dense_block"] == 3
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-10, f"{worst}: {errors[worst]:.1e}"


@blocks
@modes
def test_algebra_of_every_shape(exact_stages, case, training):
    shape, options, size = case
    pair = twins(str(case), *shape, training=training, **options)
    errors = relative_errors(*(block.double() for block in pair), block_input(pair[0], size, str(case)))
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-10, f"{worst}: {errors[worst]:.1e}"


@settings
@ends
def test_every_setting_in_float32(ops, same_masks, setting, end):
    pair, x = in_setting(setting, end)
    compare(*pair, x, None, steps=3, key=(setting, end))
    assert_shared(3)


# ---------------------------------------------------------------------------------------------- dropout
