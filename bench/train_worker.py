"""One contestant of the training comparison, in a process of its own so that its memory is its own.

It speaks JSON lines: told "epoch" on stdin it trains one epoch and reports every step's loss; told "stop"
it reports its memory and leaves. Between epochs it waits, so that contestants can take turns on the
machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings

import torch
from torch.nn import functional as F

from .devices import status_mb
from .workers import tell

LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


def schedule(step: int, steps: int, peak: float) -> float:
    """Learning rate: a linear warm-up over the first tenth, then linearly down to zero."""
    warm = max(1, steps // 10)
    return peak * ((step + 1) / warm if step < warm else (steps - step) / (steps - warm))


class Trainer:
    """A small ResNeXt on the digits. Equal seeds mean equal weights, batches and learning rates."""

    def __init__(self, data: dict, stock: bool, layout: str, seed: int, epochs: int, batch: int, rate: float):
        from gconv.models.resnet import resnext_digits

        torch.manual_seed(seed)
        self.layout = LAYOUTS[layout]
        # Branches that start at zero make the first steps smooth, and contestants stay together for longer.
        model = resnext_digits(stock=stock, zero_init_residual=True)
        self.model = model.to(memory_format=self.layout)
        self.data, self.batch, self.rate = data, batch, rate
        self.steps_per_epoch = len(data["x_train"]) // batch
        self.steps = epochs * self.steps_per_epoch
        self.step = 0
        self.shuffle = torch.Generator().manual_seed(seed + 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), rate)

    def epoch(self, on_step=None) -> list[float]:
        """One pass over the training digits in whole batches; the loss of every step. The few images left
        over wait for the next epoch: a batch of four would make the noisiest step of all."""
        self.model.train()
        x, y = self.data["x_train"], self.data["y_train"]
        losses = []
        order = torch.randperm(len(x), generator=self.shuffle)
        for picks in order[: self.steps_per_epoch * self.batch].split(self.batch):
            self.optimizer.param_groups[0]["lr"] = schedule(self.step, self.steps, self.rate)
            self.optimizer.zero_grad(set_to_none=True)
            images = x[picks].contiguous(memory_format=self.layout)
            loss = F.cross_entropy(self.model(images), y[picks])
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            self.step += 1
            if on_step:
                on_step(self.step, losses[-1])
        return losses

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """Accuracy and mean loss on the test digits."""
        self.model.eval()
        logits = self.model(self.data["x_test"].contiguous(memory_format=self.layout))
        y = self.data["y_test"]
        return float((logits.argmax(1) == y).float().mean()), float(F.cross_entropy(logits, y))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--kind", choices=("stock", "gconv"), required=True)
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="channels_last")
    parser.add_argument("--weights", required=True, help="where to leave the trained weights")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    import gconv

    warnings.simplefilter("ignore", gconv.FallbackWarning)  # what ran is reported as "kernels" instead
    data = torch.load(options.data, weights_only=True)
    trainer = Trainer(
        data,
        options.kind == "stock",
        options.layout,
        options.seed,
        options.epochs,
        options.batch,
        options.rate,
    )
    resident = status_mb("VmRSS")
    gconv.backend.reset_counts()
    tell(event="ready", parameters=trainer.parameters, steps=trainer.steps, pid=os.getpid())
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        began = time.perf_counter()
        losses = trainer.epoch(lambda step, loss: tell(event="step", step=step, loss=loss))
        seconds = time.perf_counter() - began
        accuracy, test_loss = trainer.test()
        tell(event="epoch", losses=losses, seconds=seconds, accuracy=accuracy, test_loss=test_loss)
    # Not getrusage's ru_maxrss, which starts at what the parent had when it forked.
    peak = status_mb("VmHWM") or 0.0
    kernels = gconv.backend.counts()
    torch.save(trainer.model.state_dict(), options.weights)
    tell(event="done", peak_mb=peak, training_mb=peak - resident if resident else None, kernels=kernels)


if __name__ == "__main__":
    main()
