"""convert and revert: same values, gradients, statistics, names and parameters; an exact undo; a report that
says what happened to each convolution."""

import copy

import pytest
import torch
from fused_checks import FrozenBatchNorm2d
from model_checks import COPIES, anatomy, copied
from torch import nn
from torchvision_models import import_torchvision, require_torchvision

import gconv
from gconv import backend


@pytest.fixture(autouse=True)
def quiet():
    with gconv.set_policy("silent"):
        yield


# ---------------------------------------------------------------------------------- models as users have them


class Bottleneck(nn.Module):
    """A copy of torchvision's block, as thousands of projects carry one, under other local names."""

    def __init__(self, inplanes, planes, stride=1, groups=1, width=4, downsample=None, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, planes, 1, bias=False)
        self.bn3 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, inputs):
        """The forward of torchvision's Bottleneck."""
        shortcut = inputs
        y = self.conv1(inputs)
        y = self.bn1(y)
        y = self.relu(y)
        y = self.conv2(y)
        y = self.bn2(y)
        y = self.relu(y)
        y = self.conv3(y)
        y = self.bn3(y)
        if self.downsample is not None:
            shortcut = self.downsample(inputs)
        y += shortcut
        y = self.relu(y)
        return y


class BasicBlock(nn.Module):
    def __init__(self, planes, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = None

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Net(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(inplace=True))
        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), norm(16))
        self.layer1 = nn.Sequential(Bottleneck(8, 16, 2, groups=4, width=8, downsample=down, norm=norm))
        self.layer2 = nn.Sequential(BasicBlock(16, norm), BasicBlock(16, norm))
        self.head = nn.Conv2d(16, 6, 3, groups=2)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.stem(x)))).mean((2, 3))


def randomize(model):
    """Statistics and affines far from 0 and 1, so that a lost one shows."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(generator=generator)
    return model


def net_and_converted(norm=nn.BatchNorm2d, **kwargs):
    torch.manual_seed(0)
    stock = randomize(Net(norm))
    ours = copy.deepcopy(stock)
    return stock, ours, gconv.convert(ours, **kwargs)


def image(n=4, size=16, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def assert_close(actual, expected, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_same_training(stock, ours, x, steps=2):
    stock.train()
    ours.train()
    for step in range(steps):
        grads = []
        for model in (stock, ours):
            model.zero_grad()
            x_ = x.clone().requires_grad_()
            y = model(x_)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(step)))
            grads.append(({n: p.grad.clone() for n, p in model.named_parameters()}, x_.grad, y.detach()))
        assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)
    assert_close(dict(ours.named_buffers()), dict(stock.named_buffers()))


# ----------------------------------------------------------------------------------------------------- values


def test_a_converted_model_evaluates_and_trains_as_before(ops):
    stock, ours, _ = net_and_converted()
    with torch.no_grad():
        backend.reset_counts()
        assert_close(ours.eval()(image()), stock.eval()(image()))
    assert backend.counts()["cpu.conv_bn_relu"] == 5, "the stem and the four of the basic blocks"
    assert backend.counts()["cpu.bottleneck"] == 1
    assert backend.counts()["cpu.grouped_conv"] == 1, "the head"
    assert_same_training(stock, ours, image())
    assert_close(ours.eval()(image()), stock.eval()(image()))


def test_channels_last_stays_channels_last(ops):
    stock, ours, _ = net_and_converted()
    x = image().to(memory_format=torch.channels_last)
    y = nn.Sequential(ours.stem, ours.layer1, ours.layer2).eval()(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, nn.Sequential(stock.stem, stock.layer1, stock.layer2).eval()(x))


def test_names_parameters_mode_and_optimizers_stay():
    model = Net()
    model.layer1.eval()
    before, keys, modes = anatomy(model), list(model.state_dict()), [m.training for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gconv.convert(model)
    assert anatomy(model)[1] == before[1], "the very parameters and buffers"
    assert [(n, i) for n, _, i, _ in anatomy(model)[0]] == [(n, i) for n, _, i, _ in before[0]]
    assert list(model.state_dict()) == keys and [m.training for m in model.modules()] == modes
    weight = model.layer2[0].conv1.weight.detach().clone()
    model(image()).sum().backward()
    optimizer.step()
    assert not torch.equal(model.layer2[0].conv1.weight, weight)
    assert isinstance(model.layer1[0], Bottleneck) and isinstance(model.head, nn.Conv2d)


# ----------------------------------------------------------------------------------------------------- report


def test_the_report_has_a_line_per_convolution():
    _, _, report = net_and_converted()
    assert str(report).splitlines() == [
        "stem.0+1+2 → fused",
        "layer1.0.conv1+bn1+relu → fused (in one chain)",
        "layer1.0.conv2+bn2+relu → fused (in one chain)",
        "layer1.0.conv3+bn3+relu → fused (in one chain)",
        "layer1.0.downsample.0+1 → fused (in one chain)",
        "layer2.0.conv1+bn1+relu → fused",
        "layer2.0.conv2+bn2+relu → fused",
        "layer2.1.conv1+bn1+relu → fused",
        "layer2.1.conv2+bn2+relu → fused",
        "head → gconv.Conv2d",
        "9 fused, 1 gconv.Conv2d",
    ]
    assert len(report) == 10 and report.swapped == ["head"] and report.kept == []
    assert report.to_dict()["entries"][-1] == {"name": "head", "result": "gconv.Conv2d", "reason": ""}


def test_sync_batchnorm_is_kept_and_named():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(randomize(Net())).eval()
    expected = model(image())
    report = gconv.convert(model)
    lines = str(report).splitlines()
    assert "layer1.0.conv1 → gconv.Conv2d (its batch norm kept: SyncBatchNorm)" in lines
    assert "layer1.0.conv2 → gconv.Conv2d (its batch norm kept: SyncBatchNorm)" in lines
    assert report.fused == []
    assert_close(model(image()), expected)


def test_a_norm_replaced_after_convert_is_the_one_that_runs():
    stock, ours, _ = net_and_converted()
    for model in (stock, ours):
        torch.manual_seed(0)
        model.layer1[0].bn2 = nn.GroupNorm(2, 8)
        model.stem[1] = nn.InstanceNorm2d(8)
        model.layer2[0].relu = nn.ELU()
    assert_close(ours.eval()(image()), stock.eval()(image()))
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert_close(ours.eval()(image()), stock.eval()(image()))


def test_frozen_batch_norm_is_fused_and_stays_frozen(ops):
    stock, ours, report = net_and_converted(FrozenBatchNorm2d)
    assert len(report.fused) == 9
    for mode in (True, False):
        backend.reset_counts()
        assert_close(ours.train(mode)(image()), stock.train(mode)(image()))
        counts = backend.counts()
        assert counts["cpu.conv_bn_relu"] == 5 and counts["cpu.bottleneck"] == 1
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), stock.state_dict().values()))


# ----------------------------------------------------------------------------------------------------- revert


def test_revert_is_an_exact_undo():
    model = randomize(Net()).eval()
    before, expected = anatomy(model), model(image())
    gconv.convert(model)
    assert anatomy(model) != before
    report = gconv.revert(model)
    assert anatomy(model) == before and torch.equal(model(image()), expected)
    assert "layer1.0 → reverted (Bottleneck)" in str(report).splitlines()
    assert len(gconv.revert(model)) == 0, "nothing left to revert"


def test_revert_leaves_layers_that_were_ours_from_the_start():
    model = nn.Sequential(gconv.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), gconv.ConvBNReLU(4, 4, 3))
    before = anatomy(model)
    report = gconv.convert(model)
    assert str(report).splitlines() == [
        "0 → gconv.Conv2d (already)",
        "1 → gconv.Conv2d",
        "2 → fused (already)",
        "2 gconv.Conv2d, 1 fused",
    ]
    gconv.revert(model)
    assert anatomy(model) == before


def test_our_own_models_are_left_as_they_are():
    model = nn.Sequential(gconv.models.resnet18(num_classes=10), nn.Flatten())
    before = anatomy(model)
    assert str(gconv.convert(model)) == "0 → fused (already)\n1 fused"
    assert anatomy(model) == before


def test_convert_twice_is_convert_once():
    _, ours, first = net_and_converted()
    once = anatomy(ours)
    second = gconv.convert(ours)
    assert anatomy(ours) == once
    assert second.fused == first.fused and second.swapped == first.swapped
    gconv.revert(ours)
    assert not any(name.startswith("_gconv") for m in ours.modules() for name in m.__dict__)


@pytest.mark.parametrize("how", COPIES)
def test_copies_stay_converted_and_can_be_reverted(how):
    stock, ours, _ = net_and_converted()
    ours.eval()
    stock.eval()
    other = copied(ours, how)
    assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
    assert torch.equal(other(image()), ours(image()))
    gconv.revert(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in stock.modules()]
    assert torch.equal(other(image()), stock(image()))
    assert type(ours.head) is gconv.Conv2d, "the original is untouched"


# ----------------------------------------------------------------------------------------------------- filter


def test_filter_fn_decides_and_is_asked_once_per_convolution():
    asked = []

    def only_layer2(name, module):
        asked.append(name)
        assert type(module) is nn.Conv2d
        return name.startswith("layer2")

    stock, ours, report = net_and_converted(filter_fn=only_layer2)
    assert len(asked) == len(set(asked)) == 10
    assert [name.split(".")[0] for name in report.fused] == ["layer2"] * 4
    assert "layer1.0.conv2 kept: filter_fn" in str(report).splitlines()
    assert type(ours.layer1[0]) is Bottleneck and type(ours.stem) is nn.Sequential
    assert_close(ours.eval()(image()), stock.eval()(image()))


def test_part_of_a_block_can_be_kept(ops):
    stock, ours, report = net_and_converted(filter_fn=lambda name, module: not name.endswith("conv1"))
    assert "layer2.0.conv1 kept: filter_fn" in str(report).splitlines() and len(report.fused) == 6
    assert type(ours.layer2[0].conv1) is nn.Conv2d
    backend.reset_counts()
    assert_close(ours.eval()(image()), stock.eval()(image()))
    assert backend.counts()["cpu.conv_bn_relu"] == 6
    assert_same_training(stock, ours, image())


# ------------------------------------------------------------------------------------------------------ hooks


@pytest.mark.parametrize(
    "path",
    ["stem", "stem.0", "stem.1", "stem.2", "layer1.0", "layer1.0.conv2", "layer1.0.bn3", "layer2.0.relu"],
)
def test_hooks_on_every_part_fire(path):
    stock, ours, _ = net_and_converted()
    calls = {"stock": 0, "ours": 0}
    for name, model in (("stock", stock), ("ours", ours)):
        model.get_submodule(path).register_forward_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1})
        )
    assert_close(ours.eval()(image()), stock.eval()(image()))
    assert calls["ours"] == calls["stock"] > 0


def test_a_hook_that_changes_the_output_changes_it():
    stock, ours, _ = net_and_converted()
    plain = ours.eval()(image())
    for model in (stock, ours):
        model.layer1[0].bn2.register_forward_hook(lambda module, args, output: output * 3)
    assert_close(ours(image()), stock.eval()(image()))
    assert not torch.allclose(ours(image()), plain, atol=1e-3)


# ------------------------------------------------------------------------------------------ what is not fused


class PreReLU(Bottleneck):
    """One call away from the block we know: the last ReLU comes before the sum."""

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out = self.relu(out)
        out += identity
        return out


class DoubledSum(Bottleneck):
    """The block we know, called by a subclass that does something more."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("block", [PreReLU, DoubledSum])
def test_a_block_that_computes_something_else_is_not_fused(block):
    model = randomize(block(8, 8, groups=2)).eval()
    expected = model(image(channels=8))
    report = gconv.convert(model)
    assert type(model) is block and report.fused == []
    assert report.swapped == ["conv1", "conv2", "conv3"]
    assert_close(model(image(channels=8)), expected)


def test_a_forward_replaced_on_the_instance_is_respected():
    block = randomize(Bottleneck(8, 8, groups=2)).eval()
    block.forward = lambda x: 5 * Bottleneck.forward(block, x)
    block.conv2.forward = lambda x: 7 * nn.Conv2d.forward(block.conv2, x)
    expected = block(image(channels=8))
    report = gconv.convert(block)
    assert "conv2 kept: its forward was replaced" in str(report).splitlines()
    assert_close(block(image(channels=8)), expected)


def test_subclasses_and_parametrized_convolutions_are_kept_with_the_reason():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(
        Doubled(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
        nn.Conv2d(4, 4, 3, padding=4),
        nn.Conv2d(4, 4, 5),
    ).eval()
    expected = model(image(channels=4))
    report = gconv.convert(model)
    assert str(report).splitlines() == [
        "0 kept: Doubled is not torch.nn.Conv2d",
        "2 kept: parametrized",
        "3 kept: padding: want 0 to 2, got 4x4",
        "4 kept: kernel_size: want 3x3 or 1x1, got 5x5",
        "4 kept",
    ]
    assert torch.equal(model(image(channels=4)), expected)


def test_dense_convolutions_left_to_torch_are_kept_with_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "DENSE_TO_TORCH_CHANNELS", 4)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    assert str(gconv.convert(model)).splitlines() == [
        "0 kept: dense: torch runs it faster",
        "2 → gconv.Conv2d",
        "3+4 → fused (torch's 3x3 convolution)",
        "1 kept, 1 gconv.Conv2d, 1 fused",
    ]


def test_sequentials_of_every_kind():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6),
    )  # fmt: skip
    stock = randomize(model)
    ours = copy.deepcopy(stock)
    report = gconv.convert(ours)
    assert str(report).splitlines()[:-1] == [
        "0+1 → fused",
        "3+4+5 → fused",
        "6 → gconv.Conv2d",
        "8 → gconv.Conv2d (its batch norm kept: GroupNorm)",
        "11+12 → fused",
    ]
    assert_same_training(stock, ours, image(channels=4, size=9))
    assert_close(ours.eval()(image(channels=4)), stock.eval()(image(channels=4)))
    assert_close(ours[3:7](image(channels=8)), stock[3:7](image(channels=8)))


def test_a_sequential_edited_after_convert_runs_as_edited():
    stock = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    ).eval()
    ours = copy.deepcopy(stock)
    gconv.convert(ours)
    for model in (stock, ours):
        torch.manual_seed(0)
        model.insert(1, nn.Conv2d(4, 4, 1))
        model.append(nn.Tanh())
        del model[3]
    assert_close(ours(image(channels=4)), stock(image(channels=4)))


@pytest.mark.parametrize(
    "model", [nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), nn.Linear(2, 2)]
)
def test_the_root_itself_can_be_converted(model):
    before = anatomy(model)
    report = gconv.convert(model)
    assert (len(report) == 0) == isinstance(model, nn.Linear)
    assert str(report).splitlines()[0] in ("Conv2d → gconv.Conv2d", "0+1 → fused", "no convolution found")
    gconv.revert(model)
    assert anatomy(model) == before


def test_bad_input_is_one_clear_line():
    with pytest.raises(TypeError, match=r"^convert: model: want a torch\.nn\.Module, got str$"):
        gconv.convert("resnet50")
    with pytest.raises(TypeError, match=r"^revert: model: want a torch\.nn\.Module, got NoneType$"):
        gconv.revert(None)
    with pytest.raises(TypeError, match=r"^convert: filter_fn: want a function .* got str$"):
        gconv.convert(Net(), filter_fn="layer1")


# ----------------------------------------------------------------------------------------- trace, fx, compile


def test_trace_and_explain_name_the_children(ops):
    _, ours, _ = net_and_converted()
    ours.eval()
    with torch.no_grad(), gconv.trace() as t:
        ours(image())
    rows = {row.layer: row for row in t if not row.kernel.endswith("batch_norm")}
    assert rows["layer1.0"].kernel == "cpu.bottleneck" and rows["layer1.0"].reason is None
    assert rows["stem.0"].kernel == "cpu.conv_bn_relu" and rows["head"].kernel == "cpu.grouped_conv"
    with torch.no_grad():
        assert gconv.explain(ours, image()).to_dict() == t.to_dict()


def test_fx_sees_the_nodes_of_the_stock_model():
    stock, ours, _ = net_and_converted()
    graphs = [torch.fx.symbolic_trace(model) for model in (stock, ours)]
    nodes = [[(n.op, str(n.target)) for n in graph.graph.nodes] for graph in graphs]
    assert nodes[0] == nodes[1]
    assert_close(graphs[1].eval()(image()), stock.eval()(image()))


def test_compile_and_export_without_graph_breaks(ops):
    stock, ours, _ = net_and_converted()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for model in (stock, ours):
        model.zero_grad()
    compiled(image()).sum().backward()
    stock(image()).sum().backward()
    grads = [{n: p.grad for n, p in model.named_parameters()} for model in (stock, ours)]
    assert_close(grads[1], grads[0], 1e-3, 1e-3)
    assert_close(dict(ours.named_buffers()), dict(stock.named_buffers()))
    ours.eval()
    stock.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(ours, (image(),), dynamic_shapes={"x": {0: batch}})
    assert_close(program.module()(image(7)), stock(image(7)))


def test_functional_call_uses_the_parameters_given():
    stock, ours, _ = net_and_converted()
    stock.eval()
    ours.eval()
    parameters = {name: p.detach() * 1.5 for name, p in stock.named_parameters()}
    expected = torch.func.functional_call(stock, parameters, image())
    assert_close(torch.func.functional_call(ours, parameters, image()), expected)


# ------------------------------------------------------------------------------------------ torchvision, timm


def assert_converts(model, x, fused=None):
    stock = randomize(model)
    ours = copy.deepcopy(stock)
    before = anatomy(ours)
    report = gconv.convert(ours)
    if fused is not None:
        assert len(report.fused) == fused, report
    with torch.no_grad():
        assert_close(ours.eval()(x), stock.eval()(x), rtol=1e-3, atol=1e-3)
    keys = list(stock.state_dict())
    assert list(ours.state_dict()) == keys
    gconv.revert(ours)
    assert anatomy(ours) == before
    return report


def small_resnet(torchvision, **arguments):
    """torchvision's ResNet with one block per stage."""
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10, **arguments)


def test_torchvision_resnets():
    torchvision = require_torchvision()
    torch.manual_seed(0)
    for model, fused in (
        (small_resnet(torchvision, groups=32, width_per_group=4), 16),
        (torchvision.models.resnet18(num_classes=10), 19),
        (torchvision.models.regnet_x_400mf(num_classes=10), 71),
    ):
        report = assert_converts(model, image(2, 32), fused)
        assert report.kept == (["conv1"] if hasattr(model, "conv1") else [])


def test_torchvision_conv_norm_activation():
    torchvision = require_torchvision()
    report = assert_converts(torchvision.models.mobilenet_v2(num_classes=10), image(2, 32))
    assert str(report).splitlines()[0] == "features.0.0+1 → fused", "ReLU6 runs as it is"
    block = torchvision.ops.Conv2dNormActivation(8, 8, 3, groups=2)
    assert str(gconv.convert(block)).splitlines()[0] == "0+1+2 → fused"


def test_torchvision_dilated_resnet():
    torchvision = require_torchvision()
    model = small_resnet(torchvision, replace_stride_with_dilation=[False, True, True])
    model.layer4[0].conv2.dilation = model.layer4[0].conv2.padding = (4, 4)
    report = assert_converts(model, image(2, 32))
    assert "layer4.0.conv2+bn2+relu" in report.fused


def test_torchvision_feature_extraction():
    torchvision = require_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    stock = randomize(torchvision.models.resnet18(num_classes=10)).eval()
    ours = copy.deepcopy(stock)
    gconv.convert(ours)
    nodes = {"layer1": "a", "layer3.0.relu_1": "b"}
    expected = create_feature_extractor(stock, nodes)(image(2, 32))
    assert_close(create_feature_extractor(ours, nodes)(image(2, 32)), expected)


@pytest.mark.parametrize(
    "name, arguments, last_block",
    [
        (
            "resnet26",
            {"cardinality": 32, "base_width": 4},
            ["conv1+bn1+act1", "conv2+bn2+act2", "conv3+bn3+act3"],
        ),
        ("resnet26", {"act_layer": nn.SiLU}, ["conv1+bn1", "conv2+bn2", "conv3+bn3"]),
        ("resnet26", {"drop_block_rate": 0.1}, ["conv1+bn1+act1", "conv2+bn2", "conv3+bn3+act3"]),
        ("seresnext26d_32x4d", {}, ["conv1+bn1+act1", "conv2+bn2+act2", "conv3+bn3"]),
        ("resnet18", {"drop_path_rate": 0.2}, ["conv1+bn1+act1", "conv2+bn2"]),
        ("resnetblur18", {}, ["conv1+bn1+act1", "conv2+bn2+act2"]),
    ],
)
def test_timm_resnets(name, arguments, last_block):
    import_torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install --no-deps timm")
    torch.manual_seed(0)
    report = assert_converts(timm.create_model(name, num_classes=10, **arguments), image(2, 32))
    last = [entry for entry in report.fused if entry.startswith("layer4.1.")]
    assert last == [f"layer4.1.{part}" for part in last_block], "what is not a plain ReLU runs as it is"
