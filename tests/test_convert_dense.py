"""convert on DenseNets: torchvision's, timm's and copies of them run each dense block, with its transition,
as one call; same values, gradients and names, statistics that move once, an exact undo."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from model_checks import (
    COPIES,
    anatomy,
    assert_as_good,
    assert_compiled_step_equals,
    assert_steps_as_good,
    copied,
    lively,
    seeded,
    training_step,
)
from torch import Tensor, nn
from torchvision_models import import_torchvision, require_torchvision

import gconv
from gconv import convert_dense

TINY = {"growth_rate": 8, "block_config": (2, 3), "num_init_features": 16, "num_classes": 10}


@pytest.fixture(autouse=True)
def _kernels_only(ops):
    """A fallback where our kernels should run is an error in every test here."""
    with gconv.set_policy("error"):
        yield


# ---------------------------------------------------------------------------------- models as users have them


class Layer(nn.Module):
    """A copy of torchvision's layer under another name, with other local names."""

    def __init__(self, width, growth, bn_size=2, drop_rate=0.0, memory_efficient=False):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width, bn_size * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth, growth, 3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.memory_efficient = memory_efficient

    def any_requires_grad(self, tensors: list[Tensor]) -> bool:
        """A loop, since TorchScript had no any()."""
        for one in tensors:  # noqa: SIM110
            if one.requires_grad:
                return True
        return False

    def call_checkpoint_bottleneck(self, tensors):
        def run(*args):
            return self.bn_function(args)

        return cp.checkpoint(run, *tensors, use_reentrant=False)

    def bn_function(self, tensors: list[Tensor]) -> Tensor:
        together: Tensor = torch.cat(tensors, 1)
        bottleneck = self.conv1(self.relu1(self.norm1(together)))
        return bottleneck

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """What the layer adds."""
        if isinstance(x, Tensor):
            before: list[Tensor] = [x]
        else:
            before = x
        if self.memory_efficient and self.any_requires_grad(before):
            if torch.jit.is_scripting():
                raise Exception("Memory Efficient not supported in JIT")
            bottleneck: Tensor = self.call_checkpoint_bottleneck(before)
        else:
            bottleneck = self.bn_function(before)

        maps: Tensor = self.conv2(self.relu2(self.norm2(bottleneck)))
        if self.drop_rate > 0:
            maps = F.dropout(maps, p=self.drop_rate, training=self.training)
        return maps


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a batch norm that ends in an activation."""

    def __init__(self, width, act=None):
        super().__init__(width)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class TimmLayer(nn.Module):
    """timm's layer, with the methods that convert compares timm's with."""

    forward, bottleneck_fn = convert_dense._timm_layer, convert_dense._timm_bottleneck
    call_checkpoint_bottleneck = convert_dense._timm_checkpoint
    any_requires_grad = convert_dense._any_requires_grad

    def __init__(self, width, growth, bn_size=2, drop_rate=0.0, memory_efficient=False):
        super().__init__()
        self.norm1 = BatchNormAct2d(width)
        self.conv1 = nn.Conv2d(width, bn_size * growth, 1, bias=False)
        self.norm2 = BatchNormAct2d(bn_size * growth)
        self.conv2 = nn.Conv2d(bn_size * growth, growth, 3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.grad_checkpointing = memory_efficient


class Block(nn.ModuleDict):
    def __init__(self, layers, width, growth, layer=Layer, **kwargs):
        super().__init__()
        for i in range(layers):
            self[f"denselayer{i + 1}"] = layer(width + i * growth, growth, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for _, layer in self.items():
            new = layer(maps)
            maps.append(new)
        return torch.cat(maps, 1)


class Transition(nn.Sequential):
    def __init__(self, width, out, norm=nn.BatchNorm2d):
        super().__init__()
        self.norm = norm(width)
        if norm is nn.BatchNorm2d:
            self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(width, out, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)


class DenseNet(nn.Module):
    def __init__(
        self, growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=10, layer=Layer, **kwargs
    ):
        super().__init__()
        width, k = num_init_features, growth_rate
        self.features = nn.Sequential()
        self.features.conv0 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.features.norm0 = nn.BatchNorm2d(width)
        self.features.relu0 = nn.ReLU(inplace=True)
        self.features.pool0 = nn.MaxPool2d(3, 2, 1)
        norm = nn.BatchNorm2d if layer is Layer else BatchNormAct2d
        for i, layers in enumerate(block_config):
            self.features.add_module(f"denseblock{i + 1}", Block(layers, width, k, layer, **kwargs))
            width += layers * k
            if i + 1 < len(block_config):
                self.features.add_module(f"transition{i + 1}", Transition(width, width // 2, norm))
                width //= 2
        self.features.norm5 = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


def timm_copy(**kwargs):
    return DenseNet(layer=TimmLayer, **kwargs)


def torchvisions(**kwargs):
    return require_torchvision().models.DenseNet(**kwargs)


KINDS = {"copy": DenseNet, "timm copy": timm_copy, "torchvision": torchvisions}
every_kind = pytest.mark.parametrize("kind", KINDS)
LAYER = "features.denseblock1.denselayer2"


def photos(size=32, batch=8):
    """In channels_last, where torch's batch norm too sums gradients in float32 instead of double."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))
    return images.contiguous(memory_format=torch.channels_last)


def stock_and_converted(kind="copy", size=32, filter_fn=None, **kwargs):
    """(the model, its converted copy, the report, images)."""
    images = photos(size)
    stock = lively(seeded(KINDS[kind], **TINY, **kwargs), images)
    with torch.no_grad():  # half of what the stem gives is zero: nearly nothing leaves rounding of gradients
        stock.features.norm0.bias -= 1.5
    ours = copy.deepcopy(stock)
    return stock, ours, gconv.convert(ours, filter_fn), images


def rows(trace):
    """{layer: kernel or reason} of the dense blocks and transitions themselves."""
    return {
        row.layer: (row.reason or row.kernel).removeprefix("called one by one: ")
        for row in trace
        if row.layer.count(".") == 1 and ("dense" in row.layer or "transition" in row.layer)
    }


ONE_CALL = {"features.denseblock1": "cpu.dense_block", "features.denseblock2": "cpu.dense_block"}


def same_values(ours, stock, images):
    """`rows` of a forward of the converted model; its values are the stock model's."""
    with torch.no_grad():
        want = stock(images)
        with gconv.trace() as trace:
            torch.testing.assert_close(ours(images), want, rtol=1e-4, atol=1e-4)
    return rows(trace)


# ----------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("memory_efficient", [False, True])
@every_kind
def test_inference_and_a_training_step_are_as_good(kind, memory_efficient):
    stock, ours, _, images = stock_and_converted(kind, size=46)
    for module in ours.modules():  # of ours alone: the other one would count its batches twice
        for flag in ("memory_efficient", "grad_checkpointing"):
            if hasattr(module, flag):
                setattr(module, flag, memory_efficient)
    exact, labels = copy.deepcopy(stock).double(), torch.arange(len(images))
    with torch.no_grad():
        want, baseline = exact.eval()(images.double()), stock.eval()(images)
        for form in (images, images.contiguous()):
            assert_as_good(ours.eval()(form), baseline, want)
    want, baseline = (
        training_step(model, x, labels) for model, x in ((exact, images.double()), (stock, images))
    )
    with gconv.trace() as trace:
        actual = training_step(ours, images, labels)
    assert rows(trace) == ONE_CALL, "each block and its transition are one call"
    assert_steps_as_good(actual, baseline, want, factor=2.0)


@every_kind
def test_statistics_move_once_and_memory_is_what_was_asked_for(kind):
    def step(model):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model(photos(batch=2)).sum()
        loss.backward()
        counters = {t.item() for name, t in model.state_dict().items() if name.endswith("tracked")}
        return sum(kept), counters

    plain, efficient = (
        seeded(KINDS[kind], **TINY, memory_efficient=efficient) for efficient in (False, True)
    )
    if kind == "timm copy":
        efficient.features.denseblock1.denselayer1.norm1.momentum = 0.2
    else:
        assert step(copy.deepcopy(efficient))[1] == {1, 2}, "a checkpoint normalises twice"
    for model in (plain, efficient):
        gconv.convert(model)
    (shared, once), (ultra, once_too) = step(plain), step(efficient)
    assert once == once_too == {1} and ultra < shared


def test_what_no_kernel_covers_keeps_its_checkpoints():
    stock, ours, _, images = stock_and_converted(memory_efficient=True)
    with gconv.set_policy("silent"):
        results = [training_step(m.double(), images.double(), torch.arange(8)) for m in (stock, ours)]
    assert all(torch.equal(results[1][key], want) for key, want in results[0].items())
    assert ours.get_submodule(LAYER).norm1.num_batches_tracked == 1 + 2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_everything_dropped(training):
    """A drop rate of 1 leaves no chance."""
    stock, ours, _, images = stock_and_converted(drop_rate=1.0)
    assert same_values(ours.train(training), stock.train(training), images) == ONE_CALL
    ours.get_submodule(LAYER).conv2.train(not training)
    found = same_values(ours, stock, images)
    assert found["features.denseblock1"] == "denselayer2: its convolution is not in its mode"


def test_a_changed_weight_is_seen():
    """The comparisons above can fail: one weight of one layer off by 1 % is far outside them."""
    stock, ours, _, images = stock_and_converted()
    exact = copy.deepcopy(stock).double().eval()(images.double()).detach()
    with torch.no_grad():
        ours.get_submodule(LAYER).conv1.weight *= 1.01
        with pytest.raises(AssertionError, match="relative RMS error"):
            assert_as_good(ours.eval()(images), stock.eval()(images), exact)


# ------------------------------------------------------------------------------- report, names, undo, copies


def test_the_report_has_a_line_per_convolution():
    _, ours, report, _ = stock_and_converted()
    first, *lines, summary = str(report).splitlines()
    assert first == "features.conv0+norm0+relu0 → fused (torch's 7x7 convolution)"
    assert lines[:5] == [
        f"features.{name} → fused (in one dense block)"
        for name in (
            "denseblock1.denselayer1.norm1+relu1+conv1",
            "denseblock1.denselayer1.norm2+relu2+conv2",
            "denseblock1.denselayer2.norm1+relu1+conv1",
            "denseblock1.denselayer2.norm2+relu2+conv2",
            "transition1.norm+relu+conv",
        )
    ]
    assert summary == "12 fused" and len(lines) == 11
    once = anatomy(ours)
    assert str(gconv.convert(ours)) == str(report) and anatomy(ours) == once, "twice is once"


@every_kind
def test_revert_is_an_exact_undo(kind):
    model = seeded(KINDS[kind], **TINY).eval()
    before, keys, images = anatomy(model), list(model.state_dict()), photos(batch=2)
    expected = model(images)
    gconv.convert(model)
    after = anatomy(model)
    assert after != before and after[1] == before[1] and list(model.state_dict()) == keys
    assert isinstance(model.features.denseblock1, nn.ModuleDict)
    assert [id(m) for m in model.modules()] == [row[2] for row in before[0]]
    gconv.revert(model)
    assert anatomy(model) == before and torch.equal(model(images), expected)


@pytest.mark.parametrize("how", COPIES)
def test_copies_stay_converted_and_can_be_reverted(how):
    stock, ours, _, images = stock_and_converted()
    ours.eval()
    other = copied(ours, how)
    with gconv.trace() as trace, torch.no_grad():
        assert torch.equal(other(images), ours(images))
    assert rows(trace) == ONE_CALL
    gconv.revert(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in stock.modules()]
    assert torch.equal(other(images), stock.eval()(images))


# ----------------------------------------------------------------------------------------------------- filter


def test_filter_fn_refusing_one_convolution_keeps_its_block():
    asked = []

    def refuse(name, conv):
        asked.append(name)
        return name != f"{LAYER}.conv1"

    stock, ours, report, images = stock_and_converted(filter_fn=refuse)
    assert len(asked) == len(set(asked)) == 12
    assert type(ours.features.denseblock1) is Block
    kept = f"its dense block kept: denselayer2.conv1: {report.entries[3].reason}"
    lines = str(report).splitlines()
    assert lines[2:5] == [
        f"features.denseblock1.denselayer1.conv2 → gconv.Conv2d ({kept})",
        f"{LAYER}.conv1 kept: filter_fn",
        f"{LAYER}.conv2 → gconv.Conv2d ({kept})",
    ]
    assert type(ours.get_submodule(LAYER).conv1) is nn.Conv2d
    assert "features.transition1.conv → gconv.Conv2d" in lines and len(report.fused) == 7
    assert same_values(ours.eval(), stock.eval(), images) == {"features.denseblock2": "cpu.dense_block"}


def test_filter_fn_refusing_a_transition_keeps_it_alone():
    stock, ours, report, images = stock_and_converted(filter_fn=lambda name, _: "transition" not in name)
    assert report.kept == ["features.transition1.conv"] and len(report.fused) == 11
    assert same_values(ours.eval(), stock.eval(), images) == ONE_CALL


# ------------------------------------------------------------------------- what has to be called as a module

FIRST = "features.denseblock1"
ENDING = "features.transition1"
HOOKED = {  # a path: the reason and who gives it, and the reason why the transition runs by itself
    "features.denseblock1": (ENDING, "its dense block has hooks"),
    LAYER: (FIRST, "denselayer2: has hooks"),
    f"{LAYER}.norm1": (FIRST, "denselayer2: norm1: has hooks"),
    f"{LAYER}.relu2": (FIRST, "denselayer2: relu2: has hooks"),
    f"{LAYER}.conv2": (FIRST, "denselayer2: conv2: has hooks"),
    "features.transition1": (ENDING, "has hooks"),
    "features.transition1.conv": (ENDING, "conv: has hooks"),
    "features.transition1.pool": (ENDING, "pool: want AvgPool2d(2, 2), "),
    "features.denseblock2": None,
    "features": None,
}


def test_hooks_fire_on_the_values_of_the_model():
    stock, ours, _, images = stock_and_converted()
    stock.eval(), ours.eval()
    for path, expected in HOOKED.items():
        seen, handles = [], []
        for model in (ours, stock):
            module = model.get_submodule(path)
            handles.append(module.register_forward_hook(lambda m, args, y, s=seen: s.append(y.clone())))
        found = same_values(ours, stock, images)
        assert len(seen) == 2, path
        torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4, msg=lambda text, path=path: f"{path}: {text}")
        if expected is None:
            assert found == ONE_CALL, path
        else:
            owner, reason = expected
            assert found[owner].startswith(reason), path
            assert owner != ENDING or found[FIRST] == "cpu.dense_block", "the block runs fused without it"
        for handle in handles:
            handle.remove()
    assert same_values(ours, stock, images) == ONE_CALL, "fused again"


class Halved(Layer):
    def forward(self, x):
        return super().forward(x) / 2


def biased(layer):
    layer.conv1 = nn.Conv2d(layer.conv1.in_channels, layer.conv1.out_channels, 1)


CHANGES = {
    "activation": (lambda layer: setattr(layer, "relu2", nn.SiLU()), "relu2: want ReLU, got SiLU"),
    "norm": (
        lambda layer: setattr(layer, "norm1", nn.GroupNorm(4, 24)),
        "norm1: want BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d, got GroupNorm",
    ),
    "class": (lambda layer: setattr(layer, "__class__", Halved), "want Layer, got Halved"),
    "forward": (
        lambda layer: setattr(layer, "forward", lambda x: Layer.forward(layer, x) * 3),
        "its forward is replaced",
    ),
    "child": (lambda layer: setattr(layer, "extra", nn.ReLU()), "want norm1, relu1, "),
    "bias": (biased, "has a bias"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_changed_after_or_before_run_as_changed(change):
    stock, ours, _, images = stock_and_converted()
    apply, reason = CHANGES[change]
    for model in (stock, ours):
        torch.manual_seed(5)
        apply(model.get_submodule(LAYER))
    found = same_values(ours.eval(), stock.eval(), images)
    assert reason in found[FIRST] and found["features.denseblock2"] == "cpu.dense_block"
    late = copy.deepcopy(stock)
    if change != "forward":  # its closure holds the original
        report = gconv.convert(late)
        entry = next(entry for entry in report if entry.name == "features.denseblock1.denselayer1.conv2")
        assert entry.result == "gconv.Conv2d" and reason in entry.reason
        assert same_values(late, stock, images) == {"features.denseblock2": "cpu.dense_block"}


def test_transitions_of_other_kinds_run_by_themselves():
    changes = {
        "pool: want AvgPool2d(2, 2)": lambda t: setattr(t, "pool", nn.AvgPool2d(3, 2, 1)),
        "relu: want ReLU, got SiLU": lambda t: setattr(t, "relu", nn.SiLU()),
        "conv: want 1x1": lambda t: setattr(t, "conv", nn.Conv2d(32, 16, 3, padding=1)),
        "want norm, relu, conv, pool, got": lambda t: t.append(nn.Identity()),
        "transition: conv: has a bias": lambda t: setattr(t, "conv", nn.Conv2d(32, 16, 1)),
        "want a Sequential, got SiLU": None,
    }
    for reason, change in changes.items():
        stock, ours, _, images = stock_and_converted()
        for model in (stock, ours):
            torch.manual_seed(5)
            if change is None:
                model.features.transition1 = nn.SiLU()
                model.features.denseblock2 = Block(3, 32, 4, bn_size=1)
                model.features.norm5 = nn.BatchNorm2d(44)
                model.classifier = nn.Identity()
            else:
                change(model.features.transition1)
        if change is None:
            ours.features.denseblock2.load_state_dict(stock.features.denseblock2.state_dict())
        found = same_values(ours.eval(), stock.eval(), images)
        assert reason in found[ENDING] and found[FIRST] == "cpu.dense_block"
        late = copy.deepcopy(stock)
        assert not any("transition" in name for name in gconv.convert(late).fused)
        assert ENDING not in same_values(late, stock, images)


class Doubled(Layer):
    """The layer we know, with a bottleneck that does something more."""

    def bn_function(self, tensors):
        return 2 * super().bn_function(tensors)


class Reversed(Block):
    """One argument away from the block we know."""

    def forward(self, x):
        maps = [x]
        for _, layer in self.items():
            new = layer(maps)
            maps.append(new)
        return torch.cat(maps, -1)


class Leaky(TimmLayer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm2.act = nn.LeakyReLU()


@pytest.mark.parametrize(
    "block, reason",
    [
        (lambda: Block(2, 8, 4, layer=Doubled), "its dense block kept: its layers are none that we know"),
        (lambda: Block(2, 8, 4, layer=Leaky), "its dense block kept: denselayer1: norm2: want BatchNormAct"),
        (lambda: Reversed(1, 8, 8), ""),
    ],
)  # fmt: skip
def test_a_block_that_computes_something_else_is_kept(block, reason):
    stock = seeded(block).eval()
    ours = copy.deepcopy(stock)
    report = gconv.convert(ours)
    assert type(ours) is type(stock) and not report.fused
    assert all(entry.reason.startswith(reason) for entry in report) and len(report.swapped) == len(report)
    x = torch.randn(2, 8, 6, 6)
    if not isinstance(stock, Reversed):
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)


def test_a_forward_replaced_on_the_block_is_respected():
    block = seeded(Block, layers=1, width=8, growth=4).eval()
    block.forward = lambda x: 5 * Block.forward(block, x)
    x = torch.randn(2, 8, 6, 6)
    expected = block(x)
    assert gconv.convert(block).swapped == ["denselayer1.conv1", "denselayer1.conv2"]
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_a_block_outside_a_sequential_and_an_edited_sequential():
    stock, x = seeded(Block, layers=2, width=8, growth=4), torch.randn(2, 8, 6, 6)
    stock = nn.ModuleDict({"block": stock, "transition": Transition(16, 8)}).eval()
    ours = copy.deepcopy(stock)
    assert [entry.result for entry in gconv.convert(ours)] == ["fused"] * 4 + ["gconv.Conv2d"]
    with gconv.trace() as trace, torch.no_grad():
        torch.testing.assert_close(ours.block(x), stock.block(x), rtol=1e-4, atol=1e-5)
    assert [row.kernel for row in trace] == ["cpu.dense_block"]
    for name in ("block", "transition"):
        other = nn.Sequential(*copy.deepcopy(stock).values())
        gconv.convert(other)
        expected = copy.deepcopy(stock[name])(x if name == "block" else torch.randn(2, 16, 6, 6))
        del other[1 if name == "block" else 0]
        assert other(x if name == "block" else torch.randn(2, 16, 6, 6)).shape == expected.shape


# ----------------------------------------------------------------------------------------- trace, fx, compile


def test_fx_and_jit_trace_see_the_blocks_own_forward():
    stock, ours, _, images = stock_and_converted()
    graphs = [torch.fx.symbolic_trace(model.eval()) for model in (stock, ours)]
    nodes = [[(n.op, str(n.target)) for n in graph.graph.nodes] for graph in graphs]
    assert nodes[0] == nodes[1]
    block = ours.features.denseblock1
    x = torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(graphs[1](images), stock(images), rtol=1e-4, atol=1e-4)
        with gconv.trace() as trace, pytest.warns(torch.jit.TracerWarning):
            traced = torch.jit.trace(block, x, check_trace=False)
        torch.testing.assert_close(traced(x), block(x), rtol=1e-4, atol=1e-4)
    assert next(iter(trace)).reason == "called one by one: torch.jit.trace"


def test_compiled_training_step_has_no_graph_break():
    ours = seeded(DenseNet, block_config=(1, 1), memory_efficient=True)
    gconv.convert(ours)
    assert_compiled_step_equals(ours, photos(), torch.arange(8))


def test_export_with_any_batch_size():
    stock, ours, _, images = stock_and_converted()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(ours.eval(), (images[:2],), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        torch.testing.assert_close(
            exported.module()(images[:5]), stock.eval()(images[:5]), rtol=1e-4, atol=1e-4
        )


# ------------------------------------------------------------------------------------------ torchvision, timm


def test_torchvision_densenet121():
    torchvision = require_torchvision()
    with torch.device("meta"):
        model = torchvision.models.densenet121(memory_efficient=True)
    before = anatomy(model)
    report = gconv.convert(model)
    assert len(report.fused) == len(report) == 120
    dense = [entry for entry in report if entry.reason == "in one dense block"]
    assert len(dense) == 2 * (6 + 12 + 24 + 16) + 3
    gconv.revert(model)
    assert anatomy(model) == before


def test_timm_densenet():
    import_torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install --no-deps timm")
    stock = seeded(timm.models.densenet.DenseNet, growth_rate=8, block_config=(2, 2), num_classes=10)
    lively(stock, photos())
    ours = copy.deepcopy(stock)
    report = gconv.convert(ours)
    assert str(report).splitlines()[0] == "features.conv0 kept: BatchNormAct2d" and len(report.fused) == 9
    assert same_values(ours.eval(), stock.eval(), photos()) == ONE_CALL
    with torch.no_grad():
        ours.set_grad_checkpointing()
        assert same_values(ours.train(), stock.train(), photos()) == ONE_CALL
