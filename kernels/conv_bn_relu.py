"""The joint ops of conv_bn_relu from the launchers of its parts: on a GPU a launch costs what a call does."""

import torch

from gconv.conv_bn_relu import backward_stages, forward_stages

ops = torch.ops.gconv


def conv_bn_relu_fwd_train(
    x, weight, stride, padding, dilation, groups, gamma, beta, residual, eps, relu,
    running_mean, running_var, num_batches_tracked, shift, momentum,
):  # fmt: skip
    """(z, y, mean, rstd, affine), as `gconv.conv_bn_relu.conv_bn_relu_fwd_train_ref`."""
    stages = (ops.grouped_conv_fwd_stats, ops.batch_norm_fold, ops.batch_norm_apply)
    args = (x, weight, stride, padding, dilation, groups, gamma, beta, residual, eps, relu)
    z, y, mean, var, rstd, affine = forward_stages(*stages, *args)
    if running_mean is not None:
        running = (running_mean, running_var, num_batches_tracked)
        ops.batch_norm_update_running(*running, mean, var, shift, y.numel() // y.shape[1], momentum)
    return z, y, mean, rstd, affine


def conv_bn_relu_bwd(dz, x, *args):
    """(dx, dweight, dgamma, dbeta, g), as `gconv.conv_bn_relu.conv_bn_relu_bwd_ref`."""
    stages = (ops.batch_norm_bwd_reduce, ops.batch_norm_bwd_apply, ops.grouped_conv_bwd)
    return backward_stages(*stages, dz, x, *args)
