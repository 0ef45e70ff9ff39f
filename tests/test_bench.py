"""gconv.bench: what it computes, checks, stores and reports. Nothing here asserts a time."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gconv.bench import (
    agreement,
    compare,
    devices,
    layers,
    match,
    readme,
    records,
    report,
    rivals,
    roofs,
    shapes,
    timing,
    train,
    workers,
)
from gconv.bench.__main__ import main

TINY = shapes.ConvShape("tiny", "t1", 16, 16, 4, 8)
TINY_STRIDED = shapes.ConvShape("tiny", "t2d", 16, 32, 4, 9, stride=2)


# ------------------------------------------------------------------------------------------ shapes and roofs


def test_resnext50_layers_are_the_papers():
    found = {
        s.layer: (s.in_channels, s.channels_per_group, s.size, s.stride, s.count)
        for s in shapes.MODELS["resnext50_32x4d"]
    }
    assert found == {
        "s1": (128, 4, 56, 1, 3),
        "s2d": (256, 8, 56, 2, 1),
        "s2": (256, 8, 28, 1, 3),
        "s3d": (512, 16, 28, 2, 1),
        "s3": (512, 16, 14, 1, 5),
        "s4d": (1024, 32, 14, 2, 1),
        "s4": (1024, 32, 7, 1, 2),
    }
    assert {s.flops(8, "inference") for s in shapes.MODELS["resnext50_32x4d"]} == {231_211_008}


@pytest.mark.parametrize(
    ("parameters", "widths", "depths"),
    [
        ((22, 24, 24.48, 2.54, 16), (32, 64, 160, 400), (1, 2, 7, 12)),  # RegNetX-400MF
        ((25, 88, 26.31, 2.25, 48), (96, 192, 432, 1008), (2, 6, 15, 2)),  # RegNetX-3.2GF
        ((22, 96, 31.41, 2.24, 64), (128, 192, 512, 1088), (2, 6, 12, 2)),  # RegNetY-4GF
        ((17, 192, 76.82, 2.19, 56), (168, 448, 896, 2016), (2, 4, 10, 1)),  # RegNetY-8GF
        ((18, 200, 106.23, 2.48, 112), (224, 448, 1232, 3024), (2, 4, 11, 1)),  # RegNetY-16GF
    ],
)
def test_regnet_stages_are_the_papers(parameters, widths, depths):
    assert shapes.regnet_stages(*parameters) == (widths, depths)


def test_layers_agree_with_the_model():
    """The 3x3 convolutions of our own ResNeXt-50, called on a 224x224 image, are the layers of shapes.py."""
    from gconv.models import resnext50_32x4d

    seen = []
    with torch.device("meta"):
        model = resnext50_32x4d()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            seen.append((module.in_channels, module.out_channels, module.groups, module.stride[0]))
    listed = [
        (s.in_channels, s.out_channels, s.groups, s.stride)
        for s in shapes.MODELS["resnext50_32x4d"]
        for _ in range(s.count)
    ]
    assert sorted(seen) == sorted(listed)


def test_other_networks_layers_are_their_papers():
    found = {
        (s.model, s.layer): (s.in_channels, s.channels_per_group, s.size, s.stride, s.count)
        for model in ("mobilenet_v2", "regnet_y_4gf")
        for s in shapes.MODELS[model]
    }
    assert sum(s.count for s in shapes.MODELS["mobilenet_v2"]) == 17
    assert found["mobilenet_v2", "d192d"] == (192, 1, 28, 2, 1)
    assert found["mobilenet_v2", "d960"] == (960, 1, 7, 1, 3)
    assert found["regnet_y_4gf", "s2"] == (192, 64, 28, 1, 5)
    widths = shapes.select("widths")
    assert {s.channels_per_group for s in widths} >= {1, 2, 24, 48, 56, 64, 112}
    assert any(s.groups == 64 and s.channels_per_group == 4 for s in widths)
    assert all(s in shapes.MODELS[s.model] for s in widths)
    assert [s.model for s in shapes.select("widths", "regnet_y_8gf.s3")] == ["regnet_y_8gf"]


def test_only_all_layers_of_a_model_have_a_sum():
    whole = shapes.select("resnext50_32x4d")
    assert shapes.is_whole(whole)
    assert not any(map(shapes.is_whole, (whole[:-1], shapes.select("widths"), (TINY,), ())))


def test_select_names_what_exists():
    assert [s.layer for s in shapes.select("resnext50_32x4d", "s4, s1")] == ["s4", "s1"]
    with pytest.raises(ValueError, match="want one of resnext50_32x4d"):
        shapes.select("lenet")
    with pytest.raises(ValueError, match="want some of s1, s2d"):
        shapes.select("resnext50_32x4d", "s9")


def test_roof_is_the_slower_of_arithmetic_and_traffic():
    measured = roofs.Roofs(copy_gbps=10.0, gemm_gflops=100.0, dtype="float32")
    assert roofs.roof_ms(2e9, 1e6, measured) == pytest.approx(20.0)
    assert roofs.bound_by(2e9, 1e6, measured) == "compute"
    assert roofs.roof_ms(1e6, 5e8, measured) == pytest.approx(50.0)
    assert roofs.bound_by(1e6, 5e8, measured) == "memory"
    better = measured.better(roofs.Roofs(12.0, 90.0, "float32"))
    assert (better.copy_gbps, better.gemm_gflops) == (12.0, 100.0)


def test_roofs_are_measured():
    measured = roofs.measure(torch.float32, gemm_size=64, copy_mib=(1,))
    assert measured.copy_gbps > 0 and measured.gemm_gflops > 0


def test_compulsory_bytes():
    x, y, w = 2 * 16 * 81, 2 * 32 * 25, 32 * 4 * 9
    assert TINY_STRIDED.out_size == 5
    assert TINY_STRIDED.bytes(2, "inference", 4) == 4 * (x + y + w)
    assert TINY_STRIDED.bytes(2, "training", 2) == 2 * (3 * x + 7 * y + 3 * w)
    assert TINY_STRIDED.flops(2, "training") == 3 * 2 * 2 * 25 * w


# ------------------------------------------------------------------------------------------------- the check


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def answers(request):
    problem = match.Problem.make(TINY, 2, layers.DTYPES[request.param]).without_kinks()
    exact = match.exact_results(problem, "training")
    own = [
        rivals.build(name, problem, "training").results(problem)
        for name in ("eager_nchw", "eager_channels_last")
    ]
    return problem, exact, own


def test_gconv_matches(answers):
    problem, exact, own = answers
    found = rivals.build("gconv", problem, "training").results(problem)
    verdict = match.compare(found, exact, own)
    assert verdict.ok, verdict.text
    assert set(exact) == {"y", "dx", "dweight", "dgamma", "dbeta", "running_mean", "running_var"}


@pytest.mark.parametrize(
    ("key", "spoil"),
    [
        ("dweight", lambda t: t * 1.05),
        ("dx", torch.zeros_like),
        ("dx", lambda t: t.roll(1, 3)),
        ("y", lambda t: t.reshape(2, 4, 4, 8, 8).flip(1).reshape(t.shape)),
        ("y", lambda t: t.index_fill(0, torch.tensor([1]), float("nan"))),
        ("dbeta", lambda t: t[:-1]),
        ("running_var", lambda t: t * 128 / 127),
    ],
)
def test_wrong_results_do_not_match(answers, key, spoil):
    _, exact, own = answers
    verdict = match.compare(own[0] | {key: spoil(own[0][key])}, exact, own)
    assert not verdict.ok
    assert key in verdict.text


def test_missing_result_does_not_match(answers):
    _, exact, own = answers
    assert not match.compare({k: v for k, v in own[0].items() if k != "dx"}, exact, own).ok


# ---------------------------------------------------------------------------------------------------- timing


class _Fake:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def prepare(self, i):
        self.i = i

    def run(self):
        self.log.append(self.name)


def test_rivals_take_turns_and_get_equal_rounds():
    log = []
    result = timing.interleave([_Fake(n, log) for n in "ABC"], timing.Plan(min_rounds=4, max_rounds=4))
    assert result.rounds + result.dropped == 4 or result.noisy
    turns = re.sub(r"(.)\1+", r"\1", "".join(log))
    assert turns in {"ABC" + "ABC" + "BCA" + "CAB" + "ABC", "ABC" + "ABC" + "BC" + "A" + "CAB" + "ABC"}
    assert {len(t.rounds) for t in result.timings.values()} == {result.rounds}
    assert all(t.p20 <= t.p50 <= t.p80 for t in result.timings.values())


def test_a_jump_or_a_disturbance_drops_the_round_for_everyone():
    steady = [np.array([1.0, 1.1])] * 5
    jumping = [*steady[:4], np.array([1.0, 9.0])]
    assert timing._kept_rounds({"a": steady, "b": jumping}, [False] * 5) == [True] * 4 + [False]
    assert timing._kept_rounds({"a": steady}, [True] + [False] * 4) == [False] + [True] * 4
    slow = [np.array([40.0]), np.array([45.0]), np.array([41.0])]  # more than 4 ms above, but not 25 %
    assert timing._kept_rounds({"a": slow}, [False] * 3) == [True] * 3


@pytest.mark.parametrize(
    ("switches", "calls", "seconds", "disturbed"),
    [
        (2, 2, 0.004, False),  # of a short turn: one a call
        (3, 2, 0.004, True),
        (9, 9, 0.006, False),
        (2, 2, 0.09, False),  # calls of 45 ms: by their length
        (4, 2, 0.09, False),
        (5, 2, 0.09, True),
        (100, 2, 2.0, False),
        (101, 2, 2.0, True),
        (int(0.09 * 125), 2, 0.09, True),  # what a competitor for one of the cores makes at the least
        (int(2.0 * 125), 2, 2.0, True),
    ],
)
def test_switches_allowed_grow_with_time_from_one_a_call(switches, calls, seconds, disturbed):
    assert devices.CPU.disturbed((7, 1), (7 + switches, 1), calls, seconds) is disturbed


def test_stolen_ticks_allowed_grow_with_time():
    ticks = 1 / os.sysconf("SC_CLK_TCK")

    def disturbed(stolen, seconds):
        return devices.CPU.disturbed((0, 0), (0, stolen), 2, seconds)

    assert not disturbed(1, 5 * ticks)
    assert disturbed(2, 5 * ticks)
    assert not disturbed(3, 300 * ticks)
    assert disturbed(4, 300 * ticks)


def test_rivals_of_other_processes_take_their_turns_there():
    taken = []

    def take(rival, index, calls):
        taken.append((rival.name, index, calls))
        return timing.Turn(np.full(calls, 3.0 if rival.name == "A" else 100.0), disturbed=False)

    rivals_ = [_Fake(n, None) for n in "AB"]
    result = timing.interleave(rivals_, timing.Plan(min_rounds=3, max_rounds=3), take=take)
    assert taken[:2] == [("A", 0, 2), ("B", 0, 2)]
    assert taken[2:] == [("A", 0, 2), ("B", 0, 1), ("B", 1, 1), ("A", 2, 2), ("A", 4, 2), ("B", 2, 1)]
    assert result.timings["A"].p50 == 3.0 and result.rounds == 3 and not result.noisy
    disturbed = timing.interleave(
        rivals_, timing.Plan(min_rounds=4, max_rounds=4),
        take=lambda rival, i, n: timing.Turn(np.ones(n), rival.name == "A" and i == 0),
    )  # fmt: skip
    assert (disturbed.rounds, disturbed.dropped) == (3, 1)


def test_ratio_interval_encloses_the_ratio():
    rng = np.random.default_rng(1)
    a = timing.Timing("a", [rng.normal(4, 0.1, 3) for _ in range(20)])
    b = timing.Timing("b", [rng.normal(2, 0.1, 5) for _ in range(20)])
    low, high = timing.ratio_interval(a, b)
    assert low < a.p50 / b.p50 < high
    assert high - low < 0.3


def test_peak_memory_sees_an_allocation():
    peak = devices.peak_memory_mb(lambda: torch.ones(32 << 20, dtype=torch.uint8))
    if peak is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 30 < peak < 48


# --------------------------------------------------------------------------------------------------- records


@pytest.fixture(scope="module")
def run():
    """One real run of the layer benchmark on tiny layers."""
    plan = timing.Plan(min_rounds=3, max_rounds=3)
    names = ("eager_nchw", "eager_channels_last")
    return layers.run(layers.Options((TINY, TINY_STRIDED), batch=2, rivals=names, plan=plan))


def test_layer_run_fills_every_column(run):
    assert [(row["mode"], row["layer"]) for row in run.rows] == [
        ("inference", "t1"), ("inference", "t2d"), ("training", "t1"), ("training", "t2d")
    ]  # fmt: skip
    for row in run.rows:
        assert row["match"], row["note"]
        assert row["kernel"].startswith("cpu."), row["kernel"]
        assert set(row) <= set(records.COLUMNS)
        absent = {key for key in records.COLUMNS if row.get(key) is None}
        others = ("compile_ms", "onnxruntime_ms", "openvino_ms", "gconv_triton_ms", "gconv_cuda_ms")
        expected = {c for c in records.COLUMNS if c.startswith(others)} | {"gconv_host_ms", "best_host_ms"}
        assert absent - {"gconv_peak_mb", "best_peak_mb"} == expected
        best = min(row["eager_nchw_ms"], row["eager_channels_last_ms"])
        assert row["ratio"] == pytest.approx(best / row["gconv_ms"])
        assert row["roof_percent"] == pytest.approx(100 * row["roof_ms"] / row["gconv_ms"])


@pytest.fixture(scope="module")
def whole():
    """A real run of all layers of a model: it ends with the sum of every mode."""
    counted = (TINY, shapes.ConvShape("tiny", "t2", 16, 32, 4, 6, count=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.MODELS, "tiny", counted)
        plan = timing.Plan(min_rounds=3, max_rounds=3)
        names = ("eager_nchw", "eager_channels_last")
        return layers.run(layers.Options(counted, batch=2, rivals=names, plan=plan))


def test_all_layers_are_summed_as_often_as_the_model_has_them(whole, tmp_path):
    assert [row["layer"] for row in whole.rows] == ["t1", "t2", "all"] * 2
    for start in (0, 3):
        first, second, summed = whole.rows[start : start + 3]
        assert summed["count"] == 4 and summed["mode"] == first["mode"]
        for key in ("gconv_ms", "eager_nchw_ms", "flops", "roof_ms"):
            assert summed[key] == pytest.approx(first[key] + 3 * second[key]), key
        best = first[first["best"] + "_ms"] + 3 * second[second["best"] + "_ms"]
        assert layers.best_ms(summed) == pytest.approx(best)
        assert summed["ratio"] == pytest.approx(best / summed["gconv_ms"])
        assert summed["ratio_low"] <= summed["ratio_high"]
        assert summed["gflops"] == pytest.approx(summed["flops"] / summed["gconv_ms"] / 1e6)
    path = str(tmp_path / "tiny.csv")
    records.append(path, whole.rows)
    kept = records.load(path)
    assert [records.is_total(row) for row in kept] == [False, False, True] * 2
    assert kept[2]["in_channels"] is None
    assert "all 4 layers, against the best of each" in readme.layers_part(kept)
    other = [row | {"dtype": "bfloat16", "date": "2001-01-01T00:00:00Z"} for row in kept]
    text = readme.layers_part([*kept, *other])
    assert "In bfloat16 (2001-01-01, commit" in text and text.count("| t1 |") == 2
    assert main(["compare", path, path]) == 0


def test_the_sum_of_all_layers():
    def times(*medians):
        return timing.Timing("", [np.array([median]) for median in medians])

    def row(count, best, ours):
        found = dict.fromkeys(("gconv_ms_p20", "gconv_ms_p80", "flops", "bytes", "error_ratio"), 1.0)
        found |= {"model": "m", "batch": 8, "dtype": "float32", "mode": "inference", "conditions": ""}
        return found | {
            "count": count, "match": True, "gconv_ms": ours, "best": "compile", "compile_ms": best,
            "compile_ms_p20": best, "compile_ms_p80": best, "rounds": 3, "dropped": 0, "noisy": False,
        }  # fmt: skip

    def result(best, ours):
        return timing.Result({"compile": times(*best), "gconv": times(*ours)}, 3, 0, False)

    rows = [row(3, 4.0, 1.0), row(1, 2.0, 2.0)]
    summed = layers.total(rows, [result((4, 4, 4), (1, 1, 1)), result((2, 2, 2), (2, 2, 2))])
    assert summed["ratio"] == pytest.approx((3 * 4 + 2) / (3 * 1 + 2))
    assert summed["ratio_low"] == summed["ratio_high"] == pytest.approx(summed["ratio"])
    spread = layers.total(rows, [result((3, 4, 5), (1, 1, 1)), result((2, 2, 2), (2, 2, 2))])
    assert spread["ratio_low"] < spread["ratio"] < spread["ratio_high"]
    rows[1]["match"] = False
    assert layers.total(rows, []) is None


def test_records_round_trip_and_only_grow(run, tmp_path):
    path = str(tmp_path / "deep" / "machine.csv")
    records.append(path, run.rows)
    first = Path(path).read_text(encoding="utf-8")
    records.append(path, run.rows[:1])
    assert Path(path).read_text(encoding="utf-8").startswith(first)
    with open(path, newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert tuple(table[0]) == records.COLUMNS
    assert len(table) == 1 + len(run.rows) + 1
    loaded = records.load(path)
    for row, kept in zip(run.rows, loaded):
        for key, value in row.items():
            want = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert kept[key] == want, key


def test_records_refuse_other_columns(run, tmp_path):
    with pytest.raises(ValueError, match="got also \\['colour'\\]"):
        records.append(str(tmp_path / "a.csv"), [run.rows[0] | {"colour": 1}])
    other = tmp_path / "b.csv"
    other.write_text("date,layer\n")
    with pytest.raises(ValueError, match="want the columns"):
        records.append(str(other), run.rows)
    with pytest.raises(ValueError, match="missing"):
        records.load(str(other))


def test_committed_records_load():
    for path in Path(records.FOLDER).glob("*.csv"):
        rows = records.load(str(path))
        figure = next(name for name in ("gconv_ms", "ms", "kept_mb") if name in rows[0])
        assert all(row[figure] is not None for row in rows if row["match"])


# --------------------------------------------------------------------------------------------------- compare


def _stored(tmp_path, name, rows, **changes):
    """A record with ratio 2 (1.9 to 2.1) in every row, and `changes` in the first."""
    rows = [row | {"ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1} for row in rows]
    rows[0] |= changes
    path = str(tmp_path / f"{name}.csv")
    records.append(path, rows)
    return path


@pytest.mark.parametrize(
    ("changes", "status", "kind"),
    [
        ({}, 0, "same"),
        ({"ratio": 1.5, "ratio_low": 1.4, "ratio_high": 1.6}, 1, "slower"),
        ({"ratio": 1.5, "ratio_low": 1.0, "ratio_high": 2.0}, 0, "same"),  # the intervals touch
        ({"ratio": 1.93, "ratio_low": 1.92, "ratio_high": 1.94}, 0, "same"),  # within the tolerance
        ({"ratio": 3.0, "ratio_low": 2.9, "ratio_high": 3.1}, 0, "faster"),
        ({"match": False, "ratio": None, "gconv_ms": None}, 1, "wrong"),
    ],
)
def test_compare_fails_on_regressions_only(run, tmp_path, capsys, changes, status, kind):
    before, after = _stored(tmp_path, "before", run.rows), _stored(tmp_path, "after", run.rows, **changes)
    assert compare.compare(before, after)[0].kind == kind
    assert main(["compare", before, after]) == status
    assert f"{len(run.rows)} rows: {status} regressions" in capsys.readouterr().out


def test_compare_fails_on_a_missing_row_but_not_on_a_new_one(run, tmp_path):
    all_rows, fewer = _stored(tmp_path, "all", run.rows), _stored(tmp_path, "fewer", run.rows[:-1])
    assert main(["compare", all_rows, fewer]) == 1
    assert main(["compare", fewer, all_rows]) == 0


def test_compare_by_time(run, tmp_path):
    slow = {"gconv_ms": 5.0, "gconv_ms_p20": 4.9, "gconv_ms_p80": 5.1}
    fast = {"gconv_ms": 2.0, "gconv_ms_p20": 1.9, "gconv_ms_p80": 2.1}
    before, after = _stored(tmp_path, "a", run.rows[:1], **fast), _stored(tmp_path, "b", run.rows[:1], **slow)
    assert main(["compare", before, after]) == 0
    assert main(["compare", before, after, "--metric", "ms"]) == 1
    assert main(["compare", after, before, "--metric", "ms"]) == 0


# ---------------------------------------------------------------------------------------- README and report


def test_readme_table_is_generated_between_the_markers(run, tmp_path, capsys):
    record, page = str(tmp_path / "r.csv"), tmp_path / "README.md"
    records.append(record, [run.rows[0] | {"date": "2001-01-01T00:00:00Z", "layer": "old"}, *run.rows])
    parts = "\n".join(f"{start}\nstale\n{end}" for start, end in readme.MARKERS.values())
    page.write_text(f"before\n{parts}\nafter\n", encoding="utf-8")
    models, depths = str(tmp_path / "models.csv"), str(tmp_path / "depth.csv")
    records.append(models, [], records.MODEL_COLUMNS)
    records.append(depths, [], records.DEPTH_COLUMNS)
    arguments = ["readme", "--readme", str(page), "--record", record]
    arguments += ["--models-record", models, "--depth-record", depths]
    assert main([*arguments, "--check"]) == 1
    assert "stale" in page.read_text(encoding="utf-8")
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 * (2 + 2) and "| old |" not in text
    assert len({line.count("|") for line in table}) == 1
    for row in run.rows:
        assert f"**{row['ratio']:.2f}×**" in text
    page.write_text("no markers", encoding="utf-8")
    assert main(arguments) == 2
    assert "want the markers" in capsys.readouterr().err


@pytest.fixture
def training():
    """A finished training of 2 epochs of 3 steps, made up."""
    everyone = train.contestants()
    for c in everyone:
        c.losses, c.seconds, c.accuracy = [2.0, 1.5, 1.0, 0.8, 0.5, 0.4], [1.0] * 2, [0.9] * 2
        c.test_loss, c.peak_mb, c.training_mb, c.parameters = [0.3] * 2, 400.0, 100.0, 61082
    everyone[2].losses = [loss + 1e-6 for loss in everyone[2].losses]
    check, allowed = agreement.check_curves(*(everyone[i].losses for i in (0, 2, 1)))
    assert check.ok, check.text
    return train.Training(train.Options(epochs=2), everyone, [check], allowed)


def test_page_has_the_sums(whole, tmp_path):
    pytest.importorskip("jinja2", reason="the page is made with jinja2")
    text = Path(report.write(str(tmp_path), report.Findings(whole.facts, layers=whole))).read_text("utf-8")
    assert text.count("All 4 layers together: ") == text.count("each as often as it occurs") == 2
    assert text.count("All 2 results match float64") == 2


def test_report_is_one_self_contained_page(run, training, tmp_path):
    pytest.importorskip("jinja2", reason="the page is made with jinja2")
    pytest.importorskip("matplotlib", reason="the pictures are made with matplotlib")
    path = report.write(str(tmp_path), report.Findings(run.facts, layers=run, training=training))
    text = Path(path).read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text) == []
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert text.count("data:image/png;base64,") == 3
    for name in ("training", "roofline", "times"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for row in run.rows:
        assert f"{row['ratio']:.2f}×" in text
    assert "All 2 results match float64" in text and training.checks[0].text in text
    again = main(["report", "--out", str(tmp_path)])
    assert again == 0 and Path(path).read_text(encoding="utf-8") == text


def test_wrong_result_gets_no_figure_and_fails(run, training, tmp_path, monkeypatch, capsys):
    pytest.importorskip("jinja2", reason="the page is made with jinja2")
    real = rivals._gconv

    def wrong(problem, mode):
        rival = real(problem, mode)
        module = rival.module
        rival.call = lambda x: module(x) * 1.01
        return rival

    monkeypatch.setitem(rivals._BUILDERS, "gconv", wrong)
    monkeypatch.setattr(shapes, "select", lambda model, names: (TINY,))
    status = main(
        [
            "layers",
            "--no-compile",
            "--mode",
            "inference",
            "--repeats",
            "2",
            "--batch",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    assert status == 1
    assert "FAILED: wrong result on t1 inference" in capsys.readouterr().out
    row = records.load(str(tmp_path / "layers.csv"))[0]
    assert row["match"] is False and row["gconv_ms"] is None and row["ratio"] is None
    assert row["eager_nchw_ms"] > 0
    assert "WRONG RESULT on t1" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "wrong result" in readme.layers_table([row])


def test_wrong_usage_is_one_line(capsys):
    assert main(["layers", "--model", "lenet"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(SystemExit) as stopped:
        main(["layers", "--dtype", "int8"])
    assert stopped.value.code == 2


# -------------------------------------------------------------------------------------------------- training


def _toy_digits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 1, 16, 16, generator=generator)
    y = torch.randint(0, 10, (60,), generator=generator)
    return {"x_train": x[:48], "y_train": y[:48], "x_test": x[48:], "y_test": y[48:]}


def _trainer(stock, layout):
    from gconv.bench import train_worker

    return train_worker.Trainer(
        _toy_digits(), stock, layout, seed=0, epochs=5, batch=16, rate=train.Options.rate
    )


@pytest.fixture(scope="module")
def stock_and_twin():
    return _trainer(True, "nchw").epoch(), _trainer(True, "channels_last").epoch()


def test_curves_of_gconv_lie_on_those_of_stock(stock_and_twin):
    stock, twin = stock_and_twin
    check, allowed = agreement.check_curves(stock, _trainer(False, "channels_last").epoch(), twin)
    assert check.ok, check.text
    assert len(allowed) == len(stock) and allowed[0] < 1e-4


def test_a_layer_left_out_parts_the_curves(stock_and_twin):
    stock, twin = stock_and_twin
    trainer = _trainer(True, "nchw")
    trainer.model.layer3[0].bn2.weight.register_hook(torch.zeros_like)
    trainer.model.layer1[0].conv2.weight.register_hook(torch.zeros_like)
    check, _ = agreement.check_curves(stock, trainer.epoch(), twin)
    assert not check.ok
    assert re.search(r"part at step [23] of 3", check.text)


def test_curves_are_compared_step_by_step():
    stock = np.linspace(2, 1, 40)
    twin = stock + np.where(np.arange(40) < 20, 1e-7, 1e-3)
    assert agreement.check_curves(stock, stock + 4e-7, twin)[0].ok
    late = stock + np.where(np.arange(40) < 20, 0, 4e-3)
    assert agreement.check_curves(stock, late, twin)[0].ok
    early = stock + np.where(np.arange(40) < 5, 0, 4e-3)
    assert "part at step 6 of 40" in agreement.check_curves(stock, early, twin)[0].text
    first = stock + np.where(np.arange(40) == 0, 1e-4, 0)
    assert "part at step 1 of 40" in agreement.check_curves(stock, first, twin)[0].text


def test_nan_parts_the_curves():
    assert not agreement.check_curves([1.0, 1.0], [1.0, float("nan")], [1.0, 1.0])[0].ok
    assert not agreement.check_curves([float("nan")] * 2, [1.0] * 2, [1.0] * 2)[0].ok
    with pytest.raises(ValueError, match="want curves of one length"):
        agreement.check_curves([1.0, 1.0], [1.0], [1.0, 1.0])


@pytest.fixture
def pair():
    from gconv.bench.train import _models

    return _models(0)


def test_gradients_of_the_network_agree(pair):
    data = _toy_digits()
    check = agreement.check_gradients(*pair, data["x_train"], data["y_train"])
    assert check.ok, check.text


@pytest.mark.parametrize("spoil", [torch.zeros_like, lambda g: g * 1.5, lambda g: g * float("nan")])
def test_a_wrong_gradient_is_found(pair, spoil):
    stock, ours = pair

    class Spoiled(torch.nn.Module):
        """Deep copies drop hooks, so the gradient is spoiled by the backward of an identity."""

        def __init__(self):
            super().__init__()
            self.network = ours

        def forward(self, x):
            weight = self.network.layer2[0].conv2.weight
            if not hasattr(self, "hooked"):
                self.hooked = weight.register_hook(spoil)
            return self.network(x)

        def named_parameters(self, *args, **kwargs):
            return self.network.named_parameters(*args, **kwargs)

    data = _toy_digits()
    check = agreement.check_gradients(stock, Spoiled(), data["x_train"], data["y_train"])
    assert not check.ok
    assert "layer2.0.conv2.weight" in check.text


def test_predictions_agree_and_a_wrong_running_variance_is_found(pair):
    stock, ours = pair
    x = _toy_digits()["x_test"]
    assert agreement.check_predictions(stock, ours, x).ok
    ours.layer2[0].bn2.running_var.mul_(1.001)
    assert not agreement.check_predictions(stock, ours, x).ok


def test_training_runs_in_processes_of_their_own(monkeypatch, capsys):
    monkeypatch.setattr(train.digits, "load", _toy_digits)
    result = train.run(train.Options(epochs=2, batch=16, threads=1))
    assert [check.name for check in result.checks] == ["loss curves", "gradients", "predictions"]
    for contestant in result.contestants:
        assert len(contestant.losses) == 6 and len(contestant.seconds) == 2
        assert contestant.peak_mb > (contestant.training_mb or 0) > 0
        assert contestant.parameters == result["stock"].parameters
    assert result.checks[1].ok and result.checks[2].ok
    assert abs(result["gconv"].losses[0] - result["stock"].losses[0]) < 1e-4
    assert any(name.startswith("cpu.") for name in result["gconv"].kernels)
    assert result["stock"].kernels == {} == result["twin"].kernels
    assert train.Training.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert capsys.readouterr().out.count("stock torch.nn") == 4


def test_a_training_process_that_dies_says_why(monkeypatch):
    monkeypatch.setattr(train.digits, "load", _toy_digits)
    with pytest.raises(workers.WorkerDied, match=r"stock torch.nn ended with status 1:(.|\n)*batch"):
        train.run(train.Options(epochs=1, batch=-1, threads=1))


def test_digits_are_split_three_to_one():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from gconv.bench import digits

    data = digits.load(0)
    assert data["x_train"].shape == (1348, 1, 32, 32) and data["x_test"].shape == (449, 1, 32, 32)
    assert abs(float(data["x_train"].mean())) < 1e-4
    assert torch.equal(digits.load(0)["y_test"], data["y_test"])
