"""The bottleneck block of ResNet and ResNeXt as one chain with one autograd Function: 1x1, grouped 3x3 and
1x1 convolution, each with its batch normalisation, a shortcut and ReLU (He et al. 2015, arXiv 1512.03385,
figure 5; Xie et al. 2017, arXiv 1611.05431, figure 3(c)).

Training stores each convolution's raw output with its statistics, and the next convolution normalises it as
it loads it: nothing normalised is stored. The backward likewise finishes a gradient, with the backward of
normalisation and ReLU, where the gradients of the convolution before load it. Between the convolutions there
is no pass over an activation; the block's end has one in each direction, and a third where the backward
makes the result again instead of keeping it (`gconv.recompute`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from gconv import backend, packed, pointwise_conv
from gconv.autocast import autocast_around, autocast_enabled
from gconv.autograd import (
    applier,
    call,
    channels_last,
    decide,
    empty_channels_last,
    first_order,
    in_format,
    op,
    register,
    suggests_channels_last,
    untracked,
    unwatched,
    vjp_by_reference,
    vmap_by,
)
from gconv.batch_norm import (
    apply_affine,
    as_float,
    batch_norm_apply_ref,
    batch_norm_fold_ref,
    batch_norm_stats_ref,
    bwd_finish,
    bwd_reduce,
    bwd_reduce_pair,
    check_count,
    check_eps,
    check_residual,
    constant_finish,
    fold,
    kernels_run,
    normalize,
    only,
    relu_mask,
    state_of,
    update_state,
    uses_batch_statistics,
)
from gconv.conv_bn_relu import run_conv_bn_relu
from gconv.grouped_conv import (
    bwd,
    check_tensors,
    conv_apply,
    conv_output_size,
    fwd,
    fwd_stats,
    in_channels_last,
    pair,
    per_channel,
)
from gconv.recompute import forget_block


class Conf(NamedTuple):
    """The chain's constants: strides of the 1x1 convolutions, (stride, padding, dilation, groups) of the 3x3,
    and whether the shortcut is x, a tensor given, or convolution and normalisation of x."""

    first: tuple
    middle: tuple
    last: tuple
    down: tuple | None
    shortcut: str  # "x", "given" or "down"
    eps: tuple  # of the four normalisations, in the order first, middle, last, down
    batch: tuple  # whether each normalises by the statistics of the batch


def bottleneck_ref(
    x, weights, bns, stride=1, padding=1, dilation=1, groups=1, downsample=None, residual=None
):
    """The definition of `bottleneck`: conv2d, the modules `bns`, ReLU, one after the other."""
    first, middle, last = weights
    h = torch.relu(bns[0](F.conv2d(x, first)))
    h = torch.relu(bns[1](F.conv2d(h, middle, None, stride, padding, dilation, groups)))
    y = bns[2](F.conv2d(h, last))
    if downsample is not None:
        residual = downsample[1](F.conv2d(x, downsample[0], None, stride))
    return torch.relu(y + (x if residual is None else residual))


# ------------------------------------------------------------------------------------------------ the stages
#
# Arguments come in fours, in the order first, middle, last, down; without a convolution in the shortcut the
# last of each four is None. The `table` [4, K] of a normalisation holds its affine a, b, its mean and rstd.


def _forward_stages(x, residual, weights, gammas, betas, means, variances, conf):
    """(z, raw outputs, tables, variances of the batch or None)."""
    ys, tables, found = [None] * 4, [None] * 4, [None] * 4

    def layer(i, run, run_stats, source, act, *geometry):
        if conf.batch[i]:
            ys[i], mean, found[i] = run_stats(source, weights[i], *geometry, act)
            variance = found[i]
        else:
            ys[i] = run(source, weights[i], *geometry, act, None, None, False)
            mean, variance = means[i], variances[i]
        rstd, affine = fold(mean, variance, gammas[i], betas[i], conf.eps[i])
        tables[i] = torch.stack((affine[0], affine[1], mean, rstd))
        return ys[i], tables[i][:2]

    pointwise = (pointwise_conv.fwd, pointwise_conv.fwd_stats)
    h, act = layer(0, *pointwise, x, None, conf.first)
    h, act = layer(1, fwd, fwd_stats, h, act, *conf.middle)
    h, act = layer(2, *pointwise, h, act, conf.last)
    if conf.shortcut == "down":
        more, scaled = layer(3, *pointwise, x, None, conf.down)
    else:
        more, scaled = x if conf.shortcut == "x" else residual, None
    return apply_affine(h, act, more, scaled, True), ys, tables, found


def _end_of_block(dz, z, ys, tables, gammas, conf, want_sums, want_g):
    """(g, dgammas, dbeta, finishes) of the last and the shortcut's normalisation, g being dz masked by the
    block's ReLU; one pass over dz and z."""
    dgammas, finishes, dbeta, g = [None, None], [None, None], None, None
    needed = [i for i, want in zip((2, 3), want_sums) if want]
    sources = [(ys[i], tables[i][2], tables[i][3], gammas[i]) for i in needed]
    if len(needed) == 2:
        *dgammas, dbeta, finishes[0], finishes[1], g = bwd_reduce_pair(dz, z, *sources[0], *sources[1])
    elif needed:
        at = needed[0] - 2
        dgammas[at], dbeta, finishes[at], g = bwd_reduce(dz, *sources[0], None, z, want_g)
    elif want_g:
        g = torch.ops.aten.threshold_backward(dz, z, 0)
    for at, i in enumerate((2, 3)):
        if tables[i] is not None and not conf.batch[i]:
            finishes[at] = constant_finish(tables[i])
    return g, dgammas, dbeta, finishes


def _backward_stages(dz, x, weights, gammas, ys, tables, last, wanted, conf):
    """(dx, dresidual, dweights, dgammas, dbetas), what is not wanted None or anything. `last` is a list with
    z, which only the first stage needs: it is taken out, so that its memory serves the others."""
    want_x, want_residual, want_weights, want_gammas, want_betas = wanted
    want_norm = [a or b for a, b in zip(want_gammas, want_betas)]
    # What each gradient is needed for, from the block's start to its end.
    into_first = want_x or want_weights[0]
    through_middle = into_first or want_norm[0]
    into_middle = through_middle or want_weights[1]
    through_last = into_middle or want_norm[1]
    into_last = through_last or want_weights[2]
    down = conf.shortcut == "down"
    into_down = down and (want_x or want_weights[3])
    dweights, dgammas, dbetas = [None] * 4, [None] * 4, [None] * 4
    layouts = [want and in_channels_last(w) for want, w in zip(want_weights, weights)]

    want_g = into_last or into_down or want_residual or (want_x and conf.shortcut == "x")
    want_sums = (want_norm[2] or (into_last and conf.batch[2]), want_norm[3] or (into_down and conf.batch[3]))
    g, (dgammas[2], dgammas[3]), dbeta, finishes = _end_of_block(
        dz, last.pop(), ys, tables, gammas, conf, want_sums, want_g
    )
    dbetas[2] = dbetas[3] = dbeta

    def finish(i, sums):
        n, _, h, w = ys[i].shape
        dgammas[i], dbetas[i], table = bwd_finish(sums, tables[i][2], tables[i][3], gammas[i], n * h * w)
        return table if conf.batch[i] else constant_finish(tables[i])

    dx, dresidual = None, g
    if into_down:
        rest = (want_x, want_weights[3], layouts[3])
        dx, dweights[3], _ = pointwise_conv.bwd(
            g, x, weights[3], conf.down, ys[3], finishes[1], None, None, *rest
        )
    elif conf.shortcut == "x":
        dx = g
    if into_last:
        rest = (through_last, want_weights[2], layouts[2])
        d, dweights[2], sums = pointwise_conv.bwd(
            g, ys[1], weights[2], conf.last, ys[2], finishes[0], tables[1], None, *rest
        )
    if through_last:
        table = finish(1, sums)
    if into_middle:
        rest = (through_middle, want_weights[1], layouts[1])
        d, dweights[1], sums = bwd(d, ys[0], weights[1], *conf.middle, ys[1], table, tables[0], *rest)
    if through_middle:
        table = finish(0, sums)
    if into_first:
        rest = (want_x, want_weights[0], layouts[0])
        added = dx if want_x else None
        dx, dweights[0], _ = pointwise_conv.bwd(
            d, x, weights[0], conf.first, ys[0], table, None, added, *rest
        )
    return dx, dresidual, dweights, dgammas, dbetas


# -------------------------------------------------------------------------------------- the same, composed


def _composed_layers(x, weights, conf, normalize):
    """The chain up to its last sum, from differentiable parts: the last branch, the shortcut's convolution or
    None, each normalised by `normalize(i, y)`, which adds the ReLU in between."""
    weights = [w if w is None else w.to(x.dtype) for w in weights]
    h = normalize(0, F.conv2d(x, weights[0], None, conf.first))
    h = normalize(1, conv_apply(h, weights[1], None, None, None, False, *conf.middle))
    h = normalize(2, F.conv2d(h, weights[2], None, conf.last))
    down = conf.shortcut == "down"
    return h, normalize(3, F.conv2d(x, weights[3], None, conf.down)) if down else None


def _train_composed(*args):
    """The outputs of `Bottleneck`."""
    x, residual, weights, gammas, betas, means, variances, conf = _in_fours(args)
    ys, tables, found = [None] * 4, [None] * 4, [None] * 4

    def normalize(i, y):
        ys[i] = y
        mean, variance = means[i], variances[i]
        if conf.batch[i]:
            mean, found[i] = batch_norm_stats_ref(y)
            variance = found[i]
        rstd, affine = batch_norm_fold_ref(mean, variance, gammas[i], betas[i], conf.eps[i])
        tables[i] = torch.stack((affine[0], affine[1], mean, rstd))
        return batch_norm_apply_ref(y, affine, None, None, i < 2)

    h, more = _composed_layers(x, weights, conf, normalize)
    more = x if conf.shortcut == "x" else residual if more is None else more
    return torch.relu(h + more), *_present(ys, tables, found)


def _normalized(y, gamma, beta, table, eps, by_batch):
    """gamma*(y - mean)*rstd + beta in plain PyTorch, the statistics those of y or the table's."""
    if by_batch:
        h = normalize(y, gamma, eps)
    else:
        h = (y - per_channel(table[2])) * per_channel(table[3])
        h = h if gamma is None else per_channel(gamma) * h
    return (h if beta is None else h + per_channel(beta)).to(y.dtype)


# ------------------------------------------------------------------------------------------------- Functions


def _fours(flat):
    return (flat[i : i + 4] for i in range(0, len(flat), 4))


def _in_fours(args):
    """(x, residual, weights, gammas, betas, means, variances, conf) of the flat arguments of `Bottleneck`."""
    x, residual, *rest, conf = args
    return x, residual, *_fours(rest), conf


def _present(*fours) -> list:
    """The tensors in several fours: a compiler takes no None among a Function's outputs."""
    return [t for four in fours for t in four if t is not None]


def _outputs(rest, conf):
    """(raw outputs, tables, variances) in fours, of what `_present` made of them."""
    count = 4 if conf.shortcut == "down" else 3
    variances = iter(rest[2 * count :])
    padding = [None] * (4 - count)
    return (
        [*rest[:count], *padding],
        [*rest[count : 2 * count], *padding],
        [next(variances) if by_batch else None for by_batch in conf.batch],
    )


class Bottleneck(Function):
    """(z, raw outputs, tables, variances of the batch), as many as there are: z = relu(bn3(y3) + shortcut)
    and what its backward needs; z alone is differentiable. gammas and betas float32 [K] or None; means and
    variances those of normalisations by constants, else None."""

    @staticmethod
    def forward(
        x, residual, w1, w2, w3, wd, gamma1, gamma2, gamma3, gammad, beta1, beta2, beta3, betad, mean1, mean2,
        mean3, meand, var1, var2, var3, vard, conf,
    ):  # fmt: skip
        # Each by its name: dynamo counts the parameters of a forward.
        weights, gammas, betas = (
            (w1, w2, w3, wd),
            (gamma1, gamma2, gamma3, gammad),
            (beta1, beta2, beta3, betad),
        )
        constants = (mean1, mean2, mean3, meand), (var1, var2, var3, vard)
        stages = (x, residual, weights, gammas, betas, *constants, conf)
        z, ys, tables, variances = call(_forward_stages, *stages)
        return z, *_present(ys, tables, variances)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, weights, gammas, betas, _, _, ctx.conf = _in_fours(inputs)
        z, *rest = output
        ys, tables, _ = _outputs(rest, ctx.conf)
        ctx.mark_non_differentiable(*rest)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights, *gammas, *betas, *ys, *tables, z)

    @staticmethod
    def backward(ctx, dz, *unused):
        nothing = (None,) * (len(ctx.needs_input_grad) - 14)
        if dz is None:
            return *(None,) * 14, *nothing
        wanted = tuple(ctx.needs_input_grad[:14])
        saved = list(ctx.saved_tensors)
        if first_order():
            return *_gradients(dz, saved, wanted, ctx.conf), *nothing
        return *_backward_apply(dz, *saved, wanted, ctx.conf), *nothing

    @staticmethod
    def vmap(info, in_dims, *args):
        return vmap_by(_train_composed, info, in_dims, args)


class BottleneckJoined(Function):
    """z of `Bottleneck` where every layer normalises by its batch, by one op that moves the running
    statistics too, for autograd's tape alone: no function transform sees what it saves. What else was made,
    (raw outputs, tables), is put into the list `made`."""

    @staticmethod
    def forward(ctx, x, residual, *rest):
        *parameters, conf, constants, made = rest
        weights, gammas, betas = _fours(parameters)
        z, ys, tables = run_joined(x, residual, weights, gammas, betas, conf, constants)
        made += ys, tables
        ctx.conf = conf
        ctx.set_materialize_grads(False)
        absent = [None] * (4 - len(ys))
        ctx.save_for_backward(x, *parameters, *ys, *absent, *tables, *absent, z)
        return z

    backward = staticmethod(Bottleneck.backward)


def run_joined(x, residual, weights, gammas, betas, conf, constants):
    """(z, raw outputs, tables), no None among them, by one op. constants: (eps, running, momenta) of those
    layers that there are."""
    count = 4 if conf.shortcut == "down" else 3
    eps, *state = constants
    parameters = (four[:count] for four in (weights, gammas, betas))
    geometry = (conf.first, *conf.middle, conf.last, conf.down or ())
    return call(_fwd_train, x, residual, *parameters, eps, *geometry, *state)


def _gradients(dz, saved, wanted, conf):
    """Gradients to the first 14 arguments of `Bottleneck`, None where not wanted. `saved` is what it saves, a
    list from which z is taken."""
    last = [saved.pop()]
    x, *rest = saved
    weights, gammas, _, ys, tables = _fours(rest)
    in_fours = (*wanted[:2], *_fours(wanted[2:]))
    stages = (channels_last(dz), x, weights, gammas, ys, tables, last, in_fours, conf)
    dx, dresidual, *grads = call(_backward_stages, *stages)
    return only(wanted, (dx, dresidual, *(grad for four in grads for grad in four)))


class BottleneckBackward(Function):
    """Gradients to the first 14 arguments of `Bottleneck`, None where not wanted. Its own derivative is that
    of the composition."""

    @staticmethod
    def forward(dz, *rest):
        *saved, wanted, conf = rest
        return _gradients(dz, saved, wanted, conf)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.wanted, ctx.conf = inputs
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def composed(*args):
        dz, x, *rest, z, wanted, conf = args
        weights, gammas, betas, ys, tables = _fours(rest)
        shut = [relu_mask(ys[i], tables[i], None, True) for i in range(2)]

        def forward(x, *rest):
            weights, gammas, betas = _fours(rest)

            def normalize(i, y):
                h = _normalized(y, gammas[i], betas[i], tables[i], conf.eps[i], conf.batch[i])
                return torch.where(shut[i], 0, h) if i < 2 else h

            h, more = _composed_layers(x, weights, conf, normalize)
            return h if conf.shortcut == "given" else h + (x if more is None else more)

        g = torch.where(z <= 0, 0, dz)
        want = (wanted[0], *wanted[2:])
        dx, *grads = vjp_by_reference(forward, (x, *weights, *gammas, *betas), want, (g,))
        return dx, g if wanted[1] else None, *grads

    @staticmethod
    def backward(ctx, *grads):
        args = (*ctx.saved_tensors, ctx.wanted, ctx.conf)
        needs = ctx.needs_input_grad[:14]
        result = vjp_by_reference(BottleneckBackward.composed, args, needs, grads)
        return *result[:14], *(None,) * (len(args) - 14)

    @staticmethod
    def vmap(info, in_dims, *args):
        return vmap_by(BottleneckBackward.composed, info, in_dims, args)


_train_apply = applier(Bottleneck)
joined_on_tape = applier(BottleneckJoined, transforms=False)
_backward_apply = applier(BottleneckBackward)


def _fwd_train_fake(x, residual, weights, *rest):
    *_, first, stride, padding, dilation, _, last, down, _, _ = rest
    unit = ((0, 0), (1, 1))
    ys, source = [], x
    for weight, geometry in zip(weights, ((first, *unit), (stride, padding, dilation), (last, *unit))):
        ys.append(empty_channels_last(x, conv_output_size(source, weight, *geometry)))
        source = ys[-1]
    if len(weights) == 4:
        ys.append(empty_channels_last(x, conv_output_size(x, weights[3], down, *unit)))
    tables = [x.new_empty(4, y.shape[1], dtype=torch.float32) for y in ys]
    return torch.empty_like(ys[2]), ys, tables


_fwd_train = op("bottleneck_fwd_train")
register("bottleneck_fwd_train", _fwd_train_fake, None)


# ------------------------------------------------------------------------------------------- the functions


def infer(x, residual, weights, affines, conf):
    """z by constants alone, each normalisation in its convolution's epilogue; weights may be `Packed`."""
    plain = pointwise_conv.DENSE
    h = packed.run_fwd(x, weights[0], conf.first, *plain, None, affines[0], None, True)
    h = packed.run_fwd(h, weights[1], *conf.middle, None, affines[1], None, True)
    if conf.shortcut == "down":
        residual = packed.run_fwd(x, weights[3], conf.down, *plain, None, affines[3], None, False)
    more = x if conf.shortcut == "x" else residual
    return packed.run_fwd(h, weights[2], conf.last, *plain, None, affines[2], more, True)


class Layer(NamedTuple):
    """One convolution and its normalisation: weight [K, C/groups, R, S], `bn` as in `conv_bn_relu`, pairs of
    ints and an int."""

    weight: torch.Tensor
    bn: nn.Module
    stride: tuple
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    groups: int = 1

    def output_size(self, size) -> tuple:
        """[N, K, OH, OW] of an input of this size."""
        return conv_output_size(_Sized(size), self.weight, self.stride, self.padding, self.dilation)


class _Sized(NamedTuple):
    shape: tuple


NAMES = ("first", "middle", "last", "downsample")


def sizes_of(x, layers) -> tuple | None:
    """The size after each layer (first, middle, last, perhaps downsample), or None if they do not fit."""
    sizes, size, channels = [], tuple(x.shape), x.shape[1]
    for i, layer in enumerate(layers):
        if i == 3:
            size, channels = tuple(x.shape), x.shape[1]
        kernel, weight = (3, 3) if i == 1 else (1, 1), layer.weight
        if weight.dim() != 4 or tuple(weight.shape[2:]) != kernel or weight.shape[0] == 0:
            return None
        if weight.shape[1] * layer.groups != channels or weight.shape[0] % layer.groups:
            return None
        if i != 1 and (layer.groups != 1 or layer.padding != (0, 0)):
            return None
        size, channels = layer.output_size(size), weight.shape[0]
        if size[2] < 1 or size[3] < 1:
            return None
        sizes.append(size)
    return tuple(sizes) if len(layers) == 3 or sizes[3] == sizes[2] else None


def reason_against(x, layers, sizes) -> str | None:
    """Why the layers cannot run as a chain, or None."""
    for layer in layers:
        decision = decide("bottleneck", x, layer.weight, None, *layer[2:], True)
        if not decision.ours:
            return decision.reason
    if sizes is None:
        return "convolutions that are not 1x1, 3x3 and 1x1, or do not fit together"
    for name, layer, size in zip(NAMES, layers, sizes):
        weight, bn = layer.weight, layer.bn
        rounded = weight.dtype is torch.float32 and autocast_enabled(x)  # by the kernels, as they read it
        if not (weight.dtype == x.dtype or rounded) or not backend.same_device(weight, x):
            return f"{name}: weight: want {x.dtype} on {x.device}, got {weight.dtype} on {weight.device}"
        if not kernels_run(x, size, uses_batch_statistics(bn), *state_of(bn)):
            return f"{name}: an empty batch or uncommon parameters of its normalisation"
    if torch.compiler.is_compiling() and not any(uses_batch_statistics(layer.bn) for layer in layers):
        return "by constants each layer is one op, which a compiler differentiates where it has to"
    return None


def conf_of(padded, residual) -> Conf:
    """Of four layers, the last perhaps None."""
    first, middle, last, down = padded
    return Conf(
        first=first.stride,
        middle=middle[2:],
        last=last.stride,
        down=None if down is None else down.stride,
        shortcut="down" if down is not None else "x" if residual is None else "given",
        eps=tuple(0.0 if layer is None else layer.bn.eps for layer in padded),
        batch=tuple(layer is not None and uses_batch_statistics(layer.bn) for layer in padded),
    )


def _chain(x, layers, sizes, residual):
    """The chain on the kernels."""
    padded = [*layers, *(None,) * (4 - len(layers))]
    states = [(None,) * 4 if layer is None else state_of(layer.bn) for layer in padded]
    conf = conf_of(padded, residual)
    batch = conf.batch
    for layer, by_batch, size in zip(layers, batch, sizes):
        check_eps("bottleneck", layer.bn.eps, by_batch)
        if by_batch:
            check_count("bottleneck", size)
    keep = keeps(x, layers)
    x = channels_last(x)
    weights = [None if layer is None else layer.weight for layer in padded]
    gammas, betas = [as_float(state[2]) for state in states], [as_float(state[3]) for state in states]
    means, variances = (
        [None if by_batch else as_float(state[k]) for state, by_batch in zip(states, batch)] for k in (0, 1)
    )
    tensors = (x, residual, *weights, *gammas, *betas, *means, *variances)
    if not any(batch) and unwatched(*tensors):
        norms = zip(means, variances, gammas, betas, conf.eps)
        affines = [None if norm[0] is None else call(fold, *norm)[1] for norm in norms]
        return in_format(call(infer, x, residual, weights, affines, conf), keep)
    run = Bottleneck.forward if untracked() else _train_apply
    z, *rest = run(*tensors, conf)
    ys, tables, found = _outputs(rest, conf)
    if conf.shortcut != "given":
        forget_block(z, x, ys[2], tables[2], "x" if conf.shortcut == "x" else (ys[3], tables[3]))
    for layer, by_batch, state, table, variance, (n, _, h, w) in zip(
        layers, batch, states, tables, found, sizes
    ):
        if by_batch:
            update_state(layer.bn, *state[:2], table[2], variance, n * h * w)
    return in_format(z, keep)


def keeps(x, layers) -> bool:
    """Whether the result is channels_last."""
    return any(map(suggests_channels_last, (x, *(layer.weight for layer in layers[:3]))))


def layer_by_layer(run, x, layers, residual):
    """The same by `run(x, layer, residual, relu)`."""
    h = run(run(x, layers[0], None, True), layers[1], None, True)
    if len(layers) == 4:
        residual = run(x, layers[3], None, False)
    return run(h, layers[2], x if residual is None else residual, True)


def not_chained(reason, x) -> None:
    """Says in a trace that a bottleneck runs layer by layer. No fallback: each layer decides for itself."""
    decision = backend.Decision("torch", "layers", f"layer by layer: {reason}")
    backend.record(decision, "bottleneck", x)


def _run_layer(x, layer, residual, relu):
    return run_conv_bn_relu(x, layer.weight, layer.bn, None, *layer[2:], residual, relu, True)


def bottleneck(x, weights, bns, stride=1, padding=1, dilation=1, groups=1, downsample=None, residual=None):
    """relu(bn3(conv1x1(relu(bn2(conv3x3(relu(bn1(conv1x1(x)))))))) + shortcut), the block of ResNet and
    ResNeXt (He et al. 2015, arXiv 1512.03385; Xie et al. 2017, arXiv 1611.05431), as one operation.

    In training the convolutions' raw outputs are stored and normalised by their own statistics where the next
    convolution loads them, and the running statistics of each normalisation move once. For the backward the
    raw outputs are kept and x; the result is made again, and so is x where it is the result of such a block
    and the shortcut itself (`gconv.recompute`; hooks on saved tensors see, and keep, x and the result). By
    constants (in eval mode, FrozenBatchNorm2d) without gradients each normalisation is the epilogue of its
    convolution. Both kinds may be mixed. What the kernels do not cover (see `grouped_conv`) runs layer by
    layer, as `gconv.trace` says.

    Args:
        x: [N, C, H, W].
        weights: of the three convolutions: [A, C, 1, 1], [B, A/groups, 3, 3] and [K, B, 1, 1], dtype of x.
        bns: their nn.BatchNorm2d or FrozenBatchNorm2d, as in `conv_bn_relu`: parameters, buffers and mode are
            used, their state changes as by calling them, their hooks do not run.
        stride, padding, dilation, groups: of the 3x3 convolution, as in `grouped_conv`.
        downsample: (weight [K, C, 1, 1], bn): the shortcut is bn(conv1x1(x)) of the same stride.
        residual: [N, K, OH, OW]: the shortcut itself. Without either it is x.

    Returns:
        [N, K, OH, OW], dtype of x; channels_last if x or one of the weights is, else contiguous.

    Raises:
        ValueError: what does not fit together, naming the argument, what is wanted and what was given; one
            value per channel in training.

    Determinism: the kernels are bit-identical from run to run and for any number of threads.
    """
    for name, three in (("weights", weights), ("bns", bns)):
        if len(three) != 3:
            raise ValueError(f"bottleneck: {name}: want three, got {len(three)}")
    if downsample is not None and residual is not None:
        raise ValueError("bottleneck: residual: want either downsample or residual, got both")
    more = () if downsample is None else (downsample[0],)
    for weight in (*weights, *more):
        check_tensors("bottleneck", x, weight, None)
    x, residual, weights = autocast_around((*weights, *more), x, residual)
    stride = pair("bottleneck: stride", stride, 1)
    padding, dilation = pair("bottleneck: padding", padding, 0), pair("bottleneck: dilation", dilation, 1)
    if type(groups) is not int or groups < 1:
        raise ValueError(f"bottleneck: groups: want an int of at least 1, got {groups!r}")
    first, middle, last = weights[:3]
    layers = [
        Layer(first, bns[0], (1, 1)),
        Layer(middle, bns[1], stride, padding, dilation, groups),
        Layer(last, bns[2], (1, 1)),
    ]
    if downsample is not None:
        layers.append(Layer(weights[3], downsample[1], stride))
    z = run(x, layers, residual)
    return layer_by_layer(_run_layer, x, layers, residual) if z is None else z


def run(x, layers, residual):
    """The chain, or None, said in a trace, where the layers have to run one by one."""
    sizes = sizes_of(x, layers) if x.dim() == 4 else None
    reason = reason_against(x, layers, sizes)
    if reason is not None:
        not_chained(reason, x)
        return None
    check_residual("bottleneck", residual, sizes[2], x)
    if residual is None and len(layers) == 3 and sizes[2] != tuple(x.shape):
        raise ValueError(f"bottleneck: x: want {list(sizes[2])} as the output, got {list(x.shape)}")
    z = _chain(x, layers, sizes, residual)
    backend.record(backend.whole("bottleneck", x, layers[1].weight, layers[1].groups), "bottleneck", x, z)
    return z
