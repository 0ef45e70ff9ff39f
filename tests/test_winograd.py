"""Winograd's algorithm in grouped_conv_*: held to the direct one's oracle, and chosen as it says."""

import math
import subprocess
import sys
from pathlib import Path

import checks
import conv_cases
import pytest
import torch
from checks import DTYPES, ISAS, assert_same_bits
from conv_cases import VERIFY, Case
from run_together import together

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# Whole vectors of every instruction set, then of the narrower ones only; images of whole and of cut tiles,
# more rows than a band and more columns than a tile's registers hold, one pixel; every padding; more vectors
# than a chunk; in a weight gradient's block several images or one row of tiles, more blocks than a sum has.
CASES = (
    Case(16, 16, 3, 2, 14, 14),
    Case(32, 32, 2, 3, 7, 7),
    Case(48, 48, 1, 1, 9, 20),
    Case(64, 64, 1, 2, 5, 33),
    Case(112, 112, 1, 1, 6, 5),
    Case(16, 32, 2, 1, 8, 9, padding=(0, 0)),
    Case(32, 16, 2, 2, 9, 6, padding=(2, 2)),
    Case(16, 80, 1, 1, 10, 4, padding=(2, 0)),
    Case(144, 16, 1, 1, 5, 6, padding=(0, 1)),
    Case(16, 16, 1, 1, 1, 1),
    Case(16, 16, 2, 1, 40, 12),
    Case(16, 16, 9, 2, 5, 9),
    Case(16, 16, 1, 1, 69, 112),
    Case(32, 32, 2, 5, 7, 7),
    Case(32, 32, 1, 1, 3, 131, padding=(2, 0)),
    Case(128, 32, 1, 1, 7, 7),
    Case(8, 24, 3, 2, 9, 7),
    Case(12, 4, 5, 1, 8, 11),
    # Vectors that span two groups, with half and with other shares of each; groups of more vectors than one.
    Case(24, 24, 5, 2, 9, 7),
    Case(56, 56, 3, 1, 7, 9),
    Case(17, 19, 3, 2, 6, 8, padding=(2, 0)),
    Case(20, 36, 2, 1, 12, 5, padding=(0, 2)),
    Case(42, 18, 4, 1, 5, 6),
    Case(5, 7, 3, 2, 6, 5),
)
each_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
each_op = pytest.mark.parametrize("name", VERIFY)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_isa
@each_case
@each_op
@together(dtype=DTYPES, kind=["integer", "normal"])
def test_against_float64(isa, ops, winograd, name, case, kind, dtype):
    """Integers exactly; other values within the bound of a direct algorithm."""
    winograd("always")
    verify, variants = VERIFY[name]
    verify(getattr(ops, name), case, dtype, kind, "plain")
    rotated = checks.rotate(variants, str(case), str(dtype), kind, name)
    verify(getattr(ops, name), case, dtype, kind, rotated)


def results(ops, case):
    data = conv_cases.Data(case, torch.float32, "normal", "winograd")
    x, dy = data.activation(case.input_size), data.activation(case.output_size)
    weight = data.weight(9 * case.cin)
    return {
        "y": ops.grouped_conv_fwd(x, weight, *case.geometry, None, None, None, False),
        "dx": ops.grouped_conv_bwd_input(dy, weight, case.input_size, *case.geometry, None, None, None, None)[
            0
        ],
        "dw": ops.grouped_conv_bwd_weight(dy, x, case.weight_size, *case.geometry, None, None, None),
    }


def same_bits(one, other):
    return {name: torch.equal(one[name], other[name]) for name in one}


@pytest.mark.parametrize(
    "case, pays",
    [
        (Case(64, 64, 1, 1, 28, 28), True),
        (Case(64, 64, 1, 1, 4, 3), False),
        (Case(64, 64, 1, 1, 28, 28, stride=(2, 2)), None),
        (Case(64, 64, 1, 1, 28, 28, padding=(2, 2), dilation=(2, 2)), None),
        (Case(56, 56, 2, 1, 28, 28), True),
        (Case(3, 3, 8, 1, 28, 28), None),
    ],
    ids=str,
)
def test_runs_where_it_can_and_pays(ops, winograd, case, pays):
    """The two algorithms differ in their last bits, so the bits tell which one ran."""
    found = {}
    for use in ("never", "auto", "always"):
        winograd(use)
        found[use] = results(ops, case)
    differs = [not same for same in same_bits(found["never"], found["always"]).values()]
    assert all(differs) if pays is not None else not any(differs)
    chosen = "always" if pays else "never"
    assert all(same_bits(found["auto"], found[chosen]).values())


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[10], CASES[13]], ids=str)
def test_same_bits_for_any_number_of_threads_and_any_run(isa, ops, threads, winograd, case):
    winograd("always")
    threads(1)
    first = results(ops, case)
    for count in (1, 2, 3):
        threads(count)
        for name, got in results(ops, case).items():
            assert_same_bits(got, first[name], f"{name}, {count} threads")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc/cpuinfo")
def test_sixteen_channels_pay_by_the_family_of_the_cpu(ops, winograd):
    """Of AMD's: on family 19h (Zen 4) always, on later ones (Zen 5) not for the weight gradient."""
    if not ops.cpu_isa().startswith("avx512"):
        pytest.skip("no 512-bit vectors")
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    fields = dict(map(str.strip, line.split(":", 1)) for line in cpu.splitlines() if ":" in line)
    family = int(fields["cpu family"]) if fields["vendor_id"] == "AuthenticAMD" else 0
    pays = {"y": family >= 0x19, "dx": family >= 0x19, "dw": family == 0x19}
    found = {}
    for use in ("auto", "always", "never"):
        winograd(use)
        found[use] = results(ops, Case(16, 16, 2, 1, 14, 14))
    for name, direction_pays in pays.items():
        chosen = found["always" if direction_pays else "never"]
        assert_same_bits(found["auto"][name], chosen[name], name)


@each_isa
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_inputs_in_a_slice_have_the_bits_of_dense_ones(isa, ops, winograd, case):
    """Some channels, rows and columns of wider buffers that are NaN elsewhere."""
    winograd("always")
    data = conv_cases.Data(case, torch.float32, "normal", "slices")
    x, dy = data.activation(case.input_size), data.activation(case.output_size)

    def sliced(t):
        n, c, h, w = t.shape
        wide = torch.full((n, c + 24, h + 3, w + 2), math.nan).to(memory_format=torch.channels_last)
        place = wide[:, 8 : 8 + c, 1 : 1 + h, 2:]
        return place.copy_(t)

    weight = data.weight(9 * case.cin)
    forward = (weight, *case.geometry, None, None, None, False)
    assert_same_bits(ops.grouped_conv_fwd(sliced(x), *forward), ops.grouped_conv_fwd(x, *forward), "y")
    back = (weight, case.input_size, *case.geometry, None, None, None, None)
    assert_same_bits(
        ops.grouped_conv_bwd_input(sliced(dy), *back)[0], ops.grouped_conv_bwd_input(dy, *back)[0], "dx"
    )
    back = (case.weight_size, *case.geometry, None, None, None)
    assert_same_bits(
        ops.grouped_conv_bwd_weight(sliced(dy), sliced(x), *back),
        ops.grouped_conv_bwd_weight(dy, x, *back),
        "dweight",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("case", [Case(16, 16, 2, 2, 9, 11), Case(24, 24, 3, 2, 9, 11)], ids=str)
def test_what_is_not_finite_stays_where_it_belongs(isa, ops, winograd, case, value):
    """An infinity may become NaN; no other pixel or channel loses its value."""
    winograd("always")
    data = conv_cases.Data(case, torch.float32, "normal", "not finite")
    x, dy = data.activation(case.input_size), data.activation(case.output_size)
    weight = data.weight(9 * case.cin)
    x[1, 17, 4, 5] = dy[0, 3, 2, 3] = value
    args = (x, weight, *case.geometry, None, None, None, False)
    y = ops.grouped_conv_fwd(*args)
    assert torch.equal(y.isfinite(), checks.ref_fwd(torch.float64, *args).isfinite())
    args = (dy, weight, case.input_size, *case.geometry, None, None, None, None)
    dx, _ = ops.grouped_conv_bwd_input(*args)
    assert torch.equal(dx.isfinite(), checks.ref_bwd_input(torch.float64, *args)[0].isfinite())
    args = (dy, x, case.weight_size, *case.geometry, None, None, None)
    dw, want = ops.grouped_conv_bwd_weight(*args), checks.ref_bwd_weight(torch.float64, *args)
    assert torch.equal(dw.isfinite().all(-1).all(-1), want.isfinite().all(-1).all(-1))


ALGORITHMS = ("winograd", "strassen")
SWITCHES = """
import sys, torch, gconv
for algorithm in sys.argv[1:]:
    try:
        print(getattr(torch.ops.gconv, f"cpu_{algorithm}")())
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_choice_is_reported_and_refused(ops, request, algorithm):
    request.getfixturevalue(algorithm)("always")
    with pytest.raises((RuntimeError, ValueError), match="want never, auto or always, got sometimes"):
        getattr(ops, f"set_cpu_{algorithm}")("sometimes")
    assert getattr(ops, f"cpu_{algorithm}")() == "always"


@pytest.mark.parametrize("value, want", [(None, "auto"), ("1", "auto"), ("0", "never"), ("yes", None)])
def test_environment_variables(monkeypatch, value, want):
    for algorithm in ALGORITHMS:
        variable = f"GCONV_{algorithm.upper()}"
        monkeypatch.delenv(variable, raising=False)
        if value is not None:
            monkeypatch.setenv(variable, value)
    run = subprocess.run([sys.executable, "-c", SWITCHES, *ALGORITHMS], capture_output=True, text=True)
    for line, algorithm in zip(run.stdout.splitlines(), ALGORITHMS, strict=True):
        assert line == (want or f"GCONV_{algorithm.upper()}: want 0 or 1, got yes"), run.stderr
