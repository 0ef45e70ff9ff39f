"""The kernels on NumPy arrays as their tests run them: the module, the instruction set and storage type of a
test as fixtures, and each call done twice.
"""

import dataclasses
import functools
import os
import pathlib

import build_numpy_binding
import numpy as np
import pytest
from numpy_oracle import DTYPES, Exact, Guarded, bits

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def module(name):
    """A module of build_numpy_binding: of those that GCONV_NUMPY_MODULES names, else built here."""
    named = filter(None, os.environ.get("GCONV_NUMPY_MODULES", "").split(os.pathsep))
    for path in map(pathlib.Path, named):
        if path.name.startswith(f"{name}."):
            return build_numpy_binding.load(path)
    pytest.importorskip("pybind11", reason="the NumPy bindings of the kernels are written with pybind11")
    if build_numpy_binding.compiler() is None:
        pytest.skip("the NumPy bindings of the kernels need a C++ compiler")
    return build_numpy_binding.load(build_numpy_binding.build(name))


@pytest.fixture(scope="session")
def kernels():
    """The kernels of the CPU."""
    return module("gconv_kernels_numpy")


@pytest.fixture(scope="session")
def cuda_kernels():
    """The kernels of the GPU, on the CPU."""
    return module("gconv_cuda_host")


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


@dataclasses.dataclass(frozen=True)
class Runs:
    """Which kernels run on arrays of a dtype, and two ways to run them that must agree."""

    kernels: object
    dtype: str
    plain: object
    other: object

    def both(self, call):
        """The outputs of call(run, arrays): the same on exact arrays and, the other way, on guarded ones."""
        plain, guarded = Exact(self.dtype), Guarded(self.dtype)
        first = call(self.plain, plain)
        second = call(self.other, guarded)
        guarded.check()
        for one, other in zip(first, second):
            assert np.array_equal(bits(one), bits(other)), (
                "the layout or the order of work changed the result"
            )
        return first


def cpu_runs(kernels, isa, dtype, use="never"):
    """The kernels of the CPU, with one thread and with three, then with weights packed ahead. `use` is when
    Winograd's and Strassen's algorithms run."""
    runs = (kernels.Run(isa, dtype, threads, use, use, threads == 3) for threads in (1, 3))
    return Runs(kernels, dtype, *runs)


def cuda_runs(cuda_kernels, dtype, seed=0, **options):
    """The kernels of the GPU, their blocks and warps in the order of their numbers and shuffled."""
    run = functools.partial(cuda_kernels.Run, dtype, **options)
    return Runs(cuda_kernels, dtype, run(), run(order="shuffled", seed=seed))


def both_ways(kernels, isa, dtype, call, use="never"):
    return cpu_runs(kernels, isa, dtype, use).both(call)


def assert_same(got, want, what):
    """Bitwise, but for the sign of zero and the payload of a NaN."""
    equal = (got == want) | (np.isnan(got) & np.isnan(want))
    assert equal.all(), (
        f"{what}: {np.count_nonzero(~equal)} of {equal.size} differ, first at {np.argwhere(~equal)[0]}"
    )


def table(rows):
    return np.ascontiguousarray(rows, np.float32)
