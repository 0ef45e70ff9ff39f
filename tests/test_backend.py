"""The choice of the code that runs a call, and every way a user has to find out: counters, policy, trace,
explain."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch
from torch import nn

import gconv
from gconv import backend, gpu

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(gconv.__file__)))
BLOCK_EXTENSION = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "gconv._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test starts with the default settings, no warned reason and counters at zero, and leaves them
    so."""
    backend.use_backend("auto")
    backend.set_policy("warn_once")
    backend.reset_counts()
    yield
    backend.use_backend("auto")
    backend.set_policy("warn_once")
    backend.reset_counts()
    assert not nn.modules.module._global_forward_pre_hooks, "a trace left its hooks behind"


@pytest.fixture
def built(monkeypatch):
    """The rules of `choose` as they are with the extension, on any machine."""
    monkeypatch.setattr(backend, "_missing_extension", None)


def run_python(code, **environment):
    """(exit status, stdout, stderr) of a fresh interpreter in which nothing of gconv is imported yet."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GCONV_")}
    env["PYTHONPATH"] = os.pathsep.join([ROOT, env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env |= environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    return done.returncode, done.stdout, done.stderr


def conv_arguments(dtype=torch.float32, kernel=3, channels=4, groups=1, **overrides):
    x = torch.zeros(1, channels, 8, 8, dtype=dtype)
    weight = torch.zeros(channels, channels // groups, kernel, kernel, dtype=dtype)
    arguments = {"x": x, "weight": weight, "stride": 1, "padding": 1, "dilation": 1, "groups": groups}
    return arguments | overrides


# ----------------------------------------------------------------------------------------------- the decision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "stride, padding, dilation", [(1, 0, 1), ((1, 2), 1, 3), (2, (2, 0), (1, 4)), (1, "same", 2)]
)
def test_choose_takes_our_kernel(built, dtype, stride, padding, dilation):
    arguments = conv_arguments(dtype, groups=2, stride=stride, padding=padding, dilation=dilation)
    assert backend.choose("grouped_conv", **arguments) == ("cpu", "cpu.grouped_conv", None, False)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"kernel": 5}, "kernel_size: want 3x3 or 1x1, got 5x5"),
        ({"stride": 3}, "stride: want 1 or 2, got 3x3"),
        ({"stride": (1, 4)}, "stride: want 1 or 2, got 1x4"),
        ({"padding": 3}, "padding: want 0 to 2, got 3x3"),
        ({"padding": (0, 4)}, "padding: want 0 to 2, got 0x4"),
        ({"padding": (6, 7), "dilation": 3}, "padding: want 0 to 6, got 6x7"),
        ({"padding": 3, "dilation": (4, 1)}, "padding: want 0 to 2, got 3x3"),
        ({"dtype": torch.float64}, "dtype: want float32, bfloat16 or float16, got float64"),
        ({"dtype": torch.int32}, "dtype: want float32, bfloat16 or float16, got int32"),
        (
            {"weight": torch.zeros(4, 4, 3, 3, dtype=torch.float16)},
            "weight: want dtype float32 like x, got float16",
        ),
        ({"weight": torch.zeros(4, 4, 3, 3, device="meta")}, "weight: want device cpu like x, got meta"),
        ({"x": torch.zeros(1, 4, 8, 8, device="meta")}, "device: want cpu or cuda, got meta"),
        ({"x": torch.zeros(1, 4, 8, 8).to_sparse()}, "layout: want torch.strided, got torch.sparse_coo"),
    ],
)
def test_choose_names_what_it_does_not_cover(built, changes, reason):
    decision = backend.choose("grouped_conv", **conv_arguments(**changes))
    assert decision == ("torch", "torch.conv2d", reason, True)


def test_choose_without_a_convolution_looks_at_the_tensor_alone(built):
    assert backend.choose("batch_norm", torch.zeros(1, 4, 8, 8)).kernel == "cpu.batch_norm"
    assert backend.choose("batch_norm", torch.zeros(1, 4, 8, 8).double()).kernel == "torch.batch_norm"


def test_another_kernel_size_by_design_is_no_fallback(built):
    decision = backend.choose("grouped_conv", **conv_arguments(kernel=7), by_design=True)
    assert decision == ("torch", "torch.conv2d", "by design: kernel_size: want 3x3 or 1x1, got 7x7", False)
    with backend.use_backend("cpu"), backend.set_policy("error"):
        assert backend.choose("grouped_conv", **conv_arguments(kernel=7), by_design=True) == decision
    assert backend.choose("grouped_conv", **conv_arguments(torch.float64), by_design=True).fallback
    assert backend.choose("grouped_conv", **conv_arguments(), by_design=True).backend == "cpu"


@pytest.mark.parametrize("op", ["grouped_conv", "pointwise_conv"])
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
def test_choose_takes_our_kernel_for_1x1(built, op, stride):
    arguments = conv_arguments(kernel=1, stride=stride, padding=0)
    assert backend.choose(op, **arguments) == ("cpu", "cpu.pointwise_conv", None, False)
    arguments = conv_arguments(torch.float16, kernel=1, stride=stride, padding="same", channels=512)
    assert backend.choose("conv_bn_relu", **arguments).kernel == "cpu.conv_bn_relu"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"padding": 1}, "padding: want 0 around a 1x1 kernel, got 1x1"),
        ({"stride": 3}, "stride: want 1 or 2, got 3x3"),
        ({"groups": 2}, "groups: want 1 with a 1x1 kernel, got 2"),
        ({"dtype": torch.float64}, "dtype: want float32, bfloat16 or float16, got float64"),
    ],
)
def test_choose_names_what_it_does_not_cover_of_1x1(built, changes, reason):
    arguments = conv_arguments(**{"kernel": 1, "padding": 0, **changes})
    assert backend.choose("grouped_conv", **arguments) == ("torch", "torch.conv2d", reason, True)
    by_design = backend.choose("grouped_conv", **arguments, by_design=True)
    assert by_design.fallback == ("dtype" in changes)


def test_bfloat16_of_1x1_goes_to_torch_where_the_cpu_multiplies_it(built, monkeypatch):
    arguments = conv_arguments(torch.bfloat16, kernel=1, padding=0)
    monkeypatch.setattr(backend, "POINTWISE_BFLOAT16_TO_TORCH", True)
    reason = "by design: torch runs 1x1 convolutions of bfloat16 on this CPU"
    assert backend.choose("pointwise_conv", **arguments) == ("torch", "torch.conv2d", reason, False)
    assert backend.choose("grouped_conv", **conv_arguments(torch.bfloat16)).backend == "cpu"
    with backend.use_backend("cpu"):
        assert backend.choose("pointwise_conv", **arguments).kernel == "cpu.pointwise_conv"
    monkeypatch.setattr(backend, "POINTWISE_BFLOAT16_TO_TORCH", False)
    assert backend.choose("pointwise_conv", **arguments).kernel == "cpu.pointwise_conv"


def test_dense_convolutions_go_to_torch_from_a_width_on(built, monkeypatch):
    monkeypatch.setattr(backend, "DENSE_TO_TORCH_CHANNELS", 64)
    dense = conv_arguments(channels=64)
    decision = backend.choose("grouped_conv", **dense)
    assert decision.backend == "torch" and not decision.fallback and "dense" in decision.reason
    assert backend.choose("grouped_conv", **conv_arguments(channels=32)).backend == "cpu"
    assert backend.choose("grouped_conv", **conv_arguments(channels=64, groups=2)).backend == "cpu"
    with backend.use_backend("cpu"):
        assert backend.choose("grouped_conv", **dense).backend == "cpu"
    monkeypatch.setattr(backend, "DENSE_TO_TORCH_CHANNELS", None)
    assert backend.choose("grouped_conv", **dense).backend == "cpu"


def test_a_remembered_call_is_still_checked_and_follows_the_settings(ops, monkeypatch):
    """Calls on the kernels are remembered by shape: what equals a checked argument without being it is
    checked again, and a setting changed in between counts."""
    x, w = torch.randn(1, 8, 6, 6), torch.randn(8, 2, 3, 3)
    conv = gconv.functional.grouped_conv
    for _ in range(2):
        assert conv(x, w, None, 1, 1, 1, 4).shape == x.shape
        assert conv(x, w, None, [1, 1], 1, 1, 4).shape == x.shape
    with pytest.raises(ValueError, match=r"stride: want an int or a pair of ints, got 1\.0"):
        conv(x, w, None, 1.0, 1, 1, 4)
    assert conv(x, w, None, 2, 1, 1, 4).shape == (1, 8, 3, 3)
    with pytest.raises(ValueError, match="weight: want device cpu as of x, got meta"):
        conv(x, w.to("meta"), None, 1, 1, 1, 4)
    with gconv.use_backend("torch"), gconv.trace() as trace:
        conv(x, w, None, 1, 1, 1, 4)
    assert [row.kernel for row in trace.rows] == ["torch.conv2d"]
    monkeypatch.setattr(backend, "_missing_extension", "not there")
    with gconv.set_policy("silent"), gconv.trace() as trace:
        conv(x, w, None, 1, 1, 1, 4)
    assert [row.reason for row in trace.rows] == ["not there"]


def test_the_memory_of_calls_is_bounded(ops, monkeypatch):
    from gconv import grouped_conv as module

    monkeypatch.setattr(module, "MOST_PLANNED", 4)
    for size in range(5, 30):
        gconv.functional.grouped_conv(torch.randn(1, 2, size, 5), torch.randn(2, 1, 3, 3), None, 1, 1, 1, 2)
        assert len(module._planned) <= 4


def test_a_missing_extension_is_a_reason(monkeypatch):
    monkeypatch.setattr(
        backend, "_missing_extension", "the extension gconv._C is not built: run `make develop`"
    )
    decision = backend.choose("grouped_conv", **conv_arguments())
    assert decision.fallback and "make develop" in decision.reason


# --------------------------------------------------------------------------------------------------- settings


def test_use_backend_as_call_and_in_a_block(built):
    covered, uncovered = conv_arguments(), conv_arguments(kernel=5)
    gconv.use_backend("torch")
    decision = backend.choose("grouped_conv", **covered)
    assert decision == ("torch", "torch.conv2d", "use_backend('torch')", False)
    with gconv.use_backend("cpu"):
        assert backend.backend_mode() == "cpu"
        assert backend.choose("grouped_conv", **covered).backend == "cpu"
        with pytest.raises(
            RuntimeError, match=r"use_backend\('cpu'\).*kernel_size: want 3x3 or 1x1, got 5x5"
        ):
            backend.choose("grouped_conv", **uncovered)
    assert backend.backend_mode() == "torch"
    with pytest.raises(KeyError), gconv.use_backend("cpu"):
        raise KeyError
    assert backend.backend_mode() == "torch"


@pytest.mark.parametrize("setter", [gconv.use_backend, gconv.set_policy])
def test_a_wrong_name_is_refused_and_changes_nothing(setter):
    before = backend.backend_mode(), backend.policy()
    with pytest.raises(ValueError, match=f"{setter.__name__}: want .* got 'fast'"):
        setter("fast")
    assert (backend.backend_mode(), backend.policy()) == before


def test_forced_cpu_fails_before_anything_runs(ops):
    conv = gconv.Conv2d(4, 4, 5, padding=2)
    with gconv.use_backend("cpu"), pytest.raises(RuntimeError, match="kernel_size: want 3x3 or 1x1, got 5x5"):
        conv(torch.zeros(1, 4, 8, 8))
    assert backend.counts() == {}


def test_torch_backend_is_torch_bit_for_bit(ops):
    x = torch.randn(2, 8, 9, 9)
    conv = gconv.Conv2d(8, 8, 3, padding=1, groups=2)
    with gconv.use_backend("torch"), torch.no_grad():
        assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias, 1, 1, 1, 2))
    assert backend.counts() == {"torch.conv2d": 1}


def test_policy_warns_once_per_reason():
    wide, strided = gconv.Conv2d(4, 4, 5), gconv.Conv2d(4, 4, 3, stride=3)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.warns(
        gconv.FallbackWarning, match="runs on torch: kernel_size: want 3x3 or 1x1, got 5x5"
    ) as caught:
        wide(x)
    assert len(caught) == 1 and caught[0].filename == __file__, "the warning points at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide(x)
    with pytest.warns(gconv.FallbackWarning, match="stride"):
        strided(x)


def test_policy_error_raises_and_silent_is_silent():
    conv, x = gconv.Conv2d(4, 4, 5), torch.zeros(1, 4, 8, 8)
    with (
        gconv.set_policy("error"),
        pytest.raises(RuntimeError, match="kernel_size: want 3x3 or 1x1, got 5x5"),
    ):
        conv(x)
    assert backend.policy() == "warn_once"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gconv.set_policy("silent"):
            conv(x)
    assert backend.counts() == {"torch.conv2d": 1}


def test_environment_sets_policy_and_backend():
    code = "from gconv import backend; print(backend.policy(), backend.backend_mode())"
    assert run_python(code, GCONV_FALLBACK="error", GCONV_BACKEND="torch")[:2] == (0, "error torch\n")
    assert run_python(code, GCONV_FALLBACK="", GCONV_BACKEND="")[:2] == (0, "warn_once auto\n")


@pytest.mark.parametrize("variable", ["GCONV_FALLBACK", "GCONV_BACKEND"])
def test_a_wrong_environment_variable_is_one_clear_line(variable):
    status, _, stderr = run_python("import gconv", **{variable: "loud"})
    last = stderr.strip().splitlines()[-1]
    assert status != 0 and last.startswith(f"ValueError: gconv: {variable}: want ") and "got 'loud'" in last


def test_import_without_the_extension_says_so_once_and_works():
    code = BLOCK_EXTENSION + textwrap.dedent(
        """
        import torch, gconv
        conv, x = gconv.Conv2d(4, 4, 3, groups=2), torch.randn(1, 4, 6, 6)
        stock = torch.nn.functional.conv2d(x, conv.weight, conv.bias, groups=2)
        assert torch.equal(conv(x), stock)
        block = gconv.ConvBNReLU(4, 4, 3, groups=2)
        block(x).sum().backward()
        assert block.conv.weight.grad is not None and block.bn.num_batches_tracked == 1
        print(gconv.backend.counts()["torch.conv2d"] > 0)
        """
    )
    status, stdout, stderr = run_python(code)
    assert (status, stdout) == (0, "True\n"), stderr
    assert stderr.count("FallbackWarning") == 1 and "make develop" in stderr
    assert run_python(code, GCONV_FALLBACK="silent") == (0, "True\n", "")


# --------------------------------------------------------------------------------------------------- counters


def test_counters_count_calls_and_decisions_do_not(ops):
    conv, x = gconv.Conv2d(4, 4, 3), torch.zeros(1, 4, 8, 8)
    backend.choose("grouped_conv", **conv_arguments())
    assert backend.counts() == {}
    conv(x)
    conv(x)
    assert backend.counts() == {"cpu.grouped_conv": 2}
    with pytest.warns(gconv.FallbackWarning):
        conv.double()(x.double())
    assert backend.counts() == {"cpu.grouped_conv": 2, "torch.conv2d": 1}
    backend.reset_counts()
    assert backend.counts() == {}


# ------------------------------------------------------------------------------------------------------ trace


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = gconv.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(gconv.ConvBNReLU(8, 8, 3, padding=1, groups=2), nn.ReLU())
        self.wide = gconv.Conv2d(8, 8, 5, padding=2)

    def forward(self, x, twice=False):
        x = self.body(self.stem(x))
        return self.wide(self.body(x) if twice else x)


def test_trace_names_layers_kernels_shapes_and_reasons(ops):
    net = Net().eval()
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with gconv.set_policy("silent"), torch.no_grad(), gconv.trace() as t:
        net(x, twice=True)
    rows = {row.layer: row for row in t}
    assert list(rows) == ["stem", "body.0.conv", "wide"]
    assert rows["stem"].kernel == "cpu.grouped_conv" and rows["stem"].calls == 1
    assert (rows["stem"].shape, rows["stem"].dtype, rows["stem"].layout) == (
        (2, 3, 8, 8),
        "float32",
        "channels_last",
    )
    assert rows["body.0.conv"].calls == 2 and rows["body.0.conv"].kernel.startswith("cpu.")
    assert (
        rows["wide"].kernel == "torch.conv2d"
        and rows["wide"].reason == "kernel_size: want 3x3 or 1x1, got 5x5"
    )
    lines = str(t).splitlines()
    assert lines[0].split() == ["layer", "kernel", "shape,", "dtype,", "layout", "calls", "reason"]
    assert len(lines) == 2 + len(t) and "2x3x8x8 float32 channels_last" in lines[2]
    assert lines[2][lines[0].index("calls")] == "1", "columns are aligned"
    assert json.loads(t.to_json()) == t.to_dict() and t.to_dict()["rows"][0]["shape"] == [2, 3, 8, 8]


def test_trace_changes_no_bit_of_the_result(ops):
    net, x = Net(), torch.randn(2, 3, 8, 8)
    net.eval()
    with gconv.set_policy("silent"), torch.no_grad():
        plain = net(x)
        with gconv.trace():
            traced = net(x)
    assert torch.equal(plain, traced)


def test_trace_sees_only_its_block_and_traces_nest():
    conv, x = gconv.Conv2d(4, 4, 3), torch.zeros(1, 4, 8, 8)
    conv(x)
    with gconv.trace() as outer:
        conv(x)
        with gconv.trace() as inner:
            conv(x)
        gconv.functional.conv2d(x, conv.weight)
    conv(x)
    assert [row.calls for row in inner] == [1]
    assert [(row.layer, row.calls) for row in outer] == [("Conv2d", 2), ("-", 1)]


def test_trace_names_layers_after_a_forward_that_raised(ops):
    net, x = Net().eval(), torch.zeros(1, 3, 8, 8)
    with gconv.set_policy("silent"), gconv.trace() as t:
        with pytest.raises(ValueError, match="weight"):
            net.wide(x)
        net(x)
    assert [row.layer for row in t] == ["stem", "body.0.conv", "wide"]


def test_trace_collects_from_every_thread(ops):
    net, x = Net().eval(), torch.zeros(1, 3, 8, 8)
    with gconv.set_policy("silent"), gconv.trace() as t:
        threads = [threading.Thread(target=lambda: [net(x) for _ in range(8)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [(row.layer, row.calls) for row in t] == [("stem", 32), ("body.0.conv", 32), ("wide", 32)]


def test_an_empty_trace_says_why():
    with gconv.trace() as t:
        pass
    assert len(t) == 0 and list(t) == [] and "no gconv call" in str(t)


# ---------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize("training", [False, True])
def test_explain_is_the_trace_without_the_run(ops, training):
    net, x = Net().train(training), torch.randn(2, 3, 8, 8)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with gconv.set_policy("error"), warnings.catch_warnings():
        warnings.simplefilter("error")
        explained = gconv.explain(net, x)
        by_shape = gconv.explain(net, (2, 3, 8, 8))
    assert backend.counts() == {}, "nothing ran"
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    with gconv.set_policy("silent"), gconv.trace() as t:
        net(x)
    assert explained.to_dict() == by_shape.to_dict() == t.to_dict()
    assert str(explained) == str(t)


def test_explain_takes_dtype_and_layout_from_the_tensor(ops):
    conv = gconv.Conv2d(4, 4, 3, groups=2)
    (row,) = gconv.explain(conv.double(), torch.zeros(1, 4, 8, 8, dtype=torch.float64))
    assert row.kernel == "torch.conv2d" and "float64" in row.reason and row.layer == "Conv2d"
    x = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    (row,) = gconv.explain(conv.bfloat16(), x)
    assert (row.kernel, row.dtype, row.layout) == ("cpu.grouped_conv", "bfloat16", "channels_last")
    (row,) = gconv.explain(conv, [1, 4, 8, 8])
    assert row.dtype == "bfloat16", "a shape has the dtype of the parameters"


def test_explain_several_inputs_and_cumulative_statistics(ops):
    block = gconv.ConvBNReLU(4, 4, 3, padding=1, groups=2, momentum=None)
    x = torch.randn(2, 4, 8, 8)
    rows = list(gconv.explain(block, (x, x)))
    assert rows and rows[0].kernel.startswith("cpu.")
    stock = nn.Sequential(block.conv, nn.BatchNorm2d(4, momentum=None))
    assert len(gconv.explain(stock, x)) == 1
    assert stock[1].momentum is None and int(stock[1].num_batches_tracked) == 0


def test_explain_says_what_it_cannot_explain():
    conv = gconv.Conv2d(4, 4, 3)
    with pytest.raises(TypeError, match=r"explain: module: want a torch\.nn\.Module, got function"):
        gconv.explain(gconv.functional.conv2d, (1, 4, 8, 8))
    for wrong in ("1x4x8x8", (), (1, 4.0, 8, 8), (1, -4, 8, 8), None):
        with pytest.raises(ValueError, match="explain: x: want a tensor"):
            gconv.explain(conv, wrong)
    with pytest.raises(ValueError, match="weight"):
        gconv.explain(conv, (1, 5, 8, 8))

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(RuntimeError, match="the forward of Branching needs real values"):
        gconv.explain(Branching(), (1, 4))
    conv(torch.zeros(1, 4, 8, 8))
    assert sum(backend.counts().values()) == 1, "after a failed explain calls are counted again"


# ---------------------------------------------------------------------------------------------- torch.compile


def test_compile_without_graph_breaks_follows_the_backend_and_warns_once():
    conv = gconv.Conv2d(4, 4, 5)
    x = torch.randn(1, 4, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True, backend="eager")
    with pytest.warns(gconv.FallbackWarning, match="kernel_size: want 3x3 or 1x1, got 5x5") as caught:
        compiled(x)
        compiled(x)
    assert len([w for w in caught if w.category is gconv.FallbackWarning]) == 1
    with gconv.set_policy("error"), pytest.raises(Exception, match="kernel_size: want 3x3 or 1x1, got 5x5"):
        compiled(x)
    with gconv.use_backend("torch"), gconv.set_policy("error"):
        assert torch.equal(compiled(x), nn.functional.conv2d(x, conv.weight, conv.bias))


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_compile_inside_a_trace_has_no_graph_break(ops):
    torch._dynamo.reset()
    net, x = gconv.ConvBNReLU(4, 4, 3, groups=2).eval(), torch.randn(1, 4, 8, 8)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with gconv.trace() as t, torch.no_grad():
        compiled(x)
    assert "torch.compile" in str(t)


def test_explain_sees_through_compiled_modules(ops):
    torch._dynamo.reset()
    net, x = gconv.ConvBNReLU(4, 4, 3, groups=2).eval(), torch.randn(1, 4, 8, 8)
    expected = gconv.explain(net, x).to_dict()
    assert expected["rows"]
    wrapped = torch.compile(net, backend="eager")
    assert gconv.explain(wrapped, x).to_dict() == expected
    net.compile(backend="eager")
    net(x)
    assert gconv.explain(net, x).to_dict() == expected


@pytest.mark.parametrize(
    "triton, numpy, at_odds",
    [
        ("3.6.0", "2.4.6", True),
        ("3.6.0+git1", "2.3.5", False),
        ("3.7.1", "2.4.6", False),
        ("3.10.0", "3.0", False),
    ],
)
def test_an_interpreter_that_numpy_breaks_is_named(monkeypatch, triton, numpy, at_odds):
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(gpu.importlib.metadata, "version", versions.__getitem__)
    reason = gpu._interpreter_at_odds.__wrapped__()
    if not at_odds:
        assert reason is None
        return
    assert "Triton 3.6.0" in reason and "got 2.4.6" in reason and "\n" not in reason
    monkeypatch.setattr(gpu, "_interpreter_at_odds", lambda: reason)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.missing_triton() == reason
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert gpu.missing_triton() is None
