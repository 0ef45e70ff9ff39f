"""The kernels on NumPy arrays as their tests run them: the module, the instruction set and storage type of a
test as fixtures, and each call done twice.
"""

import os
import pathlib

import build_numpy_binding
import numpy as np
import pytest
from numpy_oracle import DTYPES, Exact, Guarded, bits

ISAS = ("portable", "avx2", "avx512")


@pytest.fixture(scope="session")
def kernels():
    """The module of the kernels: the one GCONV_KERNELS_NUMPY names, else one built here."""
    named = os.environ.get("GCONV_KERNELS_NUMPY")
    if named:
        return build_numpy_binding.load(pathlib.Path(named))
    pytest.importorskip("pybind11", reason="the NumPy binding of the kernels is written with pybind11")
    if build_numpy_binding.compiler() is None:
        pytest.skip("the NumPy binding of the kernels needs a C++ compiler")
    return build_numpy_binding.load(build_numpy_binding.build())


@pytest.fixture(params=ISAS)
def isa(request, kernels):
    if request.param not in kernels.supported_isas():
        pytest.skip(f"this machine cannot run the {request.param} path")
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


def integers(rng, low, high, shape):
    return rng.integers(low, high + 1, shape).astype(np.float64)


def both_ways(kernels, isa, dtype, call, winograd="auto"):
    """The outputs of call(run, arrays): the same on exact arrays with one thread and guarded with three."""
    plain, guarded = Exact(dtype), Guarded(dtype)
    first = call(kernels.Run(isa, dtype, 1, winograd), plain)
    second = call(kernels.Run(isa, dtype, 3, winograd), guarded)
    guarded.check()
    for one, other in zip(first, second):
        assert np.array_equal(bits(one), bits(other)), (
            "the layout or the number of threads changed the result"
        )
    return first


def assert_same(got, want, what):
    """Bitwise, but for the sign of zero and the payload of a NaN."""
    equal = (got == want) | (np.isnan(got) & np.isnan(want))
    assert equal.all(), (
        f"{what}: {np.count_nonzero(~equal)} of {equal.size} differ, first at {np.argwhere(~equal)[0]}"
    )


def table(rows):
    return np.ascontiguousarray(rows, np.float32)
