"""gconv.bench's devices: what a GPU is asked and what is made of its answers, with torch.cuda stood in for by
a fake, and whole runs on it. Nothing here asserts a time that a machine took."""

import importlib.util
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from gconv.bench import (
    budget,
    devices,
    kernels,
    layers,
    machine,
    models,
    networks,
    readme,
    records,
    rivals,
    shapes,
    timing,
)
from gconv.bench.__main__ import main
from gconv.bench.match import plain_cudnn
from gconv.bench.report import Findings, load, write
from gconv.bench.roofs import measure
from gconv.bench.sweep import Options as Sweep
from gconv.bench.sweep import run as run_sweep

from gconv import gpu

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = shapes.ConvShape("tiny", "t1", 16, 16, 4, 8)
MB = 1 << 20


class FakeCuda:
    """torch.cuda of a machine whose clock moves by `ms` at each event, and that counts what it is asked."""

    def __init__(self, ms=10.0, available=True):
        self.step, self.now, self.available = ms, 0.0, available
        self.asked, self.allocated, self.peak = [], 100 * MB, 100 * MB
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                self.at = None

            def record(self):
                fake.asked.append("record")
                fake.now += fake.step
                self.at = fake.now

            def elapsed_time(self, other):
                assert fake.asked[-1] == "synchronize", "an event was read before the stream was done"
                return other.at - self.at

        self.Event = Event

    def is_available(self):
        return self.available

    def synchronize(self):
        self.asked.append("synchronize")

    def empty_cache(self):
        self.asked.append("empty_cache")

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.peak

    def allocate(self, megabytes):
        self.allocated += megabytes * MB
        self.peak = max(self.peak, self.allocated)

    def get_device_properties(self):
        return types.SimpleNamespace(multi_processor_count=132, L2_cache_size=1 << 16)

    def get_device_name(self):
        return "NVIDIA H200"

    def get_device_capability(self):
        return 9, 0


@pytest.fixture
def fake():
    return FakeCuda()


@pytest.fixture
def device(fake):
    """The CUDA form on this machine's CPU tensors, cuDNN's setting undone after the test."""
    before = torch.backends.cudnn.benchmark
    found = devices.Cuda(fake, "cpu")
    found.copy_mib, found.gemm_size = (1,), 32
    yield found
    torch.backends.cudnn.benchmark = before


class Rival:
    def __init__(self, name, log, host=lambda: None):
        self.name, self.log, self.host = name, log, host

    def prepare(self, i):
        self.log.append(("prepare", i))

    def run(self):
        self.log.append("run")
        self.host()


# ------------------------------------------------------------------------------------------------- the device


def test_a_machine_without_a_gpu_is_one_clear_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("layers", "kernels", "models", "sweep"):
        assert main([command, "--device", "cuda"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"gconv.bench {command}: device: want cpu, got cuda: torch ")
    with pytest.raises(ValueError, match="device: want cpu, got cuda: torch "):
        devices.Cuda(FakeCuda(available=False))
    assert devices.get("cpu") is devices.CPU


def test_times_are_between_events(device, fake):
    log = []
    turn = timing.turn(Rival("a", log), 5, 3, device=device)
    assert log == [("prepare", 5), "run", ("prepare", 6), "run", ("prepare", 7), "run", ("prepare", 8), "run"]
    assert turn.ms.tolist() == [10.0] * 3 and not turn.disturbed
    assert turn.host_ms.shape == (3,) and (turn.host_ms > 0).all()
    assert fake.asked == ["record"] * 8 + ["synchronize"]  # nothing waits in between
    assert timing.turn(Rival("a", []), 0, 1).host_ms is None  # the host is the device


def test_the_gpu_is_kept_busy_for_longer_than_the_host_launches(device, fake, monkeypatch):
    flushes = []
    monkeypatch.setattr(device, "flush", lambda: flushes.append(1))
    fake.step = 0.1  # ms of a flush
    device.keep_busy(0.0)  # measures what a flush takes first: two of them, once
    assert len(flushes) == 2 + int(devices.LEAST_AHEAD_MS / 0.1) + 1
    flushes.clear()
    device.keep_busy(10.0)
    assert len(flushes) * 0.1 >= devices.AHEAD * 10.0 > (len(flushes) - 2) * 0.1
    flushes.clear()
    timing.turn(Rival("a", []), 0, 2, device=device, ahead=True)
    assert len(flushes) >= 2 * 3
    flushes.clear()
    timing.turn(Rival("a", []), 0, 2, device=device)
    assert not flushes


def test_what_is_flushed_is_larger_than_the_l2_cache(device, fake):
    device.flush()
    assert device._buffer.nbytes == devices.FLUSHES << 16 and not device._buffer.any()
    device._buffer.fill_(1)
    device.flush()
    assert not device._buffer.any()
    fake.get_device_properties = lambda: types.SimpleNamespace(multi_processor_count=132)
    device._buffer = None
    device.flush()
    assert device._buffer.nbytes >= 100 * MB  # torch does not tell: more than any L2 there is now, twice


def test_cold_caches_are_flushed_before_every_call(device, monkeypatch):
    log = []
    monkeypatch.setattr(device, "flush", lambda: log.append("flush"))
    monkeypatch.setattr(device, "keep_busy", lambda ms: log.append("busy"))
    timing.interleave([Rival("a", log)], timing.Plan(1, 1, flush=True), device=device)
    calls = [entry for entry in log if not isinstance(entry, tuple)]
    runs = [i for i, entry in enumerate(calls) if entry == "run"]
    assert runs and all("flush" in calls[max(0, i - 2) : i] for i in runs)
    assert calls.count("busy") < calls.count("flush") == len(runs)  # not before the untimed ones
    log.clear()
    timing.interleave([Rival("a", log)], timing.Plan(1, 1), device=device)
    assert "flush" not in log and "busy" not in log


def test_jumps_of_a_gpu_are_smaller_than_a_time_slice():
    steady, jump = [np.array([0.10])] * 4, [np.array([0.10])] * 3 + [np.array([0.20])]
    kept = timing._kept_rounds({"a": steady, "b": jump}, [False] * 4, devices.Cuda.jump_ms)
    assert kept == [True] * 3 + [False]
    assert all(timing._kept_rounds({"a": steady, "b": jump}, [False] * 4))


def test_memory_is_the_allocators(device, fake):
    def call():
        fake.allocate(30)
        fake.allocate(-10)

    assert device.memory_of(call) == devices.Memory(100.0, 130.0)
    assert devices.peak_memory_mb(call, device) == 30.0
    found = device.allocations_of(lambda: fake.allocate(8), lambda loss: fake.allocate(5))
    assert (found.kept, found.peak) == (8.0, 13.0)
    device.release()
    assert fake.asked[-1] == "empty_cache"


def test_roofs_are_measured_on_the_device(device, fake):
    fake.step = 1.0
    before = torch.backends.cuda.matmul.fp32_precision
    for dtype in (torch.float32, torch.bfloat16):
        found = measure(dtype, device=device)
        assert found.copy_gbps == pytest.approx(2 * MB / 1e-3 / 1e9)
        assert found.gemm_gflops == pytest.approx(2 * 32**3 / 1e-3 / 1e9)
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert len(device.copies()) == 2
    for copy in device.copies():
        source, target = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
        copy(source, target)
        assert target.tolist() in (source.tolist(), (~source).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_a_cpu_agree(dtype):
    a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
    plain, convolved = (way() for way in devices.CPU.products(a, b))
    assert plain.shape == (32, 32) and convolved.shape == (1, 32, 2, 16)
    torch.testing.assert_close(convolved.permute(0, 2, 3, 1).reshape(32, 32), plain)


def test_float32_says_how_it_is_rounded(device):
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        plan = timing.Plan(flush=True)
        assert layers.conditions(plan, device, torch.float32) == "cold caches, reused memory, TF32"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert layers.conditions(plan, device, torch.float32) == "cold caches, reused memory, no TF32"
        assert layers.conditions(plan, device, torch.bfloat16) == "cold caches, reused memory"
        assert layers.conditions(plan, devices.CPU, torch.float32) == "cold caches, reused memory"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_what_a_record_says_of_a_gpu(device, fake):
    facts = machine.facts(device)
    assert facts["machine"] == "nvidia-h200-132-cores-sm-90"
    assert (facts["device"], facts["cores"], facts["isa"]) == ("NVIDIA H200", 132, "sm_90")
    assert machine.is_gpu(facts) and machine.describe(facts) == "NVIDIA H200 (sm_90)"
    assert set(records.where(facts)) < set(records.COLUMNS)
    device.set_up()
    assert torch.backends.cudnn.benchmark
    with plain_cudnn():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark
    assert not machine.is_gpu(machine.facts()) and " threads of " in machine.describe(machine.facts())


def test_the_device_fills_what_the_options_leave_open(device, monkeypatch):
    from gconv.bench.__main__ import _device, _parser, _plan, _rivals

    monkeypatch.setattr(devices, "Cuda", lambda: device)
    options = _parser().parse_args(["layers", "--device", "cuda"])
    assert _device(options) is device and (options.batch, options.dtype) == (256, "bfloat16")
    assert _plan(options, 1.0).flush and _rivals(options) == ("eager_nchw", "eager_channels_last", "compile")
    options = _parser().parse_args(
        ["layers", "--device", "cuda", "--batch", "3", "--no-flush", "--no-compile"]
    )
    assert not _plan(options, 1.0).flush and options.batch == 3 and "compile" not in _rivals(options)
    options = _parser().parse_args(["sweep"])
    assert _device(options) is devices.CPU and (options.reference, options.dtype) == (8, "float32")
    assert not _plan(options, 1.0).flush
    options = _parser().parse_args(["models"])
    _device(options)
    assert (options.batch, options.dtype, options.budget) == (8, "float32", None)


# ------------------------------------------------------------------------------------------------- the budget


def test_a_budget_ends_compiling_first():
    now = [100.0]
    spent = budget.Budget(50.0, lambda: now[0])
    assert spent.left == 50 and not spent.over and spent.compile_seconds == pytest.approx(35.0)
    spent.spend(RuntimeError)
    now[0] += 35.0
    assert spent.compile_seconds == 0 and not spent.over
    with pytest.raises(RuntimeError, match="the 50 s of --budget are used up"):
        spent.spend(RuntimeError)
    now[0] += 15.0
    assert spent.over
    endless = budget.Budget()
    endless.spend(RuntimeError)
    assert endless.compile_seconds is None and not endless.over


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_a_budget_is_a_number_of_seconds(value, capsys):
    with pytest.raises(SystemExit):
        main(["layers", "--budget", value])
    assert "want a number of seconds above 0" in capsys.readouterr().err


class Clock:
    """A budget's clock that moves at every look."""

    def __init__(self, step):
        self.step, self.now = step, 0.0

    def __call__(self):
        self.now += self.step
        return self.now


PLAN = timing.Plan(min_rounds=3, max_rounds=3)
EAGER = ("eager_nchw", "eager_channels_last")


def test_what_the_budget_leaves_out_is_said():
    def over(names, seconds):
        return layers.run(
            layers.Options(
                (TINY,), 2, modes=("inference",), rivals=names, plan=PLAN,
                budget=budget.Budget(seconds, Clock(1.0)),
            )
        )  # fmt: skip

    run = over((*EAGER, "compile"), 2.5)
    assert run.skipped == {"torch.compile, t1 inference": "the 2.5 s of --budget are used up"}
    assert len(run.rows) == 1 and run.rows[0].get("compile_ms") is None
    run = over(EAGER, 0.5)
    assert run.rows == [] and run.skipped == {"t1 inference": "the 0.5 s of --budget are used up"}


# ----------------------------------------------------------------------------------- whole runs on the device


@pytest.fixture
def interpreted(monkeypatch):
    """gconv's Triton kernels in Triton's interpreter, where the benchmark asks for a GPU's."""
    if gpu.missing_triton() is not None or not gpu.interpreting():
        pytest.skip("needs Triton and TRITON_INTERPRET=1")
    monkeypatch.setattr(rivals, "VARIANTS", {"gconv_triton": "triton"})


def test_layers_on_a_gpu(device, interpreted, tmp_path):
    run = layers.run(layers.Options((TINY,), 2, rivals=EAGER, plan=PLAN, device=device))
    assert [row["mode"] for row in run.rows] == ["inference", "training"] and not run.wrong, run.rows
    for row in run.rows:
        assert row["gconv_ms"] == row["gconv_triton_ms"] == row["eager_nchw_ms"] == 10.0
        assert row["gconv_cuda_ms" if "gconv_cuda_ms" in row else "gconv_ms"] == 10.0
        assert row["best"] in EAGER and row["gconv_host_ms"] > 0 and row["best_host_ms"] > 0
        assert row["machine"] == "nvidia-h200-132-cores-sm-90" and "Triton" in row["libraries"]
    path = records.path_of(run.facts["machine"], folder=str(tmp_path))
    records.append(path, run.rows)
    assert [row["gconv_triton_ms"] for row in records.load(path)] == [10.0, 10.0]
    text = readme.layers_part(records.load(path))
    assert "No run has been recorded yet" in text and "NVIDIA H200 (sm_90)" in text and "| 10.000 |" in text


def test_a_backend_with_a_wrong_result_makes_the_row_wrong(device, interpreted, monkeypatch):
    real = rivals._BUILDERS["gconv_triton"]

    def wrong(*args):
        rival = real(*args)
        rival.call = torch.nn.Sequential(rival.module, torch.nn.Threshold(0.1, 0.5))
        return rival

    monkeypatch.setitem(rivals._BUILDERS, "gconv_triton", wrong)
    options = layers.Options((TINY,), 2, modes=("inference",), rivals=EAGER, plan=PLAN, device=device)
    (row,) = layers.run(options).rows
    assert not row["match"] and "gconv triton: ✗ y" in row["note"]
    assert "gconv_ms" not in row and "gconv_triton_ms" not in row and row["eager_nchw_ms"] == 10.0


def test_a_backend_that_does_not_run_is_left_out(device, monkeypatch):
    monkeypatch.setattr(rivals, "missing_backend", {"triton": None, "cuda": "no nvcc here"}.get)

    def fails(problem, mode):
        raise RuntimeError("gconv: no such kernel\nand more")

    monkeypatch.setitem(rivals._BUILDERS, "gconv_triton", fails)
    options = layers.Options((TINY,), 2, modes=("inference",), rivals=EAGER, plan=PLAN, device=device)
    run = layers.run(options)
    failed = "failed: gconv: no such kernel"
    assert run.skipped == {"gconv cuda": "no nvcc here", "gconv triton, t1 inference": failed}
    assert run.rows[0]["match"] and run.rows[0]["gconv_ms"] == 10.0


def test_sweep_on_a_gpu(device):
    run = run_sweep(Sweep((TINY,), (1, 2), (1,), 2, modes=("inference",), plan=PLAN, device=device))
    assert {row["ms"] for row in run.rows} == {10.0} and run.rows[0]["isa"] == "sm_90"
    assert [row["relative"] for row in run.rows] == [0.5, 1.0]


@pytest.fixture(scope="module")
def bottleneck():
    """A model of one 3x3 layer with a 1x1 layer on either side."""
    layer = shapes.ConvShape("resnet_tiny", "s1", 16, 16, 4, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.MODELS, "resnet_tiny", (layer,))
        yield layer


@pytest.fixture(scope="module")
def one_by_one(bottleneck):
    return kernels.run(kernels.Options((bottleneck,), 2, plan=PLAN))


def test_kernels_one_by_one(one_by_one, tmp_path):
    assert not one_by_one.wrong, [row["note"] for row in one_by_one.wrong]
    ops = list(dict.fromkeys(row["op"] for row in one_by_one.rows))
    assert ops == [
        "conv forward", "conv bwd_input", "conv bwd_weight", "1x1 act + stats", "bn apply", "bn backward",
    ]  # fmt: skip
    ran = {row["op"]: row["kernel"] for row in one_by_one.rows if row["contestant"] == "gconv"}
    assert ran["conv forward"] == "cpu.grouped_conv"
    by_op = {
        row["op"]: row for row in one_by_one.rows if row["contestant"] == "gconv" and row["layer"] != "s1c"
    }
    for row in one_by_one.rows:
        assert set(row) <= set(records.KERNEL_COLUMNS)
        assert row["ms"] > 0 and row["best"] != "gconv"
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["copy_percent"] == pytest.approx(100 * row["gbps"] / row["copy_gbps"])
        assert row["floor_percent"] == pytest.approx(100 * row["floor_ms"] / row["ms"])
    image = 2 * 16 * 36 * 4
    weights = 16 * 4 * 9 * 4
    for op in ops[:3]:
        assert by_op[op]["bytes"] == 2 * image + weights and by_op[op]["flops"] == 2 * 2 * 36 * 16 * 4 * 9
    outer = 256 * image // 16
    assert by_op["1x1 act + stats"]["bytes"] == outer + image + 256 * 16 * 4
    assert by_op["bn apply"]["bytes"] == 2 * outer and by_op["bn backward"]["bytes"] == 5 * outer
    path = records.path_of("machine", records.KERNEL_COLUMNS, str(tmp_path))
    assert path.endswith("machine-kernels.csv")
    records.append(path, one_by_one.rows, records.KERNEL_COLUMNS)
    kept = records.load(path)
    assert tuple(kept[0]) == records.KERNEL_COLUMNS and len(kept) == len(one_by_one.rows)


def test_each_gradient_runs_alone(bottleneck):
    """Time that a gradient takes is not another's."""
    options = kernels.Options((bottleneck,), 2, parts=("bwd_input", "bwd_weight"))
    for task in kernels.tasks(options):
        tensors = task.inputs(torch.Generator().manual_seed(0))
        for name in ("gconv", "eager_nchw"):
            call = task.start(name, tensors)
            (gradient,) = call()
            wanted = tensors["x" if task.part == "bwd_input" else "weight"]
            assert gradient.shape == wanted.shape and torch.equal(call()[0], gradient)


@pytest.mark.parametrize("op", ["grouped_conv", "pixel"])
def test_a_wrong_kernel_gets_no_figure(bottleneck, monkeypatch, op):
    real = kernels._start_conv if op == "grouped_conv" else kernels._start_normalise

    def wrong(*args):
        call = real(*args)
        return (lambda: tuple(t * 1.01 for t in call())) if args[-2] == "gconv" else call

    monkeypatch.setattr(kernels, "_start_conv" if op == "grouped_conv" else "_start_normalise", wrong)
    parts = ("bwd_weight",) if op == "grouped_conv" else ("batch_norm",)
    run = kernels.run(kernels.Options((bottleneck,), 2, parts=parts, plan=PLAN))
    assert run.wrong and {row["contestant"] for row in run.wrong} == {"gconv"}
    assert all("ms" not in row for row in run.wrong)
    assert Findings(run.facts, kernels=run).bad


def test_kernels_on_a_gpu(device, interpreted, bottleneck):
    options = kernels.Options((bottleneck,), 1, parts=("forward", "bwd_input"), plan=PLAN, device=device)
    run = kernels.run(options)
    assert not run.wrong, [row["note"] for row in run.wrong]
    ran = {(row["op"], row["contestant"]): row for row in run.rows}
    assert ran["conv forward", "gconv_triton"]["kernel"] == "triton.grouped_conv"
    assert {row["ms"] for row in run.rows} == {10.0} and all(row["host_ms"] > 0 for row in run.rows)
    table = readme.kernels_table([dict.fromkeys(records.KERNEL_COLUMNS) | row for row in run.rows])
    assert "gconv triton" in table and "NVIDIA H200 (sm_90)" in table


def test_kernels_page(one_by_one, tmp_path):
    pytest.importorskip("jinja2", reason="the page is made with jinja2")
    found = Findings(one_by_one.facts, kernels=one_by_one)
    text = (tmp_path / write(str(tmp_path), found)).read_text(encoding="utf-8")
    assert "Kernels one by one" in text and "matrix product alone" in text and "bwd_weight" in text
    assert main(["report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text
    assert load(str(tmp_path)).kernels.rows == json.loads(json.dumps(one_by_one.rows))


def test_readme_shows_gpus_behind_cpus(one_by_one):
    cpu = [dict.fromkeys(records.KERNEL_COLUMNS) | row for row in one_by_one.rows]
    text = "".join(f"{start}\n{end}" for start, end in readme.MARKERS.values())
    assert "Kernels one by one" not in readme.update(text, [], [], [], cpu)
    gpus = [row | {"isa": "sm_90", "device": "NVIDIA H200"} for row in cpu]
    assert "Kernels one by one" in readme.update(text, [], [], [], gpus)


def test_the_newest_record_of_each_kind_of_device(one_by_one, tmp_path):
    rows = [row | {"date": "2001-01-01T00:00:00Z"} for row in one_by_one.rows[:1]]
    newer = [row | {"date": "2002-01-01T00:00:00Z", "isa": "sm_90"} for row in rows]
    paths = [str(tmp_path / name) for name in ("a-kernels.csv", "b-kernels.csv")]
    for path, of in zip(paths, (rows, newer)):
        records.append(path, of, records.KERNEL_COLUMNS)
    folder, columns = str(tmp_path), records.KERNEL_COLUMNS
    assert records.newest_record(folder, columns) == paths[1]
    assert [records.newest_record(folder, columns, gpu) for gpu in (False, True)] == paths
    assert records.newest_record(folder, records.COLUMNS, True) is None


def program():
    """.ci/gpu.py, which `make gpu` runs."""
    path = Path(__file__).resolve().parent.parent / ".ci" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_program", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_make_gpu_times_exists_and_takes_nine_minutes_a_part_at_most():
    from gconv.bench.__main__ import _parser

    asked = program()
    seconds = {"tests": asked.TEST_SECONDS}
    for goal, runs in asked.RUNS.items():
        seconds[goal] = sum(limit + asked.GRACE for limit, *_ in runs)
        for limit, *words in runs:
            options = _parser().parse_args([goal, "--device", "cuda", "--budget", str(limit), *words])
            if goal == "models":
                assert models.pick(options.model, device="cuda")
            else:
                assert shapes.select(options.model)
    assert tuple(seconds) == asked.PARTS
    assert max(seconds.values()) <= asked.SECONDS == 540


def test_make_gpu_begins_only_what_fits(monkeypatch):
    asked, clock, begun = program(), types.SimpleNamespace(now=0.0), []

    def run(name, command, limit):
        begun.append((name, limit))
        clock.now += limit
        return name, "done", limit, True

    def tests():
        yield run("tests", [], asked.TEST_SECONDS)

    monkeypatch.setattr(asked, "run", run)
    monkeypatch.setattr(asked, "tests", tests)
    monkeypatch.setattr(asked, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    rows = list(asked.rows_of(asked.PARTS))
    assert clock.now <= asked.SECONDS and 1 < len(begun) < len(rows) == 1 + sum(map(len, asked.RUNS.values()))
    left_out = [row for row in rows if row[1] != "done"]
    assert left_out and all(row[1].startswith("not begun") and row[3] for row in left_out)
    clock.now, begun[:] = 0.0, []
    assert all(row[1] == "done" for goal in asked.RUNS for row in asked.rows_of([goal]))


def test_make_gpu_ends_what_takes_too_long(capsys):
    asked = program()
    name, result, seconds, well = asked.run("slow", ["sh", "-c", "echo begun; sleep 60 & wait"], 1.0)
    assert (name, result, well) == ("slow", "ended after 1 s: begun", False) and seconds < 30
    assert asked.run("bad", ["sh", "-c", "echo so; exit 3"], 60.0)[1::2] == ("status 3: so", False)
    assert asked.run("good", ["sh", "-c", "echo so"], 60.0)[1::2] == ("so", True)
    assert asked.run("none", ["sh", "-c", "exit 5"], 60.0)[1::2] == ("nothing to run", True)


# --------------------------------------------------------------------------------------------- whole networks


def test_who_competes_on_a_gpu(monkeypatch):
    everyone = models.pick("resnext50_32x4d", device="cuda")
    assert everyone == ("gconv", "gconv_triton", "gconv_cuda", *EAGER, "compile")
    assert "gconv_triton" not in models.pick("resnext50_32x4d")
    assert set(models.pick("densenet121", device="cuda")) == {
        "gconv_shared", "gconv_ultra", *EAGER, "checkpoint", "compile",
    }  # fmt: skip
    job = networks.Job("resnext_digits", 32, 2, "bfloat16", "inference", device="cuda")
    assert networks.CONTESTANTS["compile"].precisions(job) == ("model in bfloat16",)
    monkeypatch.setattr(networks, "missing_backend", {"triton": None, "cuda": "no nvcc here"}.get)
    assert networks.CONTESTANTS["gconv_cuda"].missing(job) == "no nvcc here"
    assert networks.CONTESTANTS["gconv_triton"].missing(job) is None


def test_the_parts_of_a_step(device):
    job = networks.Job("resnext_digits", 32, 2, "float32", "training")
    contestant = networks.CONTESTANTS["eager_channels_last"]
    network = networks.Network(contestant, job, "float32", networks.make_state(job), device)
    network.stamps.clear()
    turn = timing.turn(network, 0, 2, device=device)
    assert len(network.stamps) == 3
    assert network.parts() == {"forward": 10.0, "backward": 10.0, "update": 10.0}
    assert network.stamps == [] and network.parts() == {}
    assert turn.ms.tolist() == [5 * 10.0] * 2  # the marks in between move this clock


def test_a_budget_drops_what_compiles_first(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    spent = budget.Budget(10.0, lambda: clock.now)
    real = models.entries.await_ready

    def late(worker, screen, what, seconds=None):
        found = real(worker, screen, what, seconds)
        clock.now += 4.0 if "inference" in what else 0.0
        return found

    monkeypatch.setattr(models.entries, "await_ready", late)
    names = ("gconv", "compile", "eager_nchw")
    options = models.Options(
        "resnext_digits", 32, 2, modes=("inference",), contestants=names, plan=PLAN, budget=spent
    )
    run = models.run(options)
    assert [row["contestant"] for row in run.rows] == ["gconv", "eager_nchw"]
    assert run.skipped == {"torch.compile, inference": "the 10 s of --budget are used up"}
