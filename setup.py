"""Builds the C++ extension gconv._C and maps the folders kernels/, models/ and bench/ to gconv.<folder>.

The extension needs torch and a C++ compiler. Where either is missing the package installs without it, says
so in one line, and runs on its torch backend; GCONV_CPU=1 turns that notice into an error. CXX names the
compiler.
"""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import find_packages, setup

FOLDERS = {"gconv": "gconv", "gconv.kernels": "kernels", "gconv.models": "models", "gconv.bench": "bench"}
PACKAGES = [
    name if not inner else f"{name}.{inner}"
    for name, folder in FOLDERS.items()
    if os.path.isfile(os.path.join(folder, "__init__.py"))
    for inner in ["", *find_packages(folder)]
]
COMPILERS = ("c++", "g++", "clang++")
MIN_TORCH = "0x020b000000000000"  # LibTorch stable ABI of torch 2.11: one build serves it and later ones

COMPILE_ARGS = [
    "-O3",
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-g0",
    "-Wall",
    "-Wno-unknown-warning-option",  # clang does not know the next one
    "-Wno-maybe-uninitialized",  # GCC's own AVX-512 header names registers it leaves undefined
    f"-DTORCH_TARGET_VERSION={MIN_TORCH}",
]  # no -march: translation units for one instruction set carry their own target pragmas


def parallel_compile(build_ext):
    """torch's BuildExtension, compiling on every core also where ninja is absent."""

    class ParallelBuild(build_ext):
        def build_extensions(self):
            if not self.use_ninja:
                self.compiler.compile = self._compile_sources
            super().build_extensions()

        def _compile_sources(
            self, sources, output_dir=None, macros=None, include_dirs=None, debug=0, extra_preargs=None,
            extra_postargs=None, depends=None,
        ):  # fmt: skip
            compiler = self.compiler
            macros, objects, postargs, pp_opts, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = compiler._get_cc_args(pp_opts, debug, extra_preargs)
            with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
                jobs = [
                    pool.submit(compiler._compile, obj, *build[obj], cc_args, postargs, pp_opts)
                    for obj in objects
                    if obj in build
                ]
                for job in jobs:
                    job.result()
            return objects

    return ParallelBuild


def missing_for_extension():
    """What the extension lacks here, in words, or None."""
    compiler = os.environ.get("CXX")
    if compiler and shutil.which(compiler.split()[0]) is None:
        return f"CXX={compiler} is not on PATH"
    if not compiler and not any(map(shutil.which, COMPILERS)):
        return f"no C++ compiler ({', '.join(COMPILERS)}) on PATH"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch does not import ({error}); build with --no-build-isolation beside an installed torch"
    return None


def extension_options():
    missing = missing_for_extension()
    if missing:
        if os.environ.get("GCONV_CPU") == "1":
            raise SystemExit(f"gconv: GCONV_CPU=1 asks for the C++ kernels, but: {missing}")
        print(f"gconv: building without the C++ kernels: {missing}", file=sys.stderr)
        return {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # One C++ compiler does everything; distutils would otherwise compile with CC and link with CXX.
    os.environ.setdefault("CXX", next(filter(shutil.which, COMPILERS)))
    os.environ.setdefault("CC", os.environ["CXX"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("MAX_JOBS", str(cores))
    extension = CppExtension(
        "gconv._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h") + ["gconv/schemas.inc"]),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args=COMPILE_ARGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": parallel_compile(BuildExtension)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=PACKAGES,
    package_dir=FOLDERS,
    package_data={
        "*": ["*.html", "*.css", "*.js", "*.svg", "*.csv", "*.json", "*.txt", "*.inc", "records/*.csv"]
    },
    **extension_options(),
)
