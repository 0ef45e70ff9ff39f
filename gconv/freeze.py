"""freeze(model): inference with weights packed once and batch norms folded once."""

from torch import nn

from gconv.batch_norm import is_frozen
from gconv.packed import KEPT, Kept


def freeze(model: nn.Module) -> nn.Module:
    """Makes `model` faster in inference: what its convolutions otherwise do in every call, bringing weights
    into the order in which the kernels multiply and folding batch norms, is done once and kept.

        model = gconv.freeze(gconv.models.resnext50_32x4d().eval())
        with torch.inference_mode():
            logits = model(images)

    Parameters, buffers, names, state_dict, hooks and classes stay as they were. Weights are packed in a
    layer's first call, and once more for another dtype (autocast's too), for images for which another
    algorithm is faster, and for another instruction set. Results are those of the model as it was, bit for
    bit, but where a convolution runs on torch (the 7x7 of a stem): there the batch norm is folded into its
    weights, which rounds otherwise.

    Nothing goes stale: each call asks whether weights, biases, statistics and eps are the same tensors in the
    same memory, not written to since, and packs again where they are not (after an optimizer's step,
    load_state_dict, `.to`). Only writes past torch's version counter are not seen: through `.data`, NumPy or
    a raw pointer. Call `freeze` again after such. Parameters made under torch.inference_mode count no writes:
    layers that have some run as without `freeze`.

    Kept weights are used on the CPU, in eval mode, where nothing in the call wants a gradient, outside
    torch.compile, torch.export, torch.jit and function transforms; everything else runs as before.
    `gconv.trace` shows "packed weights" for the calls that used them. They take about as much memory
    again as the weights would in float32 (those of wide 1x1 layers 7/4 of it, for Strassen's algorithm;
    bfloat16 half of it where the CPU multiplies pairs of bfloat16; under autocast the cast weights are
    kept too). Copies and pickles of the model are frozen too and pack for themselves. Threads may share a
    frozen model.

    Args:
        model: in eval mode: a model of gconv.models, gconv's layers or anything that holds them, what
            `gconv.convert` was given, or modules that call gconv.functional.fuse_*_forward. What does not run
            through gconv stays as it was.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: it, or a convolution or batch norm in it, is in train mode; it has no convolution.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model: want a torch.nn.Module, got {type(model).__name__}")
    parts = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or is_frozen(m)]
    training = [m for m in (model, *parts) if m.training and not is_frozen(m)]
    if training:
        raise ValueError(f"freeze: model: want eval mode, got a {type(training[0]).__name__} in train mode")
    if not any(isinstance(part, nn.Conv2d) for part in parts):
        raise ValueError(f"freeze: model: want convolutions, got a {type(model).__name__} without")
    for part in parts:
        part.__dict__[KEPT] = Kept()
    return model
