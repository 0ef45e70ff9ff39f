"""Trains a small ResNeXt on handwritten digits with stock torch.nn and with gconv, side by side.

Three contestants start from the same seed and see the same batches: stock torch.nn in both memory layouts and
gconv. Each runs in a process of its own (its peak memory is its own) and they take turns epoch by epoch (a
slow minute hits all of them). Whether they train the same network is judged in agreement.py.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from . import digits
from .agreement import Check, check_curves, check_gradients, check_predictions
from .screen import Cell, Screen
from .workers import Worker

__all__ = ["Contestant", "Options", "Training", "run"]

GRADIENT_BATCH = 128


@dataclass
class Options:
    seed: int = 0
    epochs: int = 8
    batch: int = 32
    rate: float = 0.005
    threads: int = 0  # 0: torch's own choice


@dataclass
class Contestant:
    name: str
    label: str
    kind: str
    layout: str
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
class Training:
    options: Options
    contestants: list[Contestant]
    checks: list[Check]
    allowed: list[float]  # how far gconv's loss may be from stock's, by step

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __getitem__(self, name: str) -> Contestant:
        return next(c for c in self.contestants if c.name == name)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Training:
        return cls(
            Options(**data["options"]),
            [Contestant(**c) for c in data["contestants"]],
            [Check(**c) for c in data["checks"]],
            data["allowed"],
        )


def _start(contestant: Contestant, options: Options, data: str, folder: str) -> Worker:
    """The process of one contestant."""
    return Worker(
        contestant.label, "training", "gconv.bench.train_worker", "--data", data,
        "--weights", os.path.join(folder, f"{contestant.name}.pt"), "--kind", contestant.kind,
        "--layout", contestant.layout, "--seed", str(options.seed), "--epochs", str(options.epochs),
        "--batch", str(options.batch), "--rate", str(options.rate),
        "--threads", str(options.threads or torch.get_num_threads()),
    )  # fmt: skip


def contestants() -> list[Contestant]:
    """The others are compared with "stock", in NCHW, where torch's batch norm is more exact than in the other
    layout. "twin" is the same network in that other layout, channels_last, which is also gconv's."""
    return [
        Contestant("stock", "stock torch.nn", "stock", "nchw"),
        Contestant("twin", "stock torch.nn", "stock", "channels_last"),
        Contestant("gconv", "gconv", "gconv", "channels_last"),
    ]


def _models(seed: int) -> tuple[nn.Module, nn.Module]:
    """Stock and gconv with equal random weights and no residual branch at zero: every gradient counts."""
    from gconv.models.resnet import resnext_digits

    pair = []
    for stock in (True, False):
        torch.manual_seed(seed)
        pair.append(resnext_digits(stock=stock))
    return pair[0], pair[1]


def run(options: Options) -> Training:
    """Trains all three in turns and checks that they agree. WorkerDied if a process ends early."""
    everyone = contestants()
    threads = options.threads or torch.get_num_threads()
    columns = (
        ("epoch", "right", 5), ("contestant", "left", 14), ("layout", "left", 13), ("mean loss", "right", 9),
        ("test accuracy", "right", 13), ("seconds", "right", 7), ("from stock NCHW", "right", 15),
    )  # fmt: skip
    title = (
        f"ResNeXt on 1,797 digits at 32×32, {options.epochs} epochs, batch {options.batch}, Adam, "
        f"seed {options.seed}, {threads} threads"
    )
    workers: list[Worker] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Screen(title, columns, options.epochs * len(everyone), "epochs") as screen,
    ):
        try:
            screen.step("gradients against float64")
            data = digits.load(options.seed)
            path = os.path.join(folder, "digits.pt")
            torch.save(data, path)
            stock, ours = _models(options.seed)
            batch = data["x_train"][:GRADIENT_BATCH], data["y_train"][:GRADIENT_BATCH]
            gradients = check_gradients(stock, ours, *batch)
            screen.step("start")
            workers = [_start(c, options, path, folder) for c in everyone]
            for contestant, worker in zip(everyone, workers):
                ready = worker.hear("ready")
                contestant.parameters = ready["parameters"]
            steps = ready["steps"] // options.epochs
            for epoch in range(options.epochs):
                for contestant, worker in zip(everyone, workers):
                    _one_epoch(contestant, worker, epoch, steps, everyone[0], screen)
            for contestant, worker in zip(everyone, workers):
                worker.tell("stop")
                done = worker.hear("done")
                for key in ("peak_mb", "training_mb", "kernels"):
                    setattr(contestant, key, done[key])
            screen.step("predictions against float64")
            trained = torch.load(os.path.join(folder, "gconv.pt"), weights_only=True)
            stock.load_state_dict(trained)
            ours.load_state_dict(trained)
            predictions = check_predictions(stock, ours, data["x_test"])
        finally:
            for worker in workers:
                worker.close()
    curves = {c.name: c.losses for c in everyone}
    same, allowed = check_curves(curves["stock"], curves["gconv"], curves["twin"])
    return Training(options, everyone, [same, gradients, predictions], allowed)


def _one_epoch(
    contestant: Contestant, worker: Worker, epoch: int, steps: int, stock: Contestant, screen: Screen
) -> None:
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
