"""The facts that stand beside every figure: device, versions, commit, threads."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from datetime import datetime, timezone

import torch

from gconv import info

from .devices import CPU, Cpu, Cuda

__all__ = ["checkout", "commit", "describe", "facts", "is_gpu", "name"]

SOURCES = ("csrc", "gconv", "kernels", "models", "bench/*.py", "setup.py")

_HERE = os.path.dirname(os.path.abspath(__file__))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", _HERE, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def checkout() -> str | None:
    """The checkout of gconv that this file is in or was installed inside of (as make does), or None."""
    folder = _HERE
    while not os.path.isfile(os.path.join(folder, "csrc", "grouped_conv.h")):
        folder, below = os.path.dirname(folder), folder
        if folder == below:
            return None
    return folder


def commit() -> str:
    """The commit of the checkout, with "+" if its sources differ from it; "unknown" where there is none."""
    root = checkout()
    sha = root and _git("rev-parse", "--short=12", "HEAD")
    if not sha:
        return "unknown"
    sources = [os.path.join(root, *path.split("/")) for path in SOURCES]
    return sha + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", *sources) else "")


def is_gpu(row: dict) -> bool:
    """Whether a row of a record, or a machine's facts, are of a GPU."""
    return row["isa"].startswith("sm_")


def describe(row: dict) -> str:
    """The machine of a row in words: "2 threads of AMD EPYC (avx512)", "NVIDIA H200 (sm_90)"."""
    if is_gpu(row):
        return f"{row['device']} ({row['isa']})"
    return f"{row['threads']} threads of {row['device']} ({row['isa'] or 'no extension'})"


def name(device: str, cores: int, isa: str | None) -> str:
    """A file name for the records of machines like this one: "intel-xeon-processor-2-cores-avx512",
    "nvidia-h200-132-cores-sm-90" (of a GPU its multiprocessors)."""
    words = re.sub(r"\((r|tm|c)\)|cpu|@.*$", " ", device.lower())
    slug = re.sub(r"[^a-z0-9]+", "-", f"{words} {cores} cores {isa or 'no-extension'}").strip("-")
    return slug


def facts(device: Cpu | Cuda = CPU) -> dict:
    """What a record and the report say about where they were measured."""
    versions = info.collect()["versions"]
    found = device.facts()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": name(found["device"], found["cores"], found["isa"]),
        "device": found["device"],
        "cores": found["cores"],
        "isa": found["isa"],
        "threads": torch.get_num_threads(),
        "gconv": versions["gconv"],
        "torch": versions["torch"],
        "python": versions["python"],
        "libraries": found["libraries"],
        "system": versions["system"],
    }
