"""Weights packed once: what `gconv.freeze` keeps beside a module's parameters, and the convolutions by it.

The kernels multiply by weights in an order of their own and apply a normalisation by running statistics as
one affine. Otherwise both are made in every call. Nothing kept is trusted: it remembers the tensors it was
made of, with their memory and version, and is made again when one is another or has been written to.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gconv import backend, guards
from gconv.autocast import autocast, autocast_enabled
from gconv.autograd import (
    call,
    channels_last,
    empty_channels_last,
    in_format,
    op,
    register,
    suggests_channels_last,
    unwatched,
)
from gconv.batch_norm import (
    as_float,
    check_eps,
    check_residual,
    fold,
    inference_affine,
    kernels_run,
    state_of,
    uses_batch_statistics,
)
from gconv.concat import check_into, placed, writes_in_place
from gconv.grouped_conv import check_tensors, conv_output_size, ops_for, plan

KEPT = "_gconv_kept"  # the name of a module's `Kept`, an attribute like any other: no part of a state_dict
MOST = 256  # things kept of one module: packed weights go by dtype and image size

# ---------------------------------------------------------------------------------------------- the ops
#
# conv_pack(weight, input_size, stride, padding, dilation, groups) -> packed: the weights of a convolution of
# an image [N, C, H, W] of weight's dtype as the kernels read them, with a header that says what they are
# for. conv_fwd_packed(x, packed, weight_size, ...) has the bits of grouped_conv_fwd or pointwise_conv_fwd of
# that weight, and conv_fwd_packed_into writes them to y; they raise RuntimeError for packed weights of
# another size or dtype or, where the kernels differ in it, image or instruction set. No gradients.

pack = op("conv_pack")
fwd_packed = op("conv_fwd_packed")
fwd_packed_into = op("conv_fwd_packed_into")


def _pack_fake(weight, input_size, stride, padding, dilation, groups):
    # How many floats depends on the instruction set: none that a compiler sees may be read.
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)


def _fwd_packed_fake(x, packed, weight_size, stride, padding, dilation, groups, *rest):
    weight = x.new_empty(1).expand(weight_size)
    return empty_channels_last(x, conv_output_size(x, weight, stride, padding, dilation))


def _fwd_packed_into_fake(*args):
    return None


register("conv_pack", _pack_fake, None)
register("conv_fwd_packed", _fwd_packed_fake, None)
register("conv_fwd_packed_into", _fwd_packed_into_fake, None)


# ------------------------------------------------------------------------------------------- what is kept


class Packed(NamedTuple):
    """A convolution's weights as `conv_pack` makes them, and their size [K, C/groups, R, S] before."""

    data: torch.Tensor
    size: torch.Size


class _Seen(NamedTuple):
    """A tensor as it was: its memory, held by an alias so that nothing else can come to lie there, and the
    version that counts the writes to it."""

    tensor: torch.Tensor
    alias: torch.Tensor
    address: int
    version: int


def _see(tensor) -> _Seen | None:
    return tensor if tensor is None else _Seen(tensor, tensor.detach(), tensor.data_ptr(), tensor._version)


def _same(seen: tuple, tensors: tuple) -> bool:
    for then, now in zip(seen, tensors):
        if then is None or now is None:
            if then is not now:
                return False
        elif then[0] is not now or then[2] != now.data_ptr() or then[3] != now._version:
            return False
    return True


def _current(seen: tuple) -> bool:
    """Whether nothing was written to the tensors since."""
    return _same(seen, tuple(then and then.tensor for then in seen))


class Kept:
    """What was made of tensors, by key. A copy or a pickle has nothing: it makes again what it needs."""

    def __init__(self):
        self.made: dict[object, tuple] = {}

    def __reduce__(self):
        return Kept, ()

    def get(self, key, tensors: tuple, make: Callable):
        """make(), or what it returned when it was last called for this key, if `tensors` (some may be None)
        are still the same and were not written to. None if one of them is an inference tensor: these do not
        count writes."""
        if backend.explaining():
            return make()
        found = self.made.get(key)
        if found is not None and _same(found[0], tensors):
            return found[1]
        if any(t is not None and t.is_inference() for t in tensors):
            return None
        # Seen before it is read: what another thread writes meanwhile must be noticed. What is made outlives
        # an inference_mode that this call may be in.
        seen = tuple(map(_see, tensors))
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        made = list(self.made.items())[1 - MOST :]
        self.made = {k: item for k, item in made if _current(item[0])} | {key: (seen, value)}
        return value


def kept_of(module: nn.Module) -> Kept | None:
    """What is kept of a module; None if it is not frozen, or where somebody watches every step."""
    kept = module.__dict__.get(KEPT)
    if kept is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    return kept


def parameters_of(conv: nn.Module, x) -> tuple:
    """(weight, bias) of a convolution, bias perhaps None. Where autocast is on and `conv` is frozen, they are
    cast to its dtype once."""
    kept = kept_of(conv)
    if kept is None or not autocast_enabled(x):
        return conv.weight, conv.bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(name, tensor):
        if tensor is None or tensor.dtype is dtype or not _ready(tensor):
            return tensor
        found = kept.get((name, dtype), (tensor,), lambda: autocast(tensor)[0])
        return tensor if found is None else found

    return cast("weight", conv.weight), cast("bias", conv.bias)


def packed_of(conv: nn.Module, weight, image, *conf) -> Packed | None:
    """The packed weights of a frozen convolution of an image of that size (H, W), or None if they cannot be
    kept; `weight` is in the image's dtype."""
    kept, size = conv.__dict__[KEPT], weight.shape
    if backend.explaining():
        return Packed(weight, size)
    if conv.weight.is_inference():
        return None
    key = ("packed", weight.dtype, backend.cpu_settings(), image, conf)

    def make():
        data = call(pack, weight, (1, size[1] * conf[-1], *image), *conf)
        bits = data.view(torch.int32)
        for _, other in list(kept.made.values()):  # images of many sizes share one
            if isinstance(other, Packed) and torch.equal(other.data.view(torch.int32), bits):
                return other
        return Packed(data, size)

    return kept.get(key, (weight,), make)


def affine_of(bn: nn.Module, state: tuple, bias=None) -> torch.Tensor:
    """[2, K], the normalisation by running statistics after a convolution with this bias, as of `fold`."""

    def make():
        mean, var, gamma, beta = map(as_float, state)
        return call(fold, mean if bias is None else mean - bias, var, gamma, beta, bn.eps)[1]

    kept = kept_of(bn)
    found = None if kept is None else kept.get(("affine", bn.eps), (*state, bias), make)
    return make() if found is None else found


# ------------------------------------------------------------------------------------- convolutions by it


def named(decision: backend.Decision, what: str = "packed weights") -> backend.Decision:
    """The decision as a trace shows it where that was kept."""
    return decision._replace(kernel=f"{decision.kernel}, {what}")


def plain(*tensors) -> bool:
    """Whether these are tensors with memory of their own, as fake ones and many subclasses are not; a dry run
    has no others."""
    return backend.explaining() or all(type(t) in guards.PLAIN for t in tensors)


def _ready(*tensors) -> bool:
    """Whether these, some of them perhaps None, are plain tensors and nobody watches them."""
    return plain(*(t for t in tensors if t is not None)) and unwatched(*tensors)


_WHERE = guards.state()


def block_of(what, x, convs, bns, make, residual=None):
    """make(), or what it returned for such a call before (`gconv.guards`, by this `what` and convolutions and
    normalisations one after the other), for a block of these modules that runs as one call on x and residual;
    None where that cannot run by what is kept, or if not all of them are frozen."""
    modules, inputs = (*convs, *bns), (x, residual)
    found = guards.recall(what, modules, inputs)
    if found is not None:
        return found
    if x.dim() != 4 or not x.is_cpu or not backend.extension_loaded():
        return None
    if None in map(kept_of, convs) or any(map(uses_batch_statistics, bns)):
        return None
    tensors = [t for conv in convs for t in (conv.weight, conv.bias)]
    for bn in bns:
        tensors += state_of(bn)
    if backend.backend_of(x) != "cpu" or not _ready(x, residual, *tensors):
        return None

    def kept():
        # What is made outlives an inference_mode that this call may be in.
        with torch.inference_mode(False), torch.no_grad():
            return make()

    return guards.remember(what, modules, inputs, tuple(tensors), True, _WHERE, kept)


def run_fwd(x, weight, *conf_and_epilogue):
    """The forward op for `weight`, a tensor or `Packed`."""
    if type(weight) is Packed:
        return fwd_packed(x, weight.data, weight.size, *conf_and_epilogue)
    return ops_for(weight.shape).fwd(x, weight, *conf_and_epilogue)


def run_fwd_into(x, weight, *rest) -> None:
    """The same into the last of the arguments."""
    if type(weight) is Packed:
        fwd_packed_into(x, weight.data, weight.size, *rest)
    else:
        ops_for(weight.shape).fwd_into(x, weight, *rest[:-1], False, rest[-1])


def _run(x, packed, conf, shape, keep, affine, residual, relu, into):
    """The forward, of that shape, into a slot or in channels_last if x is or `keep` says so."""
    rest = (packed.size, *conf, None, affine, residual, relu)
    if writes_in_place(into):

        def fill(memory, x):
            call(fwd_packed_into, x, packed.data, *rest, memory)
            return ()

        return into.run(None, fill, shape, channels_last(x))[0]
    keep = keep or suggests_channels_last(x)
    return placed(in_format(call(fwd_packed, channels_last(x), packed.data, *rest), keep), into)


class ConvCall(NamedTuple):
    """A frozen convolution and normalisation as one call on images of one size."""

    weight: Packed
    affine: torch.Tensor
    conf: tuple
    shape: tuple
    keep: bool
    decision: backend.Decision

    def run(self, x, residual, relu, into=None):
        x, residual = autocast(x, residual)
        z = _run(x, self.weight, self.conf, self.shape, self.keep, self.affine, residual, relu, into)
        backend.record(self.decision, "conv_bn_relu", x, z)
        return z


def conv_bn_relu(what, x, conv, bn, residual, padding, by_design) -> ConvCall | None:
    """`conv_bn_relu` of a frozen convolution and normalisation on the CPU's kernels, or None where it has to
    run from the parameters."""
    name = "conv_bn_relu"

    def make():
        here, more = autocast(x, residual)
        weight, bias = autocast(*parameters_of(conv, x))
        conf, decision = plan(
            name, here, weight, bias, conv.stride, padding, conv.dilation, conv.groups, by_design
        )
        shape, state = conv_output_size(here, weight, *conf[:3]) if decision.ours else None, state_of(bn)
        if decision.backend != "cpu" or not kernels_run(here, shape, False, *state):
            return None
        check_residual(name, more, shape, here)
        check_eps(name, bn.eps, False)
        found = packed_of(conv, weight, here.shape[2:], *conf)
        keep = suggests_channels_last(weight)
        return found and ConvCall(found, affine_of(bn, state, bias), conf, shape, keep, named(decision))

    return block_of(what, x, (conv,), (bn,), make, residual)


def infer_on_torch(conv, x, weight, bias, bn, residual, relu, conf):
    """The same on torch's convolution, the normalisation folded into its weight and bias."""
    state = state_of(bn)
    if uses_batch_statistics(bn) or None in state[:2] or not x.is_cpu:
        return None
    if not _ready(x, weight, bias, residual, *state):
        return None

    def make():
        scale, shift = inference_affine(*state, bn.eps, bias)
        return (scale[:, None, None, None] * weight).to(weight.dtype), shift.to(weight.dtype)

    folded = conv.__dict__[KEPT].get(("folded", bn.eps), (weight, bias, *state), make)
    if folded is None:
        return None
    y = F.conv2d(x, *folded, *conf)
    if residual is not None:
        y = y + residual
    return y.relu_() if relu else y


def conv2d(conv, x, weight, bias, conf, into):
    """`grouped_conv` of a frozen convolution, or None where it has to run from the parameters."""
    name = "grouped_conv"
    check_tensors(name, x, weight, bias)
    check_into(name, into)
    if x.dim() != 4:
        return None
    x, weight, bias = autocast(x, weight, bias)
    conf, decision = plan(name, x, weight, bias, *conf)
    if decision.backend != "cpu" or not _ready(x, weight, bias):
        return None

    def make():
        return torch.stack((torch.ones_like(bias, dtype=torch.float32), bias.float()))

    packed = packed_of(conv, weight, x.shape[2:], *conf)
    affine = None if bias is None else conv.__dict__[KEPT].get("bias", (bias,), make)
    if packed is None or (bias is not None and affine is None):
        return None
    shape = conv_output_size(x, weight, *conf[:3])
    y = _run(x, packed, conf, shape, suggests_channels_last(weight), affine, None, False, into)
    backend.record(named(decision), name, x, y)
    return y
