"""What a training step allocates, told by torch's allocator: what the forward keeps for the backward, and the
most there is at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.profiler import profile, record_function

from gconv.memory import cache_limit, set_cache_limit

__all__ = ["Allocations", "allocations_of"]

FORWARD, MEMORY = "gconv.bench: forward", "[memory]"
MB = 1 << 20


@dataclass(frozen=True)
class Allocations:
    """MiB that a step allocates on top of what there was before it (parameters, buffers, momentum, images):
    `kept` is alive when the forward ends, `peak` the most at any time of the step."""

    kept: float
    peak: float


def allocations_of(forward: Callable[[], Tensor], backward: Callable[[Tensor], object]) -> Allocations:
    """Runs forward() and then backward() on its result, and counts every allocation of torch's CPU allocator
    in between, whoever asked for it: autograd's saved tensors, what a Function keeps in its ctx, what
    checkpointing needs to run again, buffers of compiled code. Scratch memory that kernels take elsewhere is
    not seen; gconv's tensors are allocated by torch meanwhile. Deterministic for deterministic code.
    """
    gc.collect()
    limit = cache_limit()
    set_cache_limit(0)
    try:
        with profile(profile_memory=True) as profiled:
            with record_function(FORWARD):
                result = forward()
            backward(result)
    finally:
        set_cache_limit(limit)
    events = profiled.kineto_results.events()
    end = next(event.start_ns() + event.duration_ns() for event in events if event.name() == FORWARD)
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == MEMORY),
        key=lambda change: change[0],
    )
    now = kept = peak = 0
    for when, size in changes:
        now += size
        peak = max(peak, now)
        if when <= end:
            kept = now
    return Allocations(kept / MB, peak / MB)
