"""What this machine can do at best, measured in the same run: a copy and a matrix product. And the roofline
from them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

__all__ = ["Roofs", "measure", "roof_ms"]

COPY_MIB = (16, 64)  # the size of one layer's activations, and one that outgrows every private cache
GEMM_SIZE = 2048
REPEATS = 7


@dataclass(frozen=True)
class Roofs:
    """copy_gbps counts the bytes read and the bytes written; gemm_gflops counts a multiply-add as two."""

    copy_gbps: float
    gemm_gflops: float
    dtype: str

    def better(self, other: Roofs) -> Roofs:
        """The higher of each: a roof measured in a slow moment is no roof."""
        return Roofs(
            max(self.copy_gbps, other.copy_gbps), max(self.gemm_gflops, other.gemm_gflops), self.dtype
        )


def _best_seconds(call, repeats: int = REPEATS) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def measure(dtype: torch.dtype, gemm_size: int = GEMM_SIZE, copy_mib: tuple[int, ...] = COPY_MIB) -> Roofs:
    """The fastest of a few repeats: a roof is an upper bound, and interference only ever lowers what one
    sees."""
    copy = 0.0
    for mib in copy_mib:
        source = torch.ones(mib << 20, dtype=torch.uint8)
        target = torch.zeros_like(source)
        seconds = _best_seconds(lambda s=source, t=target: t.copy_(s))
        copy = max(copy, 2 * source.numel() / seconds / 1e9)
    a = torch.randn(gemm_size, gemm_size).to(dtype)
    b = torch.randn(gemm_size, gemm_size).to(dtype)
    c = torch.empty_like(a)
    seconds = _best_seconds(lambda: torch.mm(a, b, out=c))
    return Roofs(copy, 2 * gemm_size**3 / seconds / 1e9, str(dtype).removeprefix("torch."))


def roof_ms(flops: float, nbytes: float, roofs: Roofs) -> float:
    """The least time of a direct algorithm: arithmetic at the GEMM's rate or traffic at the copy's, the
    slower one."""
    return max(flops / roofs.gemm_gflops, nbytes / roofs.copy_gbps) / 1e6


def bound_by(flops: float, nbytes: float, roofs: Roofs) -> str:
    """Which of the two roofs is the lower one for this much work: "compute" or "memory"."""
    return "compute" if flops / roofs.gemm_gflops >= nbytes / roofs.copy_gbps else "memory"
