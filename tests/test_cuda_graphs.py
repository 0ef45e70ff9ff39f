"""Training steps on a GPU as they are run in earnest: under autocast, with a GradScaler, and captured in a
CUDA graph, whose replay has the same bits as running the step eagerly. Nothing of a step may read from the
GPU, or it could not be captured."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gconv
from gconv import models

pytestmark = pytest.mark.needs_cuda

SIZE, BATCH, CLASSES = 32, 4, 10
WARMUP = 3  # steps that compile and choose; on a stream of their own, as torch.cuda.graph wants it
STEPS = 3


def resnext():
    return models.ResNet(models.Bottleneck, (1, 1, 1, 1), num_classes=CLASSES, groups=8, width_per_group=4)


def densenet():
    return models.DenseNet(12, (3, 3), 24, num_classes=CLASSES, small_images=True, memory="shared")


NETWORKS = {"resnext": resnext, "densenet": densenet}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]().cuda().train()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS, BATCH, 3, SIZE, SIZE, generator=generator).cuda()
    return images, torch.randint(0, CLASSES, (STEPS, BATCH), generator=generator).cuda()


class Step:
    """A training step of a network, without the optimizer: loss and gradients, from images and labels that
    stay where they are."""

    def __init__(self, network, dtype, scale=1.0):
        self.network, self.dtype, self.scale = network, dtype, scale
        self.images = torch.zeros(BATCH, 3, SIZE, SIZE, device="cuda")
        self.labels = torch.zeros(BATCH, dtype=torch.long, device="cuda")

    def __call__(self):
        self.network.zero_grad(set_to_none=True)
        with torch.autocast("cuda", self.dtype):
            loss = F.cross_entropy(self.network(self.images), self.labels)
        (loss * self.scale).backward()
        return loss.detach()

    def fill(self, images, labels):
        self.images.copy_(images)
        self.labels.copy_(labels)

    def found(self, loss):
        """All that the step left: the loss, gradients and buffers."""
        result = {"loss": loss.clone()}
        result |= {f"d {name}": p.grad.clone() for name, p in self.network.named_parameters()}
        return result | {name: buffer.clone() for name, buffer in self.network.named_buffers()}


def warm(step):
    """Runs the step on a stream of its own, and takes back what that did to the buffers."""
    state = copy.deepcopy(step.network.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    step.network.load_state_dict(state)


def captured(step):
    """(graph, loss): the step in a graph; replaying it fills the gradients and the loss."""
    state = copy.deepcopy(step.network.state_dict())
    step.network.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    step.network.load_state_dict(state)
    return graph, loss


def assert_same(got, want, what):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value.isfinite().all(), f"{what}, {name}: not finite"
        assert torch.equal(got[name], value), f"{what}, {name}: other bits"


def assert_kernels_ran(step):
    """gconv's kernels run the network, and no fallback."""
    with gconv.trace() as trace:
        step()
    assert any(row.kernel.startswith(("cuda.", "triton.")) for row in trace), trace
    others = [row for row in trace if not row.kernel.startswith(("cuda.", "triton."))]
    assert all(row.reason.startswith("by design") for row in others), trace


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_captured_step_has_the_bits_of_an_eager_one(network, batches, dtype):
    eager, graphed = Step(network, dtype, 64.0), Step(copy.deepcopy(network), dtype, 64.0)
    assert_kernels_ran(Step(copy.deepcopy(network), dtype))
    warm(eager)
    warm(graphed)
    graph, loss = captured(graphed)
    for i, batch in enumerate(zip(*batches)):
        eager.fill(*batch)
        graphed.fill(*batch)
        want = eager.found(eager())
        graph.replay()
        assert_same(graphed.found(loss), want, f"step {i}")
    assert not torch.equal(batches[0][0], batches[0][1])  # the replays were not of the same images


def test_bfloat16_autocast_trains(network, batches):
    """Twenty steps on one batch: the loss falls, in bfloat16 and with gconv's kernels."""
    step, optimizer = Step(network, torch.bfloat16), torch.optim.SGD(network.parameters(), 0.05, 0.9)
    assert_kernels_ran(step)
    step.fill(batches[0][0], batches[1][0])
    losses = []
    for _ in range(20):
        losses.append(float(step()))
        optimizer.step()
    assert losses[-1] < losses[0] / 2, losses


def test_float16_autocast_with_a_grad_scaler(network, batches):
    """The scaler finds what overflows, skips that step, and steps as without it otherwise."""
    stock, step = copy.deepcopy(network), Step(network, torch.float16)
    step.fill(batches[0][0], batches[1][0])
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=1000)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)

    def scaled():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(network(step.images), step.labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return float(loss)

    first = scaled()
    assert scaler.get_scale() == 2.0**8, "a step of ordinary size overflowed"
    changed = [n for n, p in network.named_parameters() if not torch.equal(p, stock.get_parameter(n))]
    assert len(changed) == len(list(network.parameters()))
    losses = [scaled() for _ in range(20)]
    assert losses[-1] < first / 2, (first, losses)
    before = {name: p.clone() for name, p in network.named_parameters()}
    step.images.fill_(float("inf"))
    scaled()
    assert scaler.get_scale() == 2.0**7, "the overflow was not found"
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_a_whole_step_with_the_optimizer_is_captured(network, batches):
    """Forward, backward and SGD in one graph: after some replays the weights are those of eager steps."""

    def run(step, optimizer):
        loss = step()
        optimizer.step()
        return loss

    pairs = []
    for copied in (network, copy.deepcopy(network)):
        optimizer = torch.optim.SGD(copied.parameters(), 0.05, 0.9)
        pairs.append((Step(copied, torch.bfloat16), optimizer))
    state = copy.deepcopy(network.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for pair in pairs:
            for _ in range(WARMUP):
                run(*pair)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    pairs[1][0].network.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        run(*pairs[1])
    for step, optimizer in pairs:
        step.network.load_state_dict(state)
        for momentum in optimizer.state.values():
            momentum["momentum_buffer"].zero_()
    for batch in zip(*batches):
        for step, _ in pairs:
            step.fill(*batch)
        run(*pairs[0])
        graph.replay()
    want = pairs[0][0].network.state_dict()
    assert_same(pairs[1][0].network.state_dict(), want, "weights")
    assert any(not torch.equal(want[name], state[name]) for name in want if name.endswith("conv1.weight"))
