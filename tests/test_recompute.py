"""What a backward makes again instead of keeping it: the results of bottlenecks.
Always against the same network whose graph keeps everything."""

import copy
import gc
import weakref

import pytest
import torch
from bottleneck_blocks import Block
from checks import assert_same_bits, generator
from gconv.bench.allocations import MB, allocations_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from gconv import models, recompute

pytestmark = pytest.mark.usefixtures("ops", "one_thread")
SLACK = 24 << 10  # bytes: tables and statistics of the normalisations, the loss
SIZE = (2, 16, 12, 12)


class Blocks(nn.Module):
    """Two stages of bottlenecks, 16 -> 32 channels at 12x12 and 32 -> 48 at 6x6; all their results."""

    def __init__(self, **options):
        super().__init__()
        first, second = (32, 16, 16, 32), (48, 24, 24, 48)
        self.blocks = nn.ModuleList(
            [
                Block((16, 16, 16, 32), 4, down=True, **options),
                Block(first, 4, **options),
                Block(first, 4, **options),
                Block((32, 24, 24, 48), 8, 2, down=True, **options),
                Block(second, 8, **options),
            ]
        )
        for block in self.blocks:
            block.stock = False

    def results(self, x):
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def forward(self, x):
        return self.results(x)[-1]


def network(training=True, **options):
    torch.manual_seed(7)
    module = Blocks(**options).train(training)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
    return module


def images(size=SIZE):
    x = torch.randn(size, generator=generator("recompute"))
    return x.to(memory_format=torch.channels_last)


def gradients(module, run, x):
    """Of the sum of squares of run(module, x), to x and the parameters; of a copy of the module."""
    module = copy.deepcopy(module)
    leaf = x.detach().clone().requires_grad_()
    run(module, leaf).float().square().sum().backward()
    return [leaf.grad, *(p.grad for p in module.parameters())]


def differentiated(module, leaf, z, **options):
    tensors = [leaf, *module.parameters()]
    return torch.autograd.grad(z.float().square().sum(), tensors, allow_unused=True, **options)


@pytest.fixture
def kept_all(monkeypatch):
    """gradients(...) of the graph that keeps everything."""

    def run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(recompute, "_replace", lambda *args: False)
            return gradients(*args)

    return run


def assert_same(got, want):
    assert any(g is not None for g in want)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert (one is None) == (other is None), i
        if one is not None:
            assert_same_bits(one, other, i)


def recipes(zs):
    return [z.grad_fn.gconv_recipe() for z in zs]


def forward(module, x):
    return module(x)


# ------------------------------------------------------------------------------------------------- the bytes


def raw_outputs(module, size):
    """Elements of the raw outputs of every convolution."""
    n, _, h, w = size
    elements = 0
    for block in module.blocks:
        stride = block.conv2.stride[0]
        inner = n * h * w
        h, w = h // stride, w // stride
        elements += inner * block.conv1.out_channels + n * h * w * (
            block.conv2.out_channels + block.conv3.out_channels * (1 + (block.downsample is not None))
        )
    return elements


def bytes_of(module, x, elements):
    """Kept and expected bytes, and the peak, of a step of module(x).sum()."""
    module.zero_grad(set_to_none=True)
    found = allocations_of(lambda: module(x).sum(), lambda loss: loss.backward())
    return found.kept * MB, elements * x.element_size(), found.peak * MB


def test_raw_outputs_and_one_result_per_stage_are_kept():
    size = (4, 16, 48, 48)
    module, x = network(), images(size)
    last_of_stage = 4 * 32 * 48 * 48  # the input of the second stage's convolutions
    want = raw_outputs(module, size) + last_of_stage
    kept, expected, peak = bytes_of(module, x, want)
    assert expected <= kept <= expected + SLACK
    assert bytes_of(module, x, want)[0] == kept and peak > kept


def test_whose_graph_keeps_everything_keeps_the_other_results_too(monkeypatch):
    monkeypatch.setattr(recompute, "_replace", lambda *args: False)
    size = (4, 16, 48, 48)
    module = network()
    every = 3 * 4 * 32 * 48 * 48 + 2 * 4 * 48 * 24 * 24
    kept, expected, _ = bytes_of(module, images(size), raw_outputs(module, size) + every)
    assert expected <= kept <= expected + SLACK


# -------------------------------------------------------------------------------------------- the same values


def autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


def pyramid(module, x):
    return torch.cat([z.flatten() * (i + 1) for i, z in enumerate(module.results(x))])


def squared(module, x):
    """Every result is also kept by somebody else."""
    return torch.cat([z.square().flatten() for z in module.results(x)])


def hooked(module, x):
    seen = []
    for block in module.blocks:
        block.register_forward_hook(lambda module, args, z: seen.append(z))
        block.register_forward_hook(lambda module, args, z: z * 2)
    module(x)
    return torch.cat([z.flatten() for z in seen])


def checkpointed(reentrant):
    def run(module, x):
        for block in module.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    return run


def partly_checkpointed(module, x):
    for i, block in enumerate(module.blocks):
        x = checkpoint(block, x, use_reentrant=False) if i % 2 else block(x)
    return x


def on_cpu(module, x):
    with torch.autograd.graph.save_on_cpu():
        return module(x)


def partly_hooked(module, x):
    for i, block in enumerate(module.blocks):
        if i % 2:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                x = block(x)
        else:
            x = block(x)
    return x


def detached(module, x):
    first, *rest = module.blocks
    z = first(x)
    h = z.detach().requires_grad_()
    for block in rest:
        h = block(h)
    return torch.cat([z.flatten(), h.flatten()])


def changed_by_autograd(module, x):
    for block in module.blocks:
        x = block(x) * 1
        x.mul_(1.5)
    return x


def exchanged(module, x):
    for block in module.blocks:
        x = block(x)
        x.data = x.data.flip(0).contiguous(memory_format=torch.channels_last)
    return x.clone()


def twice_in_a_row(module, x):
    """A block on its own result: one recipe made of another of the same node's kind."""
    first, second, *_ = module.blocks
    return second(second(second(first(x))))


def contiguous(module, x):
    return module(x.contiguous())


CALLS = (
    forward, autocast, pyramid, squared, hooked, checkpointed(False), checkpointed(True), partly_checkpointed,
    on_cpu, partly_hooked, detached, changed_by_autograd, exchanged, twice_in_a_row, contiguous,
)  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("run", CALLS, ids=lambda run: run.__qualname__.split(".")[0])
def test_gradients_are_the_same_bits(run, training, kept_all):
    module, x = network(training), images()
    assert_same(gradients(module, run, x), kept_all(module, run, x))


def test_frozen_normalisations(kept_all):
    module, x = network(frozen=("bn1", "bn3", "downsample")), images()
    assert_same(gradients(module, forward, x), kept_all(module, forward, x))


def test_again_and_again(kept_all):
    """retain_graph, and the gradients of gradients, before and after a plain backward."""
    module, x = network(), images()
    want = kept_all(module, forward, x)
    leaf = x.clone().requires_grad_()
    results = module.results(leaf)
    for options in ({"retain_graph": True}, {"retain_graph": True}, {"create_graph": True}, {}):
        got = differentiated(module, leaf, results[-1], **options)
        assert_same([g.detach() for g in got], want)
        if options:
            assert [recipe._value for recipe in recipes(results)] == [None] * 5
    with pytest.raises(RuntimeError, match="second time"):
        differentiated(module, leaf, results[-1])


def second_order(module, x):
    leaf = x.clone().requires_grad_()
    first = differentiated(module, leaf, module(leaf), create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return torch.autograd.grad(penalty, [leaf, *module.parameters()], allow_unused=True)


def test_second_order(monkeypatch):
    module, x = network(False), images()
    got = second_order(module, x)
    monkeypatch.setattr(recompute, "_replace", lambda *args: False)
    assert_same(got, second_order(module, x))


def test_a_thousand_blocks_in_a_row(kept_all):
    first, second = network().blocks[:2]

    def run(module, x):
        x = first(x)
        for _ in range(1200):
            x = module(x)
        return x

    assert_same(gradients(second, run, images((1, 16, 3, 3))), kept_all(second, run, images((1, 16, 3, 3))))


def test_of_a_long_row_few_results_are_there_at_once():
    """Ten identity blocks after the first: results 0 to 9 are made, 10 is the last one's own."""
    first, second = network().blocks[:2]
    results = [first(images())]
    for _ in range(10):
        results.append(second(results[-1]))
    made = recipes(results)
    made[9].get()

    def there():
        return [i for i, recipe in enumerate(made) if recipe._value is not None]

    seen = [there()]
    for i in reversed(range(10)):
        assert_same_bits(made[i].take(), results[i].detach(), i)
        seen.append(there())
    assert seen == [[4, 9], [4], [4, 6], [4, 6], [4], [4], [], [1], [1], [], []]


# ------------------------------------------------------------------------------------------- changed in place


def test_a_result_changed_afterwards(kept_all):
    """Where the graph that keeps it raises, what is made again is what was read."""
    module, x = network(), images()

    def run(module, x):
        first, second, third, *_ = module.results(x)
        second.mul_(2)
        with torch.no_grad():
            first.zero_()
        return third

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept_all(module, run, x)
    want = kept_all(module, lambda module, x: module.results(x)[2], x)
    assert_same(gradients(module, run, x), want)


def test_what_is_kept_may_not_change():
    """The input of the first block, and the result that the second stage's first block keeps."""
    module = network()
    for place in (0, 3):
        inputs = [images() * 1]
        for block in module.blocks[:3]:
            inputs.append(block(inputs[-1]))
        z = module.blocks[3](inputs[3])
        with torch.no_grad():
            inputs[place].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


def test_a_shortcut_that_is_kept_may_not_change():
    """Even where only a later block, which makes the result between them again, is differentiated."""
    first, second = network().blocks[1:3]
    x = images((2, 32, 6, 6))
    z = second(first(x))
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z.sum(), second.conv1.weight)


# ------------------------------------------------------------------------------------------------ how long


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def raw_storages(zs):
    """Weak references to what the recipes hold."""
    return [weakref.ref(recipe._args[0].tensor) for recipe in recipes(zs)]


def test_all_is_freed_after_the_backward(no_gc):
    zs = network().results(images())
    held, of = raw_storages(zs), [z.grad_fn.gconv_recipe for z in zs]
    assert all(ref() is not None for ref in (*held, *of))
    zs[-1].sum().backward()
    assert [ref() for ref in (*held, *of)] == [None] * 10
    again = network().blocks[1](zs[0])  # its graph is gone, it is there
    assert recompute._recipe_of(zs[0]) is None and again.grad_fn.gconv_recipe() is not None


def test_all_is_freed_without_a_backward(no_gc):
    zs = network().results(images())
    held, of = raw_storages(zs), [z.grad_fn.gconv_recipe for z in zs]
    results = [weakref.ref(z) for z in zs]
    del zs
    assert [ref() for ref in (*held, *of, *results)] == [None] * 15


def test_a_result_is_freed_in_the_forward(no_gc):
    module = network()
    first = module.blocks[0](images())
    seen = weakref.ref(first)
    z = module.blocks[1](first)
    del first
    assert seen() is None
    z.sum().backward()


def test_no_recipe_without_gradients():
    module = network().requires_grad_(False)
    assert module(images()).grad_fn is None
    with torch.no_grad():
        assert network()(images()).grad_fn is None
    with torch.autograd.graph.save_on_cpu():
        z = network()(images())
    assert not hasattr(z.grad_fn, "gconv_recipe")


# ------------------------------------------------------------------------------------------- where it is used


def resnet():
    return models.ResNet(models.resnet.Bottleneck, [3, 2], num_classes=5, stem_channels=8, planes=(8, 16))


def test_models(kept_all, monkeypatch):
    torch.manual_seed(5)
    module, x = resnet(), images((2, 3, 96, 96))
    assert_same(gradients(module, forward, x), kept_all(module, forward, x))
    kept, _, _ = bytes_of(module, x, 0)
    monkeypatch.setattr(recompute, "_replace", lambda *args: False)
    assert kept < 0.8 * bytes_of(module, x, 0)[0]


def test_on_the_kernels_for_gpus(gpu_backend, kept_all):
    module, x = network().to(gpu_backend), images((1, 16, 6, 6)).to(gpu_backend)
    results = module.results(x)
    assert all(recipe is not None for recipe in recipes(results))
    assert_same(gradients(module, forward, x), kept_all(module, forward, x))
