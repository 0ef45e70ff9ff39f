"""Compiles the torch-free kernels, with a binding to NumPy, into modules for their tests: MODULES.

As a program: python tests/build_numpy_binding.py [--sanitize] [--run [pytest options]]. With --run the kernel
tests follow, under AddressSanitizer and UndefinedBehaviorSanitizer if --sanitize is given.
"""

import fcntl
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]  # as in setup.py
OPTIMIZED = ["-O3"]
SANITIZED = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]


@dataclass(frozen=True)
class Module:
    """What one module is made of: patterns of its sources (a .cu file is compiled as C++), further include
    folders, how far to optimise. Modules of one folder share their objects."""

    folder: str
    sources: tuple
    includes: tuple = ()
    optimized: tuple = tuple(OPTIMIZED)


# The kernels of the GPU run on harness code that a higher optimisation does not speed up, only their build.
CUDA_HOST = {"folder": "cuda_host", "includes": ("csrc/cuda", "tests/cuda_host"), "optimized": ("-O2",)}
CUDA_HOST_TESTS = ("tests/test_cuda_host.py", "tests/test_cuda_grouped_conv*.py")
MODULES = {
    "gconv_kernels_numpy": Module(
        "kernels", ("tests/numpy_binding.cpp", "tests/amx_emulator.cpp", "csrc/cpu/*.cpp")
    ),
    "gconv_cuda_host": Module(
        sources=("tests/cuda_host/binding.cpp", "tests/cuda_host/cuda_host.cpp", "csrc/cuda/*.cu"),
        **CUDA_HOST,
    ),
    "gconv_cuda_verbs": Module(
        sources=(
            "tests/cuda_host/verb_binding.cpp",
            "tests/cuda_host/cuda_host.cpp",
            "tests/cuda_host/verb_kernels.cu",
        ),
        **CUDA_HOST,
    ),
}


def found(root, patterns):
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]


def kernel_sources():
    return found(ROOT, ["csrc/cpu/*.cpp"])


def compiler():
    """The C++ compiler as a command, or None."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def newer(target, sources):
    """True if target exists and no source has changed, or gone, since."""
    paths = [target, *sources]
    return all(path.exists() and path.stat().st_mtime <= target.stat().st_mtime for path in paths)


def included(result):
    """What went into an object, by the list that the compiler left beside it; something that never is, if it
    left none."""
    listed = result.with_suffix(".d")
    if not listed.exists():
        return [listed]
    return [Path(name) for name in listed.read_text().partition(":")[2].replace("\\\n", " ").split()]


def build(name="gconv_kernels_numpy", sanitize=False, root=ROOT, optimized=None):
    """Builds the module where it is missing or out of date; returns the path of the shared object. The
    sources are in `root`, the checkout or a copy of it; `optimized` replaces the module's own flags."""
    import pybind11

    module = MODULES[name]
    folder = root / "build" / ("numpy_binding_sanitized" if sanitize else "numpy_binding") / module.folder
    folder.mkdir(parents=True, exist_ok=True)
    flags = FLAGS + (SANITIZED if sanitize else list(optimized or module.optimized))
    includes = [root / "csrc", *(root / path for path in module.includes)]
    includes += [pybind11.get_include(), sysconfig.get_path("include")]
    command = [*compiler(), *flags, *(f"-I{path}" for path in includes)]
    with open(folder / "lock", "w") as lock:  # two test runs in one checkout take turns
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        return build_in(target, command, flags, found(root, module.sources), root)


def built_for_the_extension(source, root):
    """The object that the extension's build, with the same flags, left of a kernel source, or None."""
    objects = (root / "build").glob(f"temp.*/{source.relative_to(root).with_suffix('.o')}")
    return max(objects, key=lambda path: path.stat().st_mtime, default=None)


def build_in(target, command, flags, sources, root):
    folder = target.parent
    note = folder / "command.txt"
    if not note.exists() or note.read_text() != " ".join(command):
        for old in folder.glob("*.o"):
            old.unlink()
        note.write_text(" ".join(command))
    headers = found(root, ["csrc/*.h", "csrc/cpu/*.h"])

    def compile_one(source):
        built = built_for_the_extension(source, root) if source.suffix == ".cpp" else None
        if built is not None and "-O3" in flags and newer(built, [source, *headers]):
            return built
        result = folder / f"{source.stem}.o"
        if not newer(result, included(result)):
            language = ["-x", "c++"] if source.suffix == ".cu" else []
            subprocess.run([*command, "-MMD", "-c", *language, source, "-o", result], check=True)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    if not newer(target, objects):
        subprocess.run([*compiler(), *flags, "-shared", *objects, "-o", target], check=True)
    return target


@functools.cache
def load(path):
    """Imports the module from its shared object, once: pybind11 registers its types but once. pybind11 knows
    modules by name, so the name says where the module comes from."""
    name = f"{str(path.parent).replace('.', '_')}.{path.name.partition('.')[0]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tests(paths, sanitize, options):
    """The exit status of the kernel tests on the modules at these paths."""
    environment = dict(os.environ, GCONV_NUMPY_MODULES=os.pathsep.join(map(str, paths)))
    if sanitize:
        # Python itself is not instrumented, so the runtime must be there before anything else is loaded;
        # libstdc++ too, or AddressSanitizer does not find what throws. Python's own leaks are not ours.
        runtimes = [library_path("libasan.so"), library_path("libubsan.so"), library_path("libstdc++.so")]
        environment["LD_PRELOAD"] = " ".join(filter(None, runtimes))
        environment["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=0"
        environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
        options = ["--capture=no", *options]  # pytest would swallow a report
    # No conftest: it imports torch, which need not be there and would slow the sanitizers down.
    pytest = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q"]
    tests = map(str, found(ROOT, ["tests/test_*_numpy.py", *CUDA_HOST_TESTS]))
    return subprocess.run([*pytest, *options, *tests], env=environment, cwd=ROOT / "build").returncode


def library_path(name):
    """Where the compiler keeps a runtime library, or None."""
    answer = subprocess.run(
        [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = answer.stdout.strip()
    return path if os.path.isabs(path) else None


def main():
    options = sys.argv[1:]
    sanitize = "--sanitize" in options
    if compiler() is None:
        raise SystemExit("gconv: the kernel tests need a C++ compiler: c++, g++ or clang++ on PATH, or CXX")
    paths = [build(name, sanitize) for name in MODULES]
    if "--run" in options:
        raise SystemExit(run_tests(paths, sanitize, options[options.index("--run") + 1 :]))
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
