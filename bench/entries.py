"""Contestants on the way to their figures: each started in a process of its own, and its results compared
with float64."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

import torch

from .agreement import check_network
from .match import ALLOWED, NONSENSE, Verdict
from .networks import EAGER, Contestant, Job
from .screen import Screen
from .workers import Worker, WorkerDied

__all__ = ["Entry", "await_ready", "check", "start"]


@dataclass
class Entry:
    """A contestant in its process, what that said of itself once its network was ready, and what its results
    are."""

    contestant: Contestant
    worker: Worker
    ready: dict
    verdict: Verdict | None = None

    @property
    def name(self) -> str:
        return self.contestant.name

    @property
    def problem(self) -> str:
        """What is wrong with its results, or nothing."""
        return "" if self.verdict.ok else self.verdict.text

    def failed(self, died: Exception) -> str:
        """Why it is left out, in one line; its process is gone then."""
        self.worker.close()
        return f"failed: {str(died).splitlines()[-1][:160]}"


def start(label: str, job: Job, modes: str, folder: str, threads: int, *who: str) -> Worker:
    """The process of a contestant (who: --contestant, its name) or of the reference (--exact); all of a job
    share a folder."""
    return Worker(
        label, "benchmark", "gconv.bench.models_worker",
        "--model", job.model, "--arguments", json.dumps(dict(job.arguments)), "--size", str(job.size),
        "--batch", str(job.batch), "--dtype", job.dtype, "--modes", modes,
        "--state", os.path.join(folder, "state.pt"), "--folder", folder,
        "--threads", str(threads), "--device", job.device, *who,
    )  # fmt: skip


def await_ready(worker: Worker, screen: Screen, what: str, seconds: float | None = None) -> dict:
    """What the process says once it is ready. WorkerDied also where it takes longer than so many seconds."""
    screen.step(what)
    began = time.monotonic()

    def wait() -> None:
        screen.tick(0)
        if seconds is not None and time.monotonic() - began > seconds:
            raise WorkerDied(f"not ready within {seconds:.0f} s")

    return worker.hear(
        "ready",
        on_other=lambda message: screen.tick(0, None, f"{what}: {message['text']}"),
        on_wait=wait,
    )


def check(mode: str, folder: str, entries: list[Entry], skipped: dict[str, str]) -> None:
    """Gives every entry its verdict, and takes those that are plainly wrong out of the competition."""

    def read(name: str) -> dict:
        path = os.path.join(folder, f"{name}-{mode}.pt")
        found = torch.load(path, weights_only=True)
        os.remove(path)
        return found

    exact = read("exact")
    found = {entry.name: read(entry.name) for entry in entries}
    torchs = [found[name] for name in EAGER if name in found]
    for entry in list(entries):
        ours = entry.contestant.ours
        wanted = {key: want for key, want in exact.items() if entry.contestant.answers_for(key)}
        entry.verdict = check_network(found[entry.name], wanted, torchs, ALLOWED if ours else NONSENSE)
        if not ours and not entry.verdict.ok:
            skipped[f"{entry.contestant.label}, {mode}"] = f"wrong result: {entry.verdict.text}"
            entries.remove(entry)
            entry.worker.close()
