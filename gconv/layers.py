"""Layers that take the place of torch.nn's: the same signature, initialisation and state_dict."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv import guards, packed
from gconv.concat import placed
from gconv.conv_bn_relu import fuse_modules_forward
from gconv.grouped_conv import grouped_conv


def fx_leaf(module: nn.Module, *args):
    """While torch.fx traces a model: `module` as one node of the graph, as torch.nn's own layers are.

    Returns None where nothing is traced or where `module` is itself the traced root.
    """
    proxy = next((arg for arg in args if isinstance(arg, torch.fx.Proxy)), None)
    if proxy is None:
        return None
    path = proxy.tracer.path_of_module(module)
    return proxy.tracer.create_proxy("call_module", path, args, {}) if path else None


class Conv2d(nn.Conv2d):
    """nn.Conv2d on gconv's kernels: [N, C, H, W] or [C, H, W] -> [N, K, OH, OW] or [K, OH, OW].

    Arguments, initialisation (also the use of the random generator), state_dict keys and `padding_mode`s are
    nn.Conv2d's. What the kernels do not cover goes to torch and is reported by `gconv.set_policy`'s policy
    and by `gconv.trace`: they cover 3x3, stride 1 or 2, padding up to twice the dilation, any groups, and
    1x1, stride 1 or 2, no padding, one group, in float32, bfloat16 and float16 on the CPU. Bit-identical from
    run to run and for any number of threads. The output is channels_last if the input or the weight is, as in
    torch, unless `into`, a slot of a `gconv.Concat`, becomes the output.
    """

    def forward(self, input: Tensor, into: Any = None) -> Tensor:
        if torch.jit.is_scripting():  # TorchScript cannot call us: the scripted layer is torch's
            return self._conv_forward(input, self.weight, self.bias)
        elif isinstance(input, torch.fx.Proxy):
            leaf = fx_leaf(self, input)
            return placed(self._conv_forward(input, self.weight, self.bias) if leaf is None else leaf, into)
        else:
            return self._run(input, into)

    @torch.jit.unused
    def _run(self, input: Tensor, into: Any) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        conf = (self.stride, padding, self.dilation, self.groups)
        if packed.kept_of(self) is not None:
            y = packed.conv2d(self, input, *packed.parameters_of(self, input), conf, into)
            if y is not None:
                return y
        return grouped_conv(input, self.weight, self.bias, *conf, into)

    @classmethod
    def from_torch(cls, conv: nn.Conv2d) -> "Conv2d":
        """A gconv layer that shares the parameters, hooks and mode of `conv`, which stays as it is.

        Raises ValueError if `conv` is anything but a plain nn.Conv2d: a subclass may compute something else,
        and a parametrization lives in the subclass it makes.
        """
        if type(conv) is not nn.Conv2d and type(conv) is not cls:
            raise ValueError(f"Conv2d.from_torch: conv: want a plain torch.nn.Conv2d, got {_described(conv)}")
        layer = cls.__new__(cls)
        for name, value in conv.__dict__.items():
            if name == guards.CALLS:
                continue
            # Shallow copies of the registries: the same tensors and hooks, in dictionaries of the new layer's
            # own.
            layer.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
        return layer


def _described(module) -> str:
    if isinstance(module, nn.Module) and nn.utils.parametrize.is_parametrized(module):
        return f"a parametrized {type(module).__mro__[1].__name__}"
    return type(module).__name__


class ConvBNReLU(nn.Module):
    """relu(bn(conv(x)) [+ residual]) in one pass: [N, C, H, W] -> [N, K, OH, OW].

    Children are `conv` (gconv.Conv2d) and `bn` (nn.BatchNorm2d), so the state_dict keys are `conv.weight`,
    `bn.weight`, ..., `bn.num_batches_tracked`. Training stores the convolution's raw output and the batch
    statistics taken from it (Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 1), never the normalised
    activation; evaluation applies the running statistics inside the convolution. A `bn` replaced by another
    module (SyncBatchNorm, Identity), or a child with hooks, is called as a module: `gconv.trace` says so.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as
            nn.Conv2d;
            `bias` is False by default because the batch norm removes it.
        relu: False ends with the batch norm and the residual.
        eps, momentum, affine, track_running_stats: as nn.BatchNorm2d.
        device, dtype: of the parameters.

    Raises:
        ValueError, RuntimeError: as nn.Conv2d and nn.BatchNorm2d, and for a residual that has not the
            output's shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = False,
        relu: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None, into: Any = None) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_children(x, residual)
        elif isinstance(x, torch.fx.Proxy):
            leaf = fx_leaf(self, x) if residual is None else fx_leaf(self, x, residual)
            return placed(self._forward_children(x, residual) if leaf is None else leaf, into)
        else:
            return self._run(x, residual, into)

    @torch.jit.unused
    def _run(self, x: Tensor, residual: Tensor | None, into: Any) -> Tensor:
        children = self._modules  # an attribute that is a child takes a microsecond
        return fuse_modules_forward(x, children["conv"], children["bn"], residual, self.relu, into)

    def _forward_children(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = self.bn(self.conv(x))
        if residual is not None:
            y = y + residual
        return F.relu(y) if self.relu else y

    @classmethod
    def from_torch(cls, conv: nn.Conv2d, bn: nn.Module, relu: bool = True) -> "ConvBNReLU":
        """The fused layer over an existing convolution, whose parameters it shares, and `bn` itself.

        Raises ValueError if `conv` is not a plain nn.Conv2d.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.conv = Conv2d.from_torch(conv)
        layer.bn = bn
        layer.relu = relu
        layer.training = bn.training
        return layer

    def extra_repr(self) -> str:
        return "" if self.relu else "relu=False"
