"""What a machine with a GPU is asked: gpu.py check|tests|kernels|layers|models|all

Runs the tests of the CUDA C++ and the Triton kernels on the GPU, the smallest of them again under
compute-sanitizer (memory accesses, then races in shared memory) where that is on PATH, then the benchmarks of
kernels one by one, of layers and of models, which go to bench/records too, and prints a table last. Needs no
network. A part takes nine minutes at most; `all` begins what still fits into nine minutes and names the rest.
`check` only prints the compute capability that the kernels are built for here; without a GPU every part ends
with one line and status 1.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", f"--rootdir={ROOT}", "-c", ROOT / "pyproject.toml", "-q"]
NO_TESTS = 5  # pytest's exit status where nothing was selected
WORKERS = 8  # processes of pytest: what takes long is compiling, on the host
TEST_SECONDS = 400  # of all tests together
# Benchmarks, and the seconds in which each leaves out what it does not get to; the most important ones first.
RESNEXT, REGNETS = "resnext50_32x4d", ("regnet_y_4gf", "regnet_y_8gf", "regnet_y_16gf")
RUNS = {
    "kernels": [(140, "--model", RESNEXT, "--seconds", "1")],
    "layers": [
        (170, "--model", RESNEXT, "--seconds", "2"),
        *((50, "--model", model, "--mode", "training", "--seconds", "1") for model in REGNETS),
    ],
    "models": [
        (170, "--model", RESNEXT, "--seconds", "10"),
        (90, "--model", "densenet121", "--mode", "training", "--batch", "128", "--seconds", "10"),
        (60, "--model", "densenet201", "--mode", "training", "--batch", "64", "--seconds", "8"),
    ],
}
PARTS = ("tests", *RUNS)
SECONDS = 540  # that a run takes at most
GRACE = 40  # seconds on top of a budget: starting, the roofs, and what was under way when it ended


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


def run(name, command, limit, **environment):
    """A row (name, result, seconds, whether it is well) of a command whose output is shown as it comes; it is
    ended, with all that it started, when it takes longer than `limit` seconds."""
    print(f"gconv: {name}", flush=True)
    start, last = time.monotonic(), ""
    env = os.environ | {"TRITON_INTERPRET": "0"} | environment
    with subprocess.Popen(
        [str(part) for part in command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:  # fmt: skip
        timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
        process.wait()
        timer.cancel()
    if time.monotonic() - start >= limit:
        return name, f"ended after {limit:.0f} s: {last}", time.monotonic() - start, False
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
    files = sorted((ROOT / "tests").glob("test_triton_*.py"))  # on CUDA C++ too, where there are both
    others = [f"--ignore={file}" for file in files]
    yield built()
    end = time.monotonic() + TEST_SECONDS

    def left():
        return max(1.0, end - time.monotonic())

    several = ["-n", WORKERS, "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    yield run("tests of the kernels", [*PYTEST, *several, *files], left())
    yield run("other tests that need a GPU", [*PYTEST, "-m", "needs_cuda", *others, ROOT / "tests"], left())
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        yield "memcheck, racecheck", "compute-sanitizer is not on PATH", 0, True
        return
    small = ROOT / "tests" / "test_triton_models.py"
    for tool, share in (("memcheck", 0.5), ("racecheck", 1.0)):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *PYTEST, small]
        # Every tensor an allocation of its own: what is beyond one is then nobody's.
        yield run(tool, command, left() * share, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def benchmark(goal, left):
    """The rows of one kind of benchmark; `left()` seconds are left."""
    bench = [sys.executable, "-m", "gconv.bench", goal, "--device", "cuda", "--record"]
    for budget, *options in RUNS[goal]:
        model = options[1]
        if budget + GRACE > left():
            yield f"{goal}, {model}", f"not begun, the time is used up: make gpu PART={goal}", 0, True
            continue
        folder = ROOT / "gconv-report" / f"{goal}-{model}"
        command = [*bench, "--out", folder, "--budget", budget, *options]
        yield run(f"{goal}, {model}", command, budget + GRACE)


def rows_of(parts):
    """The rows of all that these parts begin in the time they have."""
    end = time.monotonic() + SECONDS
    for part in parts:
        yield from tests() if part == "tests" else benchmark(part, lambda: end - time.monotonic())


def main():
    goals = (*PARTS, "all", "check")
    if len(sys.argv) != 2 or sys.argv[1] not in goals:
        raise SystemExit(
            f"gconv: gpu: PART: want one of {', '.join(goals[:-1])}, got {' '.join(sys.argv[1:])}"
        )
    reason = missing()
    if reason is not None:
        raise SystemExit(f"gconv: gpu: {reason}")
    import torch

    if sys.argv[1] == "check":
        capability = torch.cuda.get_device_capability()
        print("9.0a" if capability == (9, 0) else "{}.{}".format(*capability))
        return

    parts = PARTS if sys.argv[1] == "all" else (sys.argv[1],)
    rows = list(rows_of(parts))
    print(f"\ngconv: {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for name, result, seconds, well in rows:
        print(f"{'ok' if well else 'FAILED':6}  {name:28}  {seconds:6.0f} s  {result}")
    raise SystemExit(not all(row[-1] for row in rows))


if __name__ == "__main__":
    main()
