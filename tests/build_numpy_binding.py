"""Compiles tests/numpy_binding.cpp with the torch-free kernels into the module gconv_kernels_numpy.

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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "gconv_kernels_numpy"
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


def kernel_sources():
    return sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


def compiler():
    """The C++ compiler as a command, or None."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def newer(target, sources):
    """True if target exists and no source has changed since."""
    return target.exists() and all(path.stat().st_mtime <= target.stat().st_mtime for path in sources)


def build(sanitize=False):
    """Builds the module where it is missing or out of date; returns the path of the shared object."""
    import pybind11

    sources = [ROOT / "tests" / "numpy_binding.cpp", *kernel_sources()]
    folder = ROOT / "build" / ("numpy_binding_sanitized" if sanitize else "numpy_binding")
    folder.mkdir(parents=True, exist_ok=True)
    flags = FLAGS + (SANITIZED if sanitize else OPTIMIZED)
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    command = [*compiler(), *flags, *(f"-I{path}" for path in includes)]
    with open(folder / "lock", "w") as lock:  # two test runs in one checkout take turns
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_in(folder, command, flags, sources)


def built_for_the_extension(source):
    """The object that the extension's build, with the same flags, left of a kernel source, or None."""
    found = (ROOT / "build").glob(f"temp.*/{source.relative_to(ROOT).with_suffix('.o')}")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def build_in(folder, command, flags, sources):
    target = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    note = folder / "command.txt"
    if not note.exists() or note.read_text() != " ".join(command):
        for old in folder.glob("*.o"):
            old.unlink()
        note.write_text(" ".join(command))
    headers = [path for inner in ("csrc", "csrc/cpu") for path in (ROOT / inner).glob("*.h")]

    def compile_one(source):
        built = built_for_the_extension(source)
        if built is not None and "-O3" in flags and newer(built, [source, *headers]):
            return built
        result = folder / f"{source.stem}.o"
        if not newer(result, [source, *headers]):
            subprocess.run([*command, "-c", source, "-o", result], check=True)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    if not newer(target, objects):
        subprocess.run([*compiler(), *flags, "-shared", *objects, "-o", target], check=True)
    return target


@functools.cache
def load(path):
    """Imports the module from its shared object, once: pybind11 registers its types but once."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tests(path, sanitize, options):
    """The exit status of the kernel tests on the module at path."""
    environment = dict(os.environ, GCONV_KERNELS_NUMPY=str(path))
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
    tests = map(str, Path(__file__).parent.glob("test_*_numpy.py"))
    return subprocess.run([*pytest, *options, *tests], env=environment, cwd=path.parent).returncode


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
    path = build(sanitize)
    if "--run" in options:
        raise SystemExit(run_tests(path, sanitize, options[options.index("--run") + 1 :]))
    print(path)


if __name__ == "__main__":
    main()
