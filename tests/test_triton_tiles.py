"""The tables of tiles of the Triton kernels: what they hold is among the candidates, and each candidate
computes what the oracle does, in Triton's interpreter. (On a GPU `python -m gconv.bench tune` checks every
candidate before it times it.)"""

import math
import os
import subprocess
import sys
from pathlib import Path

import conv_cases
import pytest
import torch
from checks import assert_accurate, assert_statistics
from conv_cases import Case
from gconv.bench import tune, tune_problems
from pointwise_cases import VERIFY, as_grouped, case_of

from gconv import gpu

if gpu.missing_triton() is not None:
    pytest.skip(gpu.missing_triton(), allow_module_level=True)

STEMS = {stem: tune_problems.kernels_of(stem) for stem in tune.STEMS}
KEYS = [(stem, key) for stem, module in STEMS.items() for key in module.TILES]
each_stem = pytest.mark.parametrize("stem", STEMS)
each_key = pytest.mark.parametrize("stem, key", KEYS, ids=lambda v: str(v).replace(" ", ""))
interpreted = pytest.mark.skipif(not gpu.interpreting(), reason="needs TRITON_INTERPRET=1")

UNSEEN = ("num_warps", "num_stages", "programs")  # of a tile: what the interpreter runs alike


@each_key
def test_a_key_has_its_tile_among_a_few_candidates(stem, key):
    candidates = STEMS[stem].candidates(key)
    assert STEMS[stem].TILES[key] in candidates
    assert 2 <= len(candidates) <= 12 and len(set(candidates)) == len(candidates)


@each_stem
def test_the_search_prints_a_table_as_its_module_has_it(stem):
    source = Path(STEMS[stem].__file__).read_text("utf-8")
    assert source.count(tune.table_text(STEMS[stem].TILES)) == 1


PROGRAM = """
from gconv.bench import tune, tune_problems
from gconv.kernels import batch_norm, grouped_conv, pointwise_conv

modules = [tune_problems.kernels_of(stem) for stem in tune.STEMS]
with tune.lookups(modules[0]) as a, tune.lookups(modules[1]) as b, tune.lookups(modules[2]) as c, \\
        tune.lookups(modules[3]) as d:
    for module in (batch_norm, grouped_conv, pointwise_conv):
        module.configurations()
for module, seen in zip(modules, (a, b, c, d)):
    assert seen == set(module.TILES), (module.__name__, set(module.TILES) - seen)
"""


def test_every_key_is_compiled_ahead_of_time():
    """In a process without the interpreter, whose kernels have no signature."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def dtype_and_precision(operands):
    """What the interpreter can compute of a table's operands."""
    return {"16-bit": (torch.float16, "ieee"), "tf32": (torch.float32, "tf32")}.get(
        operands, (torch.float32, "ieee")
    )


def pointwise_check(key):
    rows, operands, size, finish = key
    dtype, precision = dtype_and_precision(operands)
    wide = size == "wide"
    if rows == "weight":
        op, case = "bwd_weight", case_of(*(72, 80) if wide else (24, 32), 1, 3, 5)
    elif finish:
        op, case = "bwd_input", case_of(72 if wide else 24, 32, 1, 5, 7)
    else:
        op, case = "fwd_stats", case_of(24, 72 if wide else 32, 1, 5, 7)
    variant = "finish_act" if finish else "act"
    run = as_grouped(STEMS["pointwise_conv"])[op]
    return precision, lambda: VERIFY[op][0](run, case, dtype, "integer", variant)


# Channels per group in and out, and groups, that take each tile of a convolution.
WIDTHS = {
    (16, 16, "plain"): (4, 4, 6), (16, 16, "plain chunks"): (40, 16, 1), (16, 32, "plain"): (16, 24, 1),
    (16, 64, "plain"): (16, 40, 1), (32, 16, "plain"): (24, 16, 1), (32, 32, "plain"): (24, 24, 1),
    (32, 64, "plain"): (24, 40, 1),
}  # fmt: skip
# The same of a gradient, whose channels in are the convolution's out.
FINISHED = {
    (16, 16, "finish"): (4, 4, 6), (16, 32, "finish"): (24, 24, 1), (16, 16, "finish chunks"): (16, 24, 1),
}  # fmt: skip
WEIGHTS = {
    (16, 16): (4, 4, 6), (16, 32): (16, 24, 1), (32, 16): (24, 16, 1), (32, 32): (24, 24, 1),
    (64, 64): (40, 40, 1),
}  # fmt: skip


def grouped_check(op, operands, widths, variant):
    dtype, precision = dtype_and_precision(operands)
    case = Case(*widths, 1, 4, 3)
    module = STEMS["grouped_conv_wgrad" if op.endswith("weight") else "grouped_conv"]
    return precision, lambda: conv_cases.VERIFY[op][0](getattr(module, op), case, dtype, "integer", variant)


def convolution_check(key):
    operands, *tile = key
    if tuple(tile) in WIDTHS:
        return grouped_check("grouped_conv_fwd_stats", operands, WIDTHS[tuple(tile)], "act")
    return grouped_check("grouped_conv_bwd_input", operands, FINISHED[tuple(tile)], "finish_act")


def weight_check(key):
    operands, *widths = key
    return grouped_check("grouped_conv_bwd_weight", operands, WEIGHTS[tuple(widths)], "finish_act")


PASSES = {
    "pass": "batch_norm_bwd_apply", "pool": "batch_norm_pool", "sums": "batch_norm_bwd_reduce",
    "pool sums": "batch_norm_pool_bwd",
}  # fmt: skip


def norm_check(key):
    kind, itemsize, vectors = key
    layer = tune_problems.Layer("tiny", "norm", *(24, 24) if vectors else (21, 21), 1, 7)
    dtype = {2: "float16", 4: "float32"}[itemsize]
    ops = [PASSES[kind]] + ["batch_norm_stats"] * (kind == "sums")
    problems = [p for p in tune_problems.problems("batch_norm", [layer]) if p.dtype == dtype and p.op in ops]
    assert len(problems) == len(ops)
    torch.manual_seed(0)
    arguments = [problem.make(2, "cpu") for problem in problems]

    def check():
        for problem, args in zip(problems, arguments):
            got, exact = problem.call(problem.apart(args)), problem.exact(args)
            if problem.op == "batch_norm_stats":
                assert_statistics(*got.values(), args[0])
                continue
            own, terms = problem.defined(problem.apart(args)), 2 * layer.size**2
            for name, want in exact.items():
                # Sums of terms that cancel are as near as the terms.
                magnitude = torch.full_like(want, math.sqrt(terms)) if want.dim() < 3 else None
                assert_accurate(got[name], want.double(), own[name], f"{problem} {name}", None, magnitude)

    return "ieee", check


CHECKS = {
    "pointwise_conv": pointwise_check,
    "grouped_conv": convolution_check,
    "grouped_conv_wgrad": weight_check,
    "batch_norm": norm_check,
}


@interpreted
@each_key
def test_every_candidate_is_right(monkeypatch, nan_filled_memory, stem, key):
    module = STEMS[stem]
    if "wide" in key or "narrow" in key:
        monkeypatch.setattr(module, "BUSY", 0)  # tiles of large problems, for a small one
    precision, check = CHECKS[stem](key)
    different = {
        tuple(value for name, value in tile._asdict().items() if name not in UNSEEN): tile
        for tile in module.candidates(key)
    }
    for tile in different.values():
        with (
            tune_problems.precision(precision),
            tune.tile_at(module, key, tile),
            tune.lookups(module) as seen,
        ):
            check()
        assert seen == {key}
