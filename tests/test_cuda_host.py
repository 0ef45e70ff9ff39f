"""The verbs of the CUDA kernels on the CPU: each against NumPy, each rule against a kernel that breaks it.

The fragments' layouts are those of the tables in the PTX ISA, section "Matrix fragments for mma.m16n8k*".
"""

import re
import subprocess
import sys

import numpy as np
import pytest
from numpy_oracle import store, value
from numpy_runs import module

ORDERS = [("forward", 0), ("reversed", 0), ("shuffled", 0), ("shuffled", 1)]
LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4  # groupID and threadID_in_group of the PTX ISA


@pytest.fixture(scope="session")
def verbs():
    return module("gconv_cuda_verbs")


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}{order[1] or ''}")
def order(request):
    return dict(zip(("order", "seed"), request.param))


def words(values):
    """float32 or 16-bit values as words of 32 bits."""
    return np.ascontiguousarray(values).view(np.uint32)


# ------------------------------------------------------------------------------------------ products


def layout(tf32, half):
    """Rows and columns [lane, i] of what a lane holds of A, B and D, by the PTX ISA's tables."""
    i = np.arange(8)[None]
    group, tig = GROUP[:, None], IN_GROUP[:, None]
    if tf32:  # m16n8k4, m16n8k8
        a = group + 8 * (i % 2), tig + 4 * (i // 2)
        b = tig + 4 * i, group + 0 * i
        counts = (2, 1) if half else (4, 2)
    else:  # m16n8k8, m16n8k16
        high = (i >= 2) if half else np.isin(i, (2, 3, 6, 7))
        a = group + 8 * high, 2 * tig + i % 2 + (0 if half else 8 * (i >= 4))
        b = 2 * tig + i % 2 + 8 * (i >= 2), group + 0 * i
        counts = (4, 2) if half else (8, 4)
    d = group + 8 * (i >= 2), 2 * tig + i % 2
    return [tuple(axis[:, :count] for axis in pair) for pair, count in zip((a, b, d), (*counts, 4))]


def product(verbs, dtype, tf32, half, a, b, d, **options):
    """d + a b by one warp of two, the other of which multiplies zeros. a, b in storage, d float32."""
    places = layout(tf32, half)
    fragments = [words(m[place]) for m, place in zip((a, b, d), places)]
    given = np.zeros((2, 32, 10), np.uint32)
    for fragment, start in zip(fragments, (0, 4, 6)):
        given[1, :, start : start + fragment.shape[1]] = fragment
    out = np.full((2, 32, 4), 0xFFFFFFFF, np.uint32)
    verbs.mma(verbs.Run(dtype, tf32=tf32, **options), half, given, out)
    assert not out[0].any()
    result = np.full((16, 8), np.nan, np.float32)
    result[places[2]] = out[1].view(np.float32)
    return result


MMA = [(dtype, dtype == "float32", half) for dtype in ("bfloat16", "float16", "float32") for half in (0, 1)]


@pytest.mark.parametrize("dtype,tf32,half", MMA)
def test_product_of_integers_is_exact(verbs, order, dtype, tf32, half):
    k = (8 if tf32 else 16) >> half
    rng = np.random.default_rng(k)
    a, b, d = (rng.integers(-50, 51, shape).astype(float) for shape in ((16, k), (k, 8), (16, 8)))
    got = product(verbs, dtype, tf32, half, store(a, dtype), store(b, dtype), d.astype(np.float32), **order)
    assert np.array_equal(got, d + a @ b)


@pytest.mark.parametrize("dtype,tf32,half", MMA)
def test_product_of_any_values(verbs, dtype, tf32, half):
    k = (8 if tf32 else 16) >> half
    rng = np.random.default_rng(k)
    a, b = store(rng.standard_normal((16, k)), dtype), store(rng.standard_normal((k, 8)) * 1e-5, dtype)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    got = product(verbs, dtype, tf32, half, a, b, d)
    # Of a float the matrix unit looks at the upper 19 bits.
    seen = [(m.view(np.uint32) & 0xFFFFE000).view(np.float32) if tf32 else m for m in (a, b)]
    left, right = value(seen[0], dtype), value(seen[1], dtype)
    bound = 2.0**-24 * (k + 1) * (np.abs(left) @ np.abs(right)) + 2.0**-24 * np.abs(d)
    assert (np.abs(got - (d + left @ right)) <= 1.01 * bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_product_of_what_is_not_finite(verbs, dtype):
    a, b = np.zeros((16, 16)), np.ones((16, 8))
    a[3, 5], a[4, 6], a[5, 0] = np.inf, np.nan, -np.inf
    b[0, 2] = 0
    got = product(verbs, dtype, False, 0, store(a, dtype), store(b, dtype), np.zeros((16, 8), np.float32))
    with np.errstate(invalid="ignore"):
        assert np.array_equal(got, a @ b, equal_nan=True)


# ----------------------------------------------------------------------------------------- fragments


@pytest.mark.parametrize("matrices", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices(verbs, order, matrices, transposed):
    rng = np.random.default_rng(matrices)
    rows, memory = 16 * rng.permutation(256)[:32], rng.integers(0, 1 << 32, 1024, dtype=np.uint32)
    out = np.zeros((32, matrices), np.uint32)
    given = np.concatenate([rows.astype(np.uint32), memory])
    verbs.matrices(verbs.Run("bfloat16", **order), matrices, transposed, given, out)
    values = memory.view(np.uint16).reshape(-1, 8)[rows // 16].reshape(4, 8, 8)[:matrices]
    if transposed:
        values = values.swapaxes(1, 2)
    want = words(values).reshape(matrices, 32).T
    assert np.array_equal(out, want)


@pytest.mark.parametrize("mask", [0, 1, 5, 16, 31])
def test_shuffle(verbs, order, mask):
    given = np.arange(64, dtype=np.float32)
    out = np.zeros(128, np.uint32)
    verbs.shuffle(verbs.Run("float32", **order), mask, words(given), out)
    want = given[np.arange(64) ^ mask]
    assert np.array_equal(out.view(np.float32), np.concatenate([want, 2 * want]))


# ------------------------------------------------------------------------------------------- storage


def floats_of_every_kind():
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 1 << 32, 5000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    drawn = drawn[~np.isnan(drawn)]
    scale = rng.standard_normal(5000) * 2.0 ** rng.integers(-27, 18, 5000)  # around all that f16 holds
    halves = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519, 65520, 65536])
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    return np.concatenate(
        [drawn, scale.astype(np.float32), halves.astype(np.float32), special], dtype=np.float32
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_storage(verbs, dtype):
    given = floats_of_every_kind()
    out = np.zeros((2, given.size), np.uint32)
    verbs.rounded(verbs.Run(dtype), words(given), out)
    number = ~np.isnan(given)
    stored = store(given, dtype)
    assert np.array_equal(out[0][number], stored.view(np.uint16)[number])
    assert (out[0][~number] == 0x7FFF).all()  # as the GPU writes a NaN
    assert np.array_equal(out[1].view(np.float32), value(stored, dtype).astype(np.float32), equal_nan=True)


def test_rounding_to_tf32(verbs):
    """To nearest, halves away from zero: 10 bits of mantissa stay."""
    given = floats_of_every_kind()
    given = np.append(given, np.float32([1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11]))
    out = np.zeros((2, given.size), np.uint32)
    verbs.rounded(verbs.Run("float32", tf32=True), words(given), out)
    assert np.array_equal(out[1], words(given))  # memory holds the float as it is
    bits = words(given).astype(np.uint64)
    magnitude = ((bits & 0x7FFFFFFF) + 0x1000) // 0x2000 * 0x2000
    want = np.where(np.isnan(given), 0x7FFFFFFF, (bits & 0x80000000) | magnitude).astype(np.uint32)
    assert np.array_equal(out[0], want)
    assert (out.view(np.float32)[0, -3:] == [1 + 2.0**-10, -1 - 2.0**-10, 1 + 2 * 2.0**-10]).all()


# ------------------------------------------------------------------------------- copies and barriers


@pytest.mark.parametrize("pending", [0, 1, 2, 3])
def test_a_copy_arrives_at_its_wait_and_not_before(verbs, pending):
    given = np.arange(3 * 32 * 4, dtype=np.uint32).reshape(3, 32, 4)
    out = np.zeros_like(given)
    verbs.copied(verbs.Run("float32"), pending, given, out)
    want = given.copy()
    want[2, 1::2] = 0
    want[3 - pending :] = 0xFFFFFFFF
    assert np.array_equal(out, want)


def turned(verbs, threads=128, **options):
    """Whether what went through shared memory came out right."""
    given = np.arange(1000, 1000 + threads, dtype=np.uint32)
    out = np.zeros((3, threads), np.uint32)
    verbs.turned(verbs.Run("float32", **options), given, out)
    in_warps = given.reshape(-1, 32)[:, ::-1].reshape(-1)
    return np.array_equal(out, [given[::-1], given[::-1] + 1, in_warps + 2])


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_barriers(verbs, order, threads):
    assert turned(verbs, threads, **order)
    passed = [place.split()[0] for place in verbs.passed()]
    assert passed == ["block_sync"] * 3 + ["warp_sync"]


def test_every_missing_barrier_shows(verbs):
    assert turned(verbs)
    for place in verbs.passed():
        where = place.split()[1]
        wrong = [kind for kind, seed in ORDERS if not turned(verbs, order=kind, seed=seed, without=where)]
        assert "forward" in wrong and "reversed" in wrong, where


# ------------------------------------------------------------------------------------------- faults


FAULTS = {
    0: r"warp \d: lane 0 is at shuffle_xor \(verb_kernels.cu:\d+\), lane 16 has ended",
    1: r"lane 0 is at warp_sync .*, lane 16 is at shuffle_xor",
    2: r"lane 0 is at shuffle_xor \(verb_kernels.cu:(\d+)\), lane 16 is at shuffle_xor "
    r"\(verb_kernels.cu:(?!\1)",
    3: r"warp 0: thread 0 is at block_sync .*, thread 16 has ended",
    4: r"warp 1: thread 0 is at block_sync .*, thread 32 has ended",
    5: r"lane 0 is at block_sync .*, lane 16 is at warp_sync",
    6: r"thread 0 is at block_sync \(verb_kernels.cu:(\d+)\), thread 32 is at block_sync "
    r"\(verb_kernels.cu:(?!\1)",
    7: r"load_chunk \(verb_kernels.cu:\d+\): its address is no multiple of 16",
    8: r"store_chunk .*: its address is no multiple of 16",
    9: r"load_chunk_constant .*: its address is no multiple of 16",
    10: r"copy_async .*: its address is no multiple of 16",
    11: r"copy_async .*: its address is no multiple of 16",
    12: r"copy_async .*: its address is not in shared memory",
    13: r"load_matrices .*: its address is no multiple of 16",
    14: r"load_matrices .*: its address is not in shared memory",
    15: r"load_matrices .*: its address is not in shared memory",
    16: r"shuffle_xor .*: mask is 32",
    17: r"lane 0 is at mma .*, lane 16 is at mma",
    18: r"warp 1: thread 0 is at block_sync .*, thread 40 has ended",
    19: r"writes beyond the 1024 bytes of its shared memory",
    20: r"shared_address .*: its address is not in shared memory",
}
RIGHT = 99  # an option of the kernel that breaks no rule


def aligned(count):
    """Words at a multiple of 16 bytes."""
    wide = np.zeros(count + 4, np.uint32)
    start = -(wide.ctypes.data // 4) % 4
    return wide[start : start + count]


def run_faulty(verbs, option, **options):
    launch = {name: options.pop(name) for name in ("threads", "shared_bytes") if name in options}
    out = aligned(64)
    verbs.faulty(verbs.Run("float32", **options), option, aligned(64), out, **launch)
    return out


@pytest.mark.parametrize("option", FAULTS)
def test_a_fault_is_named(verbs, order, option):
    if option == 19 and verbs.SANITIZED:
        pytest.skip("AddressSanitizer ends the process: test_sanitizer_sees_one_byte_too_far")
    with pytest.raises(RuntimeError, match=FAULTS[option]) as caught:
        run_faulty(verbs, option, **order)
    first = 1 if order["order"] == "reversed" else r"\d"
    assert re.match(rf"faulty \(verb_kernels.cu:\d+\): block {first}[,:]", str(caught.value)), caught.value
    assert (run_faulty(verbs, RIGHT) == 1).all()  # what comes after is as if nothing had been


@pytest.mark.parametrize(
    "launch,message",
    [
        ({"threads": 48}, "want a multiple of 32 up to 1024, got 48"),
        ({"threads": 0}, "got 0"),
        ({"threads": 2048}, "got 2048"),
        ({"shared_bytes": 2048, "shared_per_block": 2000}, "want at most 2000 bytes, got 2048"),
    ],
)
def test_a_launch_that_a_gpu_refuses(verbs, launch, message):
    with pytest.raises(RuntimeError, match=f"faulty: CUDA: .*{message}"):
        run_faulty(verbs, RIGHT, **launch)


def test_sanitizer_sees_one_byte_too_far(verbs):
    if not verbs.SANITIZED:
        pytest.skip("needs the sanitized module: make sanitize")
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import build_numpy_binding, test_cuda_host;"
        "test_cuda_host.run_faulty(build_numpy_binding.load(pathlib.Path(sys.argv[2])), 19)"
    )
    here = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code, here, verbs.__file__], capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "faulty_kernel" in done.stderr
