"""nvcc compiles the CUDA kernels for Ampere and Hopper within their registers, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import cuda_check
import pytest

needs_nvcc = pytest.mark.skipif(cuda_check.nvcc() is None, reason="needs nvcc")

SPILLING = """
__global__ void __launch_bounds__(1024, 2) wide_kernel(float* p) {
  float v[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) v[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) p[i * 1024 + threadIdx.x] = v[i] * v[127 - i];
}
"""
SHARING = """
template <typename T, int N>
__global__ void narrow_kernel(T* p) {
  __shared__ T tile[N];
  tile[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = tile[N - 1 - threadIdx.x];
}
template __global__ void narrow_kernel<float, 256>(float*);
"""


def run(*arguments):
    """(exit status, rows, stderr) of the program."""
    command = [sys.executable, cuda_check.__file__, "--json", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def source(tmp_path, text):
    path = tmp_path / "control.cu"
    path.write_text(text)
    return path


@needs_nvcc
def test_every_kernel_compiles_and_spills_nothing():
    status, rows, stderr = run()
    assert status == 0, stderr
    assert {row["file"] for row in rows} == {path.name for path in cuda_check.sources()}
    for row in rows:
        assert 0 < row["registers"] <= 255 and row["spills"] == 0 and row["shared"] <= 48 * 1024, row
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90a"}


@needs_nvcc
def test_the_verbs_compile():
    """Each verb in each type, also those that no kernel of the package uses now."""
    status, rows, stderr = run(Path(cuda_check.__file__).parent / "cuda_host" / "verb_kernels.cu")
    assert status == 0, stderr
    kernels = {row["kernel"] for row in rows}
    assert {
        f"mma_kernel<{t}, {half}>" for t in ("bf16", "f16", "tf32") for half in ("false", "true")
    } <= kernels


@needs_nvcc
def test_a_spill_is_a_fault(tmp_path):
    status, rows, stderr = run("--arch", "sm_80", source(tmp_path, SPILLING))
    assert status == 1 and [row["kernel"] for row in rows] == ["wide_kernel"]
    assert rows[0]["spills"] > 0 and f"wide_kernel: {rows[0]['spills']} bytes of register spills" in stderr


@needs_nvcc
def test_registers_and_shared_memory_are_read(tmp_path):
    status, rows, _ = run("--arch", "sm_90a", source(tmp_path, SHARING))
    assert status == 0 and rows[0]["kernel"] == "narrow_kernel<float, 256>"
    assert rows[0]["kernel"] in cuda_check.table(rows)
    assert rows[0]["shared"] == 1024 and rows[0]["registers"] > 0 and rows[0]["arch"] == "sm_90a"


@needs_nvcc
def test_what_does_not_compile_is_a_fault(tmp_path):
    status, rows, stderr = run("--arch", "sm_80", source(tmp_path, "__global__ void k() { wrong; }"))
    assert status == 1 and "error" in rows[0]
    assert "control.cu" in stderr and "wrong" in stderr


@needs_nvcc
def test_results_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_check, "CACHE", tmp_path / "cache")
    path = source(tmp_path, SHARING)
    rows, made = cuda_check.compiled(path, "sm_80")
    written = made.stat().st_mtime_ns
    assert cuda_check.compiled(path, "sm_80") == (rows, made) and made.stat().st_mtime_ns == written
    assert len(list(cuda_check.CACHE.iterdir())) == 2  # the rows and the object
    path.write_text(SHARING.replace("256", "128"))
    assert cuda_check.compiled(path, "sm_80")[0][0]["shared"] == 512
    assert len(list(cuda_check.CACHE.iterdir())) == 4


def test_without_nvcc_one_line_says_so():
    environment = {"PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, cuda_check.__file__], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert done.stderr == "gconv: cuda-check needs nvcc, on PATH or in $CUDA_HOME/bin\n"
