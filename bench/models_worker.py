"""One contestant of the whole-network benchmark, in a process of its own: its memory, its caches and what it
compiles are its own.

It speaks JSON lines. It builds its network, leaves its results for the check, reports "ready" with its peak
memory, and then takes a turn for every line {"index": i, "calls": n} on stdin, until "stop". `--exact` makes
the weights and the float64 results instead.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import warnings
from dataclasses import replace

import torch
from torch import nn

import gconv

from . import devices, networks, timing
from .networks import CONTESTANTS, Job, Network
from .workers import tell

TRIES = 3  # calls of each precision where there are several; the fastest decides


def summary(network: Network) -> dict:
    """Which code ran gconv's calls of one forward pass (and backward), from its own trace."""
    with gconv.trace() as trace:
        network.prepare(0)
        network.run()
    kernels: dict[str, int] = {}
    for row in trace:
        kernels[row.kernel] = kernels.get(row.kernel, 0) + row.calls
    by_design = ("by design", "use_backend")
    # A note beside gconv's own kernels says which of its backends was meant to run.
    others = [row for row in trace if row.reason and not row.kernel.startswith(("cuda.", "triton."))]
    reasons = {row.reason for row in others if not row.reason.startswith(by_design)}
    return {
        "kernels": kernels,
        "convolutions": sum(isinstance(m, nn.Conv2d) for m in network.module.modules()),
        "fallbacks": sorted(reasons),
    }


def fastest(
    contestant: networks.Contestant, job: Job, state: dict, device: devices.Cpu | devices.Cuda = devices.CPU
) -> tuple[Network, dict[str, float]]:
    """The contestant in its fastest precision, and where it has several the seconds of a call in each."""
    best, seconds = None, {}
    precisions = contestant.precisions(job)
    for precision in precisions:
        tell(event="step", text=f"{precision}: first call")
        network = Network(contestant, job, precision, state, device)
        if len(precisions) > 1:
            taken = timing.turn(network, 0, TRIES, device=device).ms
            seconds[precision] = float(taken.min()) / 1e3
        if best is None or seconds[precision] < seconds[best.precision]:
            best = network
        del network
    gc.collect()
    return best, seconds


def _save(results: dict, path: str) -> None:
    torch.save({name: tensor.cpu() for name, tensor in results.items()}, path)


def _exact(options: argparse.Namespace, job: Job) -> None:
    state = networks.make_state(job)
    torch.save(state, options.state)
    for mode in options.modes.split(","):
        tell(event="step", text=f"{mode}: float64 reference")
        one = replace(job, mode=mode)
        _save(networks.exact_results(one, state), os.path.join(options.folder, f"exact-{mode}.pt"))
    tell(event="ready")


def _compete(options: argparse.Namespace, job: Job) -> None:
    contestant = CONTESTANTS[options.contestant]
    device = devices.get(job.device)
    device.set_up()
    state = torch.load(options.state, weights_only=True)
    network, seconds = fastest(contestant, job, state, device)
    tell(event="step", text="check")
    _save(network.results(state), os.path.join(options.folder, f"{contestant.name}-{job.mode}.pt"))
    found = summary(network)
    del state
    gc.collect()
    timing.turn(network, 0, 1, device=device)
    network.prepare(0)
    memory = device.memory_of(network.run)
    network.prepare(0)
    training = job.mode == "training"
    allocated = device.allocations_of(network.forward, network.backward) if training else None
    network.prepare(0)
    tell(
        event="ready",
        precision=network.precision,
        seconds=seconds,
        first_seconds=network.first_seconds,
        parameters=sum(p.numel() for p in network.module.parameters()),
        before_mb=memory and memory.before,
        peak_mb=memory and memory.peak,
        kept_mb=allocated and allocated.kept,
        allocated_mb=allocated and allocated.peak,
        **found,
    )
    network.stamps.clear()
    device.release()
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        turn = timing.turn(network, **json.loads(line), device=device)
        # While others take their turns this process keeps no more memory than it needs; the untimed call of
        # its next turn faults it in again.
        network.prepare(0)
        device.release()
        tell(event="turn", ms=turn.ms.tolist(), disturbed=turn.disturbed)
    finite = network.loss is None or math.isfinite(float(network.loss))
    tell(event="done", finite=finite, parts=network.parts())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--arguments", type=json.loads, default={}, help="of the model, in JSON")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", choices=tuple(networks.DTYPES), required=True)
    parser.add_argument("--modes", required=True, help="one of them, or several of --exact, as in a,b")
    parser.add_argument("--state", required=True, help="the file of the weights")
    parser.add_argument("--folder", required=True, help="where results go")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=devices.DEVICES, required=True)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--contestant", choices=tuple(CONTESTANTS))
    who.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # what fell back is reported; exporters warn at length
    arguments = tuple(options.arguments.items())
    job = Job(
        options.model, options.size, options.batch, options.dtype, options.modes, arguments, options.device
    )
    _exact(options, job) if options.exact else _compete(options, job)


if __name__ == "__main__":
    main()
