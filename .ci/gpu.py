"""What a machine with a GPU is asked: gpu.py check|tests|layers|models|all

Runs the tests of the CUDA C++ and the Triton kernels on the GPU, the smallest of them again under
compute-sanitizer (memory accesses, then races in shared memory) where that is on PATH, then the benchmarks of
layers and of models, and prints a table last. Needs no network.
`check` only says whether there is a GPU; without one every part ends with one line and status 1.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "layers", "models")
PYTEST = [sys.executable, "-m", "pytest", f"--rootdir={ROOT}", "-c", ROOT / "pyproject.toml", "-q"]
NO_TESTS = 5  # pytest's exit status where nothing was selected


def missing():
    """Why no GPU can be used, in words, or None."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} does not import torch; name a Python that does: make gpu PYTHON=..."
    if torch.version.cuda is None:
        return f"torch {torch.__version__} of {sys.executable} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU (nvidia-smi shows the driver's view)"
    return None


def run(name, command, **environment):
    """A row (name, result, seconds, whether it is well) of a command whose output is shown as it comes."""
    print(f"gconv: {name}", flush=True)
    start, last = time.monotonic(), ""
    env = os.environ | {"TRITON_INTERPRET": "0"} | environment
    with subprocess.Popen(
        [str(part) for part in command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    status = process.returncode
    result = "nothing to run" if status == NO_TESTS else last if status == 0 else f"status {status}: {last}"
    return name, result, time.monotonic() - start, status in (0, NO_TESTS)


def built():
    """The row that says what the CUDA C++ kernels are built for, or why they cannot run."""
    import torch

    from gconv import gpu

    missing = gpu.missing_cuda(torch.device("cuda", torch.cuda.current_device()))
    return "CUDA C++ kernels", missing or f"built for {', '.join(gpu.architectures())}", 0, missing is None


def tests():
    files = sorted(file for kind in ("cuda", "triton") for file in (ROOT / "tests").glob(f"test_{kind}_*.py"))
    others = [f"--ignore={file}" for file in files]
    yield built()
    yield run("tests of the kernels", [*PYTEST, *files])
    yield run("other tests that need a GPU", [*PYTEST, "-m", "needs_cuda", *others, ROOT / "tests"])
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        yield "memcheck, racecheck", "compute-sanitizer is not on PATH", 0, True
        return
    small = ROOT / "tests" / "test_triton_models.py"
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *PYTEST, small]
        # Every tensor an allocation of its own: what is beyond one is then nobody's.
        yield run(tool, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def benchmark(goal):
    bench = [sys.executable, "-m", "gconv.bench", goal]
    options = subprocess.run([*bench, "--help"], capture_output=True, text=True).stdout
    if "--device" not in options:
        yield goal, f"`gconv.bench {goal}` has no --device yet: nothing timed", 0, True
    else:
        yield run(goal, [*bench, "--device", "cuda", "--out", ROOT / "gconv-report"])


def rows_of(part):
    return tests() if part == "tests" else benchmark(part)


def main():
    goals = (*PARTS, "all", "check")
    if len(sys.argv) != 2 or sys.argv[1] not in goals:
        raise SystemExit(
            f"gconv: gpu: PART: want one of {', '.join(goals[:-1])}, got {' '.join(sys.argv[1:])}"
        )
    reason = missing()
    if reason is not None:
        raise SystemExit(f"gconv: gpu: {reason}")
    if sys.argv[1] == "check":
        return
    import torch

    parts = PARTS if sys.argv[1] == "all" else (sys.argv[1],)
    rows = [row for part in parts for row in rows_of(part)]
    print(f"\ngconv: {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for name, result, seconds, well in rows:
        print(f"{'ok' if well else 'FAILED':6}  {name:28}  {seconds:6.0f} s  {result}")
    raise SystemExit(not all(row[-1] for row in rows))


if __name__ == "__main__":
    main()
