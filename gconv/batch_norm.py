"""Batch normalisation (Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1; inference by algorithm 2).

The ops are stages: statistics, fold into one affine per channel, apply (+ residual)(+ ReLU), and in the
backward a reduction and an application. Running statistics are updated outside of them, once per training
forward.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm

from gconv import backend
from gconv.autocast import autocast_enabled
from gconv.autograd import (
    applier,
    call,
    channels_last,
    decide,
    distinct,
    empty_channels_last,
    first_order,
    in_format,
    op,
    register,
    stored,
    suggests_channels_last,
    transformed,
    untracked,
    vjp_by_reference,
    vmap_by,
)
from gconv.grouped_conv import per_channel, wide

PIXELS = (0, 2, 3)


# ----------------------------------------------------------------------------------------------- references


def batch_norm_stats_ref(x):
    """(mean, var) [C] of x [N, C, H, W] over N*H*W; var is biased (algorithm 1, lines 1 and 2)."""
    var, mean = torch.var_mean(x.to(wide(x)), PIXELS, correction=0)
    return mean, var


def batch_norm_fold_ref(mean, var, gamma, beta, eps):
    """(rstd, affine): rstd = 1/sqrt(var + eps) [C], affine [2, C] = (gamma*rstd; beta - mean*gamma*rstd), so
    that algorithm 1, lines 3 and 4 are affine[0]*x + affine[1]. Computed in float64, returned in mean's
    dtype."""
    rstd = torch.rsqrt(var.double() + eps)
    scale = rstd if gamma is None else gamma * rstd
    shift = -mean * scale if beta is None else beta - mean * scale
    return rstd.to(mean.dtype), torch.stack((scale, shift)).to(mean.dtype)


def batch_norm_apply_ref(x, affine, residual=None, residual_affine=None, relu=False):
    """relu?(a*x + b + residual), or relu?(a*x + b + c*residual + d), for affine [2, C] = (a; b) and
    residual_affine [2, C] = (c; d)."""
    y = per_channel(affine[0]) * x + per_channel(affine[1])
    if residual_affine is not None:
        residual = per_channel(residual_affine[0]) * residual + per_channel(residual_affine[1])
    if residual is not None:
        y = y + residual
    return stored(torch.relu(y) if relu else y, x.dtype)


def batch_norm_apply_into_ref(x, affine, residual, residual_affine, relu, y) -> None:
    """Writes `batch_norm_apply_ref` to y, which may be the residual or x."""
    y.copy_(batch_norm_apply_ref(x, affine, residual, residual_affine, relu))


def batch_norm_pool_ref(x, affine):
    """[N, C, H//2, W//2]: the mean of relu(a*x + b) over squares of 2x2, affine [2, C] = (a; b), an odd last
    row or column being dropped. Computed in float32, rounded once."""
    return stored(F.avg_pool2d(torch.relu(per_channel(affine[0]) * x + per_channel(affine[1])), 2), x.dtype)


def batch_norm_pool_bwd_ref(dy, x, act, want_y, dx):
    """(sums, y): the backward of `batch_norm_pool_ref` with act [4, C] = (a; b; mean; rstd).

    With g = dy/4 at each pixel of its square, masked by [not a*x + b <= 0], in float32: writes a*g to dx, 0
    where there is no square; sums [2, C] are (sum g; sum g*(x - mean)*rstd); y is the forward's, of shape [0]
    unless wanted.
    """
    a, _, mean, rstd = act
    h, w = 2 * dy.shape[2], 2 * dy.shape[3]
    pooled = x[:, :, :h, :w]
    spread = dy.to(wide(dy)).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    g = _masked(spread, pooled, act[:2], None)
    dx.zero_()[:, :, :h, :w] = per_channel(a) * g
    return _sums_ref(g, pooled, mean, rstd), batch_norm_pool_ref(x, act[:2]) if want_y else x.new_zeros(0)


def _masked(dz, x, affine, z):
    """dz where the ReLU let through, in float32: by its output z, else by the sign of a*x + b, else
    everywhere."""
    g = dz.to(wide(dz))
    if z is not None:
        return torch.where(z <= 0, 0, g)
    if affine is not None:
        return torch.where(per_channel(affine[0]) * x + per_channel(affine[1]) <= 0, 0, g)
    return g


def _sums_ref(g, x, mean, rstd):
    """[2, C]: sum g and sum g*(x - mean)*rstd, the sums of the backward (the paper's section 3)."""
    return torch.stack((g.sum(PIXELS), (g * (x - per_channel(mean)) * per_channel(rstd)).sum(PIXELS)))


def batch_norm_bwd_finish_ref(sums, mean, rstd, gamma, count):
    """(dgamma, dbeta, finish): what the backward of a normalisation by the statistics of `count` values per
    channel makes of sums [2, C] = (sum g; sum g*(x - mean)*rstd).

    dbeta and dgamma are the sums; finish [6, C] = (A; B; C; mean; 0; 1) with dx = A*g + B*(x - mean) + C.
    """
    dbeta, dgamma = sums
    scale = rstd if gamma is None else gamma * rstd
    slope, offset = -scale * rstd * dgamma / count, -scale * dbeta / count
    finish = torch.stack((scale, slope, offset, mean, torch.zeros_like(mean), torch.ones_like(mean)))
    return dgamma.clone(), dbeta.clone(), finish


def batch_norm_bwd_reduce_ref(dz, x, mean, rstd, gamma, affine, z, want_g):
    """(dgamma, dbeta, finish, g): `batch_norm_bwd_finish_ref` of the sums over g, dz masked by the ReLU; g
    has shape [0] unless wanted.

    Rows 4 and 5 of finish are (a; b), the affine, where it gives the mask, else (0; 1), which masks nothing.
    """
    g = _masked(dz, x, affine, z)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    dgamma, dbeta, finish = batch_norm_bwd_finish_ref(_sums_ref(g, x, mean, rstd), mean, rstd, gamma, count)
    if affine is not None and z is None:
        finish = torch.cat((finish[:4], affine))
    return dgamma, dbeta, finish, stored(g, dz.dtype) if want_g else x.new_zeros(0)


def batch_norm_bwd_reduce_pair_ref(dz, z, x, mean, rstd, gamma, other_x, other_mean, other_rstd, other_gamma):
    """(dgamma, other_dgamma, dbeta, finish, other_finish, g) of two normalisations whose sum became z by a
    ReLU: `batch_norm_bwd_reduce_ref` of each, dbeta and g being common."""
    dgamma, dbeta, finish, g = batch_norm_bwd_reduce_ref(dz, x, mean, rstd, gamma, None, z, True)
    other = (other_x, other_mean, other_rstd, other_gamma)
    other_dgamma, _, other_finish, _ = batch_norm_bwd_reduce_ref(dz, *other, None, z, False)
    return dgamma, other_dgamma, dbeta, finish, other_finish, g


def batch_norm_bwd_apply_ref(dz, x, finish, z, want_g):
    """(dx, g): dx = A*g + B*(x - mean) + C; g, dz masked by the ReLU, has shape [0] unless wanted."""
    g = _masked(dz, x, finish[4:], z)
    scale, slope, offset, mean = (per_channel(row) for row in finish[:4])
    dx = scale * g + slope * (x - mean) + offset
    return stored(dx, x.dtype), stored(g, x.dtype) if want_g else x.new_zeros(0)


def batch_norm_ref(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
    residual=None, relu=False,
):  # fmt: skip
    """The definition of `batch_norm`: torch.nn.functional.batch_norm, + residual, ReLU."""
    return tail(
        F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps), residual, relu
    )


def tail(y, residual, relu):
    """What follows a normalisation at the end of a block, in plain PyTorch."""
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y


def batch_norm_update_running_ref(
    running_mean, running_var, num_batches_tracked, mean, var, shift, count, momentum
) -> None:
    """running <- (1 - momentum)*running + momentum*new, in place, with the mean and the unbiased variance of
    a batch of `count` values per channel; `shift` [C] is added to the mean (the bias of the convolution
    before). A counter, if any, counts the batch, and momentum None averages over all batches counted."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = num_batches_tracked.double().reciprocal()
    if shift is not None:
        mean = mean + shift
    for running, new, factor in ((running_mean, mean, 1.0), (running_var, var, count / (count - 1))):
        if running.dtype is torch.float32 and not isinstance(momentum, torch.Tensor):
            running.mul_(1 - momentum).add_(new, alpha=momentum * factor)
        else:
            running.copy_((1 - momentum) * running.to(new.dtype) + momentum * factor * new)


stats = op("batch_norm_stats")
fold = op("batch_norm_fold")
apply_affine = op("batch_norm_apply")
apply_into = op("batch_norm_apply_into")
pool = op("batch_norm_pool")
pool_bwd = op("batch_norm_pool_bwd")
bwd_reduce = op("batch_norm_bwd_reduce")
bwd_reduce_pair = op("batch_norm_bwd_reduce_pair")
bwd_finish = op("batch_norm_bwd_finish")
bwd_apply = op("batch_norm_bwd_apply")
_update_running = op("batch_norm_update_running")


def constant_finish(table, masked=False):
    """`finish` of a normalisation by constants, of its table [4, C] = (a; b; mean; rstd): its backward is a
    scale. Masks by the ReLU after it, or nothing."""
    zero = torch.zeros_like(table[0])
    mask = (table[0], table[1]) if masked else (zero, zero + 1)
    return torch.stack((table[0], zero, zero, table[2], *mask))


# ------------------------------------------------------------------------------------------------- Functions


def normalize(x, gamma, eps):
    """gamma*(x - mean)/sqrt(var + eps) in plain PyTorch: what a backward pulls its gradient back through."""
    var, mean = torch.var_mean(x.to(wide(x)), PIXELS, correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(var + eps)
    return (y if gamma is None else per_channel(gamma) * y).to(x.dtype)


def relu_mask(y, affine, z, relu):
    """Where the ReLU after a normalisation was shut, or None: by its stored output, or by the affine of the
    input."""
    if not relu:
        return None
    return (z if z is not None else per_channel(affine[0]) * y + per_channel(affine[1])) <= 0


def train_composed(x, gamma, beta, residual, eps, relu):
    """The training forward from differentiable parts, with the outputs of `BatchNorm`."""
    mean, var = batch_norm_stats_ref(x)
    rstd, affine = batch_norm_fold_ref(mean, var, gamma, beta, eps)
    return batch_norm_apply_ref(x, affine, residual, None, relu), mean, var, rstd, affine


def pull_back(forward, dz, primals, shut):
    """(g, gradients of forward to primals) for z = relu?(forward(*primals) + beta + residual); None primals
    skipped.

    g is dz where the ReLU was open (`shut` is the mask of the rest): the gradient of the residual.
    """
    g = dz if shut is None else torch.where(shut, 0, dz)
    return g, vjp_by_reference(forward, primals, tuple(p is not None for p in primals), (g,))


def only(wanted, grads):
    return tuple([grad if want else None for want, grad in zip(wanted, grads)])


class BatchNorm(Function):
    """Training: (z, mean, var, rstd, affine) with z = relu?(batch_norm(x) + residual); z alone is
    differentiable.

    gamma and beta [C] float32 and residual may be None.
    """

    @staticmethod
    def forward(x, gamma, beta, residual, eps, relu):
        mean, var = call(stats, x)
        rstd, affine = call(fold, mean, var, gamma, beta, eps)
        return call(apply_affine, x, affine, residual, None, relu), mean, var, rstd, affine

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gamma, _, residual, ctx.eps, ctx.relu = inputs
        z, mean, var, rstd, affine = output
        ctx.mark_non_differentiable(mean, var, rstd, affine)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gamma, mean, rstd, affine, z if ctx.relu and residual is not None else None)

    @staticmethod
    def backward(ctx, dz, *unused):
        wanted = tuple(ctx.needs_input_grad[:4])
        if dz is None:
            return (None,) * 6
        run = BatchNormBackward.forward if first_order() else _backward_apply
        *grads, dresidual = run(dz, *ctx.saved_tensors, wanted, ctx.eps, ctx.relu)
        return *grads, dz if wanted[3] and not ctx.relu else dresidual, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return vmap_by(train_composed, info, in_dims, args)


class BatchNormBackward(Function):
    """(dx, dgamma, dbeta, dresidual), None where not wanted; dresidual only after a ReLU, for it is dz
    otherwise. Its own derivative is that of the composition."""

    @staticmethod
    def forward(dz, x, gamma, mean, rstd, affine, z, wanted, eps, relu):
        dz = channels_last(dz)
        mask = affine if relu and z is None else None
        want_g = wanted[3] and relu
        dgamma, dbeta, finish, _ = call(bwd_reduce, dz, x, mean, rstd, gamma, mask, z, False)
        dx, g = call(bwd_apply, dz, x, finish, z, want_g) if wanted[0] or want_g else (None, None)
        return only((*wanted[:3], want_g), (dx, dgamma, dbeta, g))

    @staticmethod
    def setup_context(ctx, inputs, output):
        dz, x, gamma, _, _, affine, z, *ctx.rest = inputs
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(dz, x, gamma, affine, z)

    @staticmethod
    def composed(dz, x, gamma, affine, z, wanted, eps, relu):
        shut = relu_mask(x, affine, z, relu)
        g, (dx, dgamma) = pull_back(lambda x, gamma: normalize(x, gamma, eps), dz, (x, gamma), shut)
        return only((*wanted[:3], wanted[3] and relu), (dx, dgamma, g.sum(PIXELS, dtype=wide(g)), g))

    @staticmethod
    def backward(ctx, *grads):
        dz, x, gamma, affine, z = ctx.saved_tensors
        args = (dz, x, gamma, affine, z, *ctx.rest)
        result = vjp_by_reference(BatchNormBackward.composed, args, ctx.needs_input_grad[:3], grads)
        return *result[:3], *(None,) * 7

    @staticmethod
    def vmap(info, in_dims, dz, x, gamma, mean, rstd, affine, z, *rest):
        dims = (*in_dims[:3], *in_dims[5:])
        return vmap_by(BatchNormBackward.composed, info, dims, (dz, x, gamma, affine, z, *rest))


class BatchNormAffine(Function):
    """relu?(scale*x + shift + residual), normalisation by known statistics; scale, shift [C] float32."""

    @staticmethod
    def forward(x, scale, shift, residual, relu):
        return call(apply_affine, x, torch.stack((scale, shift)), residual, None, relu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, _, _, relu = inputs
        ctx.save_for_backward(x, scale, output if relu else None)

    @staticmethod
    def backward(ctx, dz):
        x, scale, z = ctx.saved_tensors
        want_x, want_scale, want_shift, want_residual = ctx.needs_input_grad[:4]
        dz = channels_last(dz)
        g = dz if z is None else torch.ops.aten.threshold_backward(dz, z, 0)
        dx = (g * per_channel(scale)).to(x.dtype) if want_x else None
        dscale = (g * x).sum(PIXELS, dtype=scale.dtype) if want_scale else None
        dshift = g.sum(PIXELS, dtype=scale.dtype) if want_shift else None
        return dx, dscale, dshift, g if want_residual else None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        z, dim = vmap_by(
            lambda x, scale, shift, residual, relu: (
                batch_norm_apply_ref(x, torch.stack((scale, shift)), residual, None, relu),
            ),
            info, in_dims, args,
        )  # fmt: skip
        return z[0], dim[0]


_train_apply = applier(BatchNorm)
_backward_apply = applier(BatchNormBackward)
_affine_apply = applier(BatchNormAffine)


# -------------------------------------------------------------- what the ops are to autograd and to compilers


def _fold_fake(mean, var, gamma, beta, eps):
    return torch.empty_like(mean), mean.new_empty(2, mean.shape[0])


def _bwd_finish_fake(sums, mean, rstd, gamma, count):
    return torch.empty_like(mean), torch.empty_like(mean), mean.new_empty(6, mean.shape[0])


def _bwd_reduce_fake(dz, x, mean, rstd, gamma, affine, z, want_g):
    g = empty_channels_last(x, x.shape) if want_g else x.new_empty(0)
    return torch.empty_like(mean), torch.empty_like(mean), mean.new_empty(6, mean.shape[0]), g


def _bwd_reduce_pair_fake(dz, z, x, mean, *rest):
    vectors = [torch.empty_like(mean) for _ in range(3)]
    tables = [mean.new_empty(6, mean.shape[0]) for _ in range(2)]
    return *vectors, *tables, empty_channels_last(x, x.shape)


def _stats_fake(x):
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _pool_fake(x, affine):
    n, c, h, w = x.shape
    return empty_channels_last(x, (n, c, h // 2, w // 2))


def _pool_bwd_fake(dy, x, act, want_y, dx):
    return torch.empty_like(act[:2]), _pool_fake(x, act) if want_y else x.new_empty(0)


def _bwd_apply_fake(dz, x, finish, z, want_g):
    return empty_channels_last(x, x.shape), empty_channels_last(x, x.shape) if want_g else x.new_empty(0)


register("batch_norm_stats", _stats_fake, batch_norm_stats_ref)
register("batch_norm_fold", _fold_fake, batch_norm_fold_ref)
register("batch_norm_update_running", lambda *args: None, None)
register(
    "batch_norm_apply",
    lambda x, affine, residual, residual_affine, relu: empty_channels_last(x, x.shape),
    batch_norm_apply_ref,
)
register("batch_norm_apply_into", lambda *args: None, None)
register("batch_norm_pool", _pool_fake, batch_norm_pool_ref)
register("batch_norm_pool_bwd", _pool_bwd_fake, None)
register("batch_norm_bwd_reduce", _bwd_reduce_fake, batch_norm_bwd_reduce_ref)
register("batch_norm_bwd_reduce_pair", _bwd_reduce_pair_fake, batch_norm_bwd_reduce_pair_ref)
register("batch_norm_bwd_finish", _bwd_finish_fake, batch_norm_bwd_finish_ref)
register("batch_norm_bwd_apply", _bwd_apply_fake, batch_norm_bwd_apply_ref)


# -------------------------------------------------------------------------------------- a module's statistics


def is_frozen(bn) -> bool:
    """True for the FrozenBatchNorm2d of torchvision and detectron2: an affine by its buffers, in train mode
    too."""
    return type(bn).__name__ == "FrozenBatchNorm2d" and not isinstance(bn, _BatchNorm)


def state_of(bn) -> tuple:
    """(running_mean, running_var, gamma, beta), each a tensor or None; a module reads attributes slowly."""
    return bn.running_mean, bn.running_var, bn.weight, bn.bias


def uses_batch_statistics(bn) -> bool:
    """Whether `bn` normalises by the batch at hand: in train mode, and in eval mode without running
    statistics."""
    return not is_frozen(bn) and (bn.training or (bn.running_mean is None and bn.running_var is None))


def update_state(bn, running_mean, running_var, mean, var, count, shift=None) -> None:
    """What nn.BatchNorm2d.forward does to its state: counts the batch and moves its running statistics."""
    if not (bn.training and bn.track_running_stats):
        return
    counter, momentum = bn.num_batches_tracked, bn.momentum
    if momentum is None and counter is None:
        momentum = 0.0
    if running_mean is not None:
        update_running(running_mean, running_var, counter, mean, var, shift, count, momentum)
    elif counter is not None:
        counter.add_(1)


def running_in_place(bn, running_mean, running_var, bias) -> tuple | None:
    """(running_mean, running_var, num_batches_tracked, shift, momentum) for an op that moves the running
    statistics itself, all None where they stay; or None where `update_state` has to."""
    if transformed():
        return None
    if not (bn.training and bn.track_running_stats):
        return (None,) * 5
    counter, momentum = bn.num_batches_tracked, bn.momentum
    if running_mean is None or (momentum is None and counter is None):
        return None
    if not _updates_in_place(running_mean, running_var, counter):
        return None
    return running_mean, running_var, counter, None if bias is None else as_float(bias.detach()), momentum


def update_running(running_mean, running_var, counter, mean, var, shift, count, momentum) -> None:
    """`batch_norm_update_running_ref`, as one op where that covers the buffers. A compiler fuses the
    reference with what surrounds it, and a function transform must see every step."""
    shift = None if shift is None else as_float(shift.detach())
    args = (running_mean, running_var, counter, mean, var, shift, count, momentum)
    if transformed() or not _updates_in_place(*args[:3]):
        batch_norm_update_running_ref(*args)
        return
    call(_update_running, *args)
    moved(running_mean, running_var)


def moved(running_mean, running_var) -> None:
    """Tells autograd, below which an op wrote them, that saved statistics are no longer what they were."""
    if running_mean is not None:
        torch.autograd.graph.increment_version((running_mean, running_var))


def _updates_in_place(running_mean, running_var, counter) -> bool:
    floats = running_mean.dtype is torch.float32 and running_var.dtype is torch.float32
    dense = running_mean.is_contiguous() and running_var.is_contiguous()
    counts = counter is None or (
        counter.dtype is torch.int64 and counter.dim() == 0 and backend.same_device(counter, running_mean)
    )
    return floats and dense and counts


def check_count(name: str, shape) -> int:
    """N*H*W; ValueError where one value per channel leaves nothing to normalise, as in torch."""
    count = shape[0] * shape[2] * shape[3]
    if count == 1:
        raise ValueError(
            f"{name}: x: Expected more than 1 value per channel when training, got input size {list(shape)}"
        )
    return count


def check_eps(name: str, eps: float, training: bool) -> None:
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"{name}: eps: want a positive number, got {eps}")


def check_residual(name: str, residual, shape, like) -> None:
    if residual is None:
        return
    if not isinstance(residual, torch.Tensor):
        raise ValueError(f"{name}: residual: want a tensor, got {type(residual).__name__}")
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"{name}: residual: want {list(shape)} as the output, got {list(residual.shape)}")
    if residual.dtype != like.dtype:
        raise ValueError(f"{name}: residual: want dtype {like.dtype} as of x, got {residual.dtype}")
    if not backend.same_device(residual, like):
        raise ValueError(f"{name}: residual: want device {like.device} as of x, got {residual.device}")


def kernels_run(x, shape, training, running_mean, running_var, gamma, beta) -> bool:
    """Whether the kernels run a normalisation of [N, C, H, W] = `shape` after x. Odd combinations of buffers,
    dtypes other than float32 and x's, and an empty batch in training are torch's to accept or to refuse."""
    if (running_mean is None) != (running_var is None):
        return False
    for v in (running_mean, running_var, gamma, beta):
        if v is not None and not (
            (v.dtype is torch.float32 or v.dtype == x.dtype)
            and backend.same_device(v, x)
            and v.shape == (shape[1],)
        ):
            return False
    return (shape[0] > 0 and shape[2] > 0 and shape[3] > 0) if training else running_mean is not None


def as_float(vector):
    return vector if vector is None or vector.dtype is torch.float32 else vector.float()


def inference_affine(running_mean, running_var, gamma, beta, eps, bias=None):
    """(scale, shift) [C] of a normalisation by running statistics, after a convolution with this bias;
    gradients flow to gamma, beta and bias."""
    scale = torch.rsqrt(as_float(running_var) + eps)
    if gamma is not None:
        scale = scale * as_float(gamma)
    mean = as_float(running_mean)
    if bias is not None:
        mean = mean - as_float(bias)
    shift = -mean * scale
    return scale, shift if beta is None else shift + as_float(beta)


def train(x, gamma, beta, residual, eps, relu):
    """(z, mean, var) by batch statistics, on the kernels; z in the memory format torch would return."""
    keep = suggests_channels_last(x)
    x, gamma, beta = channels_last(x), as_float(gamma), as_float(beta)
    if untracked():
        z, mean, var, *_ = BatchNorm.forward(x, gamma, beta, residual, eps, relu)
    else:
        z, mean, var, *_ = _train_apply(x, gamma, beta, distinct(x, residual), eps, relu)
    return in_format(z, keep), mean, var


def infer(x, running_mean, running_var, gamma, beta, residual, eps, relu):
    """z by running statistics, on the kernels; z in the memory format torch would return."""
    keep = suggests_channels_last(x)
    x = channels_last(x)
    if untracked():
        vectors = map(as_float, (running_mean, running_var, gamma, beta))
        _, affine = call(fold, *vectors, eps)
        z = call(apply_affine, x, affine, residual, None, relu)
    else:
        z = _affine_apply(
            x, *inference_affine(running_mean, running_var, gamma, beta, eps), distinct(x, residual), relu
        )
    return in_format(z, keep)


# -------------------------------------------------------------------------------------------- the functions


def _to_torch(decision):
    """The decision for a call that the kernels would take but whose parameters only torch knows what to do
    with."""
    if not decision.ours:
        return decision
    return backend.Decision(
        "torch", "torch.batch_norm", "by design: an empty batch or uncommon parameters", False
    )


def batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
    residual=None, relu=False,
):  # fmt: skip
    """Batch normalisation of [N, C, H, W], torch.nn.functional.batch_norm's signature and results, and
    optionally + residual and ReLU in the same pass.

    Training (Ioffe & Szegedy 2015, algorithm 1): y = weight*(x - mean)/sqrt(var + eps) + bias with the mean
    and biased variance of the batch; running_mean and running_var move by `momentum` towards the mean and the
    unbiased variance. Otherwise (algorithm 2) the running statistics normalise.

    Args:
        x: [N, C, H, W] float32, bfloat16 or float16 on a CPU for the kernels; anything else runs on torch.
        running_mean, running_var: [C], or None in training to leave nothing updated.
        weight, bias: gamma and beta [C], float32 or x's dtype, or None.
        training: normalise by the batch and update the running statistics.
        momentum, eps: as in torch.
        residual: added after the normalisation: shape, dtype and device of x, any strides.
        relu: ReLU last; NaN stays NaN.

    Returns:
        shape, dtype and memory format of x.

    Raises:
        ValueError: one value per channel in training, a residual that does not fit, eps out of range.
        RuntimeError: what torch refuses: parameters of another size, dtype or device.

    Determinism: the kernels are bit-identical from run to run and for any number of threads.
    """
    check_residual("batch_norm", residual, x.shape, x)
    check_eps("batch_norm", eps, training)
    if x.dim() != 4:
        decision = backend.fall_back("batch_norm", f"x: want [N, C, H, W], got {x.dim()} dimensions")
        covered = False
    else:
        decision = decide("batch_norm", x)
        vectors = (running_mean, running_var, weight, bias)
        covered = decision.ours and kernels_run(x, x.shape, training, *vectors)
    if covered and training:
        count = check_count("batch_norm", x.shape)
        y, mean, var = train(x, weight, bias, residual, eps, relu)
        if running_mean is not None:
            update_running(running_mean, running_var, None, mean, var, None, count, momentum)
    elif covered:
        y = infer(x, running_mean, running_var, weight, bias, residual, eps, relu)
    else:
        decision = _to_torch(decision)
        y = batch_norm_ref(
            x, running_mean, running_var, weight, bias, training, momentum, eps, residual, relu
        )
    backend.record(decision, "batch_norm", x, y)
    return y


def batch_norm_module(x, bn: nn.Module, residual=None, relu=True):
    """relu?(bn(x) + residual) with the parameters, buffers and mode of `bn`, an nn.BatchNorm2d or
    FrozenBatchNorm2d, whose state changes exactly as by calling it."""
    if residual is not None and autocast_enabled(x):
        residual = residual.to(x.dtype)
    check_residual("batch_norm", residual, x.shape, x)
    decision = decide("batch_norm", x)
    training, state = uses_batch_statistics(bn), state_of(bn)
    if not decision.ours or not kernels_run(x, x.shape, training, *state):
        decision = _to_torch(decision)
        y = tail(bn(x), residual, relu)
        backend.record(decision, "batch_norm", x, y)
        return y
    check_eps("batch_norm", bn.eps, training)
    running_mean, running_var, gamma, beta = state
    if training:
        count = check_count("batch_norm", x.shape)
        y, mean, var = train(x, gamma, beta, residual, bn.eps, relu)
        update_state(bn, running_mean, running_var, mean, var, count)
    else:
        y = infer(x, running_mean, running_var, gamma, beta, residual, bn.eps, relu)
    backend.record(decision, "batch_norm", x, y)
    return y
