"""Derivatives of the dense block: what the graph keeps, both orders, function transforms, checkpoints,
compilers, training steps."""

import copy
import gc

import checks
import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_bits
from dense_blocks import BLOCKS, Block, assert_shared, block_input, case_id, twins
from fused_checks import run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gconv
from gconv import dense_block as dense_module

blocks = pytest.mark.parametrize("case", BLOCKS, ids=case_id)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
memories = pytest.mark.parametrize("memory", ["shared", "ultra"])
ends = pytest.mark.parametrize("end", [11, "relu", None], ids=["pool", "relu", "buffer"])

# ------------------------------------------------------------------------------------------- what is kept


class Storages(TorchDispatchMode):
    """Every storage that an operation made while this was on, for as long as it lives."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def live(self, *but):
        """Bytes of the storages still alive, without those of the tensors `but`."""
        gc.collect()
        known = {t.untyped_storage()._cdata for t in but}
        return sorted(
            n for key, (ref, n) in self.seen.items() if not ref.expired() and key not in known and n > 0
        )


def activations(block, size, itemsize):
    """(bytes of the buffer, of every bottleneck's output)"""
    pixels = size[0] * size[1] * size[2] * itemsize
    widths = [layer.conv1.out_channels for layer in block.layers if layer.conv2 is not None]
    return block.total * pixels, [width * pixels for width in widths]


def vectors(block, training):
    """Bytes of the per-channel vectors: a table [4, C] of every normalisation, the statistics of the buffer
    and of every bottleneck's output."""
    tables = [16 * norm.running_mean.numel() for _, norm in block.all_pairs()]
    if not training:
        return tables
    widths = [layer.conv1.out_channels for layer in block.layers if layer.conv2 is not None]
    return tables + [4 * block.total] * 2 + [4 * width for width in widths]


@blocks
@memories
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=checks.dtype_name)
def test_kept_bytes(ops, case, memory, training, dtype):
    """The buffer, unless ultra the outputs of the bottlenecks, vectors of a few bytes per channel, and not
    one byte more: not x, whose caller may free it, nothing normalised, nothing concatenated."""
    shape, options, size = case
    _, ours = twins("kept", *shape, training=training, memory=memory, **options)
    for conv in (m for m in ours.modules() if isinstance(m, nn.Conv2d)):
        conv.to(dtype)
    with Storages() as storages:
        x = torch.randn(size[0], shape[0], *size[1:], dtype=dtype)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        z = ours(x.mul(1))
        del x
    assert_shared_once = gconv.backend.counts()
    assert assert_shared_once.get("cpu.dense_block", 0) >= 1
    buffer, ys = activations(ours, size, dtype.itemsize)
    want = [buffer, *([] if memory == "ultra" else ys), *vectors(ours, training)]
    returned = [] if z.shape[1] == ours.total and ours.norm is None else [z]
    got = storages.live(*returned)
    # Of the caller's: the input, a leaf that autograd's graph ends in.
    leaf = size[0] * shape[0] * size[1] * size[2] * dtype.itemsize
    got.remove(leaf)
    assert got == sorted(want)
    z.sum().backward()
