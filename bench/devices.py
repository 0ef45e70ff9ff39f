"""What differs between the devices that are measured: how time is taken, what makes caches cold, what memory
is in use, what counts as a disturbance, and what a record says of the machine.

A device is one of `Cpu` and `Cuda`; everything else of the benchmark is the same on both.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gconv import empty_cache, info

from .allocations import MB, Allocations, allocations_of

__all__ = ["CPU", "DEVICES", "Cpu", "Cuda", "Memory", "get", "peak_memory_mb", "status_mb"]

# Involuntary context switches that a turn may see, the scheduler's own tick work: so many for each call, and
# so many a second where calls are long.
SWITCHES_PER_CALL = 1
SWITCHES_PER_SECOND = 50
STOLEN_TICKS = 1  # of 10 ms, for every turn; and this share of a long one
STOLEN_SHARE = 0.01
CPU_FLUSH_BYTES = 64 << 20

L2_BYTES = 64 << 20  # where torch does not tell; an H200 has 50 MB
FLUSHES = 4  # of the L2's size: what is written evicts everything else
# A GPU that waits for its next kernel would be timed waiting: it is kept busy for this many times what the
# host took to launch the same call before, and at least for a while.
AHEAD = 1.5
LEAST_AHEAD_MS = 0.2


@dataclass(frozen=True)
class Memory:
    """MiB of memory in use: before a call, and at the call's peak."""

    before: float
    peak: float

    @property
    def above(self) -> float:
        return max(0.0, self.peak - self.before)


def status_mb(key: str) -> float | None:
    """A field of /proc/self/status in MiB."""
    try:
        with open(f"/proc/{os.getpid()}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def _stolen_ticks() -> int:
    """Clock ticks the host took from this machine's cores, or 0 where the kernel does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return int(file.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return 0


class Cpu:
    """The cores of this machine.

    batch, dtype, cold: what is measured unless something else is asked for. jump_ms: how far above its
    rival's median a call has to be to count as disturbed. copy_mib, gemm_size: of the roofs.
    """

    name = "cpu"
    batch, dtype, cold = 8, "float32", False
    jump_ms = 4.0  # a scheduler's time slice on a busy host is 4 to 8 ms
    copy_mib = (16, 64)  # the size of one layer's activations, and one that outgrows every private cache
    gemm_size = 2048

    def __init__(self) -> None:
        self.where = torch.device("cpu")
        self._buffer: np.ndarray | None = None

    def set_up(self) -> None:
        """Settings that every process of a run has to make."""

    def stamp(self) -> Any:
        """Now, in the order of the device's work."""
        return time.perf_counter_ns()

    def ms(self, start: Any, stop: Any) -> float:
        """Milliseconds between two stamps, once `synchronise` has returned."""
        return (stop - start) / 1e6

    def synchronise(self) -> None:
        """Returns when all that was asked of the device is done."""

    def flush(self) -> None:
        """Evicts the caches."""
        if self._buffer is None:
            self._buffer = np.zeros(CPU_FLUSH_BYTES, dtype=np.uint8)
        self._buffer += 1

    def keep_busy(self, host_ms: float) -> None:
        """Gives the device work for longer than the host needs to launch a call: nothing, where the host is
        the device."""

    def disturbances(self) -> tuple[int, int]:
        """A state to be compared by `disturbed`."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, _stolen_ticks()

    def disturbed(self, before: tuple[int, int], after: tuple[int, int], calls: int, seconds: float) -> bool:
        """Whether there were more involuntary switches and stolen ticks than a turn of `calls` calls that
        took `seconds` sees on a quiet machine."""
        switches, stolen = after[0] - before[0], after[1] - before[1]
        switches_allowed = max(SWITCHES_PER_CALL * calls, SWITCHES_PER_SECOND * seconds)
        stolen_allowed = max(STOLEN_TICKS, STOLEN_SHARE * seconds * os.sysconf("SC_CLK_TCK"))
        return switches > switches_allowed or stolen > stolen_allowed

    def release(self) -> None:
        """Gives freed pages back to the kernel: glibc's (malloc_trim) and those that gconv keeps. The next
        call has to fault them in."""
        empty_cache()
        ctypes.CDLL("libc.so.6").malloc_trim(0)

    def memory_of(self, call: Callable[[], Any]) -> Memory | None:
        """Resident memory around one call, or None where Linux does not tell.

        Free heap pages go back to the kernel first, so memory that the call merely reuses counts too.
        """
        try:
            self.release()
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")  # resets the high-water mark of resident memory
        except (OSError, AttributeError):
            return None
        before = status_mb("VmRSS")
        output = call()
        peak = status_mb("VmHWM")
        del output
        return None if before is None or peak is None else Memory(before, peak)

    def allocations_of(
        self, forward: Callable[[], Tensor], backward: Callable[[Tensor], object]
    ) -> Allocations:
        """What a training step keeps and allocates: see `allocations.allocations_of`."""
        return allocations_of(forward, backward)

    def copies(self) -> tuple[Callable[[Tensor, Tensor], object], ...]:
        """Ways to copy (source, target), of which the fastest is the roof."""
        return (lambda source, target: target.copy_(source),)

    def products(self, a: Tensor, b: Tensor) -> tuple[Callable[[], object], ...]:
        """Ways to multiply two square matrices of an even size, of which the fastest is the roof. torch's
        libraries differ: on AMD's CPUs MKL leaves 512-bit vectors alone, oneDNN, a 1x1 convolution's, does
        not."""
        out, last = torch.empty_like(a), torch.channels_last
        pixels = a.view(1, 2, -1, len(a)).permute(0, 3, 1, 2)
        weight = b.t()[:, :, None, None].contiguous(memory_format=last)
        return lambda: torch.mm(a, b, out=out), lambda: torch.conv2d(pixels, weight)

    def precision(self, dtype: torch.dtype) -> str:
        """How matrix products of this dtype are rounded, where it is not by the dtype, or nothing."""
        return ""

    def facts(self) -> dict:
        """What a record says of the device."""
        cpu, versions = info.collect()["cpu"], info.collect()["versions"]
        return {
            "device": cpu["model"],
            "cores": cpu["cores usable"],
            "isa": cpu["isa in use"] or "",
            "libraries": f"compiler {versions['compiler']}" if versions["compiler"] else "",
        }


class Cuda:
    """The current CUDA device. Times are between events on the stream, so they are the GPU's and not the
    host's. `api` is torch.cuda, or what stands in for it; memory is torch's allocator's."""

    name = "cuda"
    batch, dtype, cold = 256, "bfloat16", True
    jump_ms = 0.05
    copy_mib = (256, 1024)
    gemm_size = 8192

    def __init__(self, api: Any = torch.cuda, where: str = "cuda"):
        missing = self.missing(api)
        if missing:
            raise ValueError(f"device: want cpu, got cuda: {missing}")
        self.api, self.where = api, torch.device(where)
        self._buffer: Tensor | None = None
        self._flush_ms = 0.0

    @staticmethod
    def missing(api: Any = torch.cuda) -> str | None:
        """Why there is nothing to measure on, in words, or None."""
        if not api.is_available():
            if torch.version.cuda is None:
                return f"torch {torch.__version__} is built without CUDA"
            return "torch finds no CUDA GPU on this machine"
        return None

    def set_up(self) -> None:
        """cuDNN tries its algorithms and takes the fastest, for everyone."""
        torch.backends.cudnn.benchmark = True

    def stamp(self) -> Any:
        event = self.api.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop)

    def synchronise(self) -> None:
        self.api.synchronize()

    def flush(self) -> None:
        """Overwrites a buffer larger than the L2 cache."""
        if self._buffer is None:
            l2 = getattr(self.api.get_device_properties(), "L2_cache_size", 0) or L2_BYTES
            self._buffer = torch.empty(FLUSHES * l2, dtype=torch.uint8, device=self.where)
        self._buffer.zero_()

    def keep_busy(self, host_ms: float) -> None:
        """Flushes until the GPU has work for longer than the host takes to launch the next call."""
        if not self._flush_ms:
            self.flush()
            start = self.stamp()
            self.flush()
            stop = self.stamp()
            self.synchronise()
            self._flush_ms = max(self.ms(start, stop), 1e-3)
        for _ in range(int(max(AHEAD * host_ms, LEAST_AHEAD_MS) / self._flush_ms) + 1):
            self.flush()

    def disturbances(self) -> None:
        """A GPU tells nothing: jumps have to be recognised by the times alone."""

    def disturbed(self, before: None, after: None, calls: int, seconds: float) -> bool:
        return False

    def release(self) -> None:
        """Gives freed memory back to the driver, for other processes."""
        gc.collect()
        self.api.empty_cache()

    def memory_of(self, call: Callable[[], Any]) -> Memory:
        """Allocated memory around one call."""
        self.synchronise()
        self.api.reset_peak_memory_stats()
        before = self.api.memory_allocated()
        output = call()
        peak = self.api.max_memory_allocated()
        del output
        return Memory(before / MB, peak / MB)

    def allocations_of(
        self, forward: Callable[[], Tensor], backward: Callable[[Tensor], object]
    ) -> Allocations:
        """What a training step keeps and allocates, by the counters of the allocator: scratch memory that
        kernels ask torch for is in it."""
        gc.collect()
        self.synchronise()
        self.api.reset_peak_memory_stats()
        before = self.api.memory_allocated()
        result = forward()
        kept = self.api.memory_allocated() - before
        backward(result)
        return Allocations(kept / MB, (self.api.max_memory_allocated() - before) / MB)

    def copies(self) -> tuple[Callable[[Tensor, Tensor], object], ...]:
        """The driver's copy, and a kernel that reads and writes."""
        return (
            lambda source, target: target.copy_(source),
            lambda source, target: torch.bitwise_not(source, out=target),
        )

    def products(self, a: Tensor, b: Tensor) -> tuple[Callable[[], object], ...]:
        """The product of two matrices."""
        out = torch.empty_like(a)
        return (lambda: torch.mm(a, b, out=out),)

    def precision(self, dtype: torch.dtype) -> str:
        """float32 convolutions are rounded as torch's default says, its own and gconv's alike."""
        if dtype != torch.float32:
            return ""
        return "TF32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "no TF32"

    def facts(self) -> dict:
        properties = self.api.get_device_properties()
        versions = info.collect()["versions"]
        libraries = {
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "Triton": versions["triton"],
        }
        return {
            "device": self.api.get_device_name(),
            "cores": properties.multi_processor_count,
            "isa": "sm_{}{}".format(*self.api.get_device_capability()),
            "libraries": ", ".join(f"{name} {version}" for name, version in libraries.items() if version),
        }


CPU = Cpu()
DEVICES = ("cpu", "cuda")


def get(name: str) -> Cpu | Cuda:
    """The device of that name. ValueError, in one line, where it is not there."""
    return CPU if name == "cpu" else Cuda()


def peak_memory_mb(call: Callable[[], Any], device: Cpu | Cuda = CPU) -> float | None:
    """Memory one call needs at its peak above what was in use before it; None as from `memory_of`."""
    memory = device.memory_of(call)
    return memory and memory.above
