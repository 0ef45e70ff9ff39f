"""The bottleneck block of torch's modules: when they run as the chain (`gconv.bottleneck`), and calls of it
that were decided before (`gconv.guards`)."""

from typing import NamedTuple

import torch

from gconv import backend, conv_bn_relu, guards, packed
from gconv.autocast import autocast, autocast_around, autocast_enabled
from gconv.autograd import call, channels_last, in_format, untracked, unwrapped
from gconv.batch_norm import (
    as_float,
    check_eps,
    check_residual,
    moved,
    running_in_place,
    state_of,
    uses_batch_statistics,
)
from gconv.bottleneck import (
    NAMES,
    Conf,
    Layer,
    conf_of,
    infer,
    joined_on_tape,
    keeps,
    layer_by_layer,
    not_chained,
    reason_against,
    run,
    run_joined,
    sizes_of,
)
from gconv.conv_bn_relu import fuse_modules_forward, not_fusable
from gconv.recompute import forget_block

_WHERE = guards.state((vars(conv_bn_relu), "JOINED"))


class ChainCall(NamedTuple):
    """A frozen chain as one call on images of one size."""

    weights: list
    affines: list
    conf: Conf
    keep: bool
    decision: backend.Decision

    def run(self, x, residual):
        x, residual = autocast(x, residual)
        stages = (channels_last(x), residual, self.weights, self.affines, self.conf)
        z = in_format(call(infer, *stages), self.keep)
        backend.record(self.decision, "bottleneck", x, z)
        return z


def _frozen(x, pairs, residual) -> ChainCall | None:
    """The chain by what is kept of its modules, or None if they are not frozen or it has to run otherwise."""
    convs, bns = zip(*pairs)
    if packed.kept_of(convs[0]) is None:
        return None

    def make():
        here, given = autocast(x, residual)
        layers = [
            Layer(packed.parameters_of(conv, x)[0], bn, conv.stride, conv.padding, conv.dilation, conv.groups)
            for conv, bn in pairs
        ]
        sizes = sizes_of(here, layers)
        fits = sizes is not None and (len(layers) == 4 or given is not None or sizes[2] == tuple(x.shape))
        if not fits or reason_against(here, layers, sizes) is not None:
            return None
        check_residual("bottleneck", given, sizes[2], here)
        for layer in layers:
            check_eps("bottleneck", layer.bn.eps, False)
        read = (x.shape, *sizes[:2], x.shape)
        every = zip(convs, layers, read)
        weights = [packed.packed_of(conv, layer.weight, size[2:], *layer[2:]) for conv, layer, size in every]
        affines = [packed.affine_of(bn, state_of(bn)) for bn in bns]
        conf = conf_of([*layers, None][:4], given)
        decision = backend.whole("bottleneck", here, layers[1].weight, layers[1].groups)
        return ChainCall(weights, affines, conf, keeps(here, layers), packed.named(decision))

    return packed.block_of("bottleneck", x, convs, bns, make, residual)


class TrainingCall(NamedTuple):
    """A chain in training as one call on images of one size, with what of it does not change from step to
    step. weights, gammas and betas are fours, as in `gconv.bottleneck`, constants as in `run_joined`."""

    weights: tuple
    gammas: tuple
    betas: tuple
    conf: Conf
    constants: tuple
    tracked: bool
    cast: bool
    keep: bool
    decision: backend.Decision

    def run(self, x, residual):
        shortcut = self.conf.shortcut
        if self.cast:
            x, residual = autocast(x, residual)
        here = channels_last(x)
        if self.tracked:
            here, made = unwrapped(here), []
            parameters = (*self.weights, *self.gammas, *self.betas)
            z = joined_on_tape(here, unwrapped(residual), *parameters, self.conf, self.constants, made)
            ys, tables = made
            if shortcut == "x":
                forget_block(z, here, ys[2], tables[2], "x")
            elif shortcut == "down":
                forget_block(z, here, ys[2], tables[2], (ys[3], tables[3]))
        else:
            parameters = (self.weights, self.gammas, self.betas)
            z, _, _ = run_joined(here, residual, *parameters, self.conf, self.constants)
        running = self.constants[1]
        for i in range(0, len(running), 3):
            moved(*running[i : i + 2])
        z = in_format(z, self.keep)
        backend.record(self.decision, "bottleneck", x, z)
        return z


def _running_of(bns) -> tuple | None:
    """(running, momenta) of `run_joined`, or None where that does not cover what these normalisations keep of
    their batches: all of them move their statistics, or none does."""
    kept = [running_in_place(bn, bn.running_mean, bn.running_var, None) for bn in bns]
    if None in kept:
        return None
    values = [(*buffers, momentum) for *buffers, _, momentum in kept]
    if all(value is None for four in values for value in four):
        return [], []
    if any(value is None for four in values for value in four):
        return None
    return [buffer for *buffers, _ in values for buffer in buffers], [momentum for *_, momentum in values]


def _remember_training(x, pairs, layers, residual) -> None:
    """After a call that ran as a chain: the next one like it need not ask how, if all of it trains."""
    bns = [bn for _, bn in pairs]
    if guards.looked_on() or not (conv_bn_relu.JOINED and all(map(uses_batch_statistics, bns))):
        return
    states, kept = [state_of(bn) for bn in bns], _running_of(bns)
    if kept is None or any(as_float(v) is not v for state in states for v in state[2:]):
        return
    decision = backend.whole("bottleneck", x, layers[1].weight, layers[1].groups)
    cast = any(layer.weight is not conv.weight for layer, (conv, _) in zip(layers, pairs))
    if decision.backend != "cpu" or cast:
        return

    def make():
        absent = (None,) * (4 - len(pairs))
        weights, gammas, betas = (
            (*four, *absent) for four in ((conv.weight for conv, _ in pairs), *list(zip(*states))[2:])
        )
        conf = conf_of([*layers, None][:4], residual)
        constants = ([bn.eps for bn in bns], *kept)
        rest = (not untracked(), autocast_enabled(x), keeps(x, layers), decision)
        return TrainingCall(weights, gammas, betas, conf, constants, *rest)

    convs = tuple(conv for conv, _ in pairs)
    tensors = [conv.weight for conv in convs] + [bn.num_batches_tracked for bn in bns]
    for state in states:
        tensors += state
    guards.remember("bottleneck", (*convs, *bns), (x, residual), tuple(tensors), False, _WHERE, make)


def _modules_reason(pairs) -> str | None:
    """Why these convolutions and normalisations must be called as they are, or None."""
    for name, (conv, bn) in zip(NAMES, pairs):
        reason = not_fusable(conv, bn)
        if reason is None and conv.bias is not None:
            reason = "conv: has a bias"
        if reason is None and (conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
            reason = f"conv: padding {conv.padding} with {conv.padding_mode}"
        if reason is not None:
            return f"{name}: {reason}"
    return None


def fuse_bottleneck_forward(x, pairs, downsample=None, residual=None):
    """`bottleneck` of modules: what blocks made of torch's modules call.

    Where a module has hooks, a replaced forward or a type that is not fused, or a convolution has a bias,
    the block runs layer by layer (`fuse_modules_forward`), and `gconv.trace` says why. Global module hooks
    are not run for the fused modules.

    Args:
        x: [N, C, H, W].
        pairs: ((conv1, bn1), (conv2, bn2), (conv3, bn3)).
        downsample: (conv, bn) of the shortcut.
        residual: [N, K, OH, OW]: the shortcut itself. Without either it is x.

    Returns:
        [N, K, OH, OW]; dtype and memory format as in `bottleneck`.

    Raises:
        ValueError: as in `bottleneck`.
    """
    pairs = (*pairs, downsample) if downsample is not None else tuple(pairs)
    if isinstance(x, torch.Tensor):
        convs, bns = zip(*pairs)
        chain = guards.recall("bottleneck", (*convs, *bns), (x, residual))
        if chain is not None:
            return chain.run(x, residual)
    reason = _modules_reason(pairs)
    if reason is not None:
        not_chained(reason, x)
    else:
        chain = _frozen(x, pairs, residual)
        if chain is not None:
            return chain.run(x, residual)
        here, given, weights = autocast_around([conv.weight for conv, _ in pairs], x, residual)
        layers = [
            Layer(weight, bn, conv.stride, conv.padding, conv.dilation, conv.groups)
            for weight, (conv, bn) in zip(weights, pairs)
        ]
        z = run(here, layers, given)
        if z is not None:
            _remember_training(x, pairs, layers, residual)
            return z
    return layer_by_layer(lambda x, pair, *rest: fuse_modules_forward(x, *pair, *rest), x, pairs, residual)
