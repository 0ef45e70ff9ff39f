"""Dense blocks made of modules: what runs them as one call of `gconv.dense_block`, or says why not."""

from functools import partial

import torch
import torch.nn.functional as F

from gconv import backend, packed
from gconv.autocast import autocast
from gconv.autograd import call, in_format, suggests_channels_last
from gconv.batch_norm import check_eps, state_of
from gconv.conv_bn_relu import not_fusable
from gconv.dense_block import Layer, check, conf_of, in_autocast, not_shared, reason_against, run
from gconv.dense_stages import infer_stages


def _module_reason(conv, bn, kernel) -> str | None:
    """Why a layer's two modules must be called as they are, or None."""
    reason = not_fusable(conv, bn, in_dense_block=True)
    if reason is not None:
        return reason
    if conv.bias is not None:
        return "conv: has a bias"
    if tuple(conv.kernel_size) != kernel:
        return f"conv: want a {kernel[0]}x{kernel[1]} kernel, got {conv.kernel_size[0]}x{conv.kernel_size[1]}"
    kept = conv.dilation if kernel == (3, 3) else (0, 0)
    geometry = conv.padding in (kept, "same") and conv.dilation[0] == conv.dilation[1]
    if tuple(conv.stride) != (1, 1) or not geometry or conv.padding_mode != "zeros":
        return f"conv: stride {conv.stride}, padding {conv.padding} with {conv.padding_mode}"
    return f"conv: {conv.groups} groups" if kernel == (1, 1) and conv.groups != 1 else None


def modules_reason(layers, transition) -> str | None:
    """Why `fuse_dense_block_forward` calls these modules one by one, or None."""
    for i, (bn1, conv1, bn2, conv2, _) in enumerate(layers):
        pairs = ((conv1, bn1, (3, 3)),) if conv2 is None else ((conv1, bn1, (1, 1)), (conv2, bn2, (3, 3)))
        for conv, bn, kernel in pairs:
            reason = _module_reason(conv, bn, kernel)
            if reason is not None:
                return f"layer {i}: {reason}"
    if transition is not None:
        bn, conv = transition
        reason = not_fusable(None, bn, in_dense_block=True)
        if reason is None and conv is not None:
            reason = _module_reason(conv, bn, (1, 1))
        if reason is not None:
            return f"transition: {reason}"
    return None


def _called(x, layers, transition):
    """The modules one by one, as torchvision's DenseNet calls its own."""
    features = [x]
    for bn1, conv1, bn2, conv2, dropout in layers:
        h = conv1(torch.relu(bn1(torch.cat(features, 1))))
        last = conv1 if conv2 is None else conv2
        if conv2 is not None:
            h = conv2(torch.relu(bn2(h)))
        features.append(F.dropout(h, dropout, last.training) if dropout > 0 else h)
    out = torch.cat(features, 1)
    if transition is None:
        return out
    bn, conv = transition
    out = torch.relu(bn(out))
    return out if conv is None else F.avg_pool2d(conv(out), 2)


def _run_frozen(x, modules, layers, transition, memory):
    """The block by what is kept of its modules, or None if they are not frozen or it has to run otherwise."""
    every = [module for layer in modules for module in layer[:4] if module is not None]
    convs, bns = every[1::2], every[::2]
    if transition is not None:
        bns.append(transition[0])
        convs += [conv for conv in transition[1:] if conv is not None]
    if memory == "naive" or packed.kept_of(convs[0]) is None or any(layer.dropout > 0 for layer in layers):
        return None

    def make():
        (here,) = autocast(x)
        weights = [packed.parameters_of(conv, x)[0] for conv in convs]
        rest = iter(weights)
        frozen = [layer._replace(weights=tuple(next(rest) for _ in layer.weights)) for layer in layers]
        end = None if transition is None else (transition[0], next(rest, None))
        if reason_against(here, frozen, end) is not None:
            return None
        for bn in bns:
            check_eps("dense_block", bn.eps, False)
        conf = conf_of(here, frozen, end, False)
        images = [x.shape[2:]] * len(convs)
        if end is not None and end[1] is not None:  # a transition's convolution reads what is pooled
            images[-1] = torch.Size(size // 2 for size in images[-1])
        own = zip(convs, weights, images, conf.geometries)
        made = [packed.packed_of(conv, *rest, *geometry) for conv, *rest, geometry in own]
        affines = [packed.affine_of(bn, state_of(bn)) for bn in bns]
        keep = any(map(suggests_channels_last, (here, *weights)))
        decision = backend.whole("dense_block", here, frozen[0].weights[-1], frozen[0].groups)
        return made, affines, conf, keep, packed.named(decision)

    found = packed.block_of("dense_block", x, convs, bns, make)
    if found is None:
        return None
    (here,), (weights, affines, conf, keep, decision) = autocast(x), found
    out = in_format(call(infer_stages, here, weights, affines, conf), keep)
    backend.record(decision, "dense_block", here, out)
    return out


def fuse_dense_block_forward(x, layers, transition=None, memory="shared", called=None):
    """`dense_block` of modules: what dense blocks made of torch's modules call.

    Where a module has hooks, a replaced forward or a type that is not fused, or a convolution has a bias,
    the modules are called one by one, and `gconv.trace` says why. Global module hooks are not run for the
    fused modules.

    Args:
        x: [N, C, H, W].
        layers: of each (bn1, conv1, bn2, conv2, dropout); bn2 and conv2 None without a bottleneck. Dropout is
            the probability, used while the layer's last convolution is in training mode. The convolutions
            may be dilated; a 3x3 one may have groups.
        transition: (bn, conv) for BN, ReLU, 1x1 convolution, AvgPool2d(2), or (bn, None) for BN and ReLU.
        memory: as in `dense_block`.
        called: runs on x where the modules are called one by one; by default they are as in torchvision's
            DenseNet, and nothing is recomputed.

    Returns, raises: as `dense_block`.
    """
    if called is None:
        called = partial(_called, layers=layers, transition=transition)
    reason = modules_reason(layers, transition)
    if reason is not None:
        not_shared(reason, x)
        return called(x)
    shared = []
    for bn1, conv1, bn2, conv2, dropout in layers:
        last = conv1 if conv2 is None else conv2
        norms, convs = ((bn1,), (conv1,)) if conv2 is None else ((bn1, bn2), (conv1, conv2))
        rest = (dropout if last.training else 0.0, last.dilation[0], last.groups)
        shared.append(Layer(norms, tuple(conv.weight for conv in convs), *rest))
    end = transition
    if end is not None and end[1] is not None:
        end = end[0], end[1].weight
    check(x, shared, end, memory)
    out = _run_frozen(x, layers, shared, transition, memory)
    if out is None:
        out = run(*in_autocast(x, shared, end), memory)
    return called(x) if out is None else out
