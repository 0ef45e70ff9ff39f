"""Times several rivals against each other so that a shared, drifting machine treats them alike.

The rivals take turns (A B C, B C A, C A B, ...). A turn is one untimed call, in which its threads wake up and
the code and data of its predecessor leave the caches, and then one timed call or, of a fast rival, a few.
Figures are percentiles over all timed calls, and the interval of a ratio comes from resampling whole rounds.
A rival may be an object of this process or live in another one, where `turn` runs on its behalf.

Interference is recognised by its cause first: the kernel counts how often it took a core away from the
process of a turn (involuntary context switches) and for how long the host did (steal time). A round in which
either moved by more than a little for its length is dropped for all rivals alike. Jumps the guest cannot see
(a call more than JUMP_MS and JUMP_RATIO above its rival's own median) drop their round too. If too few rounds
survive, all are kept and the result is marked noisy.
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

__all__ = [
    "Memory", "Plan", "Result", "Rival", "Timing", "Turn", "interleave", "memory_of", "peak_memory_mb",
    "ratio_interval", "redrawn_medians", "status_mb", "trim", "turn",
]  # fmt: skip

TURN_MS = 6.0  # the timed calls of a fast rival's turn take about this together
MAX_CALLS_PER_TURN = 8
# Involuntary context switches that a turn may see, the scheduler's own tick work: so many for each call, and
# so many a second where calls are long.
SWITCHES_PER_CALL = 1
SWITCHES_PER_SECOND = 50
STOLEN_TICKS = 1  # of 10 ms, for every turn; and this share of a long one
STOLEN_SHARE = 0.01
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
class Turn:
    """Milliseconds of the timed calls of a turn, and whether something else had the cores meanwhile."""

    ms: np.ndarray
    disturbed: bool


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


def _is_disturbed(switches: int, stolen: int, calls: int, seconds: float) -> bool:
    """Whether this many involuntary switches and stolen ticks are more than a turn of `calls` calls that took
    `seconds` sees on a quiet machine."""
    switches_allowed = max(SWITCHES_PER_CALL * calls, SWITCHES_PER_SECOND * seconds)
    stolen_allowed = max(STOLEN_TICKS, STOLEN_SHARE * seconds * os.sysconf("SC_CLK_TCK"))
    return switches > switches_allowed or stolen > stolen_allowed


class _Flush:
    """Evicts the caches by writing a buffer of `megabytes`."""

    def __init__(self, megabytes: int = 64):
        self.buffer = np.zeros(megabytes << 20, dtype=np.uint8)

    def __call__(self) -> None:
        self.buffer += 1


def trim() -> None:
    """Gives freed heap pages back to the kernel (glibc's malloc_trim); the next call has to fault them in."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def turn(rival: Rival, index: int, calls: int, before: Sequence[Callable[[], None]] = ()) -> Turn:
    """One untimed call and `calls` timed ones, each after the actions `before`, which are not timed. Inputs
    from the index-th on."""
    times = np.empty(calls)
    switches, stolen = _disturbances()
    began = time.perf_counter()
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
    seconds = time.perf_counter() - began
    switches_after, stolen_after = _disturbances()
    return Turn(times, _is_disturbed(switches_after - switches, stolen_after - stolen, calls + 1, seconds))


def interleave(
    rivals: Sequence[Rival],
    plan: Plan,
    on_round: Callable[[int, int], None] | None = None,
    take: Callable[[Any, int, int], Turn] | None = None,
) -> Result:
    """Times the rivals in turns; `on_round(done, expected)` is called between rounds, outside every clock.

    `take(rival, index, calls)` is a turn of a rival in another process; the rivals need only names then, and
    the plan's flush and fresh are for `take` to honour.
    """
    if take is None:
        before: list[Callable[[], None]] = [_Flush()] if plan.flush else []
        if plan.fresh:
            before.append(trim)

        def take(rival: Rival, index: int, calls: int) -> Turn:
            return turn(rival, index, calls, before)

    estimates = {rival.name: float(take(rival, 0, max(2, plan.warmup)).ms.min()) for rival in rivals}
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
            n = calls[rival.name]
            taken = take(rival, done * n, n)
            samples[rival.name].append(taken.ms)
            bad |= taken.disturbed
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


def redrawn_medians(timing: Timing, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Medians of as many rounds as there are, redrawn `draws` times: a sample of what the median may be.
    Equal seeds redraw equal rounds of two rivals that took turns."""
    medians = np.array([np.median(r) for r in timing.rounds])
    picks = np.random.default_rng(seed).integers(0, len(medians), size=(draws, len(medians)))
    return np.median(medians[picks], axis=1)


def ratio_interval(
    slow: Timing, fast: Timing, confidence: float = 0.95, draws: int = 1000
) -> tuple[float, float]:
    """Bootstrap interval of median(slow) / median(fast): whole rounds are redrawn, the same ones for both."""
    ratios = redrawn_medians(slow, draws) / redrawn_medians(fast, draws)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Memory:
    """Resident memory in MiB: of the process before a call, and at the call's peak."""

    before: float
    peak: float

    @property
    def above(self) -> float:
        return max(0.0, self.peak - self.before)


def memory_of(call: Callable[[], Any]) -> Memory | None:
    """Resident memory around one call, or None where Linux does not tell.

    Free heap pages go back to the kernel first, so memory that the call merely reuses
    counts too.
    """
    try:
        trim()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # resets the high-water mark of resident memory
    except (OSError, AttributeError):
        return None
    before = status_mb("VmRSS")
    output = call()
    peak = status_mb("VmHWM")
    del output
    return None if before is None or peak is None else Memory(before, peak)


def peak_memory_mb(call: Callable[[], Any]) -> float | None:
    """Memory one call needs at its peak above what was resident before it; None as from `memory_of`."""
    memory = memory_of(call)
    return memory and memory.above


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
