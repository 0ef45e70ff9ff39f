"""Fixtures of the whole suite: which instruction set runs, NaN in fresh memory, a known number of threads,
the kernels for GPUs there or in Triton's interpreter."""

import contextlib
import os

import pytest
import torch
import torch.utils.deterministic
from checks import ISAS
from run_together import without_repeats

# Triton reads this when it is imported and whenever a kernel is declared, so it is for the whole process.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Tests that would repeat another are dropped: by instruction set and dtype, or by all of the dtypes that
    a test has `chosen`. So would Winograd's algorithm on amx_bf16, which does not use it, and the widest
    group there, whose cuts narrower ones have: on an emulator both take long."""

    def repeated(params):
        isa = params.get("isa")
        if isa == "amx_bf16" and (params.get("winograd") == "always" or params.get("width") == (112, 112, 1)):
            return True
        return not without_repeats(isa, params.get("chosen", [(params.get("dtype"), None)]))

    items[:] = [
        item for item in items if not repeated(getattr(item, "callspec", item).__dict__.get("params", {}))
    ]
    reason = missing_cuda()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("needs_cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))


def missing_cuda():
    """Why no kernels run on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    return "needs TRITON_INTERPRET=0" if os.environ.get("TRITON_INTERPRET") == "1" else None


@pytest.fixture(scope="session")
def ops():
    """torch.ops.gconv with the C++ ops loaded; a suite without them proves nothing, hence an error and not a
    skip."""
    import gconv  # noqa: F401  (loads the extension)

    if not hasattr(torch.ops.gconv, "grouped_conv_fwd"):
        pytest.fail("the C++ extension gconv._C is not built: run `make build`")
    return torch.ops.gconv


def select_isa(name):
    try:
        torch.ops.gconv.set_cpu_isa(name)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"this machine cannot run the {name} path: {error}")
    assert torch.ops.gconv.cpu_isa() == name


@pytest.fixture(params=ISAS)
def isa(request, ops):
    """Runs the test once on each instruction set this machine has."""
    before = ops.cpu_isa()
    select_isa(request.param)
    yield request.param
    ops.set_cpu_isa(before)


@pytest.fixture
def winograd(ops):
    """Chooses whether Winograd's algorithm runs ("never", "auto", "always"); undone after the test."""
    before = ops.cpu_winograd()
    yield ops.set_cpu_winograd
    ops.set_cpu_winograd(before)


@pytest.fixture
def strassen(ops):
    """The same of Strassen's."""
    before = ops.cpu_strassen()
    yield ops.set_cpu_strassen
    ops.set_cpu_strassen(before)


@pytest.fixture
def nan_filled_memory():
    """torch.empty returns NaN, so that an element nobody wrote cannot pass for a result."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(64).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """The whole module on one thread: what is small is done sooner so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _dot_in_one_order(a, b, d, input_precision, max_num_imprecise_acc):
    """What Triton's interpreter does for tl.dot, each element summed over k from first to last: on a GPU too,
    the order does not depend on where in its tile an element lies. That of NumPy's BLAS, which the
    interpreter asks, does on some CPUs."""
    total = d.data.copy()
    for k in range(a.data.shape[-1]):
        total += a.data[..., k, None].astype(total.dtype) * b.data[..., k, None, :].astype(total.dtype)
    return type(d)(total, d.dtype.scalar)


@contextlib.contextmanager
def _on_kernels(name):
    import gconv
    from gconv import gpu

    reason = gpu.missing_triton() or (None if gpu.interpreting() else missing_cuda())
    if reason is None and name == "cuda":
        reason = gpu.missing_cuda(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # on a GPU torch's default is TF32
    try:
        with pytest.MonkeyPatch.context() as patch, gconv.use_backend(name):
            if gpu.interpreting():
                patch.setattr("triton.runtime.interpreter.interpreter_builder.create_dot", _dot_in_one_order)
            yield torch.device("cpu" if gpu.interpreting() else "cuda")
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision


@pytest.fixture
def triton_backend():
    """The Triton kernels run every op in this test; the device its tensors have to be on: the GPU, or the CPU
    under Triton's interpreter."""
    with _on_kernels("triton") as device:
        yield device


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.needs_cuda)])
def gpu_backend(request):
    """The same, and once more with those kernels in CUDA C++ that there are."""
    with _on_kernels(request.param) as device:
        yield device
