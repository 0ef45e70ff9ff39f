"""The Triton kernels compile for Ampere and Hopper within registers and shared memory, without a GPU."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton_aot

import gconv
from gconv import gpu

PROGRAM = Path(triton_aot.__file__)
STEMS = [  # not imported: this process may have Triton's interpreter
    module.name
    for module in pkgutil.iter_modules(gconv.kernels.__path__)
    if "def configurations(" in Path(module.module_finder.path, f"{module.name}.py").read_text("utf-8")
]
pytestmark = pytest.mark.skipif(gpu.missing_triton() is not None, reason=str(gpu.missing_triton()))


def run(*arguments):
    """(exit status, rows, stderr) of the program, in a process of its own: the interpreter is for a whole
    one."""
    command = [sys.executable, str(PROGRAM), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def covering():
    """The rows of each kernel and dtype at its largest blocks; `make triton-aot` compiles every
    configuration."""
    return run("--covering")[1]


@pytest.mark.parametrize("stem", STEMS)
def test_every_kernel_and_dtype_compiles_and_fits(covering, stem):
    rows = [row for row in covering if stem in row["stems"]]
    assert {row["arch"] for row in rows} == {80, 90}
    faults = [
        f"{row['kernel']} sm_{row['arch']} {row['constexprs']}: {triton_aot.fault(row)}"
        for row in rows
        if triton_aot.fault(row)
    ]
    assert not faults, "\n".join(faults)
    dtypes = {dtype for row in rows for dtype in row["dtypes"]}
    assert {"fp32", "fp16", "bf16"} <= dtypes, f"{stem}: configurations() lacks some dtype"
    for row in rows:
        assert 0 < row["registers"] <= 255 and row["spills"] == 0, row


def test_spills_are_faults():
    """With a few registers to a thread the same kernels spill, and the program says so."""
    status, rows, stderr = run("--covering", "--maxnreg", "24", "verbs")
    spilling = [row for row in rows if row["spills"]]
    assert status == 1 and spilling
    assert f"{spilling[0]['spills']} bytes of register spills" in stderr


def test_what_is_a_fault():
    fine = {"arch": 80, "registers": 40, "spills": 0, "shared": 166_912}
    assert triton_aot.fault(fine) is None
    assert triton_aot.fault(fine | {"arch": 90, "shared": 232_449}).startswith("232449 bytes of shared")
    assert triton_aot.fault(fine | {"spills": 8}) == "8 bytes of register spills"
    assert triton_aot.fault({"arch": 80, "error": "CompilationError: x"}) == "CompilationError: x"


def test_a_log_of_ptxas_is_read():
    log = """ptxas info    : Function properties for k
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size"""
    assert triton_aot.resources(log) == {"registers": 255, "spills": 32}
    with pytest.raises(RuntimeError, match="said nothing"):
        triton_aot.resources("")
