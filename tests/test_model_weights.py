"""`weights=`: every form it takes, and one clear line for every form it refuses."""

import copy
import enum
import sys
import types

import pytest
import torch
from model_checks import assert_as_good, lively, seeded
from torchvision_models import require_torchvision

from gconv import models


class FakeWeights(enum.Enum):
    IMAGENET1K_V1 = types.SimpleNamespace(url="https://example.org/resnet18.pth")


@pytest.fixture(scope="module")
def resnet18_state():
    return {
        name: t.clone() for name, t in seeded(models.resnet18, seed=5, num_classes=4).state_dict().items()
    }


def save_pth(state, path):
    torch.save(state, path)


def save_safetensors(state, path):
    library = pytest.importorskip(
        "safetensors.torch", reason="safetensors is not installed: pip install safetensors"
    )
    library.save_file(state, path)


def with_prefix(prefix):
    return lambda state: {prefix + name: t for name, t in state.items()}


FORMS = {
    "plain.pth": (save_pth, lambda state: state),
    "old_zipless.pth": (
        lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
        lambda state: state,
    ),
    "checkpoint.pt": (save_pth, lambda state: {"epoch": 3, "state_dict": state, "best": 0.5}),
    "model_key.pt": (save_pth, lambda state: {"model": state, "optimizer": {"lr": 0.1}}),
    "parallel.pth": (save_pth, with_prefix("module.")),
    "compiled.pth": (save_pth, lambda state: {"state_dict": with_prefix("module._orig_mod.")(state)}),
    "compiled_parallel.pth": (save_pth, with_prefix("_orig_mod.module.")),
    "plain.safetensors": (save_safetensors, lambda state: state),
    "parallel.safetensors": (save_safetensors, with_prefix("module.")),
    "half.pth": (
        save_pth,
        lambda state: {name: t.half() if t.is_floating_point() else t for name, t in state.items()},
    ),
    "uncounted.pth": (save_pth, lambda state: {n: t for n, t in state.items() if "num_batches" not in n}),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_from_a_file(form, resnet18_state, tmp_path):
    save, wrap = FORMS[form]
    save(wrap(resnet18_state), tmp_path / form)
    path = tmp_path / form
    model = models.resnet18(weights=str(path) if form == "plain.pth" else path)
    assert model.fc.out_features == 4
    for name, tensor in model.state_dict().items():
        want = resnet18_state[name]
        assert torch.equal(
            tensor, want.half().float() if form == "half.pth" and "num" not in name else want
        ), name


def test_weights_from_a_state_dict(resnet18_state):
    model = models.resnet18(weights=resnet18_state)
    assert all(torch.equal(t, resnet18_state[name]) for name, t in model.state_dict().items())
    assert model.conv1.weight.data_ptr() != resnet18_state["conv1.weight"].data_ptr()
    assert models.load_weights(models.resnet18(num_classes=4), resnet18_state).fc.out_features == 4


def test_weights_of_torchvision():
    torchvision = require_torchvision()
    want = lively(torchvision.models.resnext50_32x4d(), torch.randn(2, 3, 64, 64)).eval()
    model = models.resnext50_32x4d(weights=want.state_dict()).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(want).double()(images.double())
        assert_as_good(model(images), want(images), exact)
    want.load_state_dict(model.state_dict())


def test_frozen_batch_norm_of_torchvision():
    """A detection backbone: its batch norms have no counter and stay as they are in training mode too."""
    torchvision = require_torchvision()
    images = torch.randn(2, 3, 64, 64)
    want = lively(models.resnet18(stock=True), images).eval()
    norm = torchvision.ops.FrozenBatchNorm2d
    model = models.resnet18(weights=want.state_dict(), norm_layer=norm).train()
    with torch.no_grad():
        exact = copy.deepcopy(want).double()(images.double())
        assert_as_good(model(images), want(images), exact)
    assert torch.equal(model.bn1.running_mean, want.bn1.running_mean)


def one_line(error):
    return "\n" not in str(error.value)


def test_weights_that_do_not_fit(resnet18_state):
    state = dict(resnet18_state)
    state["head.weight"] = torch.zeros(2)
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    del state["layer4.1.conv2.weight"], state["bn1.bias"]
    model = models.resnet18(num_classes=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        models.load_weights(model, state, "resnet18")
    assert one_line(error)
    assert str(error.value) == (
        "resnet18: weights: 2 missing: bn1.bias, layer4.1.conv2.weight; 1 unexpected: head.weight; "
        "1 of another shape: conv1.weight: want [64, 3, 7, 7], got [64, 1, 7, 7]"
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), (
        "the model was changed"
    )


def test_weights_of_another_architecture_are_summed_up(resnet18_state):
    with pytest.raises(
        ValueError, match=r"resnet50: weights: \d+ missing: .* and \d+ more; .*of another shape"
    ) as error:
        models.resnet50(weights=resnet18_state)
    assert one_line(error) and len(str(error.value)) < 1000


def test_weights_for_other_classes(resnet18_state):
    with pytest.raises(
        ValueError, match=r"num_classes = 10, the weights 4: .* replace model.fc by nn.Linear\(512, 10\)"
    ):
        models.resnet18(weights=resnet18_state, num_classes=10)


def test_weights_that_cannot_be_read(tmp_path, torchvision_or_fake):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"conv1.weight": 3}, tmp_path / "numbers.pth")
    torch.save(models.resnext_digits(), tmp_path / "whole_model.pth")
    cases = [
        (tmp_path / "text.pth", ValueError, "resnet18: weights: cannot read .*text.pth"),
        (tmp_path / "text.safetensors", ValueError, "cannot read .*text.safetensors"),
        (tmp_path / "list.pth", ValueError, "want a state dict .names to tensors., got list"),
        (tmp_path / "numbers.pth", ValueError, "got int under 'conv1.weight'"),
        (
            tmp_path / "whole_model.pth",
            ValueError,
            "cannot read .*whole_model.pth: UnpicklingError: Weights only",
        ),
        (tmp_path / "absent.pth", FileNotFoundError, "got '.*absent.pth': no such file"),
        (tmp_path, FileNotFoundError, "no such file"),
        (
            "IMAGENET1K_V1",
            FileNotFoundError,
            "got 'IMAGENET1K_V1': no such file, and nothing is downloaded by name",
        ),
        (
            torchvision_or_fake,
            ValueError,
            "nothing is downloaded; pass the path of the file fetched from https://",
        ),
        ({}, ValueError, "got an empty one"),
        (3, TypeError, "want a path or a state dict, got int"),
        (True, TypeError, "want a path or a state dict, got bool"),
    ]
    for weights, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            models.resnet18(weights=weights)
        assert one_line(error), str(error.value)


@pytest.fixture(params=["fake", "torchvision"])
def torchvision_or_fake(request):
    """A member of a weights enum: torchvision's own where it is installed."""
    if request.param == "fake":
        return FakeWeights.IMAGENET1K_V1
    return require_torchvision().models.ResNet18_Weights.DEFAULT


def test_safetensors_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        models.resnet18(weights=tmp_path / "a.safetensors")
