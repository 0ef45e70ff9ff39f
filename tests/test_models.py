"""The models against torchvision: names, initial weights, outputs, a training step, options, tracing, hooks.

Where torchvision is installed the stock form of each model (`stock=True`, torch.nn alone) must equal
torchvision's to the bit. The fused form is then compared with the stock form everywhere.
"""

import copy
import io
import json
import pickle

import pytest
import torch
from model_checks import (
    assert_as_good,
    assert_compiled_step_equals,
    assert_same_to_the_bit,
    assert_steps_as_good,
    pair,
    seeded,
    training_step,
)
from torch import nn
from torchvision_models import DATA, NAMES, SEEDED, first_values, names_and_shapes, require_torchvision

import gconv
from gconv import backend, models
from gconv.backend import counts, reset_counts

RECORD = json.loads(DATA.read_text())


@pytest.fixture(autouse=True)
def _kernels_only(ops):
    """A fallback where our kernels should run is an error in every test here."""
    with gconv.set_policy("error"):
        yield


# -------------------------------------------------------------------- names, shapes, weights


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stock", [False, True], ids=["fused", "stock"])
def test_names_shapes_and_order_are_torchvisions(name, stock):
    with torch.device("meta"):
        actual = names_and_shapes(models.get_model(name, stock=stock))
    assert list(actual.items()) == list(RECORD["names_and_shapes"][name].items())


@pytest.mark.parametrize("name", SEEDED)
def test_initial_weights_are_torchvisions(name):
    actual = first_values(seeded(models.get_model_builder(name)))
    want = RECORD["first_values_with_seed_0"][name]
    assert list(actual) == list(want)
    for key, values in want.items():
        torch.testing.assert_close(
            torch.tensor(actual[key]), torch.tensor(values), rtol=1e-4, atol=1e-6, msg=key
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_list_is_torchvisions(name):
    torchvision = require_torchvision()
    with torch.device("meta"):
        want = names_and_shapes(getattr(torchvision.models, name)())
    assert list(RECORD["names_and_shapes"][name].items()) == list(want.items())


# Arguments of ResNet; every difference between the named models is in here.
VARIANTS = {
    "basic": {"block": "BasicBlock", "layers": [2, 1, 1, 2]},
    "resnext": {"layers": [2, 1, 1, 2], "groups": 32, "width_per_group": 4, "num_classes": 7},
    "zero_init": {"zero_init_residual": True},
    "zero_init_basic": {"block": "BasicBlock", "zero_init_residual": True},
    "dilated": {"layers": [1, 2, 2, 2], "replace_stride_with_dilation": [False, True, True]},
    "wide": {"width_per_group": 128},
    "group_norm": {"block": "BasicBlock", "norm_layer": lambda width: nn.GroupNorm(8, width)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_form_is_torchvisions_to_the_bit(variant):
    theirs = require_torchvision().models.resnet
    kwargs = {"block": "Bottleneck", "layers": [1, 1, 1, 1], **VARIANTS[variant]}
    block = kwargs.pop("block")
    want = seeded(theirs.ResNet, block=getattr(theirs, block), **kwargs)
    actual, fused = (
        seeded(models.ResNet, block=getattr(models, block), stock=stock, **kwargs) for stock in (True, False)
    )
    assert_same_to_the_bit(actual, fused, want)


# -------------------------------------------------------------------- fused against stock

CASES = {
    "resnet18": {"name": "resnet18"},
    "resnext50": {"name": "resnext50_32x4d"},
    "odd": {"name": "resnext50_32x4d", "size": 75, "batch": 1},
    "small_images": {"name": "resnet34", "size": 16, "small_images": True, "num_classes": 10},
    "dilated": {
        "name": "ResNet",
        "block": models.Bottleneck,
        "layers": [1, 1, 1, 2],
        "groups": 8,
        "width_per_group": 8,
        # Both would give a dilation, and so a padding, of 4, which torch runs.
        "replace_stride_with_dilation": [False, False, True],
    },
    "wide": {"name": "ResNet", "block": models.Bottleneck, "layers": [1, 1, 1, 1], "width_per_group": 128},
    "digits": {"name": "resnext_digits", "size": 32, "batch": 8, "in_channels": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_inference_equals_stock(case):
    fused, stock, images = pair(**CASES[case])
    with torch.inference_mode():
        baseline = stock.eval()(images)
        exact = copy.deepcopy(stock).double()(images.double())
        reset_counts()
        actual = fused.eval()(images)
    assert any(kernel.startswith("cpu.") for kernel in counts()), counts()
    assert_as_good(actual, baseline, exact, case)


@pytest.mark.parametrize("case", ["resnet18", "resnext50", "dilated", "digits"])
def test_training_step_equals_stock(case):
    # Eight images: a batch norm over two pixels turns rounding into sign changes, in stock too.
    fused, stock, images = pair(**{"size": 32, **CASES[case], "batch": 8})
    labels = torch.arange(len(images)) % 10
    exact = training_step(copy.deepcopy(stock).double(), images.double(), labels)
    baseline = training_step(stock, images, labels)
    with torch.profiler.profile() as profile:
        actual = training_step(fused, images, labels)
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("gconv::")}
    blocks = [module for module in fused.modules() if isinstance(module, models.Bottleneck)]
    chained = {id(module) for block in blocks for module in block.modules()}
    alone = sum(
        module.kernel_size in ((1, 1), (3, 3))
        and not backend.dense_to_torch(module.groups, module.in_channels, module.kernel_size)
        for module in fused.modules()
        if isinstance(module, nn.Conv2d) and id(module) not in chained
    )
    assert calls.get("gconv::conv_bn_relu_fwd_train", 0) == alone, calls
    assert calls.get("gconv::conv_bn_relu_bwd", 0) == alone, calls
    assert calls.get("gconv::grouped_conv_bwd", 0) >= len(blocks), calls
    assert_steps_as_good(actual, baseline, exact)


def test_training_step_in_float64_is_stocks():
    fused, stock, images = pair("resnext_digits", size=16, batch=4, in_channels=1)
    labels = torch.arange(4)
    with gconv.set_policy("silent"):
        actual = training_step(fused.double(), images.double(), labels)
    for key, want in training_step(stock.double(), images.double(), labels).items():
        torch.testing.assert_close(
            actual[key], want, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_a_changed_weight_is_seen():
    """The comparison above can fail: one weight of one layer off by 1 % is far outside it."""
    fused, stock, images = pair("resnext_digits", size=32, batch=8, in_channels=1)
    exact = copy.deepcopy(stock).double().eval()(images.double()).detach()
    baseline = stock.eval()(images).detach()
    with torch.no_grad():
        fused.layer2[0].conv2.weight *= 1.01
        actual = fused.eval()(images)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_as_good(actual, baseline, exact)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_3x3_layer_runs_on_our_kernels(training):
    model = models.resnext50_32x4d().train(training)
    with gconv.trace() as trace, torch.set_grad_enabled(training):
        model(torch.randn(2, 3, 64, 64))
    ours = {row.layer for row in trace if row.kernel.startswith("cpu.")}
    blocks = {name for name, module in model.named_modules() if isinstance(module, models.Bottleneck)}
    assert len(blocks) == 16
    missing = {block for block in blocks if not any(layer.startswith(block) for layer in ours)}
    assert not missing, f"no kernel of ours ran in {sorted(missing)}\n{trace}"
    torch_rows = [row for row in trace if not row.kernel.startswith("cpu.")]
    assert all(row.reason.startswith("by design") for row in torch_rows), str(trace)


def test_channels_last_stays_and_equals():
    fused, stock, images = pair("resnet18")
    fused, stock = (m.eval().to(memory_format=torch.channels_last) for m in (fused, stock))
    images = images.to(memory_format=torch.channels_last)
    seen = []
    fused.layer2.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        actual, baseline = fused(images), stock(images)
        exact = copy.deepcopy(stock).double()(images.double())
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    assert_as_good(actual, baseline, exact)


def test_autocast_runs_in_bfloat16():
    fused, stock, images = pair("resnext_digits", size=32, batch=8, in_channels=1)
    dtypes = []
    fused.layer1.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.no_grad():
        exact = copy.deepcopy(stock).double().eval()(images.double())
        with torch.autocast("cpu", torch.bfloat16):
            actual, baseline = fused.eval()(images), stock.eval()(images)
    assert dtypes == [torch.bfloat16] and actual.dtype == baseline.dtype
    assert_as_good(actual, baseline, exact, factor=2.0, floor=4e-3)


# -------------------------------------------------------------------- options of the builders


def test_zero_init_residual_makes_each_block_the_identity():
    for name, last in (("resnet18", "bn2"), ("resnet50", "bn3")):
        model = models.get_model(name, zero_init_residual=True)
        for block in (m for m in model.modules() if isinstance(m, (models.BasicBlock, models.Bottleneck))):
            assert getattr(block, last).weight.abs().sum() == 0
            assert block.bn1.weight.min() == 1
        block = model.layer1[1].eval()
        x = torch.rand(1, block.conv1.in_channels, 8, 8)
        assert torch.equal(block(x), x)


def test_small_images_keep_their_size_in_the_stem():
    model = models.resnext50_32x4d(small_images=True, num_classes=10, in_channels=1)
    assert type(model.conv1) is gconv.Conv2d and model.conv1.weight.shape == (64, 1, 3, 3)
    assert isinstance(model.maxpool, nn.Identity)
    sizes = {}
    for i in (1, 2, 3, 4):
        model.get_submodule(f"layer{i}").register_forward_hook(
            lambda module, args, output, i=i: sizes.__setitem__(i, tuple(output.shape[1:]))
        )
    assert model.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 10)
    assert sizes == {1: (256, 32, 32), 2: (512, 16, 16), 3: (1024, 8, 8), 4: (2048, 4, 4)}


def test_resnext_digits():
    fused, stock = seeded(models.resnext_digits), seeded(models.resnext_digits, stock=True)
    assert sum(p.numel() for p in fused.parameters()) == DIGITS_PARAMETERS
    for (name, a), (stock_name, b) in zip(
        fused.state_dict().items(), stock.state_dict().items(), strict=True
    ):
        assert name == stock_name and torch.equal(a, b), name
    assert not any(type(module).__module__.startswith("gconv.layers") for module in stock.modules())
    grouped = [m for m in fused.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert grouped and all(type(m) is gconv.Conv2d for m in grouped)
    assert fused(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert models.resnext_digits(in_channels=3)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


DIGITS_PARAMETERS = 62_746


def test_registry():
    names = models.list_models()
    assert set(NAMES) <= set(names) and names == sorted(names)
    assert models.list_models("resnext101*") == ["resnext101_32x8d", "resnext101_64x4d"]
    assert models.list_models(exclude=["res*", "dense*"]) == ["wide_resnet101_2", "wide_resnet50_2"]
    assert models.get_model_builder("ResNet18") is models.resnet18
    assert models.get_model("resnet18", num_classes=3).fc.out_features == 3
    with pytest.raises(ValueError, match=r"get_model: name: want one of .*, resnet101, .*, got 'resnet19'"):
        models.get_model("resnet19")


def test_wrong_arguments_name_what_is_wrong():
    with pytest.raises(ValueError, match="replace_stride_with_dilation: want None or 3 elements"):
        models.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match="resnext50_32x4d: groups: want 32, got 16"):
        models.resnext50_32x4d(groups=16)
    with pytest.raises(ValueError, match=r"layers: want 1 to len\(planes\) = 4 stages"):
        models.ResNet(models.Bottleneck, [1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="groups = 2"):
        models.resnet18(groups=2)
    with pytest.raises(NotImplementedError, match="dilation = 1, got 2"):
        models.resnet18(replace_stride_with_dilation=[False, True, True])
    with pytest.raises(ValueError, match=r"weight: want .* C/groups = 1, got \[64, 3, 7, 7\]"):
        models.resnet18()(torch.randn(1, 1, 64, 64))


# -------------------------------------------------------------------- what users do to models


def test_deepcopy_and_pickle():
    fused, _, images = pair("resnext_digits", size=32, batch=4, in_channels=1)
    want = fused.eval()(images)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(copied(images), want)
        assert list(copied.state_dict()) == list(fused.state_dict())


def test_hooks_fire_and_replaced_modules_run():
    fused, stock, images = pair("resnext_digits", size=32, batch=4, in_channels=1)
    for model in (fused, stock):
        model.eval()
        model.layer1[0].relu = nn.SiLU()
        model.layer2[1].bn2 = nn.GroupNorm(4, 32)
        model.layer3[0].downsample = nn.Conv2d(64, 128, 1, stride=2, bias=False)
        model.layer3[1].bn1 = nn.Identity()
    fused.load_state_dict(stock.state_dict())
    seen = {"fused": [], "stock": []}
    paths = [
        "relu",
        "layer2.0.relu",
        "layer2.0.bn3",
        "layer2.0.conv2",
        "layer2.0.downsample",
        "layer2.0.downsample.1",
    ]
    for kind, model in (("fused", fused), ("stock", stock)):
        for path in paths:
            model.get_submodule(path).register_forward_hook(
                lambda module, args, output, kind=kind, path=path: seen[kind].append((path, output.clone()))
            )
    with gconv.set_policy("silent"), torch.no_grad(), gconv.trace() as trace:
        actual, want = fused(images), stock(images)
    torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-4)
    reasons = {row.layer: row.reason for row in trace if row.kernel == "modules"}
    assert reasons["layer1.0"] == "called one by one: relu: want ReLU, got SiLU"
    assert reasons["layer2.0"] == "called one by one: relu: has hooks"
    assert "GroupNorm" in reasons["layer2.1.conv2"]
    assert sorted(path for path, _ in seen["fused"]) == sorted(path for path, _ in seen["stock"])
    stock_outputs = dict(seen["stock"])
    for path, output in seen["fused"]:
        if path != "layer2.0.relu":  # called three times, compared through the block's output
            torch.testing.assert_close(output, stock_outputs[path], rtol=1e-4, atol=1e-4)


def test_fx_graph_has_torchvisions_nodes():
    fused, stock, images = pair("resnext50_32x4d")
    graph = torch.fx.symbolic_trace(fused.eval())
    nodes = {node.name for node in graph.graph.nodes}
    assert {"conv1", "layer1_0_conv2", "layer1_0_bn2", "layer1_0_relu_2", "layer4_2_relu_2", "fc"} <= nodes
    reference = torch.fx.symbolic_trace(stock.eval())
    assert [n.target for n in graph.graph.nodes] == [n.target for n in reference.graph.nodes]
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(images.double())
        assert_as_good(graph(images), stock(images), exact)


def test_feature_extraction():
    require_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    fused, stock, images = pair("resnext50_32x4d")
    names = ["layer1", "layer2.0.conv2", "layer3.5.relu_2", "avgpool"]
    whole_blocks = {"leaf_modules": [models.BasicBlock, models.Bottleneck]}
    with torch.no_grad():
        want = create_feature_extractor(stock.eval(), names)(images)
        actual = create_feature_extractor(fused.eval(), names)(images)
        stages = create_feature_extractor(fused, ["layer1", "layer4"], tracer_kwargs=whole_blocks)
        with gconv.trace() as trace:
            features = stages(images)
    assert list(actual) == names
    for name in names:
        torch.testing.assert_close(actual[name], want[name], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(features["layer1"], want["layer1"], rtol=1e-3, atol=1e-3)
    assert features["layer4"].shape == (2, 2048, 2, 2)
    assert sum(row.calls for row in trace if row.kernel == "cpu.bottleneck") == 16


def small(**kwargs):
    return seeded(
        models.ResNet, block=models.Bottleneck, layers=[1], groups=4, width_per_group=16, planes=[8], **kwargs
    )


def test_compiled_training_step_has_no_graph_break():
    assert_compiled_step_equals(small(), torch.randn(4, 3, 32, 32), torch.arange(4))


def test_compiled_inference():
    model, images = small().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(images)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), want, rtol=1e-5, atol=1e-5)


def test_export_with_any_batch_size():
    model = small().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    assert any("gconv.grouped_conv_fwd" in str(node.target) for node in exported.graph.nodes)
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(images), model(images), rtol=1e-5, atol=1e-5)


def test_gradients_of_each_image_by_vmap():
    fused, stock, images = pair("resnext_digits", size=16, batch=3, in_channels=1)

    def gradients(model, one_by_one):
        model.eval()
        state = {name: p.detach() for name, p in model.named_parameters()}

        def loss(state, image):
            return torch.func.functional_call(model, state, (image[None],)).square().mean()

        if one_by_one:
            each = [torch.func.grad(loss)(state, image) for image in images.to(state["fc.weight"].dtype)]
            return {name: torch.stack([grads[name] for grads in each]) for name in state}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(state, images)

    exact = gradients(copy.deepcopy(stock).double(), True)
    baseline = gradients(stock, True)
    with gconv.set_policy("silent"):
        actual = gradients(fused, False)
    for name, want in exact.items():
        assert_as_good(actual[name], baseline[name], want, name, floor=1e-5)


def test_sync_batch_norm_keeps_the_names():
    fused, stock, images = pair("resnext_digits", size=32, batch=4, in_channels=1)
    names = list(fused.state_dict())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(fused).eval()
    assert list(synced.state_dict()) == names
    with gconv.set_policy("silent"), torch.no_grad():
        torch.testing.assert_close(synced(images), stock.eval()(images), rtol=1e-4, atol=1e-4)


def test_convert_leaves_our_models_as_they_are():
    fused, _, images = pair("resnext_digits", size=16, batch=4, in_channels=1)
    want = fused.eval()(images)
    gconv.convert(fused)
    torch.testing.assert_close(fused(images), want, rtol=1e-5, atol=1e-5)
    gconv.revert(fused)
    assert torch.equal(fused(images), want)
