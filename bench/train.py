"""Trains a small ResNeXt on handwritten digits with stock torch.nn and with gconv, and holds the loss
curves together.

Three contestants start from the same seed: stock torch.nn, gconv, and a float-noise twin: stock torch.nn
again, in the other memory layout and with every weight moved by at most one unit in the last place.
Training amplifies rounding, so how far two right runs may drift apart is not a constant: the twin measures
it, in this run, on this machine. Each runs in a process of its own (its peak memory is its own) and they
take turns epoch by epoch (a slow minute hits all of them).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field

import numpy as np
import torch

import gconv

from . import digits
from .screen import Cell, Screen

__all__ = ["Contestant", "Options", "Training", "Verdict", "WorkerDied", "check_curves", "run"]

# A right implementation may stray this much further than the twin did up to the same step: two independent
# draws of float noise under the same amplification differ by a small factor, a wrong gradient by orders of
# magnitude.
FACTOR = 10.0
FLOOR_ULPS = 64  # of the loss: what one step's own rounding may do before anything is amplified


class WorkerDied(RuntimeError):
    """A training process ended before it was told to; the message ends with the last lines it wrote."""


@dataclass
class Options:
    seed: int = 0
    epochs: int = 8
    batch: int = 16
    rate: float = 0.05
    layout: str = "channels_last"
    threads: int = 0  # 0: torch's own choice


@dataclass
class Contestant:
    name: str
    label: str
    kind: str
    layout: str
    nudge: bool = False
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    training_mb: float | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    parameters: int = 0

    @property
    def epoch_seconds(self) -> float:
        """Median over the epochs, the first left out: it also warms up threads, caches and the allocator."""
        return float(np.median(self.seconds[1:] or self.seconds))


@dataclass
class Verdict:
    """ok; where the margin was smallest; and the curves of the plot: deviation of gconv, and what is
    allowed."""

    ok: bool
    text: str
    deviation: list[float]
    allowed: list[float]


@dataclass
class Training:
    options: Options
    contestants: list[Contestant]
    verdict: Verdict

    def __getitem__(self, name: str) -> Contestant:
        return next(c for c in self.contestants if c.name == name)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Training:
        return cls(
            Options(**data["options"]),
            [Contestant(**c) for c in data["contestants"]],
            Verdict(**data["verdict"]),
        )


def check_curves(stock: list[float], ours: list[float], twin: list[float]) -> Verdict:
    """Compares the losses step by step: |ours - stock| <= FACTOR x the twin's largest |twin - stock| so far
    + rounding."""
    a, b, c = (np.asarray(curve, dtype=np.float64) for curve in (stock, ours, twin))
    if not len(a) == len(b) == len(c):
        raise ValueError(
            f"check_curves: want curves of one length, got {len(a)}, {len(b)} and {len(c)} steps"
        )
    deviation = np.abs(b - a)
    floor = FLOOR_ULPS * np.finfo(np.float32).eps * np.maximum(np.abs(a), 1.0)
    allowed = FACTOR * np.maximum.accumulate(np.abs(c - a)) + floor
    inside = deviation <= allowed  # False for NaN
    if not (np.isfinite(a).all() and np.isfinite(c).all()):
        text, ok = "the loss of stock torch.nn itself is not finite: nothing to compare with", False
    elif inside.all():
        step = int(np.argmax(deviation / allowed))
        ok = True
        text = (
            f"the loss curves agree within float noise: at most {deviation[step] / allowed[step]:.2f} of "
            f"what is allowed (at step {step + 1} of {len(a)}: {deviation[step]:.1e} of "
            f"{allowed[step]:.1e})"
        )
    else:
        ok = False
        step = int(np.argmin(inside))
        text = (
            f"the loss curves of stock torch.nn and gconv part at step {step + 1} of {len(a)}: "
            f"{a[step]:.6g} and {b[step]:.6g} differ by {deviation[step]:.1e}, float noise allows "
            f"{allowed[step]:.1e}"
        )
    return Verdict(ok, text, deviation.tolist(), allowed.tolist())


class _Worker:
    """The process of one contestant."""

    def __init__(self, contestant: Contestant, options: Options, data: str):
        self.contestant = contestant
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (open for as long as the process lives)
        command = [
            sys.executable, "-m", "gconv.bench.train_worker", "--data", data, "--kind", contestant.kind,
            "--layout", contestant.layout, "--seed", str(options.seed), "--epochs", str(options.epochs),
            "--batch", str(options.batch), "--rate", str(options.rate),
            "--threads", str(options.threads or torch.get_num_threads()),
        ]  # fmt: skip
        if contestant.nudge:
            command.append("--nudge")
        parent = os.path.dirname(os.path.dirname(os.path.abspath(gconv.__file__)))
        path = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "GCONV_FALLBACK": "silent"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def tell(self, word: str) -> None:
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.failure() from None

    def hear(self, event: str, on_step=None) -> dict:
        """The next message that is `event`; steps on the way go to on_step."""
        for line in self.process.stdout:
            if not line.startswith("{"):
                continue  # something a library printed
            message = json.loads(line)
            if message["event"] == event:
                return message
            if on_step:
                on_step(message)
        raise self.failure()

    def failure(self) -> WorkerDied:
        self.process.wait()
        self.errors.seek(0)
        tail = self.errors.read().decode(errors="replace").strip().splitlines()[-12:]
        return WorkerDied(
            f"the training process of {self.contestant.label} ended with status {self.process.returncode}:\n"
            + "\n".join(tail)
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


def contestants(layout: str) -> list[Contestant]:
    other = "nchw" if layout == "channels_last" else "channels_last"
    return [
        Contestant("stock", "stock torch.nn", "stock", layout),
        Contestant("gconv", "gconv", "gconv", layout),
        Contestant("twin", "float-noise twin (stock)", "stock", other, nudge=True),
    ]


def run(options: Options) -> Training:
    """Trains all three in turns and checks the curves; whether they agree is in the verdict. WorkerDied if
    one dies."""
    everyone = contestants(options.layout)
    columns = (
        ("epoch", "right"), ("contestant", "left"), ("layout", "left"), ("mean loss", "right"),
        ("test accuracy", "right"), ("seconds", "right"), ("|loss − stock|", "right"),
    )  # fmt: skip
    title = (
        f"ResNeXt on 1,797 digits at 32×32, {options.epochs} epochs, batch {options.batch}, SGD "
        f"{options.rate:g}, seed {options.seed}, {options.threads or torch.get_num_threads()} threads"
    )
    workers: list[_Worker] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Screen(title, columns, options.epochs * 3, "epochs") as screen,
    ):
        try:
            screen.step("start")
            data = os.path.join(folder, "digits.pt")
            torch.save(digits.load(options.seed), data)
            workers = [_Worker(c, options, data) for c in everyone]
            for worker in workers:
                ready = worker.hear("ready")
                worker.contestant.parameters = ready["parameters"]
            steps = ready["steps"] // options.epochs
            for epoch in range(options.epochs):
                for worker in workers:
                    _one_epoch(worker, epoch, steps, everyone[0], screen)
            for worker in workers:
                worker.tell("stop")
                done = worker.hear("done")
                for key in ("peak_mb", "training_mb", "kernels"):
                    setattr(worker.contestant, key, done[key])
        finally:
            for worker in workers:
                worker.close()
    stock, ours, twin = (c.losses for c in everyone)
    return Training(options, everyone, check_curves(stock, ours, twin))


def _one_epoch(worker: _Worker, epoch: int, steps: int, stock: Contestant, screen: Screen) -> None:
    contestant = worker.contestant
    what = f"epoch {epoch + 1}, {contestant.label}"
    screen.step(what, steps)

    def on_step(message: dict) -> None:
        screen.tick(message["step"] - epoch * steps, steps, f"{what}: loss {message['loss']:.4f}")

    worker.tell("epoch")
    heard = worker.hear("epoch", on_step)
    contestant.losses += heard["losses"]
    for key in ("seconds", "accuracy", "test_loss"):
        getattr(contestant, key).append(heard[key])
    apart = np.abs(np.subtract(contestant.losses, stock.losses)).max() if contestant is not stock else None
    screen.row(
        [
            Cell(epoch + 1),
            Cell(contestant.label, "good" if contestant.kind == "gconv" else ""),
            Cell(contestant.layout),
            Cell(f"{np.mean(heard['losses']):.5f}"),
            Cell(f"{100 * heard['accuracy']:.2f} %"),
            Cell(f"{heard['seconds']:.2f}"),
            Cell("" if apart is None else f"≤ {apart:.1e}", "dim"),
        ]
    )
