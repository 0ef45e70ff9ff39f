"""gconv.bench on whole networks and over batches and threads: who competes, what is checked, stored and
shown. Nothing here asserts a time."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gconv.bench import (
    agreement,
    compare,
    entries,
    layers,
    match,
    models,
    models_worker,
    networks,
    readme,
    records,
    report,
    rivals,
    shapes,
    sweep,
    timing,
    workers,
)
from gconv.bench.__main__ import main

TINY = shapes.ConvShape("tiny", "t1", 16, 16, 4, 8)
MODEL = "resnext_digits"
EAGER = ("eager_nchw", "eager_channels_last")


def job(mode="training", dtype="float32"):
    return networks.Job(MODEL, 32, 8, dtype, mode)


@pytest.fixture(scope="module")
def state():
    return networks.make_state(job())


def network(name, of, state):
    contestant = networks.CONTESTANTS[name]
    return networks.Network(contestant, of, contestant.precisions(of)[0], state)


# ---------------------------------------------------------------------------------------------- who competes


def test_contestants_to_leave_out():
    everyone = models.pick("resnext50_32x4d")
    assert everyone[0] == "gconv" and set(EAGER) < set(everyone)
    assert models.pick(MODEL, "torch.compile, ONNXRUNTIME,openvino") == ("gconv", "gconv_frozen", *EAGER)
    for without in ("gconv", "tensorflow"):
        with pytest.raises(ValueError, match=r"want some of eager NCHW.*torch\.compile"):
            models.pick(MODEL, without)
    with pytest.raises(ValueError, match="want an eager contestant kept"):
        models.pick(MODEL, ",".join(EAGER))
    with pytest.raises(ValueError, match="want one of"):
        models.pick("lenet")


def test_a_contestant_of_one_family_is_asked_for_that_family_alone(monkeypatch):
    dense = networks.Contestant("checkpointed", "checkpointed", models="densenet*", modes=("training",))
    monkeypatch.setitem(networks.CONTESTANTS, "checkpointed", dense)
    assert "checkpointed" not in models.pick(MODEL)
    assert dense.suits("densenet121")


def test_what_a_contestant_cannot_run_is_said():
    engines = networks.CONTESTANTS["onnxruntime"], networks.CONTESTANTS["openvino"]
    for engine in engines:
        reason = engine.missing(job("training"))
        assert reason in {"training: runs inference only", f"{engine.packages[0]} is not installed"}
    eager = networks.CONTESTANTS["eager_nchw"]
    assert eager.missing(job()) is None
    assert eager.precisions(job("inference")) == ("float32",)
    assert eager.precisions(job("inference", "bfloat16")) == ("model in bfloat16", "autocast")
    assert eager.precisions(job("training", "bfloat16")) == ("autocast",)
    assert engines[0].precisions(job("inference", "bfloat16")) == ()


def test_the_fastest_precision_is_taken(state, capsys):
    of = job("inference", "bfloat16")
    best, seconds = models_worker.fastest(networks.CONTESTANTS["eager_channels_last"], of, state)
    assert set(seconds) == {"model in bfloat16", "autocast"}
    assert best.precision == min(seconds, key=seconds.get)
    assert best.run().dtype == torch.bfloat16
    heard = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [message["event"] for message in heard] == ["step", "step"]


def test_operations_of_resnext50():
    forward = networks.flops(networks.Job("resnext50_32x4d", 224, 1, "float32", "inference"))
    assert forward == pytest.approx(2 * 4.23e9, rel=0.01)  # 4.2 GMAC in table 1 of arXiv 1611.05431
    grouped = sum(s.count * s.flops(1, "inference") for s in shapes.MODELS["resnext50_32x4d"])
    assert forward > grouped > forward / 20
    step = networks.flops(networks.Job("resnext50_32x4d", 224, 1, "float32", "training"))
    assert step == 3 * forward


# ------------------------------------------------------------------------------------------------- the check


def answer(of, state):
    """float64's results, and those of torch in both layouts."""
    exact = networks.exact_results(of, state)
    return exact, [network(name, of, state).results(state) for name in EAGER]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def answers(request, state):
    of = job(dtype=request.param)
    return of, *answer(of, state)


def test_gconv_matches(answers, state):
    of, exact, own = answers
    ours = network("gconv", of, state)
    verdict = agreement.check_network(ours.results(state), exact, own)
    assert verdict.ok, verdict.text
    names = {name for name, _ in ours.module.named_parameters()}
    assert {key for key in exact if key.startswith("d ")} == {f"d {name}" for name in names}
    assert {"logits", "bn1.running_mean", "layer1.0.bn2.running_var"} < set(exact)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_match(name, state):
    of = job("inference")
    missing = networks.CONTESTANTS[name].missing(of)
    if missing:
        pytest.skip(f"{missing}: make rivals")
    verdict = agreement.check_network(network(name, of, state).results(state), *answer(of, state))
    assert verdict.ok, verdict.text
    layer = match.Problem.make(TINY, 2, torch.float32)
    own = [rivals.build(eager, layer, "inference").results(layer) for eager in EAGER]
    found = rivals.build(name, layer, "inference").results(layer)
    assert match.compare(found, match.exact_results(layer, "inference"), own).ok


@pytest.mark.parametrize(
    ("key", "spoil"),
    [
        ("logits", lambda t: t.roll(1, 0)),
        ("logits", lambda t: t * float("nan")),
        ("d layer1.0.conv2.weight", torch.zeros_like),
        ("d layer2.0.bn2.weight", lambda t: -t),
        ("d fc.bias", lambda t: t.flip(0)),
        ("layer2.0.bn2.running_var", lambda t: t * 1.1),
        ("layer1.0.bn2.running_mean", None),  # as it was before the step
        ("layer3.0.bn2.running_var", None),
        ("layer3.0.bn2.running_mean", torch.zeros_like),
    ],
)
def test_wrong_results_do_not_match(answers, state, key, spoil):
    _, exact, own = answers
    assert agreement.check_network(own[0], exact, own).ok
    wrong = spoil(own[0][key]) if spoil else state[key]
    verdict = agreement.check_network(own[0] | {key: wrong}, exact, own)
    assert not verdict.ok and key in verdict.text


def test_a_verdict_names_some_failures_and_counts_the_rest(answers):
    _, exact, own = answers
    verdict = agreement.check_network({key: t + 1 for key, t in own[0].items()}, exact, own)
    assert re.search(r" and \d+ more$", verdict.text)
    assert verdict.text.count(", torch ") == match.SHOWN


def test_results_leave_no_trace_and_steps_train(state):
    ours = network("gconv", job(), state)
    before = {key: t.clone() for key, t in ours.module.state_dict().items()}
    ours.results(state)
    after = ours.module.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)  # a step was run to begin with
    assert all(torch.equal(state[key], after[key]) for key in state)
    losses = []
    for i in range(4):
        ours.prepare(0)
        assert all(p.grad is None for p in ours.module.parameters())
        losses.append(float(ours.run()))
        ours.prepare(i)
    assert losses == sorted(losses, reverse=True)


def test_the_trace_says_what_ran(state):
    ours = models_worker.summary(network("gconv", job("inference"), state))
    assert ours["convolutions"] == 19
    assert ours["kernels"]["cpu.bottleneck"] == 5 and ours["fallbacks"] == []
    assert models_worker.summary(network("eager_nchw", job("inference"), state))["kernels"] == {}


# --------------------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def run():
    """One real run, two contestants, each in its own process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan = timing.Plan(min_rounds=3, max_rounds=3)
        names = ("gconv", "eager_nchw")
        return models.run(models.Options(MODEL, 32, 4, contestants=names, plan=plan))
    finally:
        torch.set_num_threads(before)


def test_run_of_a_network(run):
    assert [(row["mode"], row["contestant"]) for row in run.rows] == [
        ("inference", "gconv"), ("inference", "eager_nchw"), ("training", "gconv"), ("training", "eager_nchw")
    ]  # fmt: skip
    assert run.skipped == {} and run.wrong == []
    for row in run.rows:
        assert set(row) <= set(records.MODEL_COLUMNS)
        assert row["match"] and row["best"] == "eager_nchw" and row["threads"] == 1
        assert row["ms_per_image"] == pytest.approx(row["ms"] / 4)
        assert row["gflops"] == pytest.approx(row["gflop"] / row["ms"] * 1e3)
        (ours,), best = models.ours_and_best(run.rows, row["mode"])
        assert row["ratio"] == pytest.approx(best["ms"] / row["ms"])
        if row.get("peak_mb") is not None:
            assert row["peak_mb"] > row["step_mb"] >= 0
        assert (row["kept_mb"] is not None) == (row["mode"] == "training")
        parts = [row[f"{part}_ms"] for part in networks.PARTS if f"{part}_ms" in row]
        assert len(parts) == (3 if row["mode"] == "training" else 0) and all(part > 0 for part in parts)
        assert ours["own_convolutions"] >= 6 and ours["convolutions"] == 19
        assert "own_convolutions" not in best and best["ratio"] == 1


def test_a_process_that_dies_says_why():
    with pytest.raises(
        workers.WorkerDied, match=r"benchmark process of the float64 reference(.|\n)*Expected"
    ):
        models.run(models.Options(MODEL, size=1, batch=1, contestants=("gconv", "eager_nchw")))


class _Closed:
    closed = False

    def close(self):
        self.closed = True


def test_a_wrong_result_gets_no_figure(state, tmp_path):
    exact, own = answer(job(), state)
    spoiled = {
        "gconv": own[0] | {"logits": own[0]["logits"] * 1.01},
        "eager_nchw": own[0],
        "compile": own[1] | {"logits": own[1]["logits"].roll(1, 0)},
    }
    ready = {"precision": "float32", "kernels": {}, "fallbacks": [], "seconds": {}, "first_seconds": 1.0}
    competing = [entries.Entry(networks.CONTESTANTS[name], _Closed(), ready) for name in spoiled]
    for name, found in (*spoiled.items(), ("exact", exact)):
        torch.save(found, tmp_path / f"{name}-training.pt")
    skipped = {}
    compiled = competing[2]
    entries.check("training", str(tmp_path), competing, skipped)
    assert list(tmp_path.iterdir()) == []
    assert [entry.name for entry in competing] == ["gconv", "eager_nchw"] and compiled.worker.closed
    assert "wrong result: ✗ logits" in skipped["torch.compile, training"]
    times = timing.Timing("eager_nchw", [np.array([2.0])] * 3)
    result = timing.Result({"eager_nchw": times}, 3, 0, False)
    last = {"finite": True, "parts": {}}
    row = models._row(competing[0], "training", models.Options(MODEL), result, "eager_nchw", last)
    assert row["match"] is False and "ms" not in row and "ratio" not in row and "logits" in row["note"]
    facts = {"date": "2001-01-01T00:00:00Z"}
    assert report.Findings(facts, networks=layers.Run([row], None, facts, {})).bad
    filled = dict.fromkeys(records.MODEL_COLUMNS) | row | {"gemm_gflops": 1.0} | facts
    assert "| wrong result |" in readme.models_table([filled])


# ------------------------------------------------------------------------------- records, README and the page


def test_records_of_networks_have_their_own_columns(run, tmp_path):
    path = records.path_of("machine", records.MODEL_COLUMNS, str(tmp_path))
    assert Path(path).name == "machine-models.csv"
    records.append(path, run.rows, records.MODEL_COLUMNS)
    for row, kept in zip(run.rows, records.load(path)):
        assert tuple(kept) == records.MODEL_COLUMNS
        for key, value in row.items():
            want = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert kept[key] == want, key
    assert records.newest_record(str(tmp_path)) is None  # no layers there
    assert records.newest_record(str(tmp_path), records.MODEL_COLUMNS) == path
    with pytest.raises(ValueError, match="missing"):
        records.load(path, records.COLUMNS)


def test_networks_in_the_readme(run):
    rows = [dict.fromkeys(records.MODEL_COLUMNS) | row for row in run.rows]
    old = [row | {"date": "2001-01-01T00:00:00Z", "ms_per_image": 12345.0} for row in rows]
    text = readme.models_table([*old, *rows])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 * (2 + 2) and "12345" not in text
    assert [line.count("|") for line in table] == [8] * 4 + [
        10
    ] * 4  # training: MB kept, in all and per image
    for row in rows:
        assert f"{row['ms_per_image']:.1f}" in text
        bold = "**" if row["contestant"] == "gconv" else ""
        assert f"| {bold}{row['ratio']:.2f}×{bold} |" in text
    both = readme.models_table([*rows, *(row | {"dtype": "bfloat16"} for row in rows)])
    assert both.count("float32 training step") == both.count("bfloat16 training step") == 1


def test_networks_are_compared(run, tmp_path):
    def stored(name, **changes):
        path = str(tmp_path / f"{name}.csv")
        fixed = {"ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1}
        records.append(path, [row | fixed | changes for row in run.rows], records.MODEL_COLUMNS)
        return path

    before, slower = stored("a"), stored("b", ratio=1.0, ratio_low=0.9, ratio_high=1.1)
    assert [f.kind for f in compare.compare(before, before)] == ["same", "same"]
    assert main(["compare", before, slower]) == 1
    assert main(["compare", slower, before]) == 0


def test_network_page(run, tmp_path):
    pytest.importorskip("jinja2", reason="the page is made with jinja2")
    pytest.importorskip("matplotlib", reason="the pictures are made with matplotlib")
    path = report.write(str(tmp_path), report.Findings(run.facts, networks=run))
    text = Path(path).read_text(encoding="utf-8")
    assert (tmp_path / "networks.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("data:image/png;base64,") == 1
    assert text.count("The results match float64.") == 2 and "of 19 convolutions" in text
    assert main(["report", "--out", str(tmp_path)]) == 0 and Path(path).read_text(encoding="utf-8") == text


# --------------------------------------------------------------------------------------- batches and threads


@pytest.fixture(scope="module")
def swept():
    plan = timing.Plan(min_rounds=3, max_rounds=3)
    before = torch.get_num_threads()
    found = sweep.run(sweep.Options((TINY,), (1, 4), (1, 2), reference=2, plan=plan))
    assert torch.get_num_threads() == before
    return found


def test_sweep(swept):
    assert [(r["mode"], r["batch"], r["threads"]) for r in swept.rows] == [
        (mode, batch, threads)
        for mode in ("inference", "training") for batch in (1, 2, 4) for threads in (1, 2)
    ]  # fmt: skip
    base = {(r["mode"], r["threads"]): r for r in swept.rows if r["batch"] == 2}
    for row in swept.rows:
        assert row["match"] and set(row) <= set(records.SWEEP_COLUMNS)
        assert row["kernel"].startswith("cpu.")
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        of = base[row["mode"], row["threads"]]
        assert row["relative"] == pytest.approx(row["images_per_s"] / of["images_per_s"])
    assert all(r["relative"] == r["relative_low"] == r["relative_high"] == 1 for r in base.values())


def test_sweep_is_recorded_and_reported(swept, tmp_path):
    pytest.importorskip("jinja2", reason="the page is made with jinja2")
    path = records.path_of("machine", records.SWEEP_COLUMNS, str(tmp_path))
    records.append(path, swept.rows, records.SWEEP_COLUMNS)
    assert [row["relative"] for row in records.load(path)] == pytest.approx(
        [row["relative"] for row in swept.rows], rel=1e-4
    )
    with pytest.raises(ValueError, match="got one of a sweep"):
        compare.compare(path, path)
    swept.rows[0]["relative"] = 0.5
    swept.rows[4]["relative"] = 0.9
    assert swept.rows[0] in swept.cliffs and swept.rows[4] not in swept.cliffs
    page = report.write(str(tmp_path), report.Findings(swept.facts, sweep=swept))
    text = Path(page).read_text(encoding="utf-8")
    assert "Other batches and threads" in text and "t1 inference N = 1 on 1" in text
    loaded = report.load(str(tmp_path))
    assert loaded.sweep.rows == json.loads(json.dumps(swept.rows))


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "--model", "lenet"],
        ["models", "--without", "everything"],
        ["sweep", "--layers", "s9"],
    ],
)
def test_wrong_usage_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("option", [["--batch", "0"], ["--threads", "1,x"], ["--reference", "-8"]])
def test_counts_are_checked(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", *option])
    assert stopped.value.code == 2
    assert "want a whole number of 1 or more" in capsys.readouterr().err
