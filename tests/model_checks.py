"""What the tests of the models share: a fused model and its stock twin, a training step, a criterion."""

import copy
import io
import pickle

import torch
import torch.nn.functional as F
from torch import nn

from gconv import models


def seeded(builder, seed=0, **kwargs):
    torch.manual_seed(seed)
    return builder(**kwargs)


def lively(model, image, seed=1):
    """Batch norms with weights, biases and running statistics of their own: at their initial values half of
    what can go wrong is invisible. Running statistics come from `image`, so that no activation explodes."""
    torch.manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in norms:
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.uniform_(bn.bias, -0.3, 0.3)
        bn.momentum = None
    with torch.no_grad():
        model.train()(image)
    for bn in norms:
        bn.momentum = 0.1
    return model


def pair(name="resnext50_32x4d", size=64, batch=2, **kwargs):
    """(fused model, stock model of the same state, images)."""
    torch.manual_seed(2)
    images = torch.randn(batch, kwargs.get("in_channels", 3), size, size)
    stock = lively(seeded(getattr(models, name), stock=True, **kwargs), images)
    fused = seeded(getattr(models, name), seed=3, **kwargs)
    fused.load_state_dict(stock.state_dict())
    return fused, stock, images


def anatomy(model):
    """All that gconv.revert must bring back: class, attributes and identity of every module, parameter and
    buffer."""
    modules = [(name, type(m), id(m), sorted(m.__dict__)) for name, m in model.named_modules()]
    return modules, [(n, id(t)) for n, t in (*model.named_parameters(), *model.named_buffers())]


COPIES = ("deepcopy", "pickle", "torch.save")


def copied(model, how):
    """A copy of the model, made as one of COPIES says."""
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def relative_rms(actual, exact):
    return (
        (actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(1e-30)
    ).item()


def assert_as_good(actual, baseline, exact, label="", factor=4.0, floor=2e-6):
    """The error of `actual` (RMS, relative, against float64) is at most `factor` times torch's own + floor.

    A wrong weight, stride, shortcut or statistic is off by far more than the 1e-6 to 1e-4 that rounding
    leaves in these models.
    """
    assert actual.shape == exact.shape, f"{label}: want {tuple(exact.shape)}, got {tuple(actual.shape)}"
    error, own = relative_rms(actual, exact), relative_rms(baseline, exact)
    assert error <= factor * own + floor, f"{label}: relative RMS error {error:.2e}, torch's own {own:.2e}"


def training_step(model, images, labels):
    """One SGD step: {name: tensor} of the loss, every gradient, and the state dict after the step."""
    model.train()
    images = images.clone().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    result = {"loss": loss.detach(), "images.grad": images.grad}
    result |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return result | {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_steps_as_good(actual, baseline, exact, factor=4.0):
    """Two training steps held to one in float64, as `lively` models begin them: one batch was counted."""
    assert list(actual) == list(exact)
    for key, want in exact.items():
        if key.endswith("num_batches_tracked"):
            assert actual[key] == want == 2, key
        else:
            assert_as_good(actual[key], baseline[key], want, key, factor, floor=1e-5)


def assert_same_to_the_bit(actual, fused, want):
    """`actual` and `fused` start with the weights of `want`; actual's training step and inference are want's,
    dropout included."""
    state = want.state_dict()
    for model in (actual, fused):
        assert list(model.state_dict()) == list(state)
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[key]), f"{key}: initial values differ"
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 5])
    step, wanted = (
        seeded(training_step, 7, model=model, images=images, labels=labels) for model in (actual, want)
    )
    assert list(step) == list(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(step[key], tensor), key
    with torch.no_grad():
        assert torch.equal(actual.eval()(images), want.eval()(images))


def assert_compiled_step_equals(model, images, labels):
    """torch.compile takes a training step of `model` in one graph, with the results of eager mode."""
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    want, actual = (training_step(m, images, labels) for m in (model, compiled))
    for key, tensor in want.items():
        compiled_key = "_orig_mod." + key if key not in ("loss", "images.grad") else key
        torch.testing.assert_close(
            actual[compiled_key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
