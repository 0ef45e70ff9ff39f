"""The dense block (Huang et al. 2017, arXiv 1608.06993) as one operation with one autograd node: no
concatenation, statistics once per channel. How it computes is in `dense_stages`; here are its autograd
Function, its op for compilers, and the functions that users and modules call.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad

from gconv import backend
from gconv.autocast import autocast, autocast_enabled
from gconv.autograd import (
    applier,
    call,
    channels_last,
    decide,
    empty_channels_last,
    first_order,
    in_format,
    suggests_channels_last,
    untracked,
    unwatched,
    vjp_by_reference,
)
from gconv.batch_norm import (
    as_float,
    check_count,
    check_eps,
    fold,
    kernels_run,
    only,
    state_of,
    update_state,
    uses_batch_statistics,
)
from gconv.dense_stages import (
    Conf,
    Kept,
    LayerConf,
    Params,
    Wanted,
    backward_stages,
    forward_stages,
    infer_stages,
)
from gconv.grouped_conv import check_tensors
from gconv.memory import new_channels_last
from gconv.ranks import Alone, mixed_reason, ranks_of

MEMORY = ("shared", "ultra", "naive")
ENDS = ("buffer", "relu", "pool")


class Layer(NamedTuple):
    """One layer: BN, ReLU, 3x3 convolution, or with a bottleneck BN, ReLU, 1x1, BN, ReLU, 3x3."""

    norms: tuple  # one or two modules
    weights: tuple  # as many: [B, C, 1, 1] with a bottleneck, and [K, C or B, 3, 3]
    dropout: float = 0.0
    dilation: int = 1
    groups: int = 1


def dense_block_ref(x, layers, end=None):
    """The definition of `dense_block`, for `Layer`s and (bn, weight or None): torch.cat, the modules called,
    conv2d, dropout."""
    features = [x]
    for layer in layers:
        h = torch.cat(features, 1)
        for bn, weight in zip(layer.norms, layer.weights):
            three = weight.shape[2] == 3
            padding, dilation, groups = (layer.dilation, layer.dilation, layer.groups) if three else (0, 1, 1)
            h = F.conv2d(torch.relu(bn(h)), weight, None, 1, padding, dilation, groups)
        features.append(F.dropout(h, layer.dropout) if layer.dropout > 0 else h)
    out = torch.cat(features, 1)
    if end is None:
        return out
    bn, weight = end
    out = torch.relu(bn(out))
    return out if weight is None else F.avg_pool2d(F.conv2d(out, weight), 2)


# ----------------------------------------------------------------------------------------------- flat tensors


def _flat(params: Params) -> list:
    return [tensor for several in params for tensor in several]


def _params(tensors, conf: Conf) -> Params:
    """The inverse of `_flat`."""
    sizes = (conf.convs, *(conf.norms,) * 4)
    several, at = [], 0
    for size in sizes:
        several.append(list(tensors[at : at + size]))
        at += size
    return Params(*several, list(tensors[at:]))


def _flat_kept(kept: Kept) -> list:
    return [kept.mean, kept.var, *kept.tables, *kept.ys, *kept.variances]


def _kept(tensors, conf: Conf) -> Kept:
    """The inverse of `_flat_kept`."""
    mean, var, *rest = tensors
    ys = 0 if conf.ultra else sum(layer.bottleneck for layer in conf.layers)
    at = conf.norms
    return Kept(mean, var, rest[:at], rest[at : at + ys], rest[at + ys :])


def _wanted(needs, conf: Conf) -> Wanted:
    """`needs` of the input, the weights, gammas and betas, one after the other."""
    at = 1 + conf.convs
    weights, gammas = needs[1:at], needs[at : at + conf.norms]
    return Wanted(needs[0], list(weights), list(gammas), list(needs[at + conf.norms :][: conf.norms]))


def _grads(dz, buffer, params, kept, conf, needs, ranks) -> list:
    """Gradients to the input, the weights, gammas and betas, None where not wanted."""
    wanted = _wanted(needs, conf)
    dx, *rest = backward_stages(channels_last(dz), buffer, params, kept, conf, wanted, ranks)
    return list(only(needs, [dx, *(grad for several in rest for grad in several)]))


# -------------------------------------------------------------------------------------------------- composed


def _composed(x, weights, gammas, betas, params: Params, conf: Conf):
    """The output from differentiable parts; of params only the constants and the noises."""
    weights, noises = iter(weights), iter(params.noises)
    norms = iter(zip(gammas, betas, params.means, params.variances))

    def norm_relu(h, by_batch, eps):
        gamma, beta, mean, var = next(norms)
        mean, var = (None, None) if by_batch else (mean, var)
        return torch.relu(F.batch_norm(h, mean, var, gamma, beta, by_batch, 0.0, eps))

    features = [x]
    for layer in conf.layers:
        h = norm_relu(torch.cat(features, 1), layer.batch[0], layer.eps[0])
        if layer.bottleneck:
            h = norm_relu(F.conv2d(h, next(weights)), layer.batch[1], layer.eps[1])
        h = F.conv2d(h, next(weights), None, *layer.geometry)
        features.append(h * next(noises) * layer.kept_scale if layer.dropout > 0 else h)
    out = torch.cat(features, 1)
    if conf.end == "buffer":
        return out
    out = norm_relu(out, conf.batch, conf.eps)
    return out if conf.end == "relu" else F.conv2d(F.avg_pool2d(out, 2), next(weights))


def _grads_by_reference(dz, x, params: Params, conf: Conf, needs) -> list:
    """`_grads`, differentiable again, by the plain composition, which keeps what plain modules keep."""
    reason = "backward by the plain composition: its gradients are to be differentiated or batched"
    backend.record(backend.Decision("torch", "torch.dense_block", reason), "dense_block_bwd", x)

    def forward(x, *rest):
        at, norms = conf.convs, conf.norms
        return _composed(x, rest[:at], rest[at : at + norms], rest[at + norms :], params, conf)

    args = (x, *params.weights, *params.gammas, *params.betas)
    return list(vjp_by_reference(forward, args, needs, (dz,)))


# -------------------------------------------------------------------------------------------------- Functions


class Enter(Function):
    """x as the first channels of a buffer: a copy, once, that the block's own node can keep at no cost."""

    @staticmethod
    def forward(x, buffer):
        # By `data` it has a version of its own: the block writes the buffer's other channels.
        first = buffer.data[:, : x.shape[1]]
        first.copy_(x)
        return first

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dfirst):
        return dfirst, None


class SharedBlock(Function):
    """(output, what `Kept` holds) of a block whose input x is the buffer's first channels; the output alone
    is differentiable. The rest of the arguments are those of `Params`, a `Conf` and the ranks."""

    @staticmethod
    def forward(x, buffer, *rest):
        *tensors, conf, ranks = rest
        out, kept = call(forward_stages, buffer, _params(tensors, conf), conf, ranks)
        return out.detach() if out is buffer else out, *_flat_kept(kept)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, buffer, *tensors, ctx.conf, ctx.ranks = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.tensors = len(tensors)
        ctx.save_for_backward(x, buffer, *tensors, *kept)

    @staticmethod
    def backward(ctx, dz, *unused):
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        total = len(ctx.needs_input_grad)
        if dz is None:
            return (None,) * total
        conf = ctx.conf
        x, buffer, *rest = ctx.saved_tensors
        params, kept = _params(rest[: ctx.tensors], conf), _kept(rest[ctx.tensors :], conf)
        needs = needs[: 1 + conf.convs + 2 * conf.norms]
        batched = _are_functorch_transforms_active() or is_legacy_batchedtensor(dz)
        if first_order() and not batched:
            dx, *grads = call(_grads, dz, buffer, params, kept, conf, needs, ctx.ranks)
        else:
            dx, *grads = _grads_by_reference(dz, x, params, conf, needs)
        return dx, None, *grads, *(None,) * (total - 2 - len(grads))


_enter = applier(Enter)
_block_apply = applier(SharedBlock)


# ------------------------------------------------------------------------------------------ for compilers
#
# A compiler sees one op in each direction, so that it can neither undo the sharing nor keep more than is kept
# here. Lists of a schema hold tensors alone: what a `Conf` says goes as integers and floats.


def _packed(conf: Conf) -> tuple[list[int], list[float]]:
    ints = [conf.channels, ENDS.index(conf.end), int(conf.batch), int(conf.ultra)]
    floats = [conf.eps]
    for layer in conf.layers:
        batch, eps = (*layer.batch, False)[:2], (*layer.eps, 0.0)[:2]
        ints += [layer.growth, int(layer.bottleneck), layer.dilation, layer.groups, *map(int, batch)]
        floats += [layer.dropout, *eps]
    return ints, floats


def _unpacked(ints, floats) -> Conf:
    channels, end, batch, ultra = ints[:4]
    layers = []
    for i, j in zip(range(4, len(ints), 6), range(1, len(floats), 3)):
        growth, bottleneck, dilation, groups, *by_batch = ints[i : i + 6]
        dropout, *eps = floats[j : j + 3]
        norms = 1 + bottleneck
        batches = tuple(map(bool, by_batch[:norms]))
        layers.append(
            LayerConf(growth, bool(bottleneck), dilation, groups, dropout, tuple(eps[:norms]), batches)
        )
    return Conf(channels, tuple(layers), ENDS[end], floats[0], bool(batch), bool(ultra))


def _op_fwd(x, weights, gammas, betas, means, variances, noises, ints, floats):
    conf = _unpacked(ints, floats)
    buffer = new_channels_last(x, (x.shape[0], conf.total, *x.shape[2:]))
    buffer[:, : conf.channels].copy_(x)
    params = Params(weights, gammas, betas, means, variances, noises)
    out, kept = call(forward_stages, buffer, params, conf, Alone(x))
    return [*([] if out is buffer else [out]), buffer, *_flat_kept(kept)]


def _op_fwd_fake(x, weights, gammas, betas, means, variances, noises, ints, floats):
    conf = _unpacked(ints, floats)
    n, _, h, w = x.shape
    buffer = empty_channels_last(x, (n, conf.total, h, w))
    out = []
    if conf.end == "relu":
        out = [empty_channels_last(x, buffer.shape)]
    elif conf.end == "pool":
        out = [empty_channels_last(x, (n, weights[-1].shape[0], h // 2, w // 2))]
    shared = conf.total if conf.shares_statistics else 0
    vectors = [x.new_empty(shared, dtype=torch.float32) for _ in range(2)]
    tables = [gamma.new_empty(4, gamma.shape[0]) for gamma in gammas]
    weights, ys, found = iter(weights), [], []
    for layer in conf.layers:
        width = next(weights).shape[0]
        if layer.bottleneck:
            next(weights)
            if not conf.ultra:
                ys.append(empty_channels_last(x, (n, width, h, w)))
            if layer.batch[1]:
                found.append(x.new_empty(width, dtype=torch.float32))
    return [*out, buffer, *vectors, *tables, *ys, *found]


def _op_bwd(dz, buffer, weights, gammas, betas, noises, kept, needs, ints, floats):
    conf = _unpacked(ints, floats)
    params = Params(weights, gammas, betas, [], [], noises)
    grads = call(_grads, dz, buffer, params, _kept(kept, conf), conf, tuple(needs), Alone(buffer))
    # Those to gamma and beta are rows of one table; an op's outputs must not share memory.
    return [dz.new_empty(0) if grad is None else grad if grad.dim() == 4 else grad.clone() for grad in grads]


def _op_bwd_fake(dz, buffer, weights, gammas, betas, noises, kept, needs, ints, floats):
    n, _, h, w = buffer.shape
    likes = [None, *weights, *gammas, *betas]
    grads = [torch.empty_like(like) if want else dz.new_empty(0) for want, like in zip(needs[1:], likes[1:])]
    first = empty_channels_last(buffer, (n, ints[0], h, w)) if needs[0] else dz.new_empty(0)
    return [first, *grads]


def _op_setup_context(ctx, inputs, output):
    _, *lists, ctx.ints, ctx.floats = inputs
    conf = _unpacked(ctx.ints, ctx.floats)
    weights, gammas, betas, _, _, noises = lists
    ctx.counts = [len(tensors) for tensors in lists]
    kept = output if conf.end == "buffer" else output[1:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*weights, *gammas, *betas, *noises, *kept)


def _op_backward(ctx, grads):
    saved, at, lists = list(ctx.saved_tensors), 0, []
    convs, norms, _, _, _, noises = ctx.counts
    for count in (convs, norms, norms, noises):
        lists.append(saved[at : at + count])
        at += count
    buffer, *kept = saved[at:]
    needs = [ctx.needs_input_grad[0], *(want for several in ctx.needs_input_grad[1:4] for want in several)]
    dz = grads[0]
    found = torch.ops.gconv.dense_block_bwd(dz, buffer, *lists, kept, needs, ctx.ints, ctx.floats)
    found = [grad if want else None for grad, want in zip(found, needs)]
    rest = [[None] * norms, [None] * norms, [None] * noises]
    at = 1 + convs
    return found[0], found[1:at], found[at : at + norms], found[at + norms :], *rest, None, None


_LISTS = "Tensor[] weights, Tensor[] gammas, Tensor[] betas"
_CONF = "int[] ints, float[] floats"
_library = torch.library.Library("gconv", "FRAGMENT")
_library.define(
    f"dense_block_fwd(Tensor x, {_LISTS}, Tensor[] means, Tensor[] variances, Tensor[] noises, {_CONF}) "
    "-> Tensor[]"
)
_library.define(
    f"dense_block_bwd(Tensor dz, Tensor buffer, {_LISTS}, Tensor[] noises, Tensor[] kept, bool[] needs, "
    f"{_CONF}) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _library.impl("dense_block_fwd", _op_fwd, _key)
    _library.impl("dense_block_bwd", _op_bwd, _key)
torch.library.register_fake("gconv::dense_block_fwd", _op_fwd_fake, lib=_library)
torch.library.register_fake("gconv::dense_block_bwd", _op_bwd_fake, lib=_library)
torch.library.register_autograd(
    "gconv::dense_block_fwd", _op_backward, setup_context=_op_setup_context, lib=_library
)


# -------------------------------------------------------------------------------------------- the functions


def _shape_reason(x, layers, end) -> str | None:
    """Why these shapes make no dense block that the kernels run, or None."""
    _, channels, h, w = x.shape
    for i, layer in enumerate(layers):
        width = channels
        for weight, kernel in zip(layer.weights, ((1, 1), (3, 3))[-len(layer.weights) :]):
            groups = layer.groups if kernel == (3, 3) else 1
            if weight.dim() != 4 or tuple(weight.shape[2:]) != kernel or weight.shape[0] == 0:
                return f"layers: {i}: want a {kernel[0]}x{kernel[1]} convolution, got {list(weight.shape)}"
            if weight.shape[1] * groups != width or weight.shape[0] % groups:
                return f"layers: {i}: a weight of {list(weight.shape)} for {width} channels"
            width = weight.shape[0]
        channels += width
    if end is not None and end[1] is not None:
        weight = end[1]
        if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 1, 1) or h < 2 or w < 2:
            return f"transition: a weight of {list(weight.shape)} for {channels} channels of {h}x{w}"
    return None


def reason_against(x, layers, end) -> str | None:
    """Why the block cannot run on the kernels, or None."""
    if x.dim() != 4:
        return f"x: want [N, C, H, W], got {list(x.shape)}"
    decision = decide("dense_block", x)
    if not decision.ours:
        return decision.reason
    if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a function transform or forward-mode AD"
    reason = _shape_reason(x, layers, end)
    if reason is not None:
        return reason
    for weight in _weights_of(layers, end):
        if weight.dtype != x.dtype or not backend.same_device(weight, x):
            return f"weight: want {x.dtype} on {x.device}, got {weight.dtype} on {weight.device}"
    n, _, h, w = x.shape
    for bn, channels in zip(_norms_of(layers, end), _widths(x, layers, end)):
        if not kernels_run(x, (n, channels, h, w), uses_batch_statistics(bn), *state_of(bn)):
            return "an empty batch or uncommon parameters of a normalisation"
    return None


def _weights_of(layers, end) -> list:
    last = [] if end is None or end[1] is None else [end[1]]
    return [weight for layer in layers for weight in layer.weights] + last


def _norms_of(layers, end) -> list:
    return [bn for layer in layers for bn in layer.norms] + ([] if end is None else [end[0]])


def _widths(x, layers, end) -> list:
    """Channels that each normalisation sees."""
    widths, channels = [], x.shape[1]
    for layer in layers:
        widths += [channels, *(weight.shape[0] for weight in layer.weights[:-1])]
        channels += layer.weights[-1].shape[0]
    return widths + ([] if end is None else [channels])


def conf_of(x, layers, end, ultra) -> Conf:
    confs = []
    for layer in layers:
        eps, batch = zip(*((bn.eps, uses_batch_statistics(bn)) for bn in layer.norms))
        growth, bottleneck = layer.weights[-1].shape[0], len(layer.weights) == 2
        confs.append(LayerConf(growth, bottleneck, layer.dilation, layer.groups, layer.dropout, eps, batch))
    if end is None:
        return Conf(x.shape[1], tuple(confs), "buffer", 0.0, False, ultra)
    bn, weight = end
    kind = "relu" if weight is None else "pool"
    return Conf(x.shape[1], tuple(confs), kind, bn.eps, uses_batch_statistics(bn), ultra)


def _noise(x, layer: LayerConf):
    """What dropout keeps of a layer's output, by the draws of F.dropout on a channels_last tensor."""
    n, _, h, w = x.shape
    noise = empty_channels_last(x, (n, layer.growth, h, w))
    return (noise.bernoulli_(1 - layer.dropout) if layer.dropout < 1 else noise.zero_()).bool()


def _shared(x, layers, end, ultra):
    """The block on the kernels."""
    norms, weights = _norms_of(layers, end), _weights_of(layers, end)
    batch = [uses_batch_statistics(bn) for bn in norms]
    for bn, by_batch in zip(norms, batch):
        check_eps("dense_block", bn.eps, by_batch)
    ranks = ranks_of(norms, batch, x)
    if any(batch) and ranks.count == 1:
        check_count("dense_block", x.shape)
    keep = any(map(suggests_channels_last, (x, *weights)))
    conf = conf_of(x, layers, end, ultra)
    states = [state_of(bn) for bn in norms]
    widths = _widths(x, layers, end)
    nothing = x.new_empty(0, dtype=torch.float32)
    gammas, betas = (
        [
            x.new_full((width,), value, dtype=torch.float32) if state[k] is None else as_float(state[k])
            for state, width in zip(states, widths)
        ]
        for k, value in ((2, 1.0), (3, 0.0))
    )
    means, variances = (
        [nothing if by_batch else as_float(state[k]) for state, by_batch in zip(states, batch)]
        for k in (0, 1)
    )
    noises = [_noise(x, layer) for layer in conf.layers if layer.dropout > 0]
    params = Params(weights, gammas, betas, means, variances, noises)
    if not any(batch) and not noises and unwatched(x, *weights, *gammas, *betas):
        norms = zip(means, variances, gammas, betas, conf.all_eps)
        affines = [call(fold, *norm)[1] for norm in norms]
        return in_format(call(infer_stages, x, weights, affines, conf), keep)
    if torch.compiler.is_compiling():
        found = torch.ops.gconv.dense_block_fwd(x, *map(list, params), *_packed(conf))
        out, *kept = found if conf.end == "buffer" else (found[0], *found[2:])
    else:
        buffer = new_channels_last(x, (x.shape[0], conf.total, *x.shape[2:]))
        if untracked():
            Enter.forward(x, buffer)
            out, kept = call(forward_stages, buffer, params, conf, ranks)
            kept = _flat_kept(kept)
        else:
            out, *kept = _block_apply(_enter(x, buffer), buffer, *_flat(params), conf, ranks)
    _update(norms, batch, states, _kept(kept, conf), conf, ranks)
    return in_format(out, keep)


def _update(norms, batch, states, kept: Kept, conf: Conf, ranks) -> None:
    """Moves every running statistic, once."""
    found, at = iter(kept.variances), 0
    for layer, start in zip(conf.layers, conf.starts):
        for first in (True, False)[: 1 + layer.bottleneck]:
            if batch[at]:
                var = kept.var[:start] if first else next(found)
                update_state(norms[at], *states[at][:2], kept.tables[at][2], var, ranks.count)
            at += 1
    if conf.end != "buffer" and batch[at]:
        update_state(norms[at], *states[at][:2], kept.tables[at][2], kept.var, ranks.count)


def check(x, layers, end, memory) -> None:
    if memory not in MEMORY:
        wanted = f"{', '.join(MEMORY[:-1])} or {MEMORY[-1]}"
        raise ValueError(f"dense_block: memory: want {wanted}, got {memory!r}")
    for weight in _weights_of(layers, end):
        check_tensors("dense_block", x, weight, None)


def run(x, layers, end, memory):
    """The block on the kernels, or None, said in a trace, where it has to run as plain modules."""
    if memory == "naive":
        reason = "memory='naive'"
    else:
        reason = reason_against(x, layers, end)
        if reason is None:
            norms = _norms_of(layers, end)
            reason = mixed_reason(norms, [uses_batch_statistics(bn) for bn in norms])
    if reason is not None:
        not_shared(reason, x)
        return None
    out = _shared(x, layers, end, memory == "ultra")
    decision = backend.whole("dense_block", x, layers[0].weights[-1], layers[0].groups)
    backend.record(decision, "dense_block", x, out)
    return out


def not_shared(reason, x) -> None:
    """Says in a trace that a dense block runs as plain modules. No fallback: each of them decides for
    itself."""
    backend.record(backend.one_by_one(reason), "dense_block", x)


def dense_block(x, layers, transition=None, memory="shared", dropout=0.0):
    """A dense block (Huang et al. 2017, arXiv 1608.06993, equation 2) as one operation: every layer, BN,
    ReLU, convolution (and with a bottleneck BN, ReLU, 1x1, BN, ReLU, 3x3), reads the input and all layers
    before it, and nothing is concatenated.

    All layers write into one channels_last buffer; batch statistics are taken once per channel and shared by
    every later normalisation, each with its own gamma, beta and eps; the backward has one gradient buffer.
    Running statistics of every normalisation move once. By constants (in eval mode, FrozenBatchNorm2d)
    without gradients second normalisations are the epilogue of the 1x1 convolutions. Training, constants and
    frozen parameters mix freely. What the kernels do not cover (see `grouped_conv`), function transforms and
    forward-mode AD run as plain modules, as `gconv.trace` says; a backward under create_graph does as well,
    for its part.

    With nn.SyncBatchNorm in a process group the statistics are those of all ranks' batches, merged by Chan's
    rule; all normalisations by the batch must then be of that kind and of one group.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16.
        layers: of each (bn, weight [K, C_l, 3, 3]) or (bn, weight [B, C_l, 1, 1], bn, weight [K, B, 3, 3]),
            with modules as in `conv_bn_relu` and weights of x's dtype; C_l is C and the K of all layers
            before. Padding 1, stride 1.
        transition: (bn, weight [M, C_total, 1, 1]): BN, ReLU, 1x1 convolution and average pooling over 2x2
            end the block (the pooling is done first: they commute). (bn, None): BN and ReLU end it. None:
            the output is the concatenation.
        memory: "shared" keeps the buffer and the bottlenecks' outputs for the backward, "ultra" the buffer
            alone and computes the rest again; "naive" runs plain modules, the definition.
        dropout: the probability with which each layer's output is zeroed, by torch's random generator.

    Returns:
        [N, C_total, H, W], with a transition [N, M, H//2, W//2], dtype of x; channels_last if x or one of
        the weights is, else contiguous. Without a transition it is the buffer that the backward reads:
        changing it in place makes the backward raise.

    Raises:
        ValueError: what does not fit together, naming the argument, what is wanted and what was given; one
            value per channel in training.

    Determinism: the kernels are bit-identical from run to run and for any number of threads, dropout with
    equal states of the generator.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"dense_block: x: want a tensor, got {type(x).__name__}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dense_block: dropout: want a probability, got {dropout}")
    layers = [tuple(layer) for layer in layers]
    for i, layer in enumerate(layers):
        if len(layer) not in (2, 4):
            wanted = "(bn, weight) or (bn, weight, bn, weight)"
            raise ValueError(f"dense_block: layers: {i}: want {wanted}, got {len(layer)} items")
    if not layers:
        raise ValueError("dense_block: layers: want at least one layer, got none")
    layers = [Layer(layer[::2], layer[1::2], dropout) for layer in layers]
    check(x, layers, transition, memory)
    x, layers, end = in_autocast(x, layers, transition)
    out = run(x, layers, end, memory)
    return dense_block_ref(x, layers, end) if out is None else out


def in_autocast(x, layers, end):
    """The same with x and all weights in autocast's dtype where it is on."""
    if not autocast_enabled(x):
        return x, layers, end
    x, *weights = autocast(x, *_weights_of(layers, end))
    weights = iter(weights)
    layers = [layer._replace(weights=tuple(next(weights) for _ in layer.weights)) for layer in layers]
    return x, layers, end if end is None or end[1] is None else (end[0], next(weights))
