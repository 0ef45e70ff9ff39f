"""Batch statistics over the processes of a distributed training: what nn.SyncBatchNorm stands for, on any
device and backend of torch.distributed.

Every process takes mean and variance of its own batch; they are merged by Chan's rule (Chan, Golub and
LeVeque 1983), in float64 and in the order of the ranks, so that all processes have the same bits.
"""

import torch
import torch.distributed as dist
from torch import nn


class Alone:
    """The statistics of one process: those of its batch."""

    def __init__(self, x):
        self.count = x.shape[0] * x.shape[2] * x.shape[3]

    def merge(self, mean, var):
        return mean, var

    def total(self, sums):
        return sums


class Together:
    """The statistics of all processes of a group."""

    def __init__(self, x, group):
        self.group = group
        own = torch.tensor([Alone(x).count], dtype=torch.float64, device=x.device)
        self.counts = self._gathered(own)[:, 0]
        self.count = int(self.counts.sum().item())

    def _gathered(self, own):
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own, group=self.group)
        return torch.stack(parts)

    def merge(self, mean, var):
        """(mean, var) [C], both biased, of all batches together, of each process's own."""
        means, variances = self._gathered(torch.stack((mean, var)).double()).unbind(1)
        weights = self.counts[:, None] / self.count
        merged = (weights * means).sum(0)
        spread = (weights * (variances + (means - merged) ** 2)).sum(0)
        return merged.to(mean.dtype), spread.to(var.dtype)

    def total(self, sums):
        """The sum over all processes, in the order of the ranks."""
        return self._gathered(sums.double()).sum(0).to(sums.dtype)


def _synchronises(bn) -> bool:
    return (
        isinstance(bn, nn.SyncBatchNorm)
        and bn.training
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(_group(bn)) > 1
    )


def _group(bn):
    return bn.process_group or dist.group.WORLD


def mixed_reason(norms, batch) -> str | None:
    """Why these normalisations cannot share statistics, or None: by the batches of one group of processes or
    of one process alone."""
    groups = [_group(bn) if _synchronises(bn) else None for bn, by_batch in zip(norms, batch) if by_batch]
    if any(group is not groups[0] for group in groups):
        return "normalisations by the batches of different groups of processes"
    if groups and groups[0] is not None and torch.compiler.is_compiling():
        return "SyncBatchNorm inside torch.compile"
    return None


def ranks_of(norms, batch, x):
    """Whose batches the statistics are taken over."""
    for bn, by_batch in zip(norms, batch):
        if by_batch and _synchronises(bn):
            return Together(x, _group(bn))
    return Alone(x)
