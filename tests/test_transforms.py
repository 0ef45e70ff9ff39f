"""Function transforms over the Functions, and the autograd of the bare ops: beside stock torch or the
references."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.library import opcheck
from twins import (
    DILATION,
    GEOMETRY,
    GROUPS,
    INPUT,
    OUTPUT,
    PADDING,
    STRIDE,
    WEIGHT,
    Block,
    close,
    twins,
    values,
)

import gconv
from gconv import batch_norm as bn_module
from gconv import conv_bn_relu as fused_module
from gconv import grouped_conv as conv_module
from gconv import pointwise_conv as pointwise_module
from gconv.functional import batch_norm, grouped_conv, pointwise_conv

# -------------------------------------------------------------------------------------- function transforms

X, WEIGHTS = values(3, *INPUT), values(3, *WEIGHT)
each_kernel = pytest.mark.parametrize("weights", [WEIGHTS, values(3, 6, 4, 1, 1)], ids=["3x3", "1x1"])


def ours_conv(x, weight):
    """The convolution of x [N, 4, H, W] with either of WEIGHTS."""
    if weight.shape[-1] == 1:
        return pointwise_conv(x, weight, None, STRIDE)
    return grouped_conv(x, weight, None, *GEOMETRY)


def stock_conv(x, weight):
    if weight.shape[-1] == 1:
        return F.conv2d(x, weight, None, STRIDE)
    return F.conv2d(x, weight, None, *GEOMETRY)


def loss_of(conv):
    return lambda x, weight: conv(x, weight).sin().sum()


def penalty_of(conv, i):
    """A scalar function of the gradient of `loss_of(conv)` to argument i."""
    return lambda x, weight: grad(loss_of(conv), i)(x, weight).cos().sum()


@each_kernel
@pytest.mark.parametrize("i", [0, 1], ids=["x", "weight"])
def test_func_grad_and_its_grad(ops, i, weights):
    args = (X[0], weights[0])
    close(grad(loss_of(ours_conv), i)(*args), grad(loss_of(stock_conv), i)(*args))
    for j in (0, 1):
        close(grad(penalty_of(ours_conv, i), j)(*args), grad(penalty_of(stock_conv, i), j)(*args), 1e-4)


@each_kernel
@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (1, 0)], ids=str)
def test_vmap_of_a_convolution_and_its_gradients(ops, dims, weights):
    args = [X[0] if dims[0] is None else X, weights[0] if dims[1] is None else weights]
    if dims[0] == 1:
        args[0] = args[0].transpose(0, 1)
    gconv.backend.reset_counts()
    close(vmap(ours_conv, dims)(*args), vmap(stock_conv, dims)(*args))
    assert gconv.backend.counts() == {f"cpu.{'pointwise' if weights.shape[-1] == 1 else 'grouped'}_conv": 1}
    for i in (0, 1):
        close(vmap(grad(loss_of(ours_conv), i), dims)(*args), vmap(grad(loss_of(stock_conv), i), dims)(*args))
        ours, stock = grad(penalty_of(ours_conv, i), 1 - i), grad(penalty_of(stock_conv, i), 1 - i)
        close(vmap(ours, dims)(*args), vmap(stock, dims)(*args), 1e-4)


@each_kernel
def test_jacrev_and_batched_gradients(ops, weights):
    x, weight = X[0], weights[0]
    pixels = [lambda x, f=f: f(x, weight).sum((0, 2)) for f in (ours_conv, stock_conv)]
    close(jacrev(pixels[0])(x), jacrev(pixels[1])(x))
    leaf, cotangents = x.clone().requires_grad_(), values(3, *stock_conv(x, weight).shape)
    batched = [
        torch.autograd.grad(f(leaf, weight), leaf, cotangents, is_grads_batched=True)[0]
        for f in (ours_conv, stock_conv)
    ]
    close(*batched)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_transforms_of_a_block(ops, training, residual):
    """Per-sample gradients and their derivatives. In-place updates of captured buffers are refused by torch
    under a transform, for stock modules too, hence no running statistics in training."""
    pair = [block.train(training) for block in twins(bias=True, track_running_stats=not training)]
    r = values(*OUTPUT, seed=2) if residual else None

    def loss_of(block):
        buffers = dict(block.named_buffers())
        return lambda p, x: functional_call(block, (p, buffers), (x, r)).mul(0.3).sin().sum()

    (ours, stock), parameters = map(loss_of, pair), dict(pair[1].named_parameters())
    names = [name for name in parameters if not (training and name == "conv.bias")]
    for transform in (
        lambda f: grad(f)(parameters, X[0]),
        lambda f: vmap(grad(f), (None, 0))(parameters, X),
        lambda f: grad(lambda p: vmap(f, (None, 0))(p, X).sum())(parameters),
    ):
        got, want = transform(ours), transform(stock)
        for name in names:
            close(got[name], want[name], 1e-4, name)
    for transform in (
        lambda f: vmap(grad(f, 1), (None, 0))(parameters, X),
        lambda f: grad(lambda x: grad(f, 1)(parameters, x).cos().sum())(X[0]),
        lambda f: vmap(grad(lambda x: grad(f, 1)(parameters, x).cos().sum()))(X),
    ):
        close(transform(ours), transform(stock), 1e-3)


def test_transforms_that_torch_refuses_are_refused(ops):
    block = Block()
    parameters = dict(block.named_parameters())
    with pytest.raises(RuntimeError, match="in-place"):
        grad(lambda p: functional_call(block, p, (X[0],)).sum())(parameters)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mode_is_loud_never_zero(ops, training):
    block, x = Block(track_running_stats=not training).train(training), X[0]
    raises = pytest.raises(NotImplementedError, match="jvp")
    for function in (
        lambda x: ours_conv(x, WEIGHTS[0]),
        block,
        lambda x: batch_norm(x, None, None, training=True),
    ):
        with raises:
            jvp(function, (x,), (x,))
        for grad_mode in (torch.no_grad(), torch.enable_grad()):
            with (
                grad_mode,
                forward_ad.dual_level(),
                pytest.raises((NotImplementedError, RuntimeError), match="jvp"),
            ):
                function(forward_ad.make_dual(x, x))
    with raises:
        hessian(lambda x: ours_conv(x, WEIGHTS[0]).square().sum())(x)


# ----------------------------------------------------------------------------------------- the ops themselves


def samples(ops):
    """(op, reference, arguments) for every op with every optional argument present and absent."""
    x, weight, dy, y, r = (
        values(*INPUT),
        values(*WEIGHT),
        values(*OUTPUT),
        values(*OUTPUT, seed=1),
        values(*OUTPUT),
    )
    act, affine, finish = values(2, 4), values(2, 6), values(6, 6)
    act4 = values(4, 4)
    gamma, beta, mean, var = values(6), values(6, seed=1), values(6, seed=2), values(6, seed=3, positive=True)
    rstd, running = var.rsqrt(), (values(6), values(6, positive=True), torch.tensor(3))
    conv = [list(STRIDE), list(PADDING), list(DILATION), GROUPS]
    point, stride, rx = values(6, 4, 1, 1), list(STRIDE), values(*INPUT, seed=5)
    pooled = values(*INPUT[:2], INPUT[2] // 2, INPUT[3] // 2)
    table = {
        "pointwise_conv_fwd": [
            (x, point, stride, None, None, None, False),
            (x, point, stride, None, affine, r, True),
            (x, point, [1, 1], act, affine, None, True),
        ],
        "pointwise_conv_fwd_into": [
            (x, point, stride, None, affine, y, True, False, r),
            (x, point, stride, act, None, None, False, True, r),
        ],
        "pointwise_conv_fwd_stats": [(x, point, stride, None), (x, point, [1, 1], act)],
        "pointwise_conv_bwd": [
            (dy, x, point, stride, None, None, None, None, True, True, True),
            (dy, x, point, stride, None, None, None, rx, True, False, False),
            (dy, x, point, stride, None, None, None, None, False, True, False),
            (dy, x, point, stride, y, finish, None, rx, True, True, False),
            (dy, x, point, stride, y, finish, act4, None, True, True, False),
            (dy, x, point, stride, None, None, act4, None, False, True, True),
        ],
        "pointwise_conv_bwd_add": [
            (dy, x, point, stride, None, None, act4, rx, False, False),
            (dy, x, point, stride, y, finish, act4, rx, True, True),
        ],
        "grouped_conv_fwd": [
            (x, weight, *conv, None, None, None, False),
            (x, weight, *conv, None, affine, r, True),
            (x, weight, *conv, act, affine, None, True),
        ],
        "grouped_conv_fwd_into": [
            (x, weight, *conv, None, affine, y, True, False, r),
            (x, weight, *conv, act, None, None, False, True, r),
        ],
        "grouped_conv_fwd_stats": [(x, weight, *conv, None), (x, weight, *conv, act)],
        "grouped_conv_bwd_input": [
            (dy, weight, list(INPUT), *conv, None, None, None, None),
            (dy, weight, list(INPUT), *conv, y, finish, x, act4),
        ],
        "grouped_conv_bwd_weight": [
            (dy, x, list(WEIGHT), *conv, None, None, None, False),
            (dy, x, list(WEIGHT), *conv, None, None, None, True),
            (dy, x, list(WEIGHT), *conv, y, finish, act, False),
        ],
        "grouped_conv_bwd": [
            (dy, x, weight, *conv, None, None, None, True, True, True),
            (dy, x, weight, *conv, None, None, None, True, False, False),
            (dy, x, weight, *conv, None, None, None, False, True, False),
            (dy, x, weight, *conv, y, finish, None, True, True, False),
            (dy, x, weight, *conv, y, finish, act4, True, True, False),
            (dy, x, weight, *conv, None, None, act4, False, True, True),
        ],
        "batch_norm_stats": [(y,)],
        "batch_norm_fold": [(mean, var, gamma, beta, 1e-3), (mean, var, None, None, 1e-3)],
        "batch_norm_update_running": [
            (*running, mean, var, beta, 24, 0.1),
            (*running, mean, var, None, 24, None),
            (*running[:2], None, mean, var, None, 24, 0.1),
        ],
        "batch_norm_apply": [
            (y, affine, None, None, False),
            (y, affine, r, None, True),
            (y, affine, r, values(2, 6, seed=3), True),
        ],
        "batch_norm_apply_into": [
            (y, affine, None, None, True, r),
            (y, affine, dy, values(2, 6, seed=3), False, r),
        ],
        "batch_norm_bwd_reduce": [
            (dy, y, mean, rstd, gamma, affine, None, False),
            (dy, y, mean, rstd, None, None, r, True),
            (dy, y, mean, rstd, None, None, None, False),
        ],
        "batch_norm_bwd_reduce_pair": [
            (dy, r, y, mean, rstd, gamma, values(*OUTPUT, seed=4), beta, var, None),
            (dy, r, y, mean, rstd, None, values(*OUTPUT, seed=4), beta, var, gamma),
        ],
        "batch_norm_bwd_finish": [(affine, mean, rstd, gamma, 24), (affine, mean, rstd, None, 24)],
        "batch_norm_bwd_apply": [(dy, y, finish, None, False), (dy, y, finish, r, True)],
        "batch_norm_pool": [(x, act)],
        "batch_norm_pool_bwd": [(pooled, x, act4, False, rx), (pooled, x, act4, True, rx)],
        "conv_bn_relu_fwd_train": [
            (x, weight, *conv, None, None, None, 1e-3, False, *(None,) * 5),
            (x, weight, *conv, gamma, beta, r, 1e-3, True, *running, beta, 0.1),
        ],
        "conv_bn_relu_bwd": [
            (dy, x, weight, *conv, y, mean, rstd, gamma, affine, None, True, True, False, False),
            (dy, x, weight, *conv, y, mean, rstd, None, None, None, True, False, False, False),
            (dy, x, weight, *conv, y, mean, rstd, gamma, None, r, False, True, True, True),
        ],
    }  # fmt: skip
    for name, cases in table.items():
        modules = {
            "grouped_conv": conv_module,
            "pointwise_conv": pointwise_module,
            "batch_norm": bn_module,
            "conv_bn_relu": fused_module,
        }
        module = next(module for stem, module in modules.items() if name.startswith(stem))
        for args in cases:
            yield name, getattr(ops, name).default, getattr(module, name + "_ref"), args


CASES = [(name, i) for name, i in (
    ("pointwise_conv_fwd", 3), ("pointwise_conv_fwd_into", 2), ("pointwise_conv_fwd_stats", 2),
    ("pointwise_conv_bwd", 6), ("pointwise_conv_bwd_add", 2),
    ("grouped_conv_fwd", 3), ("grouped_conv_fwd_into", 2), ("grouped_conv_fwd_stats", 2),
    ("grouped_conv_bwd_input", 2), ("grouped_conv_bwd_weight", 3), ("grouped_conv_bwd", 6),
    ("batch_norm_stats", 1), ("batch_norm_fold", 2), ("batch_norm_update_running", 3),
    ("batch_norm_apply", 3), ("batch_norm_apply_into", 2), ("batch_norm_bwd_reduce", 3),
    ("batch_norm_bwd_reduce_pair", 2), ("batch_norm_bwd_finish", 2), ("batch_norm_bwd_apply", 2),
    ("batch_norm_pool", 1), ("batch_norm_pool_bwd", 2),
    ("conv_bn_relu_fwd_train", 2), ("conv_bn_relu_bwd", 3),
)]  # fmt: skip
MUTABLE = (
    "batch_norm_update_running", "conv_bn_relu_fwd_train", "pointwise_conv_fwd_into",
    "pointwise_conv_bwd_add", "grouped_conv_fwd_into", "batch_norm_apply_into", "batch_norm_pool_bwd",
)  # fmt: skip
ALL_CASES = [(name, i) for name, count in CASES for i in range(count)]


def sample(ops, name, i):
    return [entry[1:] for entry in samples(ops) if entry[0] == name][i]


def test_every_op_is_sampled(ops):
    schemas = {
        s.name.removeprefix("gconv::")
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("gconv::")
    }
    assert schemas == {name for name, _ in CASES} | {
        "cpu_isa",
        "set_cpu_isa",
        "cpu_winograd",
        "set_cpu_winograd",
        "cpu_strassen",
        "set_cpu_strassen",
        "cpu_cache_limit",  # of memory: test_memory.py
        "set_cpu_cache_limit",
        "cpu_cache_use",
        "empty_cpu_cache",
        "cpu_empty",
        "dense_block_fwd",  # of lists: test_dense_block_autograd.py has their opcheck
        "dense_block_bwd",
        "bottleneck_fwd_train",  # of lists: test_bottleneck.py has its
        "conv_pack",  # test_freeze.py has theirs
        "conv_fwd_packed",
        "conv_fwd_packed_into",
    }
    assert [entry[0] for entry in samples(ops)] == [name for name, _ in ALL_CASES]


@pytest.mark.parametrize("name,i", ALL_CASES)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_opcheck(ops, name, i, memory_format):
    op, _, args = sample(ops, name, i)
    args = [
        a.to(memory_format=torch.channels_last if about.alias_info else memory_format)
        if isinstance(a, torch.Tensor) and a.dim() == 4
        else a
        for a, about in zip(args, op._schema.arguments, strict=True)
    ]
    # The fakes are told every layout; tracing what they say takes seconds, and one layout is enough for it.
    some = {} if memory_format is torch.channels_last else {"test_utils": ("test_schema", "test_faketensor")}
    opcheck(op, tuple(args), **some)
    if op._schema.is_mutable:
        return
    leaves = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    opcheck(op, tuple(leaves), **some)


@pytest.mark.parametrize("name,i", [case for case in ALL_CASES if case[0] not in MUTABLE])
def test_autograd_of_an_op_is_that_of_its_reference(ops, name, i):
    """Both orders, to every argument, through every output."""
    op, ref, args = sample(ops, name, i)

    def run(function, dtype):
        inputs = [a.to(dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        leaves = [a for a in inputs if isinstance(a, torch.Tensor)]
        out = function(*inputs)
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.numel()]
        loss = sum(
            (o * values(*o.shape, seed=k, dtype=o.dtype)).sum() + o.square().sum() for k, o in enumerate(out)
        )
        first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in first if g is not None and g.requires_grad)
        second = torch.autograd.grad(penalty, leaves, allow_unused=True)
        return [*out, *first, *second]

    for k, (got, want) in enumerate(zip(run(op, torch.float32), run(ref, torch.float64))):
        if want is None or not want.any():
            assert got is None or not got.any(), k
        else:
            close(got.double(), want, 2e-3, str(k))
