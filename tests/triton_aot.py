"""Compiles the Triton kernels ahead of time for GPUs that are not there, and reports what each takes of them.

    python tests/triton_aot.py [--covering] [--json] [--jobs N] [--maxnreg N] [stem ...]

Every module of gconv.kernels that has `configurations()` lists there all that its launchers may launch, as
(kernel, signature, constexprs, options): `signature` maps the other parameters to Triton's type names
("*fp16", "i32"; "i32:16" for a multiple of 16), `options` are those of the launch (num_warps, num_stages).
Pointers are taken to be multiples of 16 bytes, as the memory of a whole tensor is. A kernel that does not
compile, spills registers or takes more shared memory than a block may have is a fault, and the exit status
is 1. --covering compiles of each kernel and dtype the configuration of the largest blocks alone.

What was compiled is kept in build/triton_aot, so that a second run compiles what changed.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pkgutil
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "triton_aot"
SHARED = {80: 166_912, 90: 232_448}  # bytes of shared memory that one block may have (CUDA guide, table 27)
REGISTERS = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def resources(log):
    """{"registers", "spills"} of one kernel, by the log of `ptxas -v`; spills in bytes stored and loaded."""
    registers, spills = REGISTERS.search(log), SPILLS.search(log)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas said nothing of registers: {log!r}")
    return {"registers": int(registers[1]), "spills": int(spills[1]) + int(spills[2])}


def fault(row):
    """What is wrong with a compiled row, in words, or None."""
    if "error" in row:
        return row["error"]
    if row["spills"]:
        return f"{row['spills']} bytes of register spills"
    if row["shared"] > SHARED[row["arch"]]:
        return f"{row['shared']} bytes of shared memory, of {SHARED[row['arch']]} that a block may have"
    return None


def described(entry, arch):
    """An entry of configurations() as plain data: a row of the report before it is compiled."""
    kernel, signature, constexprs, options = entry
    types = {name: kind.partition(":")[0] for name, kind in signature.items() if kind != "constexpr"}
    return {
        "kernel": kernel.__name__,
        "dtypes": sorted({kind[1:] for kind in types.values() if kind[0] == "*"}),
        "constexprs": {name: getattr(value, "__name__", value) for name, value in constexprs.items()},
        "options": dict(options),
        "arch": arch,
    }


def source(entry):
    """The ASTSource of an entry: the signature completed and in the order of the parameters."""
    from triton.compiler import ASTSource

    kernel, signature, constexprs, _ = entry
    unknown = (signature.keys() | constexprs.keys()) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"signature and constexprs: want every parameter, got or lacks {sorted(unknown)}")
    kinds = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(kinds.values())
        if kind[0] == "*" or kind.endswith(":16")
    }
    types = {name: kind.partition(":")[0] for name, kind in kinds.items()}
    return ASTSource(kernel, types, constexprs, attrs)


def compiled(entry, arch):
    """The row of an entry, compiled for sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget

    row, start = described(entry, arch), time.perf_counter()
    triton.knobs.nvidia.dump_ptxas_log = True
    try:
        src, log = source(entry), io.StringIO()
        target, options = GPUTarget("cuda", arch, 32), {"enable_fp_fusion": True, **entry[3]}
        with contextlib.redirect_stdout(log):
            binary = triton.compile(src, target=target, options=options)
        kept = CACHE / "resources" / f"{binary.hash}.json"
        if log.getvalue().strip() or not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(resources(log.getvalue())))
        row |= json.loads(kept.read_text()) | {"shared": binary.metadata.shared}
    except Exception as error:
        lines = str(error).splitlines() or [""]
        row["error"] = f"{type(error).__name__}: {lines[0]} {lines[-1] if len(lines) > 1 else ''}".rstrip()
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def modules(stems):
    """The modules of gconv.kernels that list configurations, of these stems or all."""
    import gconv.kernels

    names = [module.name for module in pkgutil.iter_modules(gconv.kernels.__path__)]
    unknown = set(stems) - set(names)
    if unknown:
        raise SystemExit(f"triton_aot: want stems of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    found = {name: importlib.import_module(f"gconv.kernels.{name}") for name in stems or names}
    return {name: module for name, module in found.items() if hasattr(module, "configurations")}


def size_of(entry):
    """By what the configurations of one kernel are compared: the product of its block sizes."""
    return math.prod(
        v for name, v in entry[2].items() if isinstance(v, int) and v > 1 and name.startswith("BLOCK")
    )


def covering(entries):
    """Of each kernel and dtype the entry of the largest blocks."""
    largest = {}
    for entry in entries:
        row = described(entry, 0)
        key = (row["kernel"], *row["dtypes"])
        if key not in largest or size_of(entry) > size_of(largest[key]):
            largest[key] = entry
    return list(largest.values())


_work = []  # (stems, entry, arch), inherited by the processes that compile


def _compile(i):
    stems, entry, arch = _work[i]
    return {"stems": stems, **compiled(entry, arch)}


def compile_all(stems, only_covering, jobs, maxnreg):
    """Rows of every entry for every architecture, in the order of the modules' lists."""
    more = {} if maxnreg is None else {"maxnreg": maxnreg}
    work = {}  # a kernel that several modules launch is compiled once
    for stem, module in modules(stems).items():
        entries = module.configurations()
        entries = covering(entries) if only_covering else entries
        for entry in entries:
            entry = (*entry[:3], entry[3] | more)
            for arch in SHARED:
                key = repr((entry[0].__name__, *entry[1:], arch))
                work.setdefault(key, ([], entry, arch))[0].append(stem)
    _work.extend(work.values())
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile, range(len(_work))))


def table(rows):
    from gconv.backend import format_table

    lines = [("kernel", "dtypes", "sm", "registers", "spills", "shared", "s", "configuration")]
    for row in rows:
        settings = ", ".join(f"{k}={v}" for k, v in (row["constexprs"] | row["options"]).items())
        figures = (str(row.get(name, "-")) for name in ("registers", "spills", "shared", "seconds"))
        lines.append((row["kernel"], " ".join(row["dtypes"]), str(row["arch"]), *figures, settings))
    return format_table(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stems", nargs="*", metavar="stem", help="modules of gconv.kernels (default: all)")
    parser.add_argument("--covering", action="store_true", help="each kernel and dtype once")
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default 2)")
    parser.add_argument("--maxnreg", type=int, help="registers that a thread may have, to provoke spills")
    args = parser.parse_args()
    os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(CACHE)}  # before Triton is imported
    rows = compile_all(args.stems, args.covering, args.jobs, args.maxnreg)
    print(json.dumps(rows) if args.json else table(rows))
    faults = [(row, fault(row)) for row in rows if fault(row)]
    for row, what in faults:
        print(f"{row['kernel']} sm_{row['arch']} {row['constexprs']}: {what}", file=sys.stderr)
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
