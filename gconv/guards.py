"""Calls that were decided before. Between large kernels Python is cold, and to ask again what runs a block,
how large its result is and whether its parameters are still the same takes longer than a small layer. A call
like an earlier one, with nothing of its modules changed, therefore does as that one did.

What has to be unchanged is all that a decision can depend on, compared in C (csrc/guards.h): every attribute
of the modules and every entry of the dictionaries among them (parameters, buffers, hooks), what kind of
tensors these and the inputs are, and the settings of gconv and torch.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
)
from torch.autograd import forward_ad

from gconv import backend

CALLS = "_gconv_calls"  # the name of a module's `Calls`, an attribute like any other: no part of a state_dict
MOST = 64  # calls known of one module: they go by the size of the image
PLAIN = (torch.Tensor, nn.Parameter)  # what has memory of its own; other types only look like it

_SETTINGS = (
    "_mode", "_missing_extension", "_explaining", "DENSE_TO_TORCH_CHANNELS", "POINTWISE_BFLOAT16_TO_TORCH",
)  # fmt: skip


def state(*places: tuple[dict, str]) -> tuple:
    """What decisions depend on besides a call: gconv's and torch's settings and what lies at `places`."""
    questions = (torch.is_grad_enabled, _are_functorch_transforms_active, _get_tracing_state)
    if backend.extension_loaded():
        questions += (backend.cpu_settings,)
    known = [(vars(backend), name) for name in _SETTINGS]
    return questions, (*known, (vars(forward_ad), "_current_level"), *places)


class Calls:
    """Calls of a block that were decided, kept with its first convolution. A copy or a pickle has none."""

    def __init__(self):
        self.known: dict[tuple, tuple] = {}

    def __reduce__(self):
        return dict, ()


def _key(what: str, x) -> tuple:
    if not _is_any_autocast_enabled():
        return what, x.shape
    return what, x.shape, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def recall(what: str, modules: tuple, inputs: tuple):
    """What `remember` keeps of such a call of these modules on such inputs, or None; None while a compiler
    looks on. inputs[0] is a tensor."""
    if torch.compiler.is_compiling():
        return None
    calls = modules[0].__dict__.get(CALLS)
    if type(calls) is not Calls:
        return None
    found = calls.known.get(_key(what, inputs[0]))
    if found is None or not backend.guard_holds(found[0], modules, calls, *inputs):
        return None
    return found[1]


def _plain(tensor) -> bool:
    return tensor is None or (type(tensor) in PLAIN and tensor.is_cpu and tensor.layout is torch.strided)


def looked_on() -> bool:
    """Whether something has to see every step of a call: then nothing is remembered."""
    return (
        torch.compiler.is_compiling()
        or backend.explaining()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
    )


def _guardable(modules, inputs, tensors, by_contents) -> bool:
    if looked_on() or not all(map(_plain, (*inputs, *tensors))):
        return False
    # What a guard has seen it keeps: no step's tensors, nor the graph behind them.
    for module in modules:
        if any(isinstance(value, torch.Tensor) for value in vars(module).values()):
            return False
    for tensor in tensors:
        if tensor is not None and not tensor.is_leaf:
            return False
        if tensor is not None and by_contents and tensor.is_inference():  # these do not count writes
            return False
    return True


def remember(
    what: str, modules: tuple, inputs: tuple, tensors: tuple, by_contents: bool, where: tuple, make: Callable
):
    """make(), which the next such call finds by `recall`.

    Args:
        what: the block and what of the call neither modules nor inputs say.
        modules: the block's, the first of which keeps it.
        inputs: tensors or None; only what kind of tensors they are counts.
        tensors: of the modules, some perhaps None; by_contents: make() depends on what they hold.
        where: a `state`.
        make: returns what to remember. None is not remembered.
    """
    if not _guardable(modules, inputs, tensors, by_contents):
        return make()
    owner = modules[0].__dict__
    calls = owner.get(CALLS)
    if type(calls) is not Calls:
        calls = owner[CALLS] = Calls()
    # Seen before it is read: what another thread writes meanwhile must be noticed.
    guard = backend.make_guard(where, inputs, tensors, modules, by_contents, calls)
    value = make()
    if value is not None:
        if len(calls.known) >= MOST:
            calls.known = {}
        calls.known[_key(what, inputs[0])] = guard, value
    return value
