"""Chooses the Python that make uses, fills in what it lacks, and prints its path: environment.py
demo|test|rivals

The Python that runs this file is used as it is when it imports a torch that gconv supports; modules it lacks
go to build/deps (torch is never among them), and where the network is down the run goes on without them. Any
other Python gets .venv with the pinned versions of the requirements files beside this one. The goal "rivals"
adds the inference engines that the benchmark compares with where they are installed, to build/deps too.
"""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"
DEPS = ROOT / "build" / "deps"
NOT_NEEDED = {"torch", "triton", "ninja", "wheel", "scipy"}  # of a Python at hand: there already, or optional
RIVALS = ["onnxruntime==1.31.1", "onnx==1.23.2", "onnxscript==0.7.2", "openvino==2026.4.1"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI's own torch for x86 carries gigabytes of CUDA
CHECK_TORCH = "import torch; raise SystemExit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 11))"
CHECK_PACKAGES = """
import importlib.metadata as m, sys
for name in sys.argv[1:]:
    try: m.version(name)
    except m.PackageNotFoundError: print(name)
"""


def say(text):
    print(f"gconv: {text}", file=sys.stderr, flush=True)


def run(python, *args, **options):
    # From build/, so that the checkout's own folders are not importable by accident.
    return subprocess.run([str(python), *map(str, args)], cwd=ROOT / "build", text=True, **options)


def pip_install(python, *args, stdout=sys.stderr):
    """The finished pip process; stdout stays free for the path this program prints."""
    quiet = ["--quiet", "--disable-pip-version-check"]
    return run(python, "-m", "pip", "install", *quiet, *args, stdout=stdout)


def has_torch(python):
    return Path(python).exists() and run(python, "-c", CHECK_TORCH, capture_output=True).returncode == 0


def cpu_index():
    """pip's option for the CPU builds of torch where their index answers (pip retries it for each)."""
    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=10).close()
    except OSError:
        return []
    return ["--extra-index-url", CPU_INDEX]


def requirement_files(goal):
    names = ["demo", "test"] if goal == "test" else ["demo"]
    return [ROOT / ".ci" / f"requirements-{name}.txt" for name in names]


def pins(goal):
    """{package: the lines that pin it}; one package may have a line per Python version."""
    lines = {}
    for file in requirement_files(goal):
        for line in file.read_text().splitlines():
            match = re.match(r"[\w-]+(?===)", line)
            if match:
                lines.setdefault(match[0], []).append(line)
    return lines


def lacking(python, names):
    return run(python, "-c", CHECK_PACKAGES, *names, stdout=subprocess.PIPE, check=True).stdout.split()


def make_venv(goal):
    say(f"{sys.executable} does not import torch >= 2.11; making .venv with the pinned versions")
    if run(sys.executable, "-m", "venv", ROOT / ".venv", capture_output=True).returncode != 0:
        raise SystemExit(
            f"gconv: {sys.executable} cannot make a virtual environment (on Debian and Ubuntu: apt install "
            "python3-venv); or name a Python that imports torch: make PYTHON=/path/to/python"
        )
    files = [arg for file in requirement_files(goal) for arg in ("-r", file)]
    if pip_install(VENV_PYTHON, *cpu_index(), *files).returncode != 0:
        raise SystemExit("gconv: pip could not fill .venv (message above); the same command tries again")
    if not has_torch(VENV_PYTHON):
        raise SystemExit("gconv: .venv is filled but fails at: .venv/bin/python -c 'import torch'")


def fill_venv(goal):
    wanted = pins(goal)
    missing = [line for name in lacking(VENV_PYTHON, wanted) for line in wanted[name]]
    if missing and pip_install(VENV_PYTHON, *missing).returncode != 0:
        raise SystemExit(f"gconv: pip could not add to .venv: {', '.join(missing)}")
    if goal != "test" or not lacking(VENV_PYTHON, ["torchvision"]):
        return
    # Only compared with, never depended on. Its own dependency on torch would replace the CPU build.
    if pip_install(VENV_PYTHON, "--no-deps", "torchvision==0.28.0").returncode != 0:
        say("torchvision did not install; models are compared with the committed list of names alone")


def fill_deps(goal):
    os.environ["PYTHONPATH"] = str(DEPS)
    missing = lacking(sys.executable, [name for name in pins(goal) if name not in NOT_NEEDED])
    if missing and not add_to_deps(sys.executable, missing, missing):
        say(f"going on without {', '.join(missing)}: install them beside torch for the whole {goal}")


def add_to_deps(python, names, requirements):
    """Whether pip could add the requirements, which name these packages."""
    say(f"{python} lacks {', '.join(names)}; adding them in build/deps")
    quick = ["--retries", "1", "--timeout", "10"]
    # The plan holds what is missing and nothing that is there, so the Python at hand keeps its own numpy.
    plan = pip_install(python, *quick, "--dry-run", "--report", "-", *requirements, stdout=subprocess.PIPE)
    if plan.returncode != 0:
        return False
    found = [item["metadata"] for item in json.loads(plan.stdout)["install"]]
    exact = [f"{item['name']}=={item['version']}" for item in found if item["name"] != "torch"]
    return pip_install(python, *quick, "--no-deps", "--target", DEPS, *exact).returncode == 0


def add_rivals(python):
    os.environ["PYTHONPATH"] = str(DEPS)
    missing = lacking(python, [requirement.split("==")[0] for requirement in RIVALS])
    if not missing:
        say("the benchmark's rivals are all there")
    elif not add_to_deps(python, missing, [r for r in RIVALS if r.split("==")[0] in missing]):
        raise SystemExit(f"gconv: pip could not add {', '.join(missing)} (message above)")


def choose(goal):
    """The Python to use, filled with what the goal needs."""
    if has_torch(sys.executable):
        fill_deps(goal)
        return sys.executable
    if not has_torch(VENV_PYTHON):
        make_venv(goal)
    fill_venv(goal)
    return VENV_PYTHON


def main():
    goal = sys.argv[1]
    if sys.version_info < (3, 10):  # noqa: UP036  a clear line instead of a SyntaxError further on
        raise SystemExit(f"gconv: want Python >= 3.10, got {sys.version.split()[0]} ({sys.executable})")
    DEPS.mkdir(parents=True, exist_ok=True)
    python = choose("demo" if goal == "rivals" else goal)
    if goal == "rivals":
        add_rivals(python)
    print(python)


if __name__ == "__main__":
    main()
