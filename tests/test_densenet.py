"""DenseNets and their layers: torchvision's weights and results to the bit in stock form, the fused forms
against the stock one, both kinds of names, and what has to be called as a module.

What DenseNets share with the other models (the registry, forms of weights, the committed list of names) is
in test_models.py and test_model_weights.py.
"""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from fused_checks import FrozenBatchNorm2d
from model_checks import (
    assert_as_good,
    assert_compiled_step_equals,
    assert_same_to_the_bit,
    assert_steps_as_good,
    lively,
    pair,
    seeded,
    training_step,
)
from torch import nn
from torchvision_models import names_and_shapes, require_torchvision

import gconv
from gconv import models
from gconv.dense_layers import DenseLayer, Transition, run_dense_block

MEMORY = ("naive", "shared", "ultra")
FUSED = MEMORY[1:]
# What both torchvision's DenseNet and ours take.
TINY = {"growth_rate": 8, "block_config": (2, 3), "num_init_features": 16, "num_classes": 10}


@pytest.fixture(autouse=True)
def _kernels_only(ops):
    """A fallback where our kernels should run is an error in every test here."""
    with gconv.set_policy("error"):
        yield


def tiny_pair(size=32, batch=8, **kwargs):
    """(fused model, stock model of the same state, images).

    The images are channels_last: what the fused model makes of them, and there torch's batch norm too sums
    gradients in float32 instead of double.
    """
    fused, stock, images = pair("DenseNet", size=size, batch=batch, **{**TINY, **kwargs})
    if not kwargs.get("small_images"):
        # Half of what the stem gives is zero. Where nearly nothing is, the batch norms that read it, which
        # are blind to its scale, leave nothing but rounding of the gradients of norm0.
        with torch.no_grad():
            stock.features.norm0.bias -= 1.5
        fused.load_state_dict(stock.state_dict())
    return fused, stock, images.contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------- names, shapes, weights, bits


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_names_and_shapes_are_torchvisions(name):
    torchvision = require_torchvision()
    with torch.device("meta"):
        want = names_and_shapes(getattr(torchvision.models, name)())
        assert list(names_and_shapes(models.get_model(name)).items()) == list(want.items())


PARAMETERS = {  # torchvision's counts, and for CIFAR those of table 2 in millions
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet40_k12": "1.0",
    "densenet100_k12": "7.0",
    "densenet100_k24": "27.2",
    "densenet_bc100_k12": "0.8",
    "densenet_bc250_k24": "15.3",
    "densenet_bc190_k40": "25.6",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_papers(name):
    with torch.device("meta"):
        model = models.get_model(name)
    count = sum(p.numel() for p in model.parameters())
    want = PARAMETERS[name]
    assert count == want if isinstance(want, int) else f"{count / 1e6:.1f}" == want
    assert model.classifier.out_features == (1000 if isinstance(want, int) else 10)
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    depth = "".join(filter(str.isdigit, name.partition("_k")[0]))
    assert len(weighted) == int(depth), "the depth is in the name"


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
@pytest.mark.parametrize("form", [{"stock": True}, {"memory": "naive"}], ids=["stock", "naive"])
def test_stock_form_is_torchvisions_to_the_bit(form, drop_rate):
    theirs = require_torchvision().models.DenseNet
    want = seeded(theirs, drop_rate=drop_rate, **TINY)
    actual, fused = (seeded(models.DenseNet, drop_rate=drop_rate, **TINY, **kwargs) for kwargs in (form, {}))
    assert_same_to_the_bit(actual, fused, want)


# -------------------------------------------------------------------- fused against stock

CASES = {
    "bc": {},
    "no_bottleneck": {"bn_size": None, "compression": 1.0},
    "odd": {"size": 53, "growth_rate": 6, "num_init_features": 10},
    "cifar": {"small_images": True, "size": 16, "block_config": (2, 2, 2)},
    "one_block": {"block_config": (3,), "in_channels": 2},
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CASES)
def test_inference_equals_stock(case, memory):
    fused, stock, images = tiny_pair(memory=memory, **CASES[case])
    with torch.inference_mode():
        baseline = stock.eval()(images)
        exact = copy.deepcopy(stock).double()(images.double())
        for form in (images, images.contiguous()):
            assert_as_good(fused.eval()(form), baseline, exact, case)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CASES)
def test_training_step_equals_stock(case, memory):
    fused, stock, images = tiny_pair(memory=memory, **CASES[case])
    labels = torch.arange(len(images))
    exact = training_step(copy.deepcopy(stock).double(), images.double(), labels)
    baseline = training_step(stock, images, labels)
    actual = training_step(fused, images, labels)
    assert_steps_as_good(actual, baseline, exact, factor=2.0)


@pytest.mark.parametrize("memory", MEMORY)
def test_running_statistics_move_once(memory):
    model, images = seeded(models.DenseNet, memory=memory, **TINY), torch.randn(2, 3, 32, 32)
    training_step(model, images, torch.tensor([1, 5]))
    counters = [t for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert len(counters) == 13 and all(counter == 1 for counter in counters)


@pytest.mark.parametrize("memory", MEMORY)
def test_everything_dropped(memory):
    """A drop rate of 1 leaves no chance: what the layers add is zero, in evaluation it is all there."""
    fused, stock, images = tiny_pair(memory=memory, drop_rate=1.0)
    for training in (True, False):
        exact = copy.deepcopy(stock).double().train(training)(images.double())
        assert_as_good(fused.train(training)(images), stock.train(training)(images), exact)
    block = fused.features.denseblock1.train()
    y = block(torch.randn(2, 16, 8, 8))
    assert y[:, :16].ne(0).all() and not y[:, 16:].any()


def test_a_changed_weight_is_seen():
    """The comparisons above can fail: one weight of one layer off by 1 % is far outside them."""
    fused, stock, images = tiny_pair()
    exact = copy.deepcopy(stock).double().eval()(images.double()).detach()
    with torch.no_grad():
        fused.features.denseblock2.denselayer2.conv1.weight *= 1.01
        with pytest.raises(AssertionError, match="relative RMS error"):
            assert_as_good(fused.eval()(images), stock.eval()(images), exact)


@pytest.mark.parametrize("memory", FUSED)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_each_block_is_one_call(memory, training):
    model = models.DenseNet(**TINY, memory=memory).train(training)
    with gconv.trace() as trace, torch.set_grad_enabled(training):
        model(torch.randn(4, 3, 32, 32))
    rows = [
        (row.layer, row.kernel, row.calls) for row in trace if "dense" in row.layer or "trans" in row.layer
    ]
    assert rows == [(f"features.denseblock{i}", "cpu.dense_block", 1) for i in (1, 2)], str(trace)


def test_memory_of_each_block():
    assert models.DenseNet(**TINY, memory_efficient=True).features.denseblock2.memory == "ultra"
    assert models.DenseNet(**TINY).features.transition1.memory == "shared"
    for kwargs in ({"stock": True}, {"memory": "naive"}):
        model = models.DenseNet(**TINY, small_images=True, **kwargs)
        assert {m.memory for m in model.modules() if hasattr(m, "memory")} == {"naive"}
        assert not any(type(m).__module__ == "gconv.layers" for m in model.modules())


# -------------------------------------------------------------------- the layers by themselves


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("bn_size", [2, 0])
def test_block_in_a_network_of_ones_own(memory, bn_size):
    kwargs = {"num_layers": 2, "num_input_features": 8, "bn_size": bn_size, "growth_rate": 4}
    block, want = (seeded(gconv.DenseBlock, **kwargs, memory=m) for m in (memory, "naive"))
    x = torch.randn(3, 8, 6, 5)
    y, exact = block(x), copy.deepcopy(want).double()(x.double())
    assert y.shape == (3, 16, 6, 5) and torch.equal(y[:, :8], x)
    assert_as_good(y, want(x), exact)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_transition_pools_first(training):
    fused, stock = (
        seeded(Transition, 0, num_input_features=12, num_output_features=6, memory=m)
        for m in FUSED[:1] + MEMORY[:1]
    )
    x = torch.randn(3, 12, 7, 6)
    for transition in (fused, stock):
        lively(transition, x).train(training)
    results = []
    for transition, image in ((fused, x), (stock, x), (copy.deepcopy(stock).double(), x.double())):
        image = image.clone().requires_grad_()
        with gconv.trace() as trace:
            y = transition(image)
        y.square().sum().backward()
        results.append([y.detach(), image.grad, *(p.grad for p in transition.parameters())])
        if transition is fused:
            assert [row.shape for row in trace][-1] == (3, 12, 3, 3), "the convolution sees pooled pixels"
    for actual, baseline, exact in zip(*results):
        assert_as_good(actual, baseline, exact)
    assert all(
        torch.equal(b, stock.get_buffer(name)) for name, b in fused.named_buffers() if "tracked" in name
    )


def test_wrong_arguments_name_what_is_wrong():
    cases = [
        (lambda: gconv.DenseBlock(2, 8, 4, 4, memory="fast"), "DenseBlock: memory: want .* got 'fast'"),
        (lambda: gconv.DenseBlock(0, 8, 4, 4), "DenseBlock: num_layers: want at least 1, got 0"),
        (lambda: gconv.DenseBlock(1, 8, -1, 4), "DenseLayer: bn_size: want None, 0 or a pos.*, got -1"),
        (lambda: DenseLayer(8, 0), "DenseLayer: growth_rate: want at least 1, got 0"),
        (lambda: DenseLayer(8, 4, drop_rate=1.5), "DenseLayer: drop_rate: want 0 to 1, got 1.5"),
        (lambda: Transition(8, 0), "Transition: num_output_features: want at least 1, got 0"),
        (lambda: models.DenseNet(memory=None), "DenseNet: memory: want shared, ultra or naive, got None"),
        (lambda: models.DenseNet(compression=0), "DenseNet: compression: want above 0 to 1, got 0"),
        (lambda: models.DenseNet(block_config=()), "DenseNet: block_config: want at least one block"),
        (lambda: models.DenseNet(stock=True, memory_efficient=True), "memory_efficient: want False with"),
        (lambda: models.densenet121(growth_rate=12), "densenet121: growth_rate: want 32, got 12"),
        (lambda: models.densenet_bc100_k12(bn_size=None), "densenet_bc100_k12: bn_size: want 4, got None"),
    ]  # fmt: skip
    for make, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


# -------------------------------------------------------------------- names of old, weights


def renamed(state):
    """The state dict as checkpoints of old name its tensors; they have no counters."""
    return {
        name.replace("norm1.", "norm.1.")
        .replace("conv1.", "conv.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv2.", "conv.2."): t
        for name, t in state.items()
        if not name.endswith("num_batches_tracked")
    }


def test_remap():
    state = models.DenseNet(**TINY).state_dict()
    old = renamed(state)
    assert "features.denseblock1.denselayer2.norm.2.running_var" in old
    today = models.remap_densenet_keys(old)
    assert list(today) == [name for name in state if not name.endswith("num_batches_tracked")]
    assert all(today[name] is old_tensor for name, old_tensor in zip(today, old.values(), strict=True))
    assert models.remap_densenet_keys(today) == today, "twice is once"
    assert models.remap_densenet_keys(state).keys() == state.keys()
    wrapped = {f"module.net.{name}": t for name, t in old.items()}
    assert list(models.remap_densenet_keys(wrapped)) == [f"module.net.{name}" for name in today]
    other = {"encoder.norm.1.weight": torch.ones(1), "denselayer1.norm.3.weight": torch.ones(1)}
    assert models.remap_densenet_keys(other) == other
    both = {"denselayer1.norm.1.weight": torch.ones(1), "denselayer1.norm1.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"want one of 'denselayer1.norm.1.weight' and .*, got both"):
        models.remap_densenet_keys(both)


def test_names_of_old_load_everywhere():
    _, stock, images = tiny_pair()
    want, old = stock.eval()(images), renamed(stock.state_dict())
    by_torch, by_us = (models.DenseNet(**TINY, stock=True).eval() for _ in range(2))
    by_torch.load_state_dict(old)
    models.load_weights(by_us, {f"module.{name}": t for name, t in old.items()})
    assert torch.equal(by_torch(images), want) and torch.equal(by_us(images), want)
    layer = stock.features.denseblock1.denselayer1
    alone = DenseLayer(16, 8)
    alone.load_state_dict({name: t.clone() for name, t in renamed(layer.state_dict()).items()})
    assert torch.equal(alone.norm2.running_var, layer.norm2.running_var)
    with pytest.raises(RuntimeError, match=r"denselayer1.norm1.weight"):
        by_torch.load_state_dict({n: t for n, t in old.items() if "denselayer1.norm.1.weight" not in n})


def test_weights_of_a_builder(tmp_path):
    model = seeded(models.densenet_bc100_k12, num_classes=3)
    torch.save({"state_dict": renamed(model.state_dict())}, tmp_path / "old.pth")
    for weights in (tmp_path / "old.pth", model.state_dict()):
        loaded = models.densenet_bc100_k12(weights=weights, memory="ultra")
        assert loaded.classifier.out_features == 3
        for name, tensor in loaded.named_parameters():
            assert torch.equal(tensor, model.get_parameter(name)), name
    with pytest.raises(
        ValueError,
        match=r"num_classes = 10, the weights 3: .* replace model.classifier by nn.Linear\(342, 10\)",
    ):
        models.densenet_bc100_k12(weights=model.state_dict(), num_classes=10)


@pytest.mark.parametrize("memory", FUSED)
def test_state_dict_copies_and_pickle(memory):
    fused, stock, images = tiny_pair(memory=memory)
    stock.load_state_dict(fused.state_dict())
    want = fused.eval()(images)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copied(images), want)
        assert list(copied.state_dict()) == list(stock.state_dict())


# -------------------------------------------------------------------- what has to be called as a module

LAYER = "features.denseblock1.denselayer2"
CHILDREN = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")


def same_values(fused, stock, images):
    """The fused model's trace; its values are the stock model's."""
    with gconv.trace() as trace, torch.no_grad():
        actual, want = fused(images), stock(images)
    torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-4)
    return trace


def reasons(trace):
    return {
        row.layer: row.reason.removeprefix("called one by one: ") for row in trace if row.kernel == "modules"
    }


def test_hooks_fire_on_the_values_of_torchvision():
    paths = (
        "features.norm0", "features.relu0", f"{LAYER}.norm1", f"{LAYER}.conv2", LAYER, "features.denseblock2",
        "features.transition1", "features.norm5", "features", "classifier",
    )  # fmt: skip
    for path in paths:
        fused, stock, images = tiny_pair()
        seen = []
        for model in (fused.eval(), stock.eval()):
            model.get_submodule(path).register_forward_hook(
                lambda m, args, y, seen=seen: seen.append(y.clone())
            )
        trace = same_values(fused, stock, images)
        assert len(seen) == 2, path
        torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4, msg=lambda text, path=path: f"{path}: {text}")
        if path.startswith(LAYER):
            child = path.removeprefix(LAYER).replace(".", " ").strip()
            reason = ": ".join(filter(None, ("denselayer2", child, "has hooks")))
            assert reasons(trace) == {"features.denseblock1": reason}
        elif not path.startswith("features.norm0"):
            assert not reasons(trace), path


def test_a_hook_sees_what_later_layers_leave_alone():
    """A final ReLU in place, as in torchvision, would change what a hook on `features` keeps."""
    model, kept = models.DenseNet(**TINY).eval(), []
    model.features.register_forward_hook(lambda module, args, y: kept.append(y))
    model(torch.randn(2, 3, 32, 32))
    assert kept[0].min() < 0


@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_every_childs_hooks_run(child, kind):
    block = gconv.DenseBlock(1, 8, 2, 4)
    seen = []
    module = block.get_submodule(f"denselayer1.{child}")
    if child.startswith("relu"):
        module.inplace = False  # torch forbids a full backward hook around a change in place
    norm = block.get_submodule(f"denselayer1.{child.replace('norm', 'relu')}")
    norm.inplace = False if child.startswith("norm") else getattr(norm, "inplace", None)
    handle = getattr(module, f"register_{kind}_hook")(lambda *args: seen.append(kind))
    with gconv.trace() as trace:
        block(torch.randn(2, 8, 4, 4, requires_grad=True)).sum().backward()
    assert seen == [kind] and reasons(trace) == {"DenseBlock": f"denselayer1: {child}: has hooks"}
    handle.remove()
    with gconv.trace() as trace:
        block(torch.randn(2, 8, 4, 4))
    assert not reasons(trace)


class Halved(DenseLayer):
    def forward(self, x):
        return super().forward(x) / 2


def halve(layer):
    layer.__class__ = Halved


def replace_forward(module):
    module.forward = lambda x: x * 2


REPLACED = {
    "relu": (lambda layer: setattr(layer, "relu2", nn.SiLU()), "relu2: want ReLU, got SiLU"),
    "norm": (
        lambda layer: setattr(layer, "norm1", nn.GroupNorm(4, 24)),
        "norm1: want BatchNorm2d, .* got GroupNorm",
    ),
    "conv": (
        lambda layer: nn.utils.parametrizations.weight_norm(layer.conv2),
        "conv2: want Conv2d, got ParametrizedConv2d",
    ),
    "forward": (lambda layer: replace_forward(layer.norm2), "norm2: its forward is replaced"),
    "layer": (halve, "want DenseLayer, got Halved"),
    "dropout": (
        lambda layer: setattr(layer, "drop_rate", 0.5) or layer.conv2.train(),
        "its convolution is not in its mode",
    ),
    "child": (lambda layer: layer.add_module("extra", nn.Identity()), "want norm1, .*, got .*, extra"),
}  # fmt: skip


@pytest.mark.parametrize("change", REPLACED)
def test_replaced_modules_run(change):
    fused, stock, images = tiny_pair()
    apply, reason = REPLACED[change]
    for model in (fused.eval(), stock.eval()):
        torch.manual_seed(5)
        apply(model.get_submodule(LAYER))
    trace = same_values(fused, stock, images)
    assert list(reasons(trace)) == ["features.denseblock1"], str(trace)
    assert re.fullmatch("denselayer2: " + reason, reasons(trace)["features.denseblock1"])


def test_replaced_endings_run():
    fused, stock, images = tiny_pair(block_config=(1, 1, 1))
    for model in (fused.eval(), stock.eval()):
        torch.manual_seed(5)
        features = model.features
        features.relu0 = nn.SiLU()
        features.transition1.pool = nn.AvgPool2d(3, stride=2, padding=1)
        features.transition2.relu = nn.SiLU()
        features.norm5 = nn.Identity()
        features.add_module("extra", nn.AvgPool2d(2))
    trace = same_values(fused, stock, images)
    assert reasons(trace)["features.transition1"].startswith(
        "pool: want AvgPool2d(2, 2), got AvgPool2d(kernel_size=3"
    )
    assert reasons(trace)["features.transition2"] == "relu: want ReLU, got SiLU"
    for model in (fused, stock):
        model.features.transition1.conv = nn.Conv2d(24, 12, 3, padding=1)
        model.features = model.features[:]
    fused.load_state_dict(stock.state_dict())
    assert reasons(same_values(fused, stock, images))["features.transition1"].startswith("conv: want 1x1")


def test_run_dense_block_calls_what_is_not_merged():
    block, x = gconv.DenseBlock(1, 8, 2, 4).eval(), torch.randn(2, 8, 4, 4)
    naive = copy.deepcopy(block)
    naive.memory = "naive"
    for ending in (Transition(12, 6).eval(), nn.BatchNorm2d(12).eval(), nn.Identity(), nn.InstanceNorm2d(12)):
        want = ending(naive(x))
        want = want if isinstance(ending, Transition) else F.relu(want)
        for memory in (block, naive):
            torch.testing.assert_close(run_dense_block(x, memory, ending), want, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------- what users do to models


def test_frozen_and_synchronised_norms():
    fused, stock, images = tiny_pair()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fused)).eval()
    assert list(synced.state_dict()) == list(stock.state_dict())
    frozen = models.DenseNet(**TINY, norm_layer=FrozenBatchNorm2d)
    state = {name: t for name, t in stock.state_dict().items() if not name.endswith("tracked")}
    frozen.load_state_dict(state)
    with gconv.set_policy("silent"):
        same_values(synced, stock.eval(), images)
    same_values(frozen.train(), stock, images)
    assert torch.equal(frozen.features.norm5.running_var, stock.features.norm5.running_var)


def test_fx_graph_has_torchvisions_nodes():
    torchvision = require_torchvision()
    fused, stock, images = tiny_pair()
    want = torch.fx.symbolic_trace(torchvision.models.DenseNet(**TINY).eval())
    for model in (fused.eval(), stock.eval()):
        graph = torch.fx.symbolic_trace(model)
        assert [(n.name, n.target) for n in graph.graph.nodes] == [
            (n.name, n.target) for n in want.graph.nodes
        ]
        torch.testing.assert_close(graph(images), stock(images))


def test_feature_extraction():
    require_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    fused, stock, images = tiny_pair()
    names = ["features.denseblock1", "features.transition1", "features.norm5"]
    leaves = {"leaf_modules": [gconv.DenseBlock, Transition]}
    with torch.no_grad():
        want = create_feature_extractor(stock.eval(), names)(images)
        with gconv.trace() as trace:
            actual = create_feature_extractor(fused.eval(), names, tracer_kwargs=leaves)(images)
    for name in names:
        torch.testing.assert_close(actual[name], want[name], rtol=1e-4, atol=1e-4)
    assert sum(row.calls for row in trace if row.kernel == "cpu.dense_block") == 2


@pytest.mark.parametrize("bn_size", [4, None])
def test_scripted(bn_size):
    fused, stock, images = tiny_pair(bn_size=bn_size, drop_rate=0.2)
    scripted = torch.jit.script(fused.eval())
    torch.testing.assert_close(scripted(images), stock.eval()(images), rtol=1e-5, atol=1e-5)


def test_convert_leaves_our_blocks_as_they_are():
    fused, stock, images = tiny_pair()
    before = [type(module) for module in fused.modules()]
    report = gconv.convert(nn.Sequential(fused, gconv.DenseBlock(1, 10, 2, 4)))
    assert len(report) == 2 and [type(module) for module in fused.modules()] == before
    assert "features.denseblock1.denselayer1.conv2" in gconv.convert(stock).swapped
    same_values(fused.eval(), stock.eval(), images)


@pytest.mark.parametrize("memory", FUSED)
def test_compiled_training_step_has_no_graph_break(memory):
    model, _, images = tiny_pair(memory=memory, block_config=(2,))
    assert_compiled_step_equals(model, images, torch.arange(len(images)))


def test_export_with_any_batch_size():
    model, _, images = tiny_pair()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model.eval(), (images[:2],), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(images[:5]), model(images[:5]), rtol=1e-5, atol=1e-5)


def test_autocast_runs_in_bfloat16():
    fused, stock, images = tiny_pair()
    with torch.no_grad():
        exact = copy.deepcopy(stock).double().eval()(images.double())
        with torch.autocast("cpu", torch.bfloat16), gconv.trace() as trace:
            actual, baseline = fused.eval()(images), stock.eval()(images)
    assert all(row.dtype == "bfloat16" for row in trace if row.kernel == "cpu.dense_block")
    assert_as_good(actual, baseline, exact, factor=2.0, floor=4e-3)
