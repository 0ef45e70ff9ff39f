"""The comparisons of the CUDA kernels' tests must fail on kernels with a defect: each barrier and wait left
out in turn, and a halo that is shifted.
"""

import functools
import re

import build_numpy_binding
import grouped_conv_numpy as checks
import numpy_runs
import pytest
from build_numpy_binding import ROOT
from grouped_conv_numpy import GEOMETRIES, Case
from numpy_runs import Runs

cuda_kernels = numpy_runs.cuda_kernels  # a fixture

ORDERS = [("forward", 0), ("reversed", 0), ("shuffled", 0), ("shuffled", 1)]
SYNCHRONISATION = re.compile(r"\b(block_sync|warp_sync|copy_wait)\b *(<[^>]*>)?\(\)")
DTYPES = [("bfloat16", False), ("float32", False), ("float32", True)]  # dtype, TF32
# Groups merged, several units of channels, channels that do not fill a unit, accumulators that fill a warp.
WIDTHS = [(4, 4, 9), (16, 16, 2), (5, 3, 3), (64, 64, 1)]
# Channels that the shared memory of a small device holds in turns only.
WIDE = [("fwd", "float32", False, (320, 8, 1)), ("bwd_input", "float32", False, (8, 320, 1))]
SMALL = {"multiprocessors": 2, "shared_per_block": 40 * 1024}  # few blocks, so that each has several tiles

CHECKS = {
    "fwd": checks.check_fwd,
    "fwd with act": functools.partial(checks.check_fwd, with_act=True),
    "fwd_stats": checks.check_fwd_stats,
    "bwd_input": checks.check_bwd_input,
    "bwd_input with finish and mask": functools.partial(
        checks.check_bwd_input, with_finish=True, with_mask=True
    ),
    "bwd_weight": checks.check_bwd_weight,
    "bwd_weight with finish and act": functools.partial(
        checks.check_bwd_weight, with_finish=True, with_act=True
    ),
}


def passes(kernels, what, dtype, tf32, width, geometry, **options):
    """(whether the kernels pass the comparison, the barriers and waits they passed)."""
    run = kernels.Run(dtype, tf32=tf32, **options)
    try:
        CHECKS[what](Runs(kernels, dtype, run, run), Case(width, geometry))
    except (AssertionError, RuntimeError):
        return False, kernels.passed()
    return True, kernels.passed()


def everything():
    for what in CHECKS:
        for dtype, tf32 in DTYPES:
            for width in WIDTHS:
                for geometry in (GEOMETRIES[0], GEOMETRIES[2], GEOMETRIES[9]):
                    yield what, dtype, tf32, width, geometry
    for problem in WIDE:
        yield *problem, GEOMETRIES[0]


@pytest.fixture(scope="module")
def reached(cuda_kernels):
    """{a barrier or wait: the problems whose kernels pass it}; all are computed right."""
    found = {}
    for problem in everything():
        right, places = passes(cuda_kernels, *problem, **SMALL)
        assert right, problem
        for place in places:
            found.setdefault(place.split()[1], []).append(problem)
    return found


def in_the_source():
    """file:line of every barrier and wait that the kernels have."""
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        if path.name == "verbs.h" or path.suffix not in (".cu", ".h"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if SYNCHRONISATION.search(line.partition("//")[0]):
                yield f"{path.name}:{number}"


@pytest.mark.parametrize("place", list(in_the_source()))
def test_a_missing_barrier_or_wait_is_seen(cuda_kernels, reached, place):
    assert place in reached, "no problem of this file reaches it"
    for problem in reached[place]:
        for order, seed in ORDERS:
            if not passes(cuda_kernels, *problem, order=order, seed=seed, without=place, **SMALL)[0]:
                return
    pytest.fail("left out, nothing changes: is it needed?")


# (file, text, what takes its place)
SHIFTED_HALO = ("csrc/cuda/grouped_conv_tile.h", "axis.base0 = low,", "axis.base0 = low + 1,")


def copy_with(defect):
    """A copy of the sources with a defect, in build/cuda_defects; what is there and the same stays, so that a
    second run compiles nothing."""
    file, text, other = defect
    root = ROOT / "build" / "cuda_defects" / file.rpartition("/")[2]
    for pattern in ("csrc/*.h", "csrc/cpu/*.h", "csrc/cuda/*", "tests/*.h", "tests/cuda_host/*"):
        for path in ROOT.glob(pattern):
            target = root / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            source = path.read_text()
            if path == ROOT / file:
                assert source.count(text) == 1, f"{file}: want one {text!r}"
                source = source.replace(text, other)
            if not target.exists() or target.read_text() != source:
                target.write_text(source)
    return root


@pytest.fixture(scope="module")
def shifted(cuda_kernels):
    """The kernels with a halo that begins one row and column late."""
    path = build_numpy_binding.build("gconv_cuda_host", root=copy_with(SHIFTED_HALO), optimized=["-O0"])
    return build_numpy_binding.load(path)


@pytest.mark.parametrize("what", CHECKS)
def test_a_shifted_halo_is_seen(cuda_kernels, shifted, what):
    for dtype, tf32 in DTYPES:
        for geometry in (GEOMETRIES[0], GEOMETRIES[2]):
            problem = (what, dtype, tf32, WIDTHS[0], geometry)
            assert passes(cuda_kernels, *problem)[0]
            assert not passes(shifted, *problem)[0], problem
