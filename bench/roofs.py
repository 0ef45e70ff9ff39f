"""What this machine can do at best, measured in the same run: a copy and a matrix product. And the roofline
from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .devices import CPU, Cpu, Cuda

__all__ = ["Roofs", "measure", "roof_ms"]

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


def _best_seconds(call, device: Cpu | Cuda, repeats: int = REPEATS) -> float:
    call()
    stamps = []
    for _ in range(repeats):
        start = device.stamp()
        call()
        stamps.append((start, device.stamp()))
    device.synchronise()
    return min(device.ms(*pair) for pair in stamps) / 1e3


def measure(
    dtype: torch.dtype,
    gemm_size: int | None = None,
    copy_mib: tuple[int, ...] | None = None,
    device: Cpu | Cuda = CPU,
) -> Roofs:
    """The fastest of a few repeats: a roof is an upper bound, and interference only ever lowers what one
    sees. A matrix product in float32 is rounded as convolutions are. Sizes: the device's, if not given."""
    gemm_size, where = gemm_size or device.gemm_size, device.where
    copy = 0.0
    for mib in copy_mib or device.copy_mib:
        source = torch.ones(mib << 20, dtype=torch.uint8, device=where).view(torch.int32)
        target = torch.zeros_like(source)
        for way in device.copies():
            seconds = _best_seconds(lambda s=source, t=target, way=way: way(s, t), device)
            copy = max(copy, 2 * source.nbytes / seconds / 1e9)
    a = torch.randn(gemm_size, gemm_size, device=where).to(dtype)
    b = torch.randn(gemm_size, gemm_size, device=where).to(dtype)
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    if device.precision(dtype):
        matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision
    try:
        with torch.no_grad():
            seconds = min(_best_seconds(way, device) for way in device.products(a, b))
    finally:
        matmul.fp32_precision = before
    return Roofs(copy, 2 * gemm_size**3 / seconds / 1e9, str(dtype).removeprefix("torch."))


def roof_ms(flops: float, nbytes: float, roofs: Roofs) -> float:
    """The least time of a direct algorithm: arithmetic at the GEMM's rate or traffic at the copy's, the
    slower one."""
    return max(flops / roofs.gemm_gflops, nbytes / roofs.copy_gbps) / 1e6


def bound_by(flops: float, nbytes: float, roofs: Roofs) -> str:
    """Which of the two roofs is the lower one for this much work: "compute" or "memory"."""
    return "compute" if flops / roofs.gemm_gflops >= nbytes / roofs.copy_gbps else "memory"
