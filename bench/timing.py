"""Times several rivals against each other so that a shared, drifting machine treats them alike.

The rivals take turns (A B C, B C A, C A B, ...). A turn is one untimed call, in which its threads wake up and
the code and data of its predecessor leave the caches, and then one timed call or, of a fast rival, a few.
Figures are percentiles over all timed calls, and the interval of a ratio comes from resampling whole rounds.
A rival may be an object of this process or live in another one, where `turn` runs on its behalf.

Interference is recognised by its cause first: the kernel counts how often it took a core away from the
process of a turn (involuntary context switches) and for how long the host did (steal time). A round in which
either moved by more than a little for its length is dropped for all rivals alike. Jumps that nothing counts
(a call more than the device's jump_ms and JUMP_RATIO above its rival's own median; on a GPU all there is)
drop their round too. If too few rounds survive, all are kept and the result is marked noisy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .devices import CPU, Cpu, Cuda

__all__ = [
    "Plan", "Result", "Rival", "Timing", "Turn", "interleave", "ratio_interval", "redrawn_medians", "turn",
]  # fmt: skip

TURN_MS = 6.0  # the timed calls of a fast rival's turn take about this together
MAX_CALLS_PER_TURN = 8
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
    """Milliseconds of the timed calls of a turn, whether something else had the cores meanwhile, and what the
    host took to launch the calls where that is not the same."""

    ms: np.ndarray
    disturbed: bool
    host_ms: np.ndarray | None = None


@dataclass
class Result:
    timings: dict[str, Timing]
    rounds: int  # kept
    dropped: int
    noisy: bool  # more than half of the rounds were disturbed: all of them are in the figures
    host_ms: dict[str, float] = field(default_factory=dict)  # median; of rivals whose host is not the device


def turn(
    rival: Rival,
    index: int,
    calls: int,
    before: Sequence[Callable[[], None]] = (),
    device: Cpu | Cuda = CPU,
    ahead: bool = False,
) -> Turn:
    """One untimed call and `calls` timed ones, each after the actions `before`, which are not timed. Inputs
    from the index-th on. ahead: the device is given work until the host has launched the call, so that its
    time is the device's alone."""
    stamps, host = [], []
    last_ms = 0.0
    start_state = device.disturbances()
    began = time.perf_counter()
    for k in range(-1, calls):
        rival.prepare(index + k + 1)
        for action in before:
            action()
        if ahead and k >= 0:
            device.keep_busy(last_ms)
        launched = time.perf_counter_ns()
        start = device.stamp()
        output = rival.run()
        stop = device.stamp()
        last_ms = (time.perf_counter_ns() - launched) / 1e6
        # Freed outside the clock for everyone, but before the next call, which reuses the memory.
        del output
        if k >= 0:
            stamps.append((start, stop))
            host.append(last_ms)
    device.synchronise()
    seconds = time.perf_counter() - began
    disturbed = device.disturbed(start_state, device.disturbances(), calls + 1, seconds)
    times = np.array([device.ms(*pair) for pair in stamps])
    return Turn(times, disturbed, None if device.name == "cpu" else np.array(host))


def interleave(
    rivals: Sequence[Rival],
    plan: Plan,
    on_round: Callable[[int, int], None] | None = None,
    take: Callable[[Any, int, int], Turn] | None = None,
    device: Cpu | Cuda = CPU,
) -> Result:
    """Times the rivals in turns; `on_round(done, expected)` is called between rounds, outside every clock.

    `take(rival, index, calls)` is a turn of a rival in another process; the rivals need only names then, and
    the plan's flush and fresh are for `take` to honour.
    """
    if take is None:
        before: list[Callable[[], None]] = [device.flush] if plan.flush else []
        if plan.fresh:
            before.append(device.release)

        def take(rival: Rival, index: int, calls: int) -> Turn:
            return turn(rival, index, calls, before, device, ahead=plan.flush)

    estimates = {rival.name: float(take(rival, 0, max(2, plan.warmup)).ms.min()) for rival in rivals}
    calls = {
        name: int(np.clip(TURN_MS // max(t, 1e-3), 1, MAX_CALLS_PER_TURN)) for name, t in estimates.items()
    }

    samples: dict[str, list[np.ndarray]] = {rival.name: [] for rival in rivals}
    hosts: dict[str, list[np.ndarray]] = {rival.name: [] for rival in rivals}
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
            if taken.host_ms is not None:
                hosts[rival.name].append(taken.host_ms)
            bad |= taken.disturbed
        disturbed.append(bad)
        if on_round:
            elapsed = (time.perf_counter() - began) / len(disturbed)
            expected = int(np.clip(plan.seconds / max(elapsed, 1e-6), plan.min_rounds, plan.max_rounds))
            on_round(len(disturbed), max(expected, len(disturbed)))
    keep = _kept_rounds(samples, disturbed, device.jump_ms)
    noisy = sum(keep) < max(3, MIN_KEPT * len(keep))
    if noisy:
        keep = [True] * len(keep)
    timings = {
        name: Timing(name, [r for r, kept in zip(rounds, keep) if kept]) for name, rounds in samples.items()
    }
    host_ms = {name: float(np.median(np.concatenate(taken))) for name, taken in hosts.items() if taken}
    return Result(timings, sum(keep), len(keep) - sum(keep), noisy, host_ms)


def _kept_rounds(
    samples: dict[str, list[np.ndarray]], disturbed: Sequence[bool], jump_ms: float = CPU.jump_ms
) -> list[bool]:
    keep = [not bad for bad in disturbed]
    for rounds in samples.values():
        median = float(np.median(np.concatenate(rounds)))
        limit = max(median + jump_ms, median * JUMP_RATIO)
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
