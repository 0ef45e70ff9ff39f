"""Memory of large tensors on the CPU.

What gconv's C++ kernels return or work in, from 128 KiB up, comes from an allocator that keeps freed blocks,
as torch's does on a GPU. torch's own CPU allocator gives them back to the system by way of malloc, which
zeroes and maps in every page anew for the next tensor: of ResNet's inference that is some 5 to 10 % of the
time. Tensors of torch's operators are not touched. Addresses are reserved a GiB at a time, which tools show
as virtual memory; memory is what tensors have had of them.
"""

from typing import NamedTuple

import torch

from gconv import backend


class CacheUse(NamedTuple):
    """Bytes in tensors, and bytes that are free and kept."""

    allocated: int
    cached: int


def empty_cache() -> None:
    """Gives all memory that is free and kept for later tensors back to the system. No tensor is touched."""
    if backend.extension_loaded():
        torch.ops.gconv.empty_cpu_cache()


def cache_limit() -> int:
    """How many bytes are kept at most when they are free: an eighth of the memory of the machine, or of its
    control group where that is less, or what GCONV_CACHE_MB (in MiB) or `set_cache_limit` said; 0 without the
    C++ kernels."""
    return torch.ops.gconv.cpu_cache_limit() if backend.extension_loaded() else 0


def set_cache_limit(limit: int) -> None:
    """Keeps at most `limit` bytes from now on and gives back what is above. 0: torch allocates everything,
    and its memory profiler sees it; tensors that exist stay where they are. Without the C++ kernels there is
    nothing to limit.

    Raises:
        ValueError: a limit that is no int of at least 0.
    """
    if type(limit) is not int or limit < 0:
        raise ValueError(f"set_cache_limit: limit: want an int of at least 0, got {limit!r}")
    if backend.extension_loaded():
        torch.ops.gconv.set_cpu_cache_limit(limit)


def cache_use() -> CacheUse:
    """What tensors have of this memory now, and what is free and kept."""
    return CacheUse(*torch.ops.gconv.cpu_cache_use()) if backend.extension_loaded() else CacheUse(0, 0)


def new(like: torch.Tensor, size, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    """An uninitialized tensor [N, C, H, W] on the device of `like`, allocated as an op allocates its result
    (float64 and 8-bit types as torch does)."""
    if like.device.type == "cpu" and backend.extension_loaded():
        return torch.ops.gconv.cpu_empty(list(size), dtype, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(size), dtype=dtype, device=like.device, memory_format=layout)


def new_channels_last(like: torch.Tensor, size) -> torch.Tensor:
    """The same with the dtype of `like`, channels_last."""
    return new(like, size, like.dtype, True)


def new_like(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """torch.empty_like(like, dtype=dtype), allocated likewise where `like` is [N, C, H, W] without gaps."""
    if like.dim() == 4:
        for layout in (torch.contiguous_format, torch.channels_last):
            if like.is_contiguous(memory_format=layout):
                return new(like, like.shape, dtype, layout is torch.channels_last)
    return torch.empty_like(like, dtype=dtype)


if backend.extension_loaded():

    @torch.library.register_fake("gconv::cpu_empty")
    def _cpu_empty_fake(size, dtype, channels_last):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(size, dtype=dtype, memory_format=layout)
