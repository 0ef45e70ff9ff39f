"""The facts that stand beside every figure: device, versions, commit, threads."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from datetime import datetime, timezone

import torch

from gconv import info

__all__ = ["checkout", "commit", "facts", "name"]

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


def name(cpu: str, cores: int, isa: str | None) -> str:
    """A file name for the records of machines like this one: "intel-xeon-processor-2-cores-avx512"."""
    words = re.sub(r"\((r|tm|c)\)|cpu|@.*$", " ", cpu.lower())
    slug = re.sub(r"[^a-z0-9]+", "-", f"{words} {cores} cores {isa or 'no-extension'}").strip("-")
    return slug


def facts() -> dict:
    """What a record and the report say about where they were measured."""
    collected = info.collect()
    cpu, versions = collected["cpu"], collected["versions"]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": name(cpu["model"], cpu["cores usable"], cpu["isa in use"]),
        "device": cpu["model"],
        "cores": cpu["cores usable"],
        "isa": cpu["isa in use"] or "",
        "threads": torch.get_num_threads(),
        "gconv": versions["gconv"],
        "torch": versions["torch"],
        "python": versions["python"],
        "compiler": versions["compiler"] or "",
        "system": versions["system"],
    }
