"""amx_bf16: that its kernels really multiply by tiles, and that the emulator they run on where the CPU lacks
AMX (amx_emulator.h) does what the hardware does: arithmetic, and an end with a message where that would
fault.

test_kernels_numpy.py and test_pointwise_numpy.py run the kernels themselves, as on every instruction set.
"""

import re
import subprocess
import sys

import numpy as np
import numpy_runs
import pytest
from grouped_conv_numpy import GEOMETRIES, Case, check_bwd_input, check_fwd, check_real_values, name
from numpy_oracle import store, value
from numpy_runs import assert_same, cpu_runs
from test_pointwise_numpy import Case as PointwiseCase
from test_pointwise_numpy import expected_bwd, run_bwd, run_fwd

kernels = numpy_runs.kernels  # fixture
DTYPE = "bfloat16"


@pytest.fixture(autouse=True)
def needs_amx(kernels):
    if "amx_bf16" not in kernels.supported_isas():
        pytest.skip("no AMX, and no emulator of it: that needs AVX512-BF16 and a compiler that knows AMX")


@pytest.fixture
def emulated(kernels):
    if not kernels.emulates_amx():
        pytest.skip("this CPU has AMX: nothing is emulated, so nothing can be counted or corrupted")
    yield kernels
    kernels.corrupt_emulated_product(-1)


def configuration(rows=(16, 16, 16), row_bytes=(64, 64, 64), palette=1, reserved=0):
    shapes = np.zeros(64, np.uint8)
    shapes[0], shapes[2] = palette, reserved
    shapes[16:48].view(np.uint16)[: len(row_bytes)] = row_bytes
    shapes[48 : 48 + len(rows)] = rows
    return shapes.tobytes()


def tile_product(kernels, shapes, sums, rows, columns):
    """What the instructions make of rows and columns [16, 16, 2] in bfloat16 and sums [16, 16]."""
    result = np.array(sums, np.float32)
    kernels.tile_product(shapes, result, store(rows, DTYPE), store(columns, DTYPE))
    return result


def defined_product(sums, rows, columns):
    """TDPBF16PS as Intel's manual defines it: the first values of the pairs and the second are summed in
    float32 apart, each product exact, then together, then with the sum there is. With exponents so near to
    each other float64 holds every product and sum before it is rounded."""
    parts = np.zeros((2, len(rows), columns.shape[1]))
    for k in range(rows.shape[1]):
        for i in range(2):
            parts[i] = (parts[i] + rows[:, k, i, None] * columns[k, None, :, i]).astype(np.float32)
    return (sums + (parts[0] + parts[1]).astype(np.float32)).astype(np.float32)


def operands(seed):
    rng = np.random.default_rng(seed)
    rows, columns = (value(store(rng.standard_normal((16, 16, 2)), DTYPE), DTYPE) for _ in range(2))
    return rng.standard_normal((16, 16)).astype(np.float32), rows, columns


@pytest.mark.parametrize("seed", range(4))
def test_a_tile_product_is_as_defined(kernels, seed):
    sums, rows, columns = operands(seed)
    got = tile_product(kernels, configuration(), sums, rows, columns)
    assert_same(got, defined_product(sums, rows, columns), "sums")


def test_a_small_tile_leaves_the_rest_alone(kernels):
    sums, rows, columns = operands(5)
    m, n, k = 5, 9, 3
    shapes = configuration((m, m, k), (4 * n, 4 * k, 4 * n))
    got = tile_product(kernels, shapes, sums, rows, columns)
    want = sums.copy()
    want[:m, :n] = defined_product(sums[:m, :n], rows[:m, :k], columns[:k, :n])
    assert_same(got, want, "sums")


def test_denormals_are_zero_and_nan_and_infinity_pass(kernels):
    sums, rows, columns = np.zeros((16, 16), np.float32), np.zeros((16, 16, 2)), np.zeros((16, 16, 2))
    tiny = 2.0**-130
    sums[0], rows[1, 0, 0], columns[0, :, 0] = tiny, tiny, 2.0**20
    rows[2, 1, 1], columns[1, :, 1] = np.inf, 1
    rows[3, 2, 0], columns[2, :, 0] = np.nan, 1
    want = np.zeros((16, 16), np.float32)
    want[2], want[3] = np.inf, np.nan
    assert_same(tile_product(kernels, configuration(), sums, rows, columns), want, "sums")


ILLEGAL = {
    "palette": (configuration(palette=2), "palette"),
    "reserved byte": (configuration(reserved=1), "reserved"),
    "too many rows": (configuration(rows=(17, 16, 16)), "too large"),
    "too long rows": (configuration(row_bytes=(64, 68, 64)), "too large"),
    "half a float": (configuration(row_bytes=(64, 62, 64)), "whole floats"),
    "rows alone": (configuration(row_bytes=(64, 0, 64)), "alone"),
    "ninth tile": (configuration((16,) * 9, (64,) * 9), "beyond the eighth"),
    "no palette": (configuration(palette=0), "not configured"),
    "a tile that is not there": (configuration((16, 16), (64, 64)), "not configured"),
    "other rows": (configuration((8, 16, 16)), "do not match"),
    "other columns": (configuration(row_bytes=(64, 64, 32)), "do not match"),
    "other depth": (configuration((16, 16, 8)), "do not match"),
}
RUN_ILLEGAL = """
import sys
import numpy as np
import numpy_runs
kernels = numpy_runs.module("gconv_kernels_numpy")
sums, pairs = np.zeros((16, 16), np.float32), np.zeros((16, 16, 2), np.uint16)
kernels.tile_product(bytes.fromhex(sys.argv[1]), sums, pairs, pairs)
"""


@pytest.mark.parametrize("what", ILLEGAL)
def test_what_the_hardware_refuses_ends_the_process(emulated, what):
    shapes, message = ILLEGAL[what]
    tests = str(numpy_runs.build_numpy_binding.ROOT / "tests")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {tests!r})\n{RUN_ILLEGAL}", shapes.hex()],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode < 0 and re.search(f"AMX emulator: .*{message}", done.stderr), done.stderr


# ------------------------------------------------------------------------------------- the kernels use them


def counted(kernels, call):
    """How many tile products a call does; its thread has no tiles configured afterwards."""
    before = kernels.emulated_products()
    call()
    assert not kernels.emulated_tiles_configured()
    return kernels.emulated_products() - before


def tiles(pixels):
    return -(-pixels // 16)


def test_1x1_multiplies_by_tiles(emulated):
    case = PointwiseCase((70, 40), (1, (5, 7), (1, 1)))
    args = emulated, "amx_bf16", DTYPE, case
    one_run = tiles(35) * tiles(40) * -(-70 // 32)
    assert counted(emulated, lambda: run_fwd(*args, None, None, None, False, stats=False)) == 2 * one_run
    dx = tiles(35) * tiles(70) * -(-40 // 32)
    assert counted(emulated, lambda: run_bwd(*args, None, None, None, want_dweight=False)) == 2 * dx
    dweight = tiles(40) * tiles(70) * -(-35 // 32)
    assert counted(emulated, lambda: run_bwd(*args, None, None, None, want_dx=False)) == 2 * dweight
    assert counted(emulated, lambda: run_bwd(*args, None, None, None)) == 2 * (dx + dweight)


@pytest.mark.parametrize("width", [(16, 16, 2), (32, 32, 2), (48, 32, 1)], ids=name)
def test_wide_groups_multiply_by_tiles(emulated, width):
    case = Case(width, (1, (4, 20), (1, 1), (1, 1), (1, 1)))
    cg, kg, groups = width
    taps = 3 * (3 * 4 - 2)  # a vertical tap outside the image is left out
    runs = cpu_runs(emulated, "amx_bf16", DTYPE)
    forward = groups * tiles(kg) * -(-cg // 32) * tiles(20) * taps
    assert counted(emulated, lambda: check_fwd(runs, case, False, False, False, False)) == 2 * forward
    backward = groups * tiles(cg) * -(-kg // 32) * tiles(20) * taps
    assert counted(emulated, lambda: check_bwd_input(runs, case)) == 2 * backward


def test_others_do_not(emulated):
    narrow, wide = Case((4, 4, 8), GEOMETRIES[0]), Case((32, 32, 2), GEOMETRIES[0])
    odd = PointwiseCase((33, 40), (1, (5, 7), (1, 1)))  # no pairs of an odd number of channels

    def call():
        check_fwd(cpu_runs(emulated, "amx_bf16", DTYPE), narrow, False, False, False, False)
        check_fwd(cpu_runs(emulated, "avx512_bf16", DTYPE), wide, False, False, False, False)
        check_fwd(cpu_runs(emulated, "amx_bf16", "float32"), wide, False, False, False, False)
        run_fwd(emulated, "amx_bf16", DTYPE, odd, None, None, None, False, stats=False)

    assert counted(emulated, call) == 0


@pytest.mark.parametrize("width", [(112, 112, 2), (512, 64, 1)], ids=name)
def test_real_values_of_the_widest_groups(kernels, width):
    check_real_values(
        cpu_runs(kernels, "amx_bf16", DTYPE), Case(width, GEOMETRIES[0], 7), ops=("fwd", "bwd_input")
    )


# --------------------------------------------------------------------------------------- negative controls


def test_a_wrong_product_of_a_1x1_is_found(emulated):
    case = PointwiseCase((70, 40), (1, (5, 7), (1, 1)))
    emulated.corrupt_emulated_product(7)
    with pytest.raises(AssertionError, match="changed the result"):
        run_fwd(emulated, "amx_bf16", DTYPE, case, None, None, None, False, stats=False)
    emulated.corrupt_emulated_product(7)
    with pytest.raises(AssertionError, match="changed the result"):
        run_bwd(emulated, "amx_bf16", DTYPE, case, None, None, None, want_dx=False)
    dweight = run_bwd(emulated, "amx_bf16", DTYPE, case, None, None, None, want_dx=False)[0]
    assert_same(value(dweight, DTYPE), expected_bwd(case, None, None, None)[1], "without: dweight")


def test_a_wrong_product_of_a_wide_group_is_found(emulated):
    case = Case((32, 32, 2), GEOMETRIES[0])
    runs = cpu_runs(emulated, "amx_bf16", DTYPE)
    emulated.corrupt_emulated_product(100)
    with pytest.raises(AssertionError, match="changed the result"):
        check_fwd(runs, case, False, False, False, False)
    check_fwd(runs, case, False, False, False, False)
