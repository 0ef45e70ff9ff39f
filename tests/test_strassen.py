"""Strassen's algorithm in pointwise_conv_*: held to the direct one's oracle, and chosen as it says."""

import math

import checks
import conv_cases
import pytest
import torch
import torch.nn.functional as F
from checks import DTYPES, ISAS, assert_accurate, assert_same_bits
from pointwise_cases import (
    VERIFY,
    all_args,
    as_grouped,
    case_of,
    verify_batch,
    verify_layout,
    verify_threads,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# Halves of whole vectors of every instruction set, then of the narrower ones only; one vector of the output
# in a half, two, several chunks; one cut of the source and several, even and not; images of one pixel, of an
# odd number, of several runs; strides. Input gradients of up to 512 channels of dy are direct in any case.
CASES = (
    case_of(32, 32, 2, 1, 1),
    case_of(64, 96, 2, 5, 5),
    case_of(96, 288, 1, 7, 9),
    case_of(288, 64, 2, 13, 5),
    case_of(544, 32, 1, 6, 9),
    case_of(64, 544, 3, 7, 7),
    case_of(32, 1056, 1, 8, 11),
    case_of(320, 640, 1, 9, 8, (2, 2)),
    case_of(64, 576, 2, 5, 6, (1, 2)),
    case_of(16, 48, 1, 9, 7),
    case_of(8, 520, 2, 3, 5),
)
each_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_isa
@each_case
@pytest.mark.parametrize("name", ["fwd", "fwd_stats", "bwd_input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
def test_integers_are_exact(isa, ops, strassen, name, case, dtype):
    strassen("always")
    verify, variants = VERIFY[name]
    for variant in variants:
        verify(as_grouped(ops)[name], case, dtype, "integer", variant)


def post_relu(case, shift):
    """An input as a network's layer reads it, its mean about `shift` + 0.4, and weights whose output channels
    differ in scale."""
    data = conv_cases.Data(case, torch.float32, "normal", f"post-ReLU {shift}")
    x = data.activation(case.input_size).add_(shift).relu_().contiguous(memory_format=torch.channels_last)
    scale = torch.logspace(-2, 2, case.output_size[1])[:, None, None, None]
    return x, data.weight(case.cin) * scale


@each_isa
@pytest.mark.parametrize("c, k", [(256, 512), (512, 256), (1024, 128), (2048, 64)])
@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_error_of_post_relu_inputs(isa, ops, strassen, c, k, shift):
    """Root mean square and maximum within twice torch's own."""
    strassen("always")
    x, weight = post_relu(case_of(c, k, 1, 14, 14), shift)
    exact = F.conv2d(x.double(), weight.double())
    y = ops.pointwise_conv_fwd(x, weight, [1, 1], None, None, None, False)
    assert_accurate(y, exact, [F.conv2d(x, weight), F.conv2d(x.contiguous(), weight)], f"{c} to {k}")


@each_isa
@pytest.mark.parametrize("case", [case_of(256, 1024, 1, 14, 14), case_of(512, 640, 2, 7, 9)], ids=str)
@pytest.mark.parametrize("name", ["fwd", "fwd_stats", "bwd_input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
def test_error_against_float64(isa, ops, strassen, name, case, dtype):
    strassen("always")
    verify, variants = VERIFY[name]
    verify(as_grouped(ops)[name], case, dtype, "normal", "plain")
    verify(as_grouped(ops)[name], case, dtype, "normal", checks.rotate(variants, str(case), str(dtype), name))


def results(ops, a):
    base = a["dy"], a["x"], a["w"], a["stride"]
    return {
        "y": ops.pointwise_conv_fwd(*base[1:], None, None, None, False),
        "dx": ops.pointwise_conv_bwd(*base, None, None, None, None, True, False, False)[0],
    }


@pytest.mark.parametrize(
    "case, can, pays",
    [
        (case_of(256, 1024, 1, 28, 28), "y dx", "y dx"),
        (case_of(1024, 256, 1, 28, 28), "y", "y"),
        (case_of(256, 64, 2, 24, 24), "y", "y"),
        (case_of(256, 32, 1, 28, 28), "y", ""),
        (case_of(128, 256, 1, 28, 28), "y", ""),
        (case_of(512, 1024, 1, 7, 7), "y dx", ""),
        (case_of(512, 1024, 1, 48, 48, (2, 2)), "y dx", "y dx"),
        (case_of(36, 1024, 1, 28, 28), "", ""),
        (case_of(1024, 36, 1, 28, 28), "", ""),
    ],
    ids=str,
)
def test_runs_where_it_can_and_pays(isa, ops, strassen, case, can, pays):
    """The two algorithms differ in their last bits, so the bits tell which one ran."""
    found, args = {}, all_args(case, torch.float32)
    for use in ("never", "auto", "always"):
        strassen(use)
        found[use] = results(ops, args)
    pays = "" if isa == "portable" else pays
    for name in ("y", "dx"):
        same = torch.equal(found["never"][name], found["always"][name])
        assert same == (name not in can.split()), name
        chosen = "always" if name in pays.split() else "never"
        assert torch.equal(found["auto"][name], found[chosen][name]), name


PARALLEL = (case_of(256, 1024, 3, 14, 14), case_of(320, 640, 2, 13, 11), case_of(64, 96, 5, 5, 5))


@pytest.mark.parametrize("case", PARALLEL, ids=str)
def test_same_bits_for_any_number_of_threads_and_any_run(isa, ops, threads, strassen, case):
    strassen("always")
    verify_threads(ops, case, torch.float32, threads)


@pytest.mark.parametrize("case", PARALLEL, ids=str)
def test_an_image_does_not_depend_on_its_batch(isa, ops, strassen, case):
    strassen("always")
    verify_batch(ops, case, torch.float32)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_layout_does_not_change_a_bit(isa, ops, strassen, layout):
    strassen("always")
    verify_layout(ops, case_of(96, 544, 2, 5, 7), torch.float32, layout)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_image(isa, ops, strassen, value):
    """It spreads to pixels and channels of that image at most, and what it must reach it reaches."""
    strassen("always")
    args = all_args(case_of(64, 544, 3, 5, 7), torch.float32)
    clean = results(ops, args)
    args["x"][1, 40, 2, 3] = args["dy"][1, 300, 4, 6] = value
    for name, got in results(ops, args).items():
        for image in (0, 2):
            assert_same_bits(got[image], clean[name][image], f"{name}, image {image}")
        row, column = (2, 3) if name == "y" else (4, 6)
        assert not got[1, :, row, column].isfinite().any(), name


@pytest.mark.parametrize("use", ["never", "auto", "always"])
@pytest.mark.parametrize("case", [case_of(256, 128, 2, 14, 14), case_of(256, 128, 2, 7, 5)], ids=str)
def test_packed_weights_give_the_same_bits(isa, ops, strassen, use, case):
    strassen(use)
    a = all_args(case, torch.float32)
    conf = (a["stride"], [0, 0], [1, 1], 1)
    packed = ops.conv_pack(a["w"], case.input_size, *conf)
    rest = (a["act"][:2], a["affine"], a["residual"], True)
    got = ops.conv_fwd_packed(a["x"], packed, a["w"].shape, *conf, *rest)
    assert_same_bits(got, ops.pointwise_conv_fwd(a["x"], a["w"], a["stride"], *rest))


def test_packed_weights_of_the_other_algorithm_are_refused(isa, ops, strassen):
    a = all_args(case_of(64, 96, 1, 5, 5), torch.float32)
    conf = (a["stride"], [0, 0], [1, 1], 1)
    strassen("always")
    packed = ops.conv_pack(a["w"], [1, 64, 5, 5], *conf)
    strassen("never")
    with pytest.raises(RuntimeError, match="conv_fwd_packed: packed: want what conv_pack makes"):
        ops.conv_fwd_packed(a["x"], packed, a["w"].shape, *conf, None, None, None, False)


@pytest.mark.parametrize("product", range(7))
def test_a_product_of_the_wrong_sign_is_noticed(isa, ops, strassen, product):
    """Negative control of the exact comparison, by packed weights of which one product's are negated."""
    strassen("always")
    case = case_of(64, 64, 1, 5, 7)
    a = all_args(case, torch.float32, "integer")
    conf = (a["stride"], [0, 0], [1, 1], 1)
    exact = F.conv2d(a["x"].double(), a["w"].double())
    packed = ops.conv_pack(a["w"], case.input_size, *conf)

    def run():
        return ops.conv_fwd_packed(a["x"], packed, a["w"].shape, *conf, None, None, None, False)

    checks.assert_exact(run(), exact)
    vectors = 64 // {"portable": 4, "avx2": 8}.get(isa, 16)
    weights = packed[-64 * 64 * 7 // 4 :].view(vectors // 4, 7, -1)  # of four vectors, by product
    weights[:, product].neg_()
    with pytest.raises(AssertionError):
        checks.assert_exact(run(), exact)
