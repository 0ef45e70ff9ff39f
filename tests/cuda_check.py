"""Compiles the CUDA kernels for GPUs that are not there, and reports what each takes of them.

    python tests/cuda_check.py [--arch sm_80,sm_90a] [--json] [--jobs N] [--maxrregcount N] [file.cu ...]

A file that does not compile or a kernel that spills registers is a fault, and the exit status is 1. Shared
memory is what the kernel declares; what a launch asks for besides is checked when it runs. Results are kept
in build/cuda_check by the content of the sources, so that a second run compiles what changed. Needs nvcc, on
PATH or in $CUDA_HOME/bin, and no GPU.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from triton_aot import resources

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "cuda_check"
# As in setup.py, whose link takes these objects, and a word on each kernel.
FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
ARCHITECTURES = "sm_80,sm_90a"
KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SHARED = re.compile(r"(\d+) bytes smem")


def nvcc():
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return next(filter(None, map(shutil.which, [f"{home}/bin/nvcc"] * bool(home) + ["nvcc"])), None)


def sources():
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def rows_of(log):
    """A row for each kernel of a log of `ptxas -v`; spills in bytes stored and loaded."""
    starts = list(KERNEL.finditer(log))
    rows = []
    for start, following in zip(starts, [*starts[1:], None]):
        part = log[start.end() : following.start() if following else None]
        shared = SHARED.search(part)
        figures = resources(part) | {"shared": int(shared[1]) if shared else 0}
        rows.append({"kernel": start[1], "arch": start[2], **figures})
    return rows


def demangled(names):
    """{mangled name: as the source has it, without what all kernels share}."""
    if not names or not shutil.which("c++filt"):
        return {name: name for name in names}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    common = re.compile(r"\(anonymous namespace\)::|gconv::cuda::|gconv::|^void |\([^()]*\)$")
    return {name: common.sub("", line) for name, line in zip(names, done.stdout.splitlines())}


def compiled(source, arch, more=()):
    """(the rows of a source for one architecture, its object), from the cache or by nvcc."""
    command = [nvcc(), *FLAGS, f"-arch={arch}", *more]
    headers = sorted(
        [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("c*/*.h"), *source.parent.glob("*.h")]
    )
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([version, *command, source.name]).encode())
    for path in (source, *headers):
        key.update(path.read_bytes())
    kept = CACHE / f"{source.stem}-{arch}-{key.hexdigest()[:16]}.json"
    made = kept.with_suffix(".o")
    if kept.exists() and made.exists():
        return json.loads(kept.read_text()), made
    start = time.perf_counter()
    CACHE.mkdir(parents=True, exist_ok=True)
    part = made.with_suffix(f".{os.getpid()}.o")
    command += [f"-I{ROOT / 'csrc' / 'cuda'}", "-c", str(source), "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    about = {"file": source.name, "seconds": round(time.perf_counter() - start, 1)}
    if done.returncode != 0:
        message = [line for line in done.stderr.splitlines() if not line.startswith("ptxas info")]
        error = "\n".join(message) or str(done.returncode)
        return [{"kernel": "-", "arch": arch, **about, "error": error}], None
    rows = [row | about for row in rows_of(done.stderr)]
    names = demangled([row["kernel"] for row in rows])
    rows = [row | {"kernel": names[row["kernel"]]} for row in rows]
    part.replace(made)
    kept.write_text(json.dumps(rows))
    return rows, made


def fault(row):
    """What is wrong with a row, in words, or None."""
    if "error" in row:
        return row["error"]
    return f"{row['spills']} bytes of register spills" if row["spills"] else None


def table(rows):
    from gconv.backend import format_table

    names = ("file", "arch", "registers", "shared", "spills", "seconds", "kernel")
    return format_table([names, *(tuple(str(row.get(name, "-")) for name in names) for row in rows)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="file.cu", help="default: csrc/cuda/*.cu")
    parser.add_argument(
        "--arch", default=ARCHITECTURES, help=f"separated by commas (default {ARCHITECTURES})"
    )
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (default 2)")
    parser.add_argument("--maxrregcount", type=int, help="registers of a thread, to provoke spills")
    args = parser.parse_args()
    if nvcc() is None:
        raise SystemExit("gconv: cuda-check needs nvcc, on PATH or in $CUDA_HOME/bin")
    more = [] if args.maxrregcount is None else [f"-maxrregcount={args.maxrregcount}"]
    work = [(source, arch) for source in args.files or sources() for arch in args.arch.split(",")]
    if not work:
        raise SystemExit("gconv: cuda-check: no .cu file in csrc/cuda")
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for rows, _ in pool.map(lambda item: compiled(*item, more), work) for row in rows]
    print(json.dumps(rows) if args.json else table(rows))
    faults = [row for row in rows if fault(row)]
    for row in faults:
        print(f"{row['file']} {row['arch']} {row['kernel']}: {fault(row)}", file=sys.stderr)
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
