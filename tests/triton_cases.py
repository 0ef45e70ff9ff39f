"""What the tests of the Triton kernels share: the dtypes they run at, the ops on whatever device runs them,
and the tests of the C++ ops to be run on them again."""

import copy
import functools
import inspect

import checks
import pytest
import torch

# The interpreter computes bfloat16 wrongly, so that is for a GPU alone.
DTYPES = (torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.needs_cuda))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)


class OnDevice:
    """torch.ops.gconv on CPU tensors, run on `device`: arguments are copied there with their strides and what
    lies between, results and what the op wrote into its arguments are copied back."""

    def __init__(self, device):
        self.device = device

    def there(self, value):
        if not isinstance(value, torch.Tensor) or value.device == self.device:
            return value
        everything = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(self.device)
        return everything.as_strided(value.shape, value.stride(), value.storage_offset())

    def __getattr__(self, name):
        op = getattr(torch.ops.gconv, name)

        def run(*args):
            moved = [self.there(arg) for arg in args]
            results = op(*moved)
            for arg, there in zip(args, moved, strict=True):
                if there is not arg:
                    arg.copy_(there)
            if isinstance(results, torch.Tensor):
                return results.cpu()
            return results if results is None else tuple(result.cpu() for result in results)

        return run


@pytest.fixture(name="ops")
def ops_on_device(triton_backend):
    """In a module that imports it: the ops as the Triton kernels run them."""
    return OnDevice(triton_backend)


@pytest.fixture(name="isa")
def no_isa():
    """The one "instruction set" of this backend, as the tests of the C++ ops ask for one."""
    return "triton"


def on_triton(test, **values):
    """`test`, of the C++ ops by the fixtures `ops` and `isa`, for the Triton kernels: with these values of
    its parameters in the place of its own, and `DTYPES`."""

    @functools.wraps(test)
    def again(*args, **kwargs):
        test(*args, **kwargs)

    again.__signature__ = inspect.signature(test)
    again.pytestmark = []
    values["dtype"] = DTYPES
    for mark in getattr(test, "pytestmark", ()):
        name = mark.args[0] if mark.name == "parametrize" else None
        if name in values:
            mark = pytest.mark.parametrize(name, values[name], **mark.kwargs).mark
        again.pytestmark.append(mark)
    return again


def on_device(module, device):
    """`module` on CPU tensors, run on `device`: its parameters, buffers and inputs are copied there at each
    call, its result and what became of its buffers are copied back."""
    if device.type == "cpu":
        return module
    inner = copy.deepcopy(module)

    def forward(*inputs):
        state = {name: p.to(device) for name, p in module.named_parameters()}
        state |= {name: b.to(device) for name, b in module.named_buffers()}
        z = torch.func.functional_call(inner, state, tuple(x.to(device) for x in inputs))
        for name, buffer in module.named_buffers():
            buffer.copy_(state[name])
        return z.cpu()

    module.forward = forward
    return module
