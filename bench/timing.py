"""Times several rivals against each other so that a shared, drifting machine treats them alike.

The rivals take turns (A B C, B C A, C A B, ...). A turn is one untimed call, in which its threads wake up and
the code and data of its predecessor leave the caches, and then one timed call or, of a fast rival, a few.
Figures are percentiles over all timed calls, and the interval of a ratio comes from resampling whole rounds.

Interference is recognised by its cause first: the kernel counts how often it took a core away from this
process (involuntary context switches) and for how long the host did (steal time). A round in which either
moved by more than a little is dropped for all rivals alike. Jumps the guest cannot see (a call more than
JUMP_MS and JUMP_RATIO above its rival's own median) drop their round too. If too few rounds survive, all
are kept and the result is marked noisy.
"""

from __future__ import annotations

import ctypes
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

__all__ = ["Plan", "Result", "Rival", "Timing", "interleave", "peak_memory_mb", "ratio_interval", "status_mb"]

TURN_MS = 6.0  # the timed calls of a fast rival's turn take about this together
MAX_CALLS_PER_TURN = 8
SWITCHES_PER_CALL = 1  # involuntary context switches that one call may see: the scheduler's own tick work
JUMP_MS = 4.0  # a scheduler's time slice on a busy host is 4 to 8 ms
JUMP_RATIO = 1.25
MIN_KEPT = 0.5  # of the rounds


class Rival(Protocol):
    """Something to time. `prepare(i)` is not timed and picks the i-th of several inputs; `run()` is."""

    name: str

    def prepare(self, i: int) -> None: ...

    def run(self) -> Any: ...


@dataclass
class Plan:
    """How long to measure: rounds until `seconds` are used up, but between `min_rounds` and `max_rounds`."""

    min_rounds: int = 7
    max_rounds: int = 60
    seconds: float = 3.0
    warmup: int = 2
    flush: bool = False  # overwrite a buffer larger than the caches before every call
    fresh: bool = False  # give freed memory back to the system before every call

    @property
    def conditions(self) -> str:
        """What a record says about caches and memory."""
        return f"{'cold' if self.flush else 'warm'} caches, {'fresh' if self.fresh else 'reused'} memory"


@dataclass
class Timing:
    """Milliseconds of the kept calls of one rival, by round."""

    name: str
    rounds: list[np.ndarray] = field(default_factory=list)

    @property
    def calls(self) -> np.ndarray:
        return np.concatenate(self.rounds)

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.calls, q))

    @property
    def p20(self) -> float:
        return self.percentile(20)

    @property
    def p50(self) -> float:
        return self.percentile(50)

    @property
    def p80(self) -> float:
        return self.percentile(80)


@dataclass
class Result:
    timings: dict[str, Timing]
    rounds: int  # kept
    dropped: int
    noisy: bool  # more than half of the rounds were disturbed: all of them are in the figures


def _stolen_ticks() -> int:
    """Clock ticks the host took from this machine's cores, or 0 where the kernel does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return int(file.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return 0


def _disturbances() -> tuple[int, int]:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, _stolen_ticks()


class _Flush:
    """Evicts the caches by writing a buffer of `megabytes`."""

    def __init__(self, megabytes: int = 64):
        self.buffer = np.zeros(megabytes << 20, dtype=np.uint8)

    def __call__(self) -> None:
        self.buffer += 1


def _trim() -> None:
    """Gives freed heap pages back to the kernel (glibc's malloc_trim); the next call has to fault them in."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _turn(rival: Rival, index: int, calls: int, before: Sequence[Callable[[], None]]) -> np.ndarray:
    times = np.empty(calls)
    for k in range(-1, calls):
        rival.prepare(index + k + 1)
        for action in before:
            action()
        start = time.perf_counter_ns()
        output = rival.run()
        stop = time.perf_counter_ns()
        # Freed outside the clock for everyone, but before the next call, which reuses the memory.
        del output
        if k >= 0:
            times[k] = (stop - start) / 1e6
    return times


def interleave(
    rivals: Sequence[Rival], plan: Plan, on_round: Callable[[int, int], None] | None = None
) -> Result:
    """Times the rivals in turns; `on_round(done, expected)` is called between rounds, outside every clock."""
    before: list[Callable[[], None]] = [_Flush()] if plan.flush else []
    if plan.fresh:
        before.append(_trim)
    estimates = {}
    for rival in rivals:
        warm = _turn(rival, 0, max(2, plan.warmup), before)
        estimates[rival.name] = float(warm.min())
    calls = {
        name: int(np.clip(TURN_MS // max(t, 1e-3), 1, MAX_CALLS_PER_TURN)) for name, t in estimates.items()
    }

    samples: dict[str, list[np.ndarray]] = {rival.name: [] for rival in rivals}
    disturbed: list[bool] = []
    began = time.perf_counter()
    expected = plan.min_rounds
    while len(disturbed) < plan.max_rounds:
        done = len(disturbed)
        if done >= plan.min_rounds and time.perf_counter() - began >= plan.seconds:
            break
        bad = False
        for rival in (*rivals[done % len(rivals) :], *rivals[: done % len(rivals)]):
            switches, stolen = _disturbances()
            n = calls[rival.name]
            samples[rival.name].append(_turn(rival, done * n, n, before))
            switches_after, stolen_after = _disturbances()
            allowed = SWITCHES_PER_CALL * (n + 1)
            bad |= switches_after - switches > allowed or stolen_after - stolen > 1
        disturbed.append(bad)
        if on_round:
            elapsed = (time.perf_counter() - began) / len(disturbed)
            expected = int(np.clip(plan.seconds / max(elapsed, 1e-6), plan.min_rounds, plan.max_rounds))
            on_round(len(disturbed), max(expected, len(disturbed)))
    keep = _kept_rounds(samples, disturbed)
    noisy = sum(keep) < max(3, MIN_KEPT * len(keep))
    if noisy:
        keep = [True] * len(keep)
    timings = {
        name: Timing(name, [r for r, kept in zip(rounds, keep) if kept]) for name, rounds in samples.items()
    }
    return Result(timings, sum(keep), len(keep) - sum(keep), noisy)


def _kept_rounds(samples: dict[str, list[np.ndarray]], disturbed: Sequence[bool]) -> list[bool]:
    keep = [not bad for bad in disturbed]
    for rounds in samples.values():
        median = float(np.median(np.concatenate(rounds)))
        limit = max(median + JUMP_MS, median * JUMP_RATIO)
        for i, times in enumerate(rounds):
            keep[i] = keep[i] and bool(times.max() <= limit)
    return keep


def ratio_interval(
    slow: Timing, fast: Timing, confidence: float = 0.95, draws: int = 1000
) -> tuple[float, float]:
    """Bootstrap interval of median(slow) / median(fast): whole rounds are redrawn, the same ones for both."""
    rounds = min(len(slow.rounds), len(fast.rounds))
    rng = np.random.default_rng(0)
    a = np.stack([np.median(r) for r in slow.rounds[:rounds]])
    b = np.stack([np.median(r) for r in fast.rounds[:rounds]])
    picks = rng.integers(0, rounds, size=(draws, rounds))
    ratios = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return float(low), float(high)


def peak_memory_mb(call: Callable[[], Any]) -> float | None:
    """Memory one call needs at its peak above what was resident before it, or None where Linux does not tell.

    Free heap pages go back to the kernel first, so memory that the call merely reuses
    counts too.
    """
    try:
        _trim()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # resets the high-water mark of resident memory
    except (OSError, AttributeError):
        return None
    before = status_mb("VmRSS")
    output = call()
    peak = status_mb("VmHWM")
    del output
    if before is None or peak is None:
        return None
    return max(0.0, peak - before)


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
