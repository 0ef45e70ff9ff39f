"""`python -m gconv.info`: what a bug report needs to know about a machine and what gconv runs on there."""

import argparse
import ast
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys

import torch

from gconv import backend, gpu, memory

VARIABLES = {
    "GCONV_BACKEND": "auto | cpu | cuda | triton | torch: the backend at import (gconv.use_backend)",
    "GCONV_FALLBACK": "silent | warn_once | error: the fallback policy at import (gconv.set_policy)",
    "GCONV_ISA": "portable | avx2 | avx512 | avx512_bf16 | amx_bf16: the instruction set of the CPU kernels",
    "GCONV_WINOGRAD": "0: never Winograd's algorithm; otherwise the CPU kernels use it for wide groups",
    "GCONV_STRASSEN": "0: never Strassen's algorithm; otherwise the CPU kernels use it for wide 1x1 layers",
    "GCONV_CACHE_MB": "MiB of freed CPU memory kept for later tensors (gconv.memory); 0: torch allocates",
    "GCONV_CPU": "1: a build without the C++ kernels is an error",
    "GCONV_CUDA": "1: a build without the CUDA kernels is an error; 0: they are not built",
    "TORCH_CUDA_ARCH_LIST": "the GPUs that the CUDA kernels are built for, such as 8.0;9.0a+PTX",
    "TRITON_INTERPRET": "1: Triton's interpreter runs the Triton kernels on the CPU under backend triton",
    "CXX": "the C++ compiler of the build",
    "OMP_NUM_THREADS": "threads of torch, which are the threads of gconv's kernels",
}


def version() -> str:
    """The version of the package: as installed, or as its pyproject.toml says in a checkout."""
    try:
        return importlib.metadata.version("gconv")
    except importlib.metadata.PackageNotFoundError:
        pass
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "pyproject.toml")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition("=")
                if key.strip() == "version":
                    return ast.literal_eval(value.strip())
    return "unknown"


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """The first line of `$CXX --version` (or c++'s), or None."""
    command = (os.environ.get("CXX") or "c++").split()
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


def _cpu_model(path: str = "/proc/cpuinfo") -> str:
    """What Linux calls the CPU. Virtual machines leave out of it which it is ("AMD EPYC"): then with
    the family and model that the CPU itself tells."""
    known: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                known.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    for key in ("model name", "Hardware", "cpu model"):
        name = known.get(key)
        if name and not re.search(r"\d", name) and "cpu family" in known and "model" in known:
            return f"{name} family {known['cpu family']} model {known['model']}"
        if name:
            return name
    return platform.processor() or platform.machine()


def _isa() -> tuple[str | None, list[str]]:
    """The instruction set the CPU kernels use and those they could use here; (an error's text, []) on a bad
    GCONV_ISA, (None, []) without the extension."""
    if not backend.extension_loaded():
        return None, []
    try:
        in_use = torch.ops.gconv.cpu_isa()
    except RuntimeError as error:
        return f"error: {str(error).splitlines()[0]}", []
    available = []
    try:
        for isa in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"):
            try:
                torch.ops.gconv.set_cpu_isa(isa)
                available.append(isa)
            except RuntimeError:
                continue
    finally:
        torch.ops.gconv.set_cpu_isa(in_use)
    return in_use, available


def _memory_kept() -> str | None:
    """How much freed memory the CPU kernels keep at most; an error's text on a bad GCONV_CACHE_MB, None
    without the extension."""
    if not backend.extension_loaded():
        return None
    try:
        return f"up to {memory.cache_limit() >> 20} MiB"
    except RuntimeError as error:
        return f"error: {str(error).splitlines()[0]}"


def _triton() -> str:
    """Whether the Triton kernels have something to run on."""
    missing = gpu.missing_triton()
    if missing is not None:
        return missing
    if torch.cuda.is_available():
        return "available"
    return "interpreter" if gpu.interpreting() else "no GPU (TRITON_INTERPRET=1 runs them on the CPU, slowly)"


def _cuda() -> str:
    """Whether the CUDA C++ kernels are there and have something to run on."""
    missing = gpu.missing_cuda()
    if missing is not None:
        return missing
    built = f"built for {', '.join(gpu.architectures())}"
    if not torch.cuda.is_available():
        return f"no GPU ({built})"
    return gpu.missing_cuda(torch.device("cuda", torch.cuda.current_device())) or f"available ({built})"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def collect() -> dict:
    """Everything the command prints, as plain data."""
    isa, isa_available = _isa()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": {
            "gconv": version(),
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "torchvision": _installed("torchvision"),
            "numpy": _installed("numpy"),
            "python": platform.python_version(),
            "compiler": _compiler(),
            "system": platform.platform(),
        },
        "cpu": {
            "model": _cpu_model(),
            "cores usable": cores,
            "threads": torch.get_num_threads(),
            "torch capability": torch.backends.cpu.get_cpu_capability(),
            "isa in use": isa,
            "isa available": isa_available,
            "memory kept": _memory_kept(),
        },
        "gpus": _gpus(),
        "backends": {
            "cpu": backend.missing_extension() or "available",
            "cuda": _cuda(),
            "triton": _triton(),
            "torch": "available",
            "mode": backend.backend_mode(),
            "fallback policy": backend.policy(),
        },
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "-" if value is None else str(value)


def format_info(info: dict) -> str:
    """The report as aligned lines under a heading per section."""
    width = max(len(key) for section in info.values() if isinstance(section, dict) for key in section)
    lines = []
    for title, section in info.items():
        lines.append(title)
        rows = (
            section.items() if isinstance(section, dict) else [(str(i), gpu) for i, gpu in enumerate(section)]
        )
        lines += [f"  {key:<{width}}  {_text(value)}" for key, value in rows] or ["  none"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    meanings = "\n".join(f"  {name:<16} {meaning}" for name, meaning in VARIABLES.items())
    parser = argparse.ArgumentParser(
        prog="python -m gconv.info",
        description="Shows versions, CPU, GPUs, backends and settings; put it into a bug report.",
        epilog=f"environment variables:\n{meanings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else format_info(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
