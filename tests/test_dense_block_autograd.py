"""Derivatives of the dense block: what the graph keeps, both orders, function transforms, checkpoints,
compilers, training steps."""

import copy
import gc

import checks
import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_bits
from dense_blocks import BLOCKS, Block, assert_shared, block_input, case_id, twins
from fused_checks import assert_close, compare_transforms, run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import jvp
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gconv
from gconv import dense_block as dense_module

blocks = pytest.mark.parametrize("case", BLOCKS, ids=case_id)
SMALL = (
    ((6, 4, 2), {"width": 8, "end": 7}),
    ((8, 4, 2), {"width": 8, "groups": 2, "end": "relu"}),
    ((6, 4, 2), {}),
)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
memories = pytest.mark.parametrize("memory", ["shared", "ultra"])
ends = pytest.mark.parametrize("end", [11, "relu", None], ids=["pool", "relu", "buffer"])


@pytest.fixture(autouse=True)
def one_thread(threads):
    """These blocks are too small for more."""
    threads(1)


# ------------------------------------------------------------------------------------------- what is kept


class Storages(TorchDispatchMode):
    """Every storage that an operation made while this was on, for as long as it lives."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def live(self, *but):
        """Bytes of the storages still alive, without those of the tensors `but`."""
        gc.collect()
        known = {t.untyped_storage()._cdata for t in but}
        return sorted(
            n for key, (ref, n) in self.seen.items() if not ref.expired() and key not in known and n > 0
        )


def activations(block, size, itemsize):
    """(bytes of the buffer, of every bottleneck's output)"""
    pixels = size[0] * size[1] * size[2] * itemsize
    widths = [layer.conv1.out_channels for layer in block.layers if layer.conv2 is not None]
    return block.total * pixels, [width * pixels for width in widths]


def vectors(block, training):
    """Bytes of the per-channel vectors: a table [4, C] of every normalisation, the statistics of the buffer
    and of every bottleneck's output."""
    tables = [16 * norm.running_mean.numel() for _, norm in block.all_pairs()]
    if not training:
        return tables
    widths = [layer.conv1.out_channels for layer in block.layers if layer.conv2 is not None]
    return tables + [4 * block.total] * 2 + [4 * width for width in widths]


@blocks
@memories
@modes
def test_kept_bytes(ops, case, memory, training):
    """The buffer, unless ultra the outputs of the bottlenecks, vectors of a few bytes per channel, and not
    one byte more: not x, whose caller may free it, nothing normalised, nothing concatenated."""
    shape, options, size = case
    dtype = checks.rotate((torch.float32, torch.bfloat16), "kept", case, memory, training)
    _, ours = twins("kept", *shape, training=training, memory=memory, **options)
    for conv in (m for m in ours.modules() if isinstance(m, nn.Conv2d)):
        conv.to(dtype)
    gconv.backend.reset_counts()
    with Storages() as storages:
        x = torch.randn(size[0], shape[0], *size[1:], dtype=dtype)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        z = ours(x.mul(1))
        del x
    assert_shared()
    buffer, ys = activations(ours, size, dtype.itemsize)
    want = [buffer, *([] if memory == "ultra" else ys), *vectors(ours, training)]
    returned = [] if z.shape[1] == ours.total and ours.norm is None else [z]
    got = storages.live(*returned)
    # Of the caller's: the input, a leaf that autograd's graph ends in.
    leaf = size[0] * shape[0] * size[1] * size[2] * dtype.itemsize
    got.remove(leaf)
    assert got == sorted(want)
    z.sum().backward()


def test_more_layers_keep_linearly_more(ops):
    """Of stock modules what is kept grows with the square of the depth."""
    kept = {}
    for layers in (2, 4, 8):
        for name, block in zip(("stock", "ours"), twins("linear", 4, 4, layers, width=8)):
            with Storages() as storages:
                z = block(torch.randn(2, 4, 8, 8).requires_grad_())
            kept[name, layers] = sum(n for n in storages.live() if n >= 2 * 64 * 4 * 4)
            del z
    for name, linear in (("ours", True), ("stock", False)):
        growths = kept[name, 4] - kept[name, 2], kept[name, 8] - kept[name, 4]
        assert (growths[1] <= 2 * growths[0]) == linear, kept


# ----------------------------------------------------------------------------------- derivatives of all kinds


@modes
@ends
@memories
def test_second_order(ops, training, end, memory):
    """Both orders beside float64; under create_graph the first order is that of plain modules."""
    stock, ours = twins("second", 6, 4, 3, width=8, end=end, training=training, memory=memory)
    x = block_input(stock, (2, 4, 6), "second")

    def both_orders(block, dtype):
        block = copy.deepcopy(block).to(dtype)
        leaf = x.detach().to(dtype).requires_grad_()
        tensors = [leaf, *block.parameters()]
        z = block(leaf)
        dz = torch.randn(z.shape, generator=checks.generator("second")).to(dtype).requires_grad_()
        plain = torch.autograd.grad(z, tensors, dz, retain_graph=True)
        first = torch.autograd.grad(z, tensors, dz, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [*tensors, dz], allow_unused=True)
        return plain, [*first, *second]

    (_, exact), (plain, got) = both_orders(stock, torch.float64), both_orders(ours, torch.float32)
    for i, (want, value) in enumerate(zip(exact, got, strict=True)):
        assert_close(value, want, 2e-3, i)
    for i, value in enumerate(plain):
        assert_close(value, exact[i], 1e-4, i)


@ends
def test_batched_gradients(ops, end):
    stock, ours = twins("batched", 6, 4, 2, width=8, end=end)
    x = block_input(stock, (2, 4, 5), "batched")
    found = []
    for block in (stock, ours):
        leaf = x.detach().requires_grad_()
        z = block(leaf)
        cotangents = torch.randn(3, *z.shape, generator=checks.generator("batched"))
        tensors = [leaf, *block.parameters()]
        found.append(torch.autograd.grad(z, tensors, cotangents, is_grads_batched=True))
    for want, got in zip(*found, strict=True):
        assert_close(got, want, 1e-4)


@modes
def test_function_transforms(ops, training):
    """By plain modules, as a trace says."""
    pair = twins("transforms", 6, 4, 2, width=8, end=7, training=training, track_running_stats=not training)
    x = block_input(pair[0], (2, 4, 6), "transforms").detach()
    with gconv.trace() as t:
        compare_transforms(*pair, x, [lambda f, p, x: jvp(lambda x: f(p, x), (x,), (x.flip(3),))[1]])
    kernels = [row.kernel for row in t]
    assert "modules" in kernels and "cpu.dense_block" not in kernels


def test_forward_mode(ops):
    """Right, by plain modules, in whichever grad mode."""
    stock, ours = twins("dual", 6, 4, 2, width=8, end=7)
    x = block_input(stock, (2, 4, 6), "dual").detach()
    tangents = []
    for block in (stock, ours):
        for context in (torch.no_grad(), torch.enable_grad()):
            with context, torch.autograd.forward_ad.dual_level():
                z = block(torch.autograd.forward_ad.make_dual(x, x.flip(2)))
                tangents.append(torch.autograd.forward_ad.unpack_dual(z).tangent)
    for tangent in tangents[1:]:
        assert_close(tangent, tangents[0], 1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpoint_gives_the_same_gradients(ops, use_reentrant):
    """Its second forward moves running statistics again, as it does those of stock modules."""
    pair = twins("checkpoint", 6, 4, 2, width=8, end=7)
    x = block_input(pair[0], (2, 4, 6), "checkpoint").detach()
    results = []
    for block, again in ((pair[1], False), (pair[1], True), (pair[0], True)):
        # The tail needs what the block returns: the forward runs to its end again.
        net = nn.Sequential(copy.deepcopy(block), nn.Sigmoid())
        leaf = x.clone().requires_grad_()
        z = checkpoint(net, leaf, use_reentrant=use_reentrant) if again else net(leaf)
        z.square().sum().backward()
        results.append((net[0], [leaf.grad, *(p.grad for p in net.parameters())]))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert_same_bits(a, b)
    for (name, got), want in zip(results[1][0].named_buffers(), results[2][0].buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)
    assert int(results[0][0].norm.num_batches_tracked) == 1
    assert int(results[1][0].norm.num_batches_tracked) == 2


def test_a_retained_graph_can_be_walked_again(ops):
    stock, ours = twins("again", 6, 4, 2, width=8, end=7)
    x = block_input(stock, (2, 4, 6), "again")
    z = ours(x)
    tensors = [x, *ours.parameters()]
    once, again = (torch.autograd.grad(z.square().sum(), tensors, retain_graph=True) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert_same_bits(a, b)
    torch.autograd.grad(z.sum(), tensors)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(z.sum(), tensors)


# ------------------------------------------------------------------------------------------------ compilers


def steps_of(block, call, xs):
    """The results of training steps: named, of the last."""
    for x in xs:
        results = run(call, x.requires_grad_(), torch.ones(copy.deepcopy(block)(x).shape).cumsum(-1), None)
    results |= {f"d{name}": p.grad for name, p in block.named_parameters()} | dict(block.named_buffers())
    return {name.replace("_orig_mod.", ""): value for name, value in results.items()}


COMPILED = [
    *((case, training, "shared", "aot_eager") for case in SMALL for training in (True, False)),
    (SMALL[0], True, "ultra", "aot_eager"),
    (SMALL[0], True, "shared", "inductor"),
]


@pytest.mark.parametrize("case,training,memory,backend", COMPILED, ids=str)
def test_compiled_in_one_graph(ops, case, training, memory, backend):
    torch._dynamo.reset()
    shape, options = case
    _, ours = twins("compile", *shape, training=training, memory=memory, **options)
    twin = copy.deepcopy(ours)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    xs = [block_input(ours, (2, 4, 6), ("compile", i)).detach() for i in range(2)]
    want, got = steps_of(ours, ours, xs), steps_of(twin, compiled, xs)
    for name, value in want.items():
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert got["z"].stride() == want["z"].stride()
    with torch.no_grad():
        torch.testing.assert_close(compiled(xs[0]), ours(xs[0]), rtol=1e-4, atol=1e-4)


@modes
def test_no_recompiles_on_the_batch_size(ops, training):
    torch._dynamo.reset()
    _, ours = twins("sizes", 6, 4, 2, width=8, end=7, training=training)
    twin = copy.deepcopy(ours)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for n in (4, 3, 7, 2, 9):
        x = block_input(ours, (n, 4, 6), ("sizes", n)).detach().contiguous()
        z = compiled(x)
        torch.testing.assert_close(z, ours(x), rtol=1e-4, atol=1e-4)
        z.square().sum().backward()
    assert counter.frame_count == 2


def test_compiled_with_dropout_and_options(ops):
    """Constants, cumulative statistics, no affine: one graph; dropout draws, and drops about as many."""
    torch._dynamo.reset()
    for options in (
        {"momentum": None, "affine": False},
        {"frozen": True},
        {"dropout": 0.5},
    ):
        _, ours = twins("compile options", 6, 4, 2, width=8, **options)
        twin = copy.deepcopy(ours)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        x = block_input(ours, (4, 6, 5), "compile options").detach()
        if "dropout" in options:
            leaf = x.clone().requires_grad_()
            z = compiled(leaf)
            assert 0.3 < (z[:, 6:] == 0).float().mean() < 0.7
            z.square().sum().backward()
            assert leaf.grad.isfinite().all() and leaf.grad.any()
            continue
        want, got = steps_of(ours, ours, [x, x + 1]), steps_of(twin, compiled, [x, x + 1])
        for name, value in want.items():
            if value is not None:
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=f"{options} {name}")


def op_samples():
    """Arguments of dense_block_fwd of several blocks."""
    for (shape, options), training, memory in (
        (SMALL[0], True, "shared"),
        (SMALL[1], True, "ultra"),
        (SMALL[2], True, "shared"),
        (SMALL[1], False, "shared"),
    ):
        _, ours = twins("opcheck", *shape, training=training, memory=memory, **options)
        layers = [
            dense_module.Layer(
                tuple(n for _, n in m.pairs()), tuple(c.weight for c, _ in m.pairs()), 0.5,
                options.get("dilation", 1), options.get("groups", 1),
            )
            for m in ours.layers
        ]  # fmt: skip
        end = ours.transition()
        end = end if end is None or end[1] is None else (end[0], end[1].weight)
        x = torch.randn(2, shape[0], 4, 6)
        conf = dense_module.conf_of(x, layers, end, memory == "ultra")
        norms, empty = dense_module._norms_of(layers, end), torch.empty(0)
        yield (
            x,
            [w.detach() for w in dense_module._weights_of(layers, end)],
            [n.weight.detach() for n in norms],
            [n.bias.detach() for n in norms],
            [empty if training else n.running_mean for n in norms],
            [empty if training else n.running_var for n in norms],
            [dense_module._noise(x, layer) for layer in conf.layers],
            *dense_module._packed(conf),
        )


@pytest.mark.parametrize("i", range(4))
def test_opcheck(ops, i):
    args = list(op_samples())[i]
    opcheck(ops.dense_block_fwd.default, args)
    leaves = (
        args[0].clone().requires_grad_(),
        *([t.requires_grad_() for t in s] for s in args[1:4]),
        *args[4:],
    )
    opcheck(ops.dense_block_fwd.default, leaves)
    with torch.no_grad():
        found = ops.dense_block_fwd(*args)
        conf = dense_module._unpacked(*args[7:])
        buffer, *kept = found[conf.end != "buffer" :]
        weights, gammas, betas, _, _, noises = args[1:7]
        needs = [True] * (1 + len(weights) + len(gammas) + len(betas))
        for wanted in (needs, [i % 2 == 0 for i in range(len(needs))]):
            back = (torch.randn(found[0].shape), buffer, weights, gammas, betas, noises, kept, wanted)
            opcheck(ops.dense_block_bwd.default, (*back, *args[7:]))


def test_packing_a_conf_loses_nothing():
    for args in op_samples():
        conf = dense_module._unpacked(*args[7:])
        assert dense_module._packed(conf) == args[7:]


@pytest.mark.parametrize("end", [7, "relu", None], ids=["pool", "relu", "buffer"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported(ops, end, strict):
    _, ours = twins("export", 6, 4, 2, width=8, end=end, training=False)
    x = block_input(ours, (2, 5, 6), "export").detach().contiguous()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ours, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    more = torch.cat([x, x, x])
    torch.testing.assert_close(program.module()(more), ours(more), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------- training steps


class Net(nn.Module):
    """A small DenseNet-BC of two blocks for the digits."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.block1 = Block(8, 6, 3, width=24, end=13, dropout=dropout)
        self.block2 = Block(13, 6, 3, width=24, end="relu", dropout=dropout)
        self.classifier = nn.Linear(31, 10)

    def forward(self, x):
        return self.classifier(self.block2(self.block1(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("memory", ["shared", "ultra"])
def test_training_on_images_follows_stock(ops, memory):
    """From the same weights on the same digits: losses and weights as far from float64's as stock's own, the
    weights in most of five draws: a value next to 0 may fall on the other side of a ReLU, in stock as here,
    and what follows such a step says nothing about rounding."""
    load_digits = pytest.importorskip(
        "sklearn.datasets", reason="the digits come with scikit-learn"
    ).load_digits
    digits = load_digits()
    images = torch.from_numpy(digits.images).unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    said = [weights_off(images, labels, memory, draw) for draw in range(5)]
    assert said.count(None) > 2, said


def weights_off(images, labels, memory, seed):
    """Six steps of training in three ways: which weights are too far from float64's, or None."""
    torch.manual_seed(seed)
    stock = Net()
    ours, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    for block in (ours.block1, ours.block2):
        block.stock, block.memory = False, memory
    losses, states = [], []
    for net, dtype in ((exact, torch.float64), (stock, torch.float32), (ours, torch.float32)):
        gconv.backend.reset_counts()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        curve = []
        for step in range(6):
            batch = slice(32 * step, 32 * step + 32)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images[batch].to(dtype)), labels[batch])
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(torch.tensor(curve, dtype=torch.float64))
        states.append(net.state_dict())
    assert_shared(12)
    assert losses[0][-1] < losses[0][0]
    own, error = ((losses[i] - losses[0]).abs().max() for i in (1, 2))
    assert error <= 4 * own + 1e-5, f"{losses}"
    for name, want in states[0].items():
        if not want.is_floating_point():
            assert torch.equal(states[2][name], want), name
            continue
        own, error = ((states[i][name].double() - want).abs().max() for i in (1, 2))
        if error > 4 * own + 2e-5 * want.abs().max():
            return f"{name}: {error:.1e}, stock's own {own:.1e}"
    return None
