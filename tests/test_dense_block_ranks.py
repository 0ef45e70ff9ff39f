"""The dense block in several processes: SyncBatchNorm's statistics, DistributedDataParallel."""

import copy
import datetime
import socket

import checks
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dense_blocks import assert_shared, block_input, twins
from fused_checks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gconv
from gconv import dense_block as dense_module
from gconv.ranks import Together

WORLD = 2
SIZE = (5, 4, 6)
SPLIT = (2, 3)  # images of each rank: an uneven batch


def sync(block):
    """nn.SyncBatchNorm in the place of every BatchNorm2d; on the CPU torch's own refuses to run."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(block)


def of_rank(rank, *tensors):
    return [t.split(SPLIT)[rank] for t in tensors]


def _in_process(rank, port, args, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://localhost:{port}", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    try:
        # What comes from the parent lies in memory that all processes share.
        synchronised, unsynchronised, (stock, ours, batches), (one, value) = copy.deepcopy(args)
        trained = [
            _trained(rank, block, batches, memory)
            for block, memory in ((stock, "shared"), (copy.deepcopy(ours), "shared"), (ours, "ultra"))
        ]
        results[rank] = {
            "synchronised": _synchronised(rank, synchronised),
            "unsynchronised": _unsynchronised(rank, *unsynchronised),
            "one value": sync(one)(value[rank : rank + 1]).detach(),
            "trained": trained,
        }
        dist.barrier()
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- SyncBatchNorm

CASES = {
    "pool": {"width": 8, "end": 10},
    "relu": {"end": "relu"},
    "buffer, dropout": {"width": 8, "dropout": 0.3},
    "ultra": {"width": 8, "end": 10, "memory": "ultra"},
    "momentum": {"width": 8, "end": 10, "momentum": None},
}


class Masks:
    """What dropout keeps in one process, or of the whole batch for rank None: the layers of all steps one
    after the other."""

    def __init__(self, rank):
        self.rank, self.calls = rank, 0

    def draw(self, shape):
        self.calls += 1
        keep = torch.rand((SIZE[0], *shape[1:]), generator=checks.generator("masks", self.calls)) >= 0.3
        return keep if self.rank is None else keep.split(SPLIT)[self.rank]

    def noise(self, x, layer):
        """`dense_block._noise`."""
        shape = (x.shape[0], layer.growth, *x.shape[2:])
        return self.draw(shape).contiguous(memory_format=torch.channels_last)

    def dropout(self, h, p, training):
        """F.dropout."""
        return h * self.draw(h.shape) / (1 - p)


def _synchronised(rank, cases):
    """{case: results of two steps of this rank}"""
    found = {}
    for name, (_, block, x, dz) in cases.items():
        dense_module._noise = Masks(rank).noise
        x, dz = of_rank(rank, x, dz)
        gconv.backend.reset_counts()
        results = run(sync(block), x.requires_grad_(), dz, None, steps=2)
        assert_shared(2)
        found[name] = {key: value for key, value in results.items() if value is not None}
    return found


def synchronised_cases():
    """{case: (stock, ours, x, dz)}"""
    cases = {}
    for name, options in CASES.items():
        stock, ours = twins(("sync", name), 6, 4, 2, **options)
        x = block_input(stock, SIZE, ("sync", name)).detach()
        with torch.no_grad():
            dz = torch.randn(copy.deepcopy(ours)(x).shape, generator=checks.generator("sync", name))
        cases[name] = stock, ours, x, dz
    return cases


def test_synchronised_statistics_are_those_of_the_whole_batch(ranks, monkeypatch):
    """Two processes with unequal parts of a batch beside one with all of it, in float64."""
    wanted, own = {}, {}
    for name, (stock, ours, x, dz) in synchronised_cases().items():
        for results, block, dtype in ((wanted, stock, torch.float64), (own, ours, torch.float32)):
            monkeypatch.setattr(F, "dropout", Masks(None).dropout)
            monkeypatch.setattr(dense_module, "_noise", Masks(None).noise)
            results[name] = run(block.to(dtype), x.to(dtype).requires_grad_(), dz.to(dtype), None, steps=2)
    for name, want in wanted.items():
        parts = [found["synchronised"][name] for found in ranks]
        for key, value in want.items():
            if value is None:
                continue
            got = [part[key] for part in parts]
            if not value.is_floating_point():
                assert all(torch.equal(g, value) for g in got), (name, key)
                continue
            if "running" in key:
                assert torch.equal(*got), (name, key)
                got = got[0]
            else:
                got = torch.cat(got) if key in ("z", "dx") else sum(got)
            # As good as one process with the whole batch, which the other tests hold to float64.
            error, alone = ((g.double() - value).abs().max() for g in (got, own[name][key]))
            assert error <= 4 * alone + 2e-6 * value.abs().max(), f"{name} {key}: {error:.1e}, {alone:.1e}"


def plain_case():
    """(ours, x)"""
    _, ours = twins("mixed", 6, 4, 2, width=8)
    return ours, torch.randn(SIZE[0], 6, *SIZE[1:], generator=checks.generator("mixed"))


def one_value_case():
    """(ours, x): one value per channel in each process."""
    _, ours = twins("one value", 6, 4, 2, width=8)
    return ours, torch.randn(WORLD, 6, 1, 1, generator=checks.generator("one value"))


def test_one_value_per_channel_in_each_process_is_enough(ranks):
    ours, x = one_value_case()
    z = torch.cat([found["one value"] for found in ranks])
    torch.testing.assert_close(z, ours(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(x[:1])


def _unsynchronised(rank, block, x):
    """The output without synchronisation, and what runs where some normalisations are synchronised only."""
    (x,) = of_rank(rank, x)
    z = copy.deepcopy(block)(x).detach()
    block.layers[0].norm2 = sync(block.layers[0].norm2)
    with gconv.set_policy("silent"), gconv.trace() as t:
        try:
            block(x)
        except ValueError as error:
            return z, [(row.kernel, row.reason) for row in t], str(error)
    return z, [], "nothing"


def test_mixed_groups_run_as_modules_and_say_so(ranks):
    """torch's SyncBatchNorm then refuses the CPU itself. Without any the results differ from those of the
    whole batch, as the test above would notice."""
    ours, x = plain_case()
    parts, rows, errors = zip(*(found["unsynchronised"] for found in ranks))
    assert (torch.cat(parts) - ours(x)).abs().max() > 0.01
    for row, error in zip(rows, errors):
        reason = "called one by one: normalisations by the batches of different groups of processes"
        assert row[0] == ("modules", reason)
        assert "SyncBatchNorm expected input tensor to be on" in error


def test_outside_a_group_a_synchronised_norm_is_a_plain_one(ops):
    stock, ours = twins("alone", 6, 4, 2, width=8, end=7)
    x = block_input(stock, (3, 4, 6), "alone").detach()
    z = sync(copy.deepcopy(ours))(x)
    assert torch.equal(z, ours(x))


# --------------------------------------------------------------------------------- DistributedDataParallel


def _trained(rank, block, batches, memory):
    """The state after some steps of DistributedDataParallel."""
    block.memory = memory
    model = DistributedDataParallel(block)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        model(*of_rank(rank, x)).square().mean().backward()
        optimizer.step()
    return block.state_dict()


def training_case():
    """(stock, ours, batches)"""
    gen = checks.generator("ddp")
    return *twins("ddp", 6, 4, 3, width=8, end=10), [
        torch.randn(SIZE[0], 6, *SIZE[1:], generator=gen) for _ in range(4)
    ]


def test_data_parallel_training_follows_stock(ranks):
    before = training_case()[1].state_dict()
    for found in ranks:
        want, *both = found["trained"]
        for name, value in want.items():
            for got in both:
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)
    for name in (name for name in before if name.endswith("weight")):
        assert torch.equal(*(found["trained"][1][name] for found in ranks)), name
        assert not torch.equal(ranks[0]["trained"][1][name], before[name]), name


@pytest.fixture(scope="module")
def ranks(ops):
    """What every process of a group found: all of the tests in one group, for a process takes seconds to
    start."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    args = synchronised_cases(), plain_case(), training_case(), one_value_case()
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_in_process, (port, args, results), nprocs=WORLD)
        return [results[rank] for rank in range(WORLD)]


def test_merging_is_exact_for_unequal_parts():
    """Chan's rule against the variance of all values, at a mean far larger than the spread."""
    parts = [torch.randn(n, 3, 4, 5, dtype=torch.float64) + 1000 + n for n in (2, 7, 1)]
    together = Together.__new__(Together)
    together.counts = torch.tensor([p.numel() / 3 for p in parts], dtype=torch.float64)
    together.count = int(together.counts.sum())
    own = [(p.mean((0, 2, 3)), p.var((0, 2, 3), correction=0)) for p in parts]
    together._gathered = lambda _: torch.stack([torch.stack(pair) for pair in own])
    mean, var = together.merge(*own[0])
    whole = torch.cat(parts)
    torch.testing.assert_close(mean, whole.mean((0, 2, 3)), rtol=1e-13, atol=0)
    torch.testing.assert_close(var, whole.var((0, 2, 3), correction=0), rtol=1e-9, atol=0)
