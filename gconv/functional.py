"""The functional forms: what torch.nn.functional's conv2d and batch_norm take, their fusion, whole
blocks."""

from gconv.batch_norm import batch_norm
from gconv.bottleneck import bottleneck
from gconv.bottleneck_modules import fuse_bottleneck_forward
from gconv.conv_bn_relu import conv_bn_relu, fuse_modules_forward
from gconv.dense_block import dense_block
from gconv.dense_modules import fuse_dense_block_forward
from gconv.grouped_conv import grouped_conv
from gconv.pointwise_conv import pointwise_conv

conv2d = grouped_conv

__all__ = [
    "batch_norm", "bottleneck", "conv2d", "conv_bn_relu", "dense_block", "fuse_bottleneck_forward",
    "fuse_dense_block_forward", "fuse_modules_forward", "grouped_conv", "pointwise_conv",
]  # fmt: skip
