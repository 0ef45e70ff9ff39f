"""The weight gradient's CUDA kernels on the CPU (tests/cuda_host), against float64.

Small integers make every sum exact, so results are compared bit by bit, on arrays of exact size and, with the
blocks, warps and lanes in another order, inside guarded buffers.
"""

import functools

import grouped_conv_numpy
import numpy as np
import numpy_runs
import pytest
from grouped_conv_numpy import (
    BWD_OPTIONS,
    GEOMETRIES,
    Case,
    check_bwd_weight,
    check_real_values,
    name,
    run_bwd_weight,
)
from numpy_oracle import Exact, conv_bwd_weight, store, value
from numpy_runs import Runs, assert_same, cuda_runs, integers

cuda_kernels = numpy_runs.cuda_kernels  # a fixture

FORMS = {"bfloat16": {}, "float16": {}, "tf32": {"tf32": True}, "float32": {}}
# Every kind of warp tile: channels of one octet, groups of two and of three octets, groups that end within an
# octet, blocks that hold some of a group only, unequal channels.
WIDTHS = [*grouped_conv_numpy.WIDTHS, (4, 4, 16), (12, 12, 2), (40, 40, 1), (96, 8, 1)]
# A row of tiles longer than 64 lanes, taps far apart (each row and column of taps is loaded for itself),
# images side by side in a tile, strips whose last step is short.
FURTHER = [
    (1, (4, 70), (1, 1), (1, 1), (1, 1)),
    (1, (3, 131), (1, 2), (1, 1), (1, 1)),
    (2, (19, 21), (1, 1), (9, 10), (9, 10)),
    (1, (2, 3), (1, 1), (6, 8), (4, 5)),
    (11, (7, 7), (1, 1), (1, 1), (1, 1)),
    (5, (4, 5), (2, 2), (1, 1), (1, 1)),
]
# Devices of other sizes: one block has all steps; there is room for few rows or lanes.
DEVICES = {
    "large": {},
    "single": {"multiprocessors": 1},
    "small": {"multiprocessors": 1, "shared_per_block": 40 * 1024, "shared_per_multiprocessor": 64 * 1024},
}


@pytest.fixture(params=FORMS)
def form(request):
    """The storage type and how its products are made."""
    options = FORMS[request.param]
    return "float32" if options else request.param, options


def runs_of(cuda_kernels, form, device="large", **options):
    dtype, products = form
    return cuda_runs(cuda_kernels, dtype, **products, **DEVICES[device], **options)


@pytest.mark.parametrize("width", WIDTHS, ids=name)
def test_exact(cuda_kernels, form, width):
    """Every geometry, with the prologues in turn."""
    for seed, geometry in enumerate(GEOMETRIES):
        with_finish, with_act = BWD_OPTIONS[seed % len(BWD_OPTIONS)]
        check_bwd_weight(runs_of(cuda_kernels, form), Case(width, geometry, seed), with_finish, with_act)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [(4, 4, 8), (8, 8, 3), (16, 16, 2), (24, 24, 1), (3, 5, 4)], ids=name)
def test_exact_by_device(cuda_kernels, form, width, device):
    """One block goes over the ends of strips, or has little shared memory: the result is the same."""
    for seed, geometry in enumerate([*FURTHER, GEOMETRIES[9], GEOMETRIES[11]]):
        options = BWD_OPTIONS[(seed + len(device)) % len(BWD_OPTIONS)]
        check_bwd_weight(runs_of(cuda_kernels, form, device), Case(width, geometry, seed), *options)


@pytest.mark.parametrize("width", [(4, 4, 8), (16, 16, 2), (24, 24, 1), (3, 5, 4)], ids=name)
def test_prologues(cuda_kernels, form, width):
    """A pixel outside the image is 0 after the prologue, not relu(shift)."""
    case = Case(width, GEOMETRIES[0], 1)
    case.act[1] = 2
    for options in BWD_OPTIONS:
        check_bwd_weight(runs_of(cuda_kernels, form, "single"), case, *options)


@pytest.mark.parametrize("width", [(4, 4, 8), (5, 5, 3), (16, 16, 2)], ids=name)
def test_layout_of_the_weights(cuda_kernels, form, width):
    """channels_last weights [K, 3, 3, C/groups] hold the same."""
    case = Case(width, GEOMETRIES[0], 2)
    contiguous = run_bwd_weight(runs_of(cuda_kernels, form), case, None, None)[0]
    last = run_bwd_weight(runs_of(cuda_kernels, form, channels_last_weight=True), case, None, None)[0]
    assert np.array_equal(np.moveaxis(last.reshape(case.k, 3, 3, -1), 3, 1), contiguous)


@pytest.mark.parametrize("width", [(1, 1, 32), (4, 4, 8), (8, 8, 4), (24, 24, 2), (64, 64, 1)], ids=name)
def test_real_values(cuda_kernels, form, width):
    runs = runs_of(cuda_kernels, form)
    check_real_values(runs, Case(width, GEOMETRIES[1], 7), ["bwd_weight"], 2.0**-11 if form[1] else 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_work_does_not_matter(cuda_kernels, form, seed):
    """Real values, whose sums depend on the order of the terms: the bits are the same."""
    case = Case((8, 8, 3), FURTHER[4], seed)
    case.x, case.dy = case.rng.standard_normal(case.input), case.rng.standard_normal(case.output)
    dtype, products = form
    run = functools.partial(cuda_kernels.Run, dtype, **products)
    orders = [run(order="reversed"), run(order="shuffled", seed=seed)]
    for order in orders:  # both() compares the bits
        run_bwd_weight(Runs(cuda_kernels, dtype, run(), order), case, case.finish, case.act)


def test_gradient_of_a_sum_is_read_in_place(cuda_kernels, form):
    """An expanded gradient, one vector for all pixels: strides of 0."""
    case, (dtype, products) = Case((4, 4, 8), GEOMETRIES[0], 3), form
    vector = store(integers(case.rng, -2, 2, case.k), dtype)
    case.dy = np.broadcast_to(value(vector, dtype), case.output)
    dweight = Exact(dtype).flat_output(case.weight_shape)
    cuda_kernels.grouped_conv_bwd_weight(
        cuda_kernels.Run(dtype, **products), *case.geometry_arguments(),
        np.broadcast_to(vector, case.output), store(case.x, dtype), None, None, None, dweight,
    )  # fmt: skip
    want = conv_bwd_weight(case.dy, case.x, case.weight_shape, *case.geometry)
    assert_same(value(dweight, dtype), value(store(want, dtype), dtype), "dweight")


@pytest.mark.parametrize("width", [(4, 4, 8), (24, 24, 2)], ids=name)
def test_nan_and_infinity(cuda_kernels, form, width):
    """They reach the weights between their channel and the group's, and nothing else."""
    case = Case(width, GEOMETRIES[0], 5)
    case.x[0, 3, 4, case.c // 2] = np.nan
    case.dy[1, 2, 2, 0] = np.inf
    with np.errstate(invalid="ignore"):
        want = np.isfinite(conv_bwd_weight(case.dy, case.x, case.weight_shape, *case.geometry))
    got = run_bwd_weight(runs_of(cuda_kernels, form), case, None, None)[0]
    assert np.array_equal(np.isfinite(value(got, form[0])).all((2, 3)), want.all((2, 3)))


def test_too_little_shared_memory_is_said(cuda_kernels):
    runs = cuda_runs(cuda_kernels, "float32", shared_per_block=2048, shared_per_multiprocessor=4096)
    with pytest.raises(RuntimeError, match="grouped_conv_bwd_weight: CUDA: too little shared memory"):
        run_bwd_weight(runs, Case((8, 8, 4), GEOMETRIES[0]), None, None)
