"""gconv.bench tune: what it chooses, drops and leaves out, with a clock and times of the tests' own."""

import csv

import pytest
import torch
from gconv.bench import tune, tune_problems
from gconv.bench.__main__ import main

from gconv import gpu

needs_triton = pytest.mark.skipif(gpu.missing_triton() is not None, reason=str(gpu.missing_triton()))
interpreted = pytest.mark.skipif(
    not gpu.interpreting() or gpu.missing_triton() is not None, reason="needs Triton and TRITON_INTERPRET=1"
)
TINY = tune_problems.Layer("tiny", "norm", 24, 24, 1, 6)
KEY = ("pass", 4, True)


# ------------------------------------------------------------------------------------------ choosing


def trials(times):
    return [tune.Trial((i,), ms) for i, ms in enumerate(times)]


@pytest.mark.parametrize(
    "times, best",
    [
        ((1.0, 0.9, 0.8), 2),
        ((1.0, 0.99, 1.5), 0),  # within the noise of the tile there is
        ((1.0, None, 0.5), 2),
        ((None, 3.0, 2.0), 2),  # the table's own tile fails
        ((None, None), 0),
        ((1.0,), 0),
    ],
)
def test_the_fastest_that_ran_is_chosen_if_it_gains(times, best):
    assert tune.chosen(trials(times)) == (best,)


def test_the_table_is_tried_first_and_nothing_after_the_time_is_up():
    tried, seconds = [], iter((3, 2, 1, 0, -1))

    def trial(tile):
        tried.append(tile)
        return tune.Trial(tile, 1.0)

    found = tune.search("c", ("a", "b", "c", "d", "e"), trial, lambda: next(seconds))
    assert tried == ["c", "a", "b"] and [t.tile for t in found] == tried
    assert [t.tile for t in tune.search("c", ("a", "c"), trial, lambda: -1)] == ["c"]


def test_a_table_is_changed_for_a_while_only():
    class Module:
        TILES = {"a": 1, "b": 2}  # noqa: RUF012

    table = Module.TILES
    with pytest.raises(KeyError), tune.tile_at(Module, "a", 3):
        assert Module.TILES == {"a": 3, "b": 2}
        raise KeyError
    with tune.lookups(Module) as seen:
        assert Module.TILES["b"] == 2
    assert seen == {"b"} and Module.TILES is table and table == {"a": 1, "b": 2}


# ------------------------------------------------------------------------------------------ problems


@needs_triton
@pytest.mark.parametrize("stem", tune.STEMS)
def test_every_key_has_problems_that_look_it_up(stem):
    found = tune.problems_of_keys(stem, tune_problems.LAYERS[stem], 256)
    assert set(found) == set(tune_problems.kernels_of(stem).TILES)
    for key, problems in found.items():
        assert 0 < len(problems) <= tune.PER_KEY, key
        assert all(tune.keys_of(problem, 256) == {key} for problem in problems)
        if "16-bit" in key or 2 in key:
            assert {problem.dtype for problem in problems} == {"bfloat16", "float16"}


# ------------------------------------------------------------------------------------------ the run


class Clock:
    """Seconds that pass with every look at it."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


@pytest.fixture
def tiny(monkeypatch):
    """One small layer, and the table of batch_norm, which a fake timer reads."""
    monkeypatch.setitem(tune_problems.LAYERS, "batch_norm", (TINY,))
    return tune_problems.kernels_of("batch_norm")


def options(**changes):
    return tune.Options(**{"stems": ("batch_norm",), "batch": 2, "seconds": 1e6, "device": "cpu"} | changes)


@interpreted
def test_a_run_times_every_candidate_and_prints_what_to_commit(monkeypatch, tiny, tmp_path, capsys):
    monkeypatch.setattr(tune_problems, "WAYS", (("float16", "ieee"), ("float32", "ieee")))
    before = dict(tiny.TILES)

    def timer(call):
        call()
        tile = tiny.TILES[KEY]
        return 0.5 if tile == tiny.Tile(1024, 8) else 1.0

    result = tune.run(options(), timer, Clock(0))
    assert before == tiny.TILES
    assert result.tables["batch_norm"] == before | {KEY: tiny.Tile(1024, 8)}
    assert not result.failed
    assert {row["key"] for row in result.rows} == {tune.key_text(key) for key in before if key[2]}
    rows = [row for row in result.rows if row["key"] == tune.key_text(KEY)]
    assert {row["tile"] for row in rows} == set(map(tune.tile_text, tiny.candidates(KEY)))
    assert [row["tile"] for row in rows if row["chosen"]] == ["Tile(1024, 8)"]
    assert [row["tile"] for row in rows if row["in_table"]] == [tune.tile_text(before[KEY])]
    assert {row["ratio"] for row in rows} == {0.5, 1.0}
    assert len(result.unsearched) == sum(not aligned for _, _, aligned in before)
    assert all("no layer looks it up" in name for name in result.unsearched)

    path = tune.report(result, str(tmp_path))
    printed = capsys.readouterr().out
    assert tune.table_text(result.tables["batch_norm"]) in printed
    assert "not searched: batch_norm" in printed and "1 of 16 tiles changed" in printed
    with open(path, newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(result.rows) and tuple(written[0]) == tune.COLUMNS


@interpreted
def test_what_the_time_did_not_suffice_for_is_named(monkeypatch, tiny):
    monkeypatch.setattr(tune_problems, "WAYS", (("float16", "ieee"), ("float32", "ieee")))
    result = tune.run(options(seconds=25), lambda call: 1.0, Clock(1))
    assert any("tiles: out of time" in name for name in result.unsearched)
    assert any(name.endswith("): out of time") for name in result.unsearched)
    assert not result.failed
    named = {name.partition(": ")[0] for name in result.unsearched}
    complete = {f"batch_norm {row['key']}" for row in result.rows} - named
    assert len(named | complete) == len(tiny.TILES)


def trial_of(monkeypatch, tile, instead=None):
    """The trial of a tile of KEY, where `instead(launch, kernel, grid, *args, **meta)` launches."""
    from gconv.kernels import verbs

    problem = next(
        p for p in tune.problems("batch_norm", [TINY]) if p.precision == "ieee" and p.dtype == "float32"
    )
    bench, launch = tune.Bench(KEY, [problem], 2, "cpu", lambda call: 1.0), verbs.launch
    with monkeypatch.context() as patch:
        if instead is not None:
            patch.setattr(verbs, "launch", lambda *args, **meta: instead(launch, *args, **meta))
        return bench.trial(tile)


@interpreted
def test_what_spills_fails_or_is_wrong_is_dropped_and_says_why(monkeypatch, tiny, nan_filled_memory):
    tile = tiny.Tile(1024, 4)
    assert trial_of(monkeypatch, tile) == tune.Trial(tile, 1.0)

    class Spilling:
        n_spills = 12

    def spills(launch, *args, **meta):
        launch(*args, **meta)
        return Spilling()

    trial = trial_of(monkeypatch, tile, spills)
    assert trial.ms is None and "batch_norm_apply_kernel spills 12 registers" in trial.note

    def fails(launch, *args, **meta):
        raise NotImplementedError("out of resource: shared memory\nmore")

    trial = trial_of(monkeypatch, tile, fails)
    assert trial.ms is None and trial.note.endswith("NotImplementedError: out of resource: shared memory")

    def forgets(launch, kernel, grid, *args, **meta):
        return launch(kernel, (grid[0] - 1, *grid[1:]), *args, **meta)

    trial = trial_of(monkeypatch, tile, forgets)
    assert trial.ms is None and "wrong" in trial.note

    monkeypatch.setattr(tune_problems.Problem, "call", lambda self, args: {"0": args[0]})
    with pytest.raises(ArithmeticError, match="the table's own tile is wrong"):
        trial_of(monkeypatch, tile)


@interpreted
def test_a_table_whose_own_tile_fails_is_a_failure_that_is_named(tiny):
    def timer(call):
        raise AssertionError("never called")

    with tune.tile_at(tiny, KEY, tiny.Tile(1000, 4)):  # no power of two
        result = tune.run(options(), timer, Clock(0))
    assert result.failed
    assert any(name.startswith(f"batch_norm {tune.key_text(KEY)}: ") for name in result.unsearched)


# ------------------------------------------------------------------------------------------ the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line(capsys, tmp_path):
    assert main(["tune", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("gconv.bench tune: device: want a CUDA GPU") and message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["conv"], "stem: want some of pointwise_conv, grouped_conv"),
        (["batch_norm", "--layers", "t1,t9"], "layers: want some of resnext50_32x4d.s1"),
    ],
)
def test_names_that_are_not_there_are_refused(capsys, arguments, message):
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_layers_are_selected_by_either_name():
    assert [str(layer) for layer in tune_problems.select("batch_norm", "t2, densenet121.t1")] == [
        "densenet121.t1", "densenet121.t2",
    ]  # fmt: skip
    assert tune_problems.select("batch_norm", None) == tune_problems.LAYERS["batch_norm"]
