"""gconv.bench on memory: what a step keeps and allocates, DenseNet's contestants, memory against depth.
Nothing here asserts a time."""

import json
from pathlib import Path

import pytest
import torch
from gconv.bench import (
    agreement,
    compare,
    depth,
    models,
    networks,
    plots,
    readme,
    records,
    report,
)
from gconv.bench.__main__ import main
from gconv.bench.allocations import MB, allocations_of
from torch import nn

from gconv.dense_layers import DenseBlock

OURS = ("gconv_shared", "gconv_ultra")
TRAINING = (*OURS, "eager_nchw", "eager_channels_last", "checkpoint")
SLACK = 8 << 10  # bytes: statistics of the batch norms, the loss
SIZES = (("depth", 16), ("growth_rate", 4))


def job(mode="training", dtype="float32"):
    return networks.Job(depth.MODEL, 16, 4, dtype, mode, SIZES)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What is small here is done sooner so, and bytes do not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def state():
    return networks.make_state(job())


def network(name, of, state):
    contestant = networks.CONTESTANTS[name]
    return networks.Network(contestant, of, contestant.precisions(of)[0], state)


# -------------------------------------------------------------------------------------- what a step allocates


def allocated(module, x):
    """Bytes (kept, peak) of a step of module(x).sum()."""
    module.zero_grad(set_to_none=True)
    found = allocations_of(lambda: module(x).sum(), lambda loss: loss.backward())
    return found.kept * MB, found.peak * MB


def test_what_a_dense_block_keeps_is_counted():
    layers, channels, growth = 3, 8, 4
    block = DenseBlock(layers, channels, 4, growth, memory="naive")
    x = torch.randn(2, channels, 16, 16)
    # Of each layer the concatenation and its normalised form, and the same of the bottleneck (design of a
    # memory that grows with the square of the depth).
    inputs = [channels + i * growth for i in range(layers)]
    want = sum(2 * c + 2 * 4 * growth for c in inputs) * 4 * x[:, 0].numel()
    kept, peak = allocated(block, x)
    assert want <= kept <= want + SLACK
    assert peak > kept
    assert allocated(block, x) == (kept, peak)


def test_what_does_not_keep_is_not_counted():
    conv, x = nn.Conv2d(4, 4, 3), torch.randn(2, 4, 34, 34)
    y = 2 * 4 * 32 * 32 * 4
    kept, peak = allocated(conv, x)  # x is not the step's, y is not kept
    assert kept <= SLACK and y <= peak
    kept, _ = allocated(nn.Sequential(conv, nn.ReLU(), nn.ReLU()), x)
    assert 2 * y <= kept <= 2 * y + SLACK


class _Hidden(torch.autograd.Function):
    """Keeps a tensor where no hook of autograd sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.mine = x.exp()
        return ctx.mine.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.mine


def test_what_a_function_keeps_by_itself_is_counted():
    x = torch.randn(1 << 16, requires_grad=True)
    found = allocations_of(lambda: _Hidden.apply(x), lambda loss: loss.backward())
    assert x.nbytes <= found.kept * MB <= x.nbytes + SLACK


# ----------------------------------------------------------------------------------- the DenseNet contestants


def test_who_competes_on_a_densenet():
    everyone = models.pick("densenet121")
    assert set(TRAINING) < set(everyone) and "gconv" not in everyone
    assert "gconv" in models.pick("resnext50_32x4d") and not {*OURS, "checkpoint"} & set(
        models.pick("resnext50_32x4d")
    )
    of = networks.Job("densenet121", 224, 1, "float32", "inference")
    assert networks.CONTESTANTS["gconv_shared"].missing(of) is None
    for name in ("gconv_ultra", "checkpoint"):
        assert networks.CONTESTANTS[name].missing(of) == "inference: runs training only"
    assert [models.default_size(name) for name in ("densenet121", "densenet_bc100_k12")] == [224, 32]


def test_operations_of_densenet121():
    forward = networks.flops(networks.Job("densenet121", 224, 1, "float32", "inference"))
    assert forward == pytest.approx(2 * 2.85e9, rel=0.02)


def test_depth_counts_the_convolutions_and_the_classifier():
    model = job().build(stock=True)
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == dict(SIZES)["depth"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_densenet_contestants_match(dtype, state):
    of = job(dtype=dtype)
    exact = networks.exact_results(of, state)
    found = {name: network(name, of, state).results(state) for name in TRAINING}
    own = [found[name] for name in networks.EAGER]
    for name in TRAINING:
        answers_for = networks.CONTESTANTS[name].answers_for
        wanted = {key: want for key, want in exact.items() if answers_for(key)}
        verdict = agreement.check_network(found[name], wanted, own)
        assert verdict.ok, f"{name}: {verdict.text}"
    for key in (
        "d features.denseblock2.denselayer1.conv2.weight",
        "d features.denseblock1.denselayer2.norm1.bias",
    ):
        for wrong in (torch.zeros_like(own[0][key]), -own[0][key]):
            assert not agreement.check_network(own[0] | {key: wrong}, exact, own).ok


def test_checkpointing_updates_twice(state):
    exact = networks.exact_results(job(), state)
    found, own = (network(name, job(), state).results(state) for name in ("checkpoint", "eager_nchw"))
    unanswered = {key for key in exact if not networks.CONTESTANTS["checkpoint"].answers_for(key)}
    assert unanswered == {key for key in exact if ".running_" in key} != set()
    key = "features.denseblock1.denselayer1.norm1.running_mean"
    assert not agreement.check_network(found, {key: exact[key]}, [own]).ok
    assert networks.CONTESTANTS["checkpoint"].remark


def test_who_keeps_less(state):
    kept = {}
    for name in ("gconv_ultra", "gconv_shared", "checkpoint", "eager_channels_last"):
        each = network(name, job(), state)
        each.prepare(0)
        kept[name] = allocations_of(each.forward, each.backward).kept
    assert (
        list(kept) == sorted(kept, key=kept.get) and kept["gconv_shared"] < 0.5 * kept["eager_channels_last"]
    )


# --------------------------------------------------------------------------------------- memory against depth


@pytest.fixture(scope="module")
def run():
    """One real run of one depth, and the same rows at another, made up."""
    names = ("gconv_shared", "eager_channels_last", "onnxruntime")
    found = depth.run(depth.Options((10,), 4, 8, 2, contestants=names))
    found.rows += [row | {"depth": 22, "kept_mb": 4 * row["kept_mb"]} for row in found.rows]
    return found


def test_run_of_depths(run):
    assert [(row["depth"], row["contestant"]) for row in run.rows] == [
        (10, "gconv_shared"), (10, "eager_channels_last"), (22, "gconv_shared"), (22, "eager_channels_last")
    ]  # fmt: skip
    assert list(run.skipped) == ["onnxruntime, L = 10"] and run.wrong == []
    for row in run.rows[:2]:
        assert set(row) <= set(records.DEPTH_COLUMNS)
        assert row["match"] and row["threads"] == 1 and row["parameters"] > 0
        assert 0 < row["kept_mb"] < row["allocated_mb"]


def test_depths_are_recorded_and_reported(run, tmp_path):
    pytest.importorskip("jinja2", reason="the page is made with jinja2")
    pytest.importorskip("matplotlib", reason="the pictures are made with matplotlib")
    path = records.path_of("machine", records.DEPTH_COLUMNS, str(tmp_path))
    assert Path(path).name == "machine-depth.csv"
    records.append(path, run.rows, records.DEPTH_COLUMNS)
    kept = records.load(path)
    assert tuple(kept[0]) == records.DEPTH_COLUMNS
    assert [row["kept_mb"] for row in kept] == pytest.approx([row["kept_mb"] for row in run.rows], rel=1e-4)
    with pytest.raises(ValueError, match="got one of depths"):
        compare.compare(path, path)
    page = Path(report.write(str(tmp_path), report.Findings(run.facts, depths=run)))
    text = page.read_text(encoding="utf-8")
    assert (tmp_path / "depths.png").read_bytes().startswith(b"\x89PNG")
    assert "L = 22: MB per image" in text and "onnxruntime, L = 10" in text
    assert report.load(str(tmp_path)).depths.rows == json.loads(json.dumps(run.rows))
    table = readme.depth_table([*({**row, "date": "2001", "kept_mb": 9e4} for row in kept), *kept])
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 and "90000" not in table and lines[0].count("L = ") == 2
    assert f"{kept[0]['kept_mb'] / 2:.1f} / {kept[0]['allocated_mb'] / 2:.1f}" in lines[2]


def test_a_wrong_result_has_no_curve(run):
    wrong = [{**row, "match": False, "kept_mb": None, "allocated_mb": None} for row in run.rows[:1]]
    assert depth.Run(wrong, run.facts, {}).wrong == wrong
    filled = [dict.fromkeys(records.DEPTH_COLUMNS) | row for row in (*wrong, *run.rows[1:])]
    assert "wrong result" in readme.depth_table(filled)
    if not plots.missing():
        assert plots.depths(filled).startswith(b"\x89PNG")


def test_compiling_has_a_budget():
    budget = depth._Budget(60.0)
    assert budget.reason(40) is None
    budget.took(20.0, 40)
    assert budget.reason(64) is None  # about 32 of the 40 s left
    budget.took(32.0, 64)
    assert "what is left of 60 s" in budget.reason(100)
    skipped = {}
    options = depth.Options()
    chosen = depth._choose(options.job(100), 100, options, budget, skipped)
    assert [c.name for c in chosen] == [name for name in depth.CHOICE if name != "compile"]
    assert list(skipped) == ["torch.compile, L = 100"]
    budget = depth._Budget(60.0)
    budget.took(61.0, 40)  # stopped there
    assert budget.reason(64)


@pytest.mark.parametrize(
    "arguments", [["--depths", "40,65"], ["--depths", "4"], ["--without", "eager channels_last"]]
)
def test_wrong_usage_is_one_line(arguments, capsys):
    assert main(["depth", *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# ---------------------------------------------------------------------------------------------- older records


def test_a_record_from_before_a_column_is_read_and_continued(tmp_path):
    path = tmp_path / "machine-models.csv"
    heading = records.MODEL_COLUMNS[: records.MODEL_COLUMNS.index("kept_mb")]
    old = dict.fromkeys(heading, "") | {"date": "2001", "model": "resnet50", "ms": "1.5", "note": 'a, "b"'}
    quoted = '"a, ""b"""'
    line = ",".join(quoted if key == "note" else old[key] for key in heading)
    path.write_text(f"{','.join(heading)}\n{line}\n", encoding="utf-8")
    (row,) = records.load(str(path))
    assert row["kept_mb"] is None and row["ms"] == 1.5 and tuple(row) == records.MODEL_COLUMNS
    assert records.newest_record(str(tmp_path), records.MODEL_COLUMNS) == str(path)
    records.append(str(path), [{"date": "2002", "kept_mb": 3.5}], records.MODEL_COLUMNS)
    added = len(records.MODEL_COLUMNS) - len(heading)
    assert path.read_text(encoding="utf-8").splitlines()[1] == line + "," * added
    assert [row["kept_mb"] for row in records.load(str(path))] == [None, 3.5]
    assert [row["note"] for row in records.load(str(path))] == ['a, "b"', ""]
    with pytest.raises(ValueError, match="want the columns"):
        records.append(str(path), [], records.SWEEP_COLUMNS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
