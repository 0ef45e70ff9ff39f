"""Convolution, batch normalisation, + residual and ReLU as one operation with one autograd Function.

Training stores the convolution's raw output and its statistics, never the normalised value (unless a residual
makes the ReLU's mask depend on it); the backward of normalisation and ReLU is applied where the convolution's
gradients load it. Inference folds the normalisation into the convolution's epilogue.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from gconv import backend, guards, packed
from gconv.autocast import autocast, autocast_enabled
from gconv.autograd import (
    applier,
    call,
    channels_last,
    distinct,
    empty_channels_last,
    first_order,
    in_format,
    op,
    register,
    suggests_channels_last,
    untracked,
    unwrapped,
    vjp_by_reference,
    vmap_by,
)
from gconv.batch_norm import (
    PIXELS,
    apply_affine,
    apply_into,
    as_float,
    batch_norm_apply_ref,
    batch_norm_bwd_apply_ref,
    batch_norm_bwd_reduce_ref,
    batch_norm_fold_ref,
    batch_norm_module,
    batch_norm_update_running_ref,
    bwd_apply,
    bwd_reduce,
    check_count,
    check_eps,
    check_residual,
    fold,
    inference_affine,
    is_frozen,
    kernels_run,
    moved,
    normalize,
    only,
    pull_back,
    relu_mask,
    running_in_place,
    state_of,
    tail,
    train_composed,
    update_state,
    uses_batch_statistics,
)
from gconv.concat import check_into, placed, writes_in_place
from gconv.grouped_conv import (
    check_tensors,
    conv_apply,
    conv_output_size,
    grouped_conv_bwd_ref,
    grouped_conv_fwd_stats_ref,
    in_channels_last,
    ops_for,
    plan,
    run_conv,
    wide,
)

# Where the backward of normalisation and ReLU is applied to the gradient: True as the convolution's two
# gradients load it, False in one pass of its own before them.
FINISH_ON_LOAD = True

# Whether one op runs all stages of a direction where there is one for the device (the CPU). Between large
# kernels an op's way through the dispatcher is cold and takes tens of microseconds.
JOINED = True


def conv_bn_relu_ref(
    x, weight, bn, bias=None, stride=1, padding=0, dilation=1, groups=1, residual=None, relu=True
):
    """The definition of `conv_bn_relu`: conv2d, the module `bn`, + residual, ReLU."""
    return tail(bn(F.conv2d(x, weight, bias, stride, padding, dilation, groups)), residual, relu)


# ---------------------------------------------------------------------------------- a training step's stages


def forward_stages(fwd_stats, fold, apply_affine, x, weight, *args):
    """(z, y, mean, var, rstd, affine) of `ConvBatchNorm`, by the given ops or references."""
    *conf, gamma, beta, residual, eps, relu = args
    y, mean, var = fwd_stats(x, weight, *conf, None)
    rstd, affine = fold(mean, var, gamma, beta, eps)
    return apply_affine(y, affine, residual, None, relu), y, mean, var, rstd, affine


def backward_stages(
    reduce, apply, conv_bwd, dz, x, weight, stride, padding, dilation, groups, y, mean, rstd,
    gamma, affine, z, want_dx, want_dweight, want_g, weight_channels_last,
):  # fmt: skip
    """(dx, dweight, dgamma, dbeta, g) by the given ops or references, of shape [0] where not wanted."""
    # What finishes dz on load knows no mask by z.
    masked = want_g or ((want_dx or want_dweight) and z is not None)
    dgamma, dbeta, finish, g = reduce(dz, y, mean, rstd, gamma, affine, z, masked)
    dy, raw = g if masked else dz, y
    if not FINISH_ON_LOAD and (want_dx or want_dweight):
        dy, _ = apply(dy, y, finish, None, False)
        raw = finish = None
    wanted = (want_dx, want_dweight, weight_channels_last)
    conf = (stride, padding, dilation, groups)
    dx, dweight, _ = conv_bwd(dy, x, weight, *conf, raw, finish, None, *wanted)
    return dx, dweight, dgamma, dbeta, g if want_g else x.new_empty(0)


def conv_bn_relu_fwd_train_ref(
    x, weight, stride, padding, dilation, groups, gamma, beta, residual, eps, relu,
    running_mean, running_var, num_batches_tracked, shift, momentum,
):  # fmt: skip
    """(z, y, mean, rstd, affine): y = conv(x, weight) as stored, mean [K] of y, what `batch_norm_fold_ref`
    makes of its statistics, z = relu?(affine[0]*y + affine[1] + residual). Running statistics, if given, move
    as by `batch_norm_update_running_ref`."""
    stages = (grouped_conv_fwd_stats_ref, batch_norm_fold_ref, batch_norm_apply_ref)
    args = (x, weight, stride, padding, dilation, groups, gamma, beta, residual, eps, relu)
    z, y, mean, var, rstd, affine = forward_stages(*stages, *args)
    if running_mean is not None:
        running = (running_mean, running_var, num_batches_tracked)
        batch_norm_update_running_ref(*running, mean, var, shift, y.numel() // y.shape[1], momentum)
    return z, y, mean, rstd, affine


def conv_bn_relu_bwd_ref(dz, x, *args):
    """(dx, dweight, dgamma, dbeta, g): the gradients of `conv_bn_relu_fwd_train_ref` for the gradient dz of
    z; g, dz masked by the ReLU, is the residual's. affine and z say where the ReLU was shut, as in
    `batch_norm_bwd_reduce_ref`. dx, dweight and g have shape [0] unless wanted."""
    stages = (batch_norm_bwd_reduce_ref, batch_norm_bwd_apply_ref, grouped_conv_bwd_ref)
    return backward_stages(*stages, dz, x, *args)


_fwd_train = op("conv_bn_relu_fwd_train")
_bwd = op("conv_bn_relu_bwd")


def _joined(x) -> bool:
    """A compiler is shown the stages: it fuses some of them with what surrounds them."""
    return JOINED and backend.backend_of(x) == "cpu" and not torch.compiler.is_compiling()


# ------------------------------------------------------------------------------------------------- Functions


def _plain_conv(x, weight, conf):
    return conv_apply(x, weight, None, None, None, False, *conf)


def _conv_train_composed(x, weight, bias, gamma, beta, residual, eps, relu, *conf):
    y = _plain_conv(x, weight, conf)
    z, mean, var, rstd, affine = train_composed(y, gamma, beta, residual, eps, relu)
    return z, y, mean, var, rstd, affine


def _save_for_backward(
    ctx, z, y, mean, rstd, affine, x, weight, bias, gamma, beta, residual, eps, relu, *conf
):
    ctx.eps, ctx.relu, ctx.conf = eps, relu, conf
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)
    z = z if relu and residual is not None else None
    ctx.save_for_backward(bias, x, weight, gamma, y, mean, rstd, affine, z)


class ConvBatchNorm(Function):
    """Training: (z, y, mean, var, rstd, affine), z = relu?(batch_norm(y) + residual), y = conv(x, weight); z
    alone is differentiable. The convolution's bias is no part of y: it moves the mean of y and nothing else,
    so its gradient is zero; whoever keeps running statistics adds it to the mean. bias, gamma, beta and
    residual may be None.
    """

    @staticmethod
    def forward(x, weight, bias, gamma, beta, residual, eps, relu, stride, padding, dilation, groups):
        args = (x, weight, stride, padding, dilation, groups, gamma, beta, residual, eps, relu)
        return call(forward_stages, ops_for(weight.shape).fwd_stats, fold, apply_affine, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, y, mean, var, rstd, affine = output
        ctx.mark_non_differentiable(y, mean, var, rstd, affine)
        _save_for_backward(ctx, z, y, mean, rstd, affine, *inputs)

    @staticmethod
    def backward(ctx, dz, *unused):
        nothing = (None,) * (len(ctx.needs_input_grad) - 6)
        if dz is None:
            return *(None,) * 6, *nothing
        bias, *saved = ctx.saved_tensors
        want_x, want_weight, want_bias, *rest, want_residual = ctx.needs_input_grad[:6]
        wanted = (want_x, want_weight, *rest, want_residual)
        run = ConvBatchNormBackward.forward if first_order() else _backward_apply
        dx, dweight, dgamma, dbeta, dresidual = run(dz, *saved, wanted, ctx.eps, ctx.relu, *ctx.conf)
        dbias = torch.zeros_like(bias) if want_bias else None
        if want_residual and not ctx.relu:
            dresidual = dz
        return dx, dweight, dbias, dgamma, dbeta, dresidual, *nothing

    @staticmethod
    def vmap(info, in_dims, *args):
        return vmap_by(_conv_train_composed, info, in_dims, args)


class ConvBatchNormJoined(Function):
    """z of `ConvBatchNorm`, by one op that moves the running statistics too, for autograd's tape alone: no
    function transform sees what it saves, and there is one output to wrap instead of six."""

    @staticmethod
    def forward(
        ctx, x, weight, bias, gamma, beta, residual, eps, relu, stride, padding, dilation, groups, running
    ):
        conf = (stride, padding, dilation, groups)
        z, *saved = call(_fwd_train, x, weight, *conf, gamma, beta, residual, eps, relu, *running)
        _save_for_backward(ctx, z, *saved, x, weight, bias, gamma, beta, residual, eps, relu, *conf)
        return z

    backward = staticmethod(ConvBatchNorm.backward)


class ConvBatchNormBackward(Function):
    """(dx, dweight, dgamma, dbeta, dresidual), None where not wanted; dresidual only after a ReLU, for it is
    dz otherwise. Its own derivative is that of the composition."""

    @staticmethod
    def forward(dz, x, weight, gamma, y, mean, rstd, affine, z, wanted, eps, relu, *conf):
        want_x, want_weight, want_gamma, want_beta, want_residual = wanted
        dz = channels_last(dz)
        mask = affine if relu and z is None else None
        want_g = want_residual and relu
        layout = want_weight and in_channels_last(weight)
        args = (dz, x, weight, *conf, y, mean, rstd, gamma, mask, z, want_x, want_weight, want_g, layout)
        if FINISH_ON_LOAD and _joined(x):
            grads = call(_bwd, *args)
        else:
            grads = call(backward_stages, bwd_reduce, bwd_apply, ops_for(weight.shape).bwd, *args)
        return only((want_x, want_weight, want_gamma, want_beta, want_g), grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dz, x, weight, gamma, y, _, _, affine, z, *ctx.rest = inputs
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(dz, x, weight, gamma, y, affine, z)

    @staticmethod
    def composed(dz, x, weight, gamma, y, affine, z, wanted, eps, relu, *conf):
        def forward(x, weight, gamma):
            return normalize(_plain_conv(x, weight, conf), gamma, eps)

        g, (dx, dweight, dgamma) = pull_back(forward, dz, (x, weight, gamma), relu_mask(y, affine, z, relu))
        dbeta = g.sum(PIXELS, dtype=wide(g))
        return only((*wanted[:4], wanted[4] and relu), (dx, dweight, dgamma, dbeta, g))

    @staticmethod
    def backward(ctx, *grads):
        args = (*ctx.saved_tensors, *ctx.rest)
        result = vjp_by_reference(ConvBatchNormBackward.composed, args, ctx.needs_input_grad[:4], grads)
        return *result[:4], *(None,) * (5 + len(ctx.rest))

    @staticmethod
    def vmap(info, in_dims, dz, x, weight, gamma, y, mean, rstd, affine, z, *rest):
        dims = (*in_dims[:5], *in_dims[7:])
        return vmap_by(
            ConvBatchNormBackward.composed, info, dims, (dz, x, weight, gamma, y, affine, z, *rest)
        )


_train_apply = applier(ConvBatchNorm)
_joined_apply = applier(ConvBatchNormJoined)
_joined_on_tape = applier(ConvBatchNormJoined, transforms=False)
_backward_apply = applier(ConvBatchNormBackward)


# -------------------------------------------------------------- what the ops are to autograd and to compilers


def _fwd_train_fake(x, weight, stride, padding, dilation, groups, *rest):
    y = empty_channels_last(x, conv_output_size(x, weight, stride, padding, dilation))
    mean = x.new_empty(y.shape[1], dtype=torch.float32)
    return torch.empty_like(y), y, mean, torch.empty_like(mean), mean.new_empty(2, y.shape[1])


def _bwd_fake(
    dz, x, weight, stride, padding, dilation, groups, y, mean, rstd, gamma, affine, z,
    want_dx, want_dweight, want_g, weight_channels_last,
):  # fmt: skip
    dx = empty_channels_last(x, x.shape) if want_dx else x.new_empty(0)
    layout = torch.channels_last if weight_channels_last else torch.contiguous_format
    dweight = torch.empty_like(weight, memory_format=layout) if want_dweight else x.new_empty(0)
    g = empty_channels_last(y, y.shape) if want_g else x.new_empty(0)
    return dx, dweight, torch.empty_like(mean), torch.empty_like(mean), g


register("conv_bn_relu_fwd_train", _fwd_train_fake, None)
register("conv_bn_relu_bwd", _bwd_fake, conv_bn_relu_bwd_ref)


# ------------------------------------------------------------------------------------------- the functions


def _train_into(memory, x, weight, bias, gamma, beta, residual, eps, relu, *conf) -> tuple:
    """What `Slot.run` takes to write the result of `ConvBatchNorm`."""

    def apply(*args):
        apply_into(*args, memory)

    args = (x, weight, *conf, gamma, beta, residual, eps, relu)
    return call(forward_stages, ops_for(weight.shape).fwd_stats, fold, apply, *args)[1:]


def _train(x, weight, bias, bn, state, residual, relu, conf, count, into):
    running_mean, running_var, gamma, beta = state
    keep = suggests_channels_last(x) or suggests_channels_last(weight)
    x, gamma, beta = channels_last(x), as_float(gamma), as_float(beta)
    args = (x, weight, bias, gamma, beta, distinct(x, residual), bn.eps, relu, *conf)
    in_place = writes_in_place(into)
    joined = _joined(x) and not in_place
    running = running_in_place(bn, running_mean, running_var, bias) if joined else None
    if running is not None:
        if untracked():
            z = call(_fwd_train, x, weight, *conf, gamma, beta, residual, bn.eps, relu, *running)[0]
        else:
            z = _joined_apply(*args, running)
        moved(*running[:2])
    else:
        if in_place:
            size = conv_output_size(x, weight, *conf[:3])
            z, _, mean, var, *_ = into.run(ConvBatchNorm, _train_into, size, *args)
        else:
            run = ConvBatchNorm.forward if untracked() else _train_apply
            z, _, mean, var, *_ = run(*args)
        update_state(bn, running_mean, running_var, mean, var, count, bias)
    return z if in_place else placed(in_format(z, keep), into)


class TrainingCall(NamedTuple):
    """A convolution without a bias and its normalisation as one training step's call on images of one size,
    with what of it does not change from step to step."""

    weight: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    running: tuple
    eps: float
    conf: tuple
    tracked: bool
    cast: bool
    keep: bool
    decision: backend.Decision

    def run(self, x, residual, relu):
        weight = self.weight
        if self.cast:
            x, weight, residual = autocast(x, weight, residual)
        here = channels_last(x)
        if self.tracked:
            rest = (self.gamma, self.beta, unwrapped(residual), self.eps, relu, *self.conf, self.running)
            z = _joined_on_tape(unwrapped(here), weight, None, *rest)
        else:
            rest = (*self.conf, self.gamma, self.beta, residual, self.eps, relu, *self.running)
            z = call(_fwd_train, here, weight, *rest)[0]
        moved(*self.running[:2])
        z = in_format(z, self.keep)
        backend.record(self.decision, "conv_bn_relu", x, z)
        return z


_WHERE = guards.state((globals(), "JOINED"))


def _remember_training(x, conv, bn, residual, conf, by_design) -> None:
    """After a call that ran: the next one like it need not ask how, if it is one op in training."""
    if guards.looked_on() or conv.bias is not None or not uses_batch_statistics(bn) or not _joined(x):
        return
    with torch.no_grad():
        here, weight = autocast(x, conv.weight)
    settled, decision = plan("conv_bn_relu", here, weight, None, *conf, by_design)
    state = state_of(bn)
    running_mean, running_var, gamma, beta = state
    if not decision.ours or as_float(gamma) is not gamma or as_float(beta) is not beta:
        return
    running = running_in_place(bn, running_mean, running_var, None)
    if running is None or not kernels_run(here, conv_output_size(here, weight, *settled[:3]), True, *state):
        return
    keep = suggests_channels_last(here) or suggests_channels_last(weight)

    def make():
        rest = (not untracked(), autocast_enabled(x), keep, decision)
        return TrainingCall(conv.weight, gamma, beta, running, bn.eps, settled, *rest)

    tensors = (conv.weight, *state, bn.num_batches_tracked)
    guards.remember("conv_bn_relu", (conv, bn), (x, residual), tensors, False, _WHERE, make)


def _infer(x, weight, bias, eps, state, residual, relu, conf, into):
    if not untracked():
        scale, shift = inference_affine(*state, eps, bias)
        return run_conv(x, weight, scale, shift, residual, relu, conf, into)
    mean, var, gamma, beta = map(as_float, state)
    _, affine = call(fold, mean if bias is None else mean - bias, var, gamma, beta, eps)
    if into is not None:
        return run_conv(x, weight, *affine, residual, relu, conf, into)
    keep = suggests_channels_last(x) or suggests_channels_last(weight)
    run = ops_for(weight.shape).fwd
    return in_format(call(run, channels_last(x), weight, *conf, None, affine, residual, relu), keep)


def conv_bn_relu(
    x, weight, bn, bias=None, stride=1, padding=0, dilation=1, groups=1, residual=None, relu=True, into=None
):
    """relu?(bn(conv2d(x, weight, bias)) + residual) as one operation (grouped convolution: Xie et al. 2017;
    batch normalisation: Ioffe & Szegedy 2015, algorithms 1 and 2).

    In training the convolution's raw output is stored and normalised by its own statistics, and the running
    statistics of `bn` move once; otherwise the normalisation is the epilogue of the convolution. What the
    kernels do not cover (see `grouped_conv`) runs on torch, each part for itself.

    Args:
        x, weight, bias, stride, padding, dilation, groups: as in `grouped_conv`; x is [N, C, H, W].
        bn: an nn.BatchNorm2d of K channels, or a FrozenBatchNorm2d (buffers weight, bias, running_mean,
            running_var, eps), which normalises by its buffers in train mode too. Its parameters, buffers and
            mode are used and its state changes exactly as by calling it; its hooks do not run.
        residual: [N, K, OH, OW], added before the ReLU: dtype and device of x, any strides.
        relu: ReLU last; NaN stays NaN.
        into: a slot of a `gconv.Concat`, which becomes the result.

    Returns:
        [N, K, OH, OW], dtype of x; channels_last if x or weight is, else contiguous.

    Raises:
        ValueError: what does not fit together, naming the argument, what is wanted and what was given; one
            value per channel in training.

    Determinism: the kernels are bit-identical from run to run and for any number of threads.
    """
    conf = (stride, padding, dilation, groups)
    return run_conv_bn_relu(x, weight, bn, bias, *conf, residual, relu, False, into)


def run_conv_bn_relu(
    x, weight, bn, bias, stride, padding, dilation, groups, residual, relu, by_design, into=None, frozen=None
):
    """`conv_bn_relu`; `frozen` is the module of the convolution if it is frozen."""
    check_tensors("conv_bn_relu", x, weight, bias)
    check_into("conv_bn_relu", into)
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    conf, decision = plan("conv_bn_relu", x, weight, bias, stride, padding, dilation, groups, by_design)
    if not decision.ours:
        if frozen is not None and not decision.fallback and backend.backend_mode() != "torch":
            z = packed.infer_on_torch(frozen, x, weight, bias, bn, residual, relu, conf)
            if z is not None:
                backend.record(packed.named(decision, "folded batch norm"), "conv_bn_relu", x, z)
                return placed(z, into)
        y = F.conv2d(x, weight, bias, *conf)
        backend.record(decision, "conv_bn_relu", x, y)
        return placed(batch_norm_module(y, bn, residual, relu), into)
    shape = conv_output_size(x, weight, *conf[:3])
    check_residual("conv_bn_relu", residual, shape, x)
    training, state = uses_batch_statistics(bn), state_of(bn)
    if not kernels_run(x, shape, training, *state):
        y = run_conv(x, weight, None, as_float(bias), None, False, conf)
        backend.record(decision, "conv_bn_relu", x, y)
        return placed(batch_norm_module(y, bn, residual, relu), into)
    check_eps("conv_bn_relu", bn.eps, training)
    if training:
        count = check_count("conv_bn_relu", shape)
        z = _train(x, weight, bias, bn, state, residual, relu, conf, count, into)
    else:
        z = _infer(x, weight, bias, bn.eps, state, residual, relu, conf, into)
    backend.record(decision, "conv_bn_relu", x, z)
    return z


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def watched(module: nn.Module) -> str | None:
    """What calling the module does beyond what its class says, or None."""
    attributes = module.__dict__
    if any(map(attributes.get, _HOOKS)):
        return "has hooks"
    return "its forward is replaced" if "forward" in attributes else None


def not_plain_relu(module) -> str | None:
    """Why `module` is no bare nn.ReLU that a fused call may stand for, or None."""
    if type(module) is not nn.ReLU:
        return f"want ReLU, got {type(module).__name__}"
    return watched(module)


def brings_relu(bn) -> bool:
    """True for timm's BatchNormAct2d, or a copy of it, that drops nothing and ends in a bare nn.ReLU."""
    if not isinstance(bn, nn.BatchNorm2d) or type(bn).__name__ != "BatchNormAct2d":
        return False
    drop, act = bn._modules.get("drop"), bn._modules.get("act")
    return type(drop) is nn.Identity and not watched(drop) and not_plain_relu(act) is None


def not_fusable(conv, bn, in_dense_block: bool = False) -> str | None:
    """Why the modules must be called as they are, or None; `conv` may be None. `in_dense_block`: the fusion
    merges the statistics of several processes itself and applies a ReLU to what `bn` gives."""
    fused = type(bn) is nn.BatchNorm2d or is_frozen(bn)
    if in_dense_block:
        fused = fused or type(bn) is nn.SyncBatchNorm or brings_relu(bn)
    if not fused:
        return f"bn: want BatchNorm2d or FrozenBatchNorm2d, got {type(bn).__name__}"
    if conv is not None and type(conv) is not nn.Conv2d and type(conv).__module__ != "gconv.layers":
        return f"conv: want Conv2d, got {type(conv).__name__}"
    for name, child in (("bn", bn),) if conv is None else (("conv", conv), ("bn", bn)):
        reason = watched(child)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def fuse_modules_forward(x, conv: nn.Module, bn: nn.Module, residual=None, relu: bool = True, into=None):
    """relu?(bn(conv(x)) + residual), fused where the modules allow it: what blocks made of torch's modules
    call.

    A 3x3 or 1x1 convolution runs as `conv_bn_relu`; any other (7x7) runs on torch and normalisation, residual
    and ReLU follow in one pass. Where a module has hooks, a replaced forward or a type other than Conv2d,
    BatchNorm2d or FrozenBatchNorm2d (SyncBatchNorm, a parametrized convolution), the modules are called one
    by one, and `gconv.trace` says why. Global module hooks are not run for the fused modules.

    Args:
        x: [N, C, H, W].
        conv: gconv.Conv2d or nn.Conv2d, every padding mode.
        bn: normalisation over the convolution's K output channels.
        residual: [N, K, OH, OW], added before the ReLU.
        relu: ReLU last.
        into: a slot of a `gconv.Concat`, which becomes the result.

    Returns:
        [N, K, OH, OW]; dtype and memory format as in `conv_bn_relu`.

    Raises:
        ValueError: as in `conv_bn_relu`.
    """
    call = None
    if into is None and isinstance(x, torch.Tensor):
        call = guards.recall("conv_bn_relu", (conv, bn), (x, residual))
        if call is not None and not backend.tracing():
            return call.run(x, residual, relu)
    with backend.layer_scope(conv):
        if call is not None:
            return call.run(x, residual, relu)
        reason = not_fusable(conv, bn)
        if reason is not None:
            z = placed(tail(bn(conv(x)), residual, relu), into)
            backend.record(backend.one_by_one(reason), "conv_bn_relu", x, z)
            return z
        padding, what = conv.padding, "conv_bn_relu"
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)
            padding, what = (0, 0), "conv_bn_relu, padded"
        by_design = type(conv) is nn.Conv2d or conv.kernel_size == (1, 1)
        frozen = None if packed.kept_of(conv) is None else conv
        if frozen is not None and isinstance(x, torch.Tensor):
            check_into("conv_bn_relu", into)
            call = packed.conv_bn_relu(what, x, conv, bn, residual, padding, by_design)
            if call is not None:
                return call.run(x, residual, relu, into)
        weight, bias = packed.parameters_of(conv, x)
        conf = (conv.stride, padding, conv.dilation, conv.groups)
        z = run_conv_bn_relu(x, weight, bn, bias, *conf, residual, relu, by_design, into, frozen)
        if into is None and padding is conv.padding:  # what the next call would recall
            _remember_training(x, conv, bn, residual, conf, by_design)
        return z
