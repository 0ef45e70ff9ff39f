"""gconv.Concat under autograd, compilers and transforms: right, or an error."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from concat_networks import CatOfCopies, Dense, UNet, image, twins
from torch.autograd import forward_ad

import gconv
from gconv import functional as GF

pytestmark = pytest.mark.usefixtures("ops")


# -------------------------------------------------------------------------------------------------- gradients


def test_gradients_of_several_readers_add_up():
    results = []
    for concat in (gconv.Concat(2, 3, 1), CatOfCopies(2, 3, 1)):
        x = image(c=3, dtype=torch.float64).requires_grad_()
        slot = concat.put(0, x[:, :2] * 2)
        concat.put(1, x.sin())
        first = concat.prefix(2)
        concat.put(2, first.sum(1, keepdim=True).square())  # after a prefix is read
        loss = (first * 3).sum() + concat.prefix(2).square().sum() + concat.read().cos().sum() + slot.sum()
        loss.backward()
        results.append(x.grad)
    assert torch.allclose(*results, rtol=1e-12)


def test_a_slot_nobody_reads_and_parts_without_gradient():
    x, weight = image(), torch.randn(4, 3, 1, 1, requires_grad=True)
    concat = gconv.Concat(3, 4, 4)
    constant = concat.put(0, x)
    concat.put(1, GF.pointwise_conv(x, weight))
    unread = GF.pointwise_conv(x, weight, into=concat[2])
    prefix = concat.prefix(2)
    assert not constant.requires_grad and prefix.requires_grad and unread.requires_grad
    prefix.sum().backward()
    want = torch.autograd.grad(F.conv2d(x, weight).sum(), weight)[0]
    assert torch.allclose(weight.grad, want)
    assert not concat.prefix(1).requires_grad


def test_gradcheck_of_any_order():
    def function(a, b):
        concat = gconv.Concat(2, 3)
        slot = concat.put(1, b * b)
        concat.put(0, a.sin())
        return concat.read() * concat.prefix(2).cos(), concat.prefix(1), slot

    args = [torch.randn(2, c, 2, 3, dtype=torch.float64, requires_grad=True) for c in (2, 3)]
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


def test_batched_gradients():
    x = torch.randn(1, 2, 2, 2, requires_grad=True)
    concat = gconv.Concat(2, 2)
    concat.put(0, x * 2)
    concat.put(1, x * 3)
    y = concat.read()
    eye = torch.eye(y.numel()).view(-1, *y.shape)
    (jacobian,) = torch.autograd.grad(y, x, eye, is_grads_batched=True)
    jacobian = jacobian.reshape(16, 8)
    assert torch.equal(jacobian, torch.cat((2 * torch.eye(8), 3 * torch.eye(8))))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_double_backward_on_the_kernels(training):
    results = []
    for model in twins(UNet):
        model.train(training)
        x = image().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        results.append((x.grad, *[p.grad for p in model.parameters() if p.grad is not None]))
    assert len(results[0]) == len(results[1]) > 10
    for actual, want in zip(*results):
        assert torch.allclose(actual, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


# ---------------------------------------------------------------------------------------- in-place operations


# What torch says of a saved tensor that has another version now; the second of a saved prefix.
COUNTER = "modified by an inplace operation|another view of its base has been modified inplace"


def saved():
    """A Concat whose first slot a convolution has saved; the second is written after that."""
    x = image().requires_grad_()
    concat = gconv.Concat(4, 5)
    conv, reader = gconv.Conv2d(3, 4, 3, padding=1), gconv.Conv2d(4, 5, 3, padding=1)
    first = conv(x, into=concat[0])
    second = reader(first, into=concat[1])
    return SimpleNamespace(first=first, second=second, prefix=concat.read())


def test_writing_a_slot_spoils_nothing():
    F.conv2d(saved().prefix, torch.randn(2, 9, 1, 1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("victim", ["first", "second", "prefix"])
@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
def test_what_spoils_saved_values_raises(victim, recorded):
    tensors = saved()
    y = F.conv2d(tensors.prefix, torch.randn(2, 9, 1, 1, requires_grad=True))
    tensor = getattr(tensors, victim)
    if recorded and victim == "prefix":
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            tensor.mul_(2)
    with torch.set_grad_enabled(recorded and victim != "prefix"):
        tensor.mul_(2)
    with pytest.raises(RuntimeError, match=COUNTER):
        y.sum().backward()


@pytest.mark.parametrize("alias", [lambda t: t.detach(), lambda t: t[:, 1:3], lambda t: t.view_as(t)])
def test_views_of_slots_share_the_counter(alias):
    tensors = saved()
    y = F.conv2d(tensors.prefix, torch.randn(2, 9, 1, 1, requires_grad=True))
    with torch.no_grad():
        alias(tensors.first).zero_()
    with pytest.raises(RuntimeError, match=COUNTER):
        y.sum().backward()


def test_a_slot_may_be_changed_before_anyone_reads_it():
    results = []
    for concat in (gconv.Concat(3, 2), CatOfCopies(3, 2)):
        x = image().requires_grad_()
        concat.put(1, x[:, :2] * 2)
        slot = concat.put(0, x * 3)
        slot.sin_()
        y = concat.read()
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for actual, want in zip(*results):
        assert torch.equal(actual, want)


def test_a_slot_changed_after_it_was_read_raises():
    """Nothing but the prefix knows: its values are others than its history says."""
    tensors = saved()
    tensors.second.relu_()
    with pytest.raises(RuntimeError, match=COUNTER):
        tensors.prefix.sum().backward()


def test_a_changed_prefix_is_refused_or_raises():
    prefix = saved().prefix
    with pytest.raises(RuntimeError, match="modified inplace"):
        F.relu(prefix, inplace=True)
    with torch.no_grad():
        prefix.relu_()
    with pytest.raises(RuntimeError, match="inplace"):
        (prefix * 2).sum().backward()


@pytest.mark.parametrize("which", ["slot", "prefix"])
def test_gradients_cannot_be_brought_in_by_the_back_door(which):
    """In-place by a tensor with gradients, where slots and prefix have none: the other would not know."""
    concat, w = gconv.Concat(3, 1), torch.ones(1, requires_grad=True)
    slot = concat.put(0, image())
    prefix = concat.prefix(1)
    with pytest.raises(RuntimeError, match="modified inplace"):
        (slot if which == "slot" else prefix).mul_(w)
    slot.mul_(2)  # without gradients it is plain memory
    assert torch.equal(prefix, 2 * image())


# -------------------------------------------------------------------------------------- compilers, transforms


def test_compile_is_cat():
    one, other = (m.eval() for m in twins(UNet))
    torch.compiler.reset()
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    x, x2 = image().requires_grad_(), image().requires_grad_()
    y, want = compiled(x), other(x2)
    y.square().sum().backward()
    want.square().sum().backward()
    assert torch.allclose(y, want, atol=1e-5) and torch.allclose(x.grad, x2.grad, rtol=1e-4, atol=1e-4)


def test_a_concat_that_crosses_into_compiled_code():
    concat, x = gconv.Concat(3, 3), image().requires_grad_()
    concat.put(0, x * 2)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def rest(concat, x):
        concat.put(1, x * 3)
        return concat.read()

    y = rest(concat, x)
    with gconv.trace() as calls:
        again = concat.read()
    assert [row.kernel for row in calls] == ["torch.cat"] and "transform" in calls.rows[0].reason
    assert torch.equal(y, torch.cat((2 * x, 3 * x), 1)) and torch.equal(again, y)
    (y + again).sum().backward()
    assert (x.grad == 10).all()


def test_export_and_fx_and_jit_trace():
    one, other = (m.eval() for m in twins(UNet))
    x = image()
    want = other(x)
    exported = torch.export.export(one, (x,))
    assert torch.allclose(exported.module()(x), want, atol=1e-5)
    graph = torch.fx.symbolic_trace(one)
    assert "torch.cat" in graph.code and torch.equal(graph(x), want)
    traced = torch.jit.trace(one, (x,), check_trace=False)
    other_x = image(n=3, seed=9)
    assert torch.allclose(traced(other_x), other(other_x), atol=1e-5)


def test_a_slot_that_a_traced_layer_does_not_know_stays_unwritten():
    layer, concat = gconv.Conv2d(3, 4, 3, padding=1), gconv.Concat(4)
    y = torch.fx.symbolic_trace(layer)(image(), concat[0])
    assert torch.allclose(y, layer(image()), atol=1e-5)
    with pytest.raises(RuntimeError, match="slot 0 is not"):
        concat.read()


def test_layers_still_script():
    for layer in (gconv.Conv2d(3, 4, 3, padding=1), gconv.ConvBNReLU(3, 4, 3, padding=1).eval()):
        assert torch.allclose(torch.jit.script(layer)(image()), layer(image()), atol=1e-5)


def test_function_transforms():
    one, other = (m.eval() for m in twins(Dense))
    x = image()

    def loss(model):
        def of(parameters, x):
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        return of

    gradients = []
    for model in (one, other):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        per_sample = torch.func.vmap(torch.func.grad(loss(model)), (None, 0))
        gradients.append(per_sample(parameters, x))
    for name, want in gradients[1].items():
        assert torch.equal(gradients[0][name], want), name
    with gconv.trace() as calls:
        torch.func.grad(lambda x: one(x).sum())(x)
    rows = [row for row in calls if row.kernel == "torch.cat"]
    assert rows and all(row.reason == "by design: a function transform" for row in rows)


def test_forward_mode():
    def function(x):
        concat = gconv.Concat(3, 3)
        concat.put(0, x.sin())
        concat.put(1, x * 2)
        return concat.read()

    x, tangent = image(), image(seed=4)
    _, dy = torch.func.jvp(function, (x,), (tangent,))
    assert torch.equal(dy, torch.cat((x.cos() * tangent, 2 * tangent), 1))
    with forward_ad.dual_level():
        dy = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
        assert torch.equal(dy, torch.cat((x.cos() * tangent, 2 * tangent), 1))


def test_trace_and_explain_show_copies():
    model = twins(UNet)[0]
    with gconv.trace() as calls:
        model(image())
    copies = [row for row in calls if row.kernel == "torch.copy_"]
    assert [row.shape for row in copies] == [(2, 16, 4, 6), (2, 8, 8, 12)]
    assert all(row.reason == "by design: copied into a slot of Concat" for row in copies)
    assert "torch.cat" not in [row.kernel for row in calls]
    explained = gconv.explain(model, (2, 3, 8, 12))
    assert [row.kernel for row in explained] == [row.kernel for row in calls]
    with gconv.use_backend("torch"), gconv.trace() as calls:
        model(image())
    assert sum(row.calls for row in calls if row.kernel == "torch.copy_") == 4
