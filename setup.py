"""Builds the C++ extensions gconv._C (for CPUs) and gconv._cuda (for NVIDIA GPUs) and maps the folders
kernels/, models/ and bench/ to gconv.<folder>.

gconv._C needs torch and a C++ compiler. Where either is missing the package installs without it, says so in
one line, and runs on its torch backend; GCONV_CPU=1 turns that notice into an error. CXX names the compiler.

gconv._cuda is built besides where nvcc is on PATH (or in $CUDA_HOME/bin) and torch is one with CUDA.
GCONV_CUDA=1 builds it beside any torch and makes it an error if it cannot be, GCONV_CUDA=0 never builds it.
TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") says for which GPUs, by default ARCHITECTURES as far as nvcc knows them.
"""

import os
import re
import shlex
import shutil
import subprocess
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


ARCHITECTURES = "8.0;8.6;8.9+PTX;9.0a;10.0+PTX"  # PTX is what later GPUs compile for themselves
CUDA_ARGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def parallel_compile(build_ext):
    """torch's BuildExtension, compiling on every core also where ninja is absent; .cu files by nvcc, without
    torch's headers."""

    class ParallelBuild(build_ext):
        def build_extensions(self):
            if not self.use_ninja:
                self.compiler.compile = self._compile_sources
            for extension in self.extensions:
                if isinstance(extension, dict) or not getattr(extension, "cuda", None):
                    continue
                folder = os.path.join(os.path.abspath(self.build_temp), "nvcc")
                extension.extra_objects += extension.cuda.objects(folder)
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


class CudaObjects:
    """The kernels in csrc/cuda: what compiles them and for which GPUs."""

    def __init__(self, nvcc):
        self.nvcc = nvcc
        self.codes = gpu_codes(nvcc, os.environ.get("TORCH_CUDA_ARCH_LIST"))
        self.sources = sorted(glob("csrc/cuda/*.cu"))

    def libraries(self):
        """The folders of the CUDA runtime."""
        done = subprocess.run(
            [self.nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        top = re.search(r"TOP=(\S+)", done.stderr).group(1)
        folders = [top + "/lib64", top + "/lib", *re.findall(r"-L([^\"\s]+)", done.stderr)]
        return [folder for folder in folders if os.path.isfile(folder + "/libcudart_static.a")]

    def objects(self, folder):
        """Compiles what changed into `folder`, side by side; returns all objects."""
        os.makedirs(folder, exist_ok=True)
        args = [f"-gencode=arch=compute_{code.partition('_')[2]},code={code}" for code in self.codes]
        with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
            return list(pool.map(lambda source: self._object(folder, source, args), self.sources))

    def _object(self, folder, source, args):
        stem = os.path.join(folder, os.path.basename(source))
        command = [self.nvcc, *CUDA_ARGS, *args, "-c", source, "-o", stem + ".o", "-MD", "-MF", stem + ".d"]
        if not _up_to_date(stem, shlex.join(command)):
            print(shlex.join(command), flush=True)
            threads = f"--threads={os.environ['MAX_JOBS']}"  # one GPU beside the other
            if subprocess.run([*command, threads]).returncode != 0:
                raise SystemExit(f"gconv: {source} does not compile (GCONV_CUDA=0 builds without it)")
            with open(stem + ".command", "w", encoding="utf-8") as file:
                file.write(shlex.join(command))
        return stem + ".o"


def _up_to_date(stem, command):
    """Whether the object was made by this command after everything it includes."""
    try:
        with open(stem + ".command", encoding="utf-8") as file:
            if file.read() != command:
                return False
        with open(stem + ".d", encoding="utf-8") as file:
            included = shlex.split(file.read().partition(":")[2].replace("\\\n", " "))
        made = os.path.getmtime(stem + ".o")
        return all(os.path.getmtime(name) <= made for name in included)
    except OSError:
        return False


def gpu_codes(nvcc, wanted):
    """The codes (sm_80 for machine code, compute_80 for PTX) that a TORCH_CUDA_ARCH_LIST asks for, or
    ARCHITECTURES where nvcc knows them. The kernels need compute capability 8.0, so what is below is left
    out."""
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = set(done.stdout.split())
    codes = []
    for name in re.split(r"[;,\s]+", (wanted or ARCHITECTURES).strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if found is None:
            raise SystemExit(f"gconv: TORCH_CUDA_ARCH_LIST: want such as 8.0;9.0a+PTX, got {wanted}")
        major, minor, suffix, ptx = found.groups()
        if int(major) < 8:
            continue
        if not {f"sm_{major}{minor}", f"sm_{major}{minor}{suffix}"} & known:
            if wanted:
                raise SystemExit(f"gconv: TORCH_CUDA_ARCH_LIST: {nvcc} does not know {name}")
            continue
        codes.append(f"sm_{major}{minor}{suffix}")
        if ptx:
            codes.append(f"compute_{major}{minor}{suffix}")
    return codes


def cuda_objects():
    """What gconv._cuda is made of, or None where it is not to be built."""
    import torch

    asked = os.environ.get("GCONV_CUDA")
    if asked == "0" or (asked != "1" and torch.version.cuda is None):
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which(os.path.join(home, "bin", "nvcc"))) or shutil.which("nvcc")
    cuda = None if nvcc is None else CudaObjects(nvcc)
    if cuda is not None and cuda.codes:
        return cuda
    if asked == "1":
        lacking = "nvcc is neither on PATH nor in $CUDA_HOME/bin" if cuda is None else "no GPU from 8.0 on"
        raise SystemExit(f"gconv: GCONV_CUDA=1 asks for the CUDA kernels, but: {lacking}")
    return None


def extension_options():
    missing = missing_for_extension()
    if missing:
        if os.environ.get("GCONV_CUDA") == "1":
            raise SystemExit(f"gconv: GCONV_CUDA=1 asks for the CUDA kernels, but: {missing}")
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
    headers = glob("csrc/*.h") + glob("csrc/cpu/*.h") + ["gconv/schemas.inc"]
    common = {"include_dirs": [os.path.abspath("csrc")], "py_limited_api": True}
    extensions = [
        CppExtension(
            "gconv._C",
            sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            depends=sorted(headers),
            extra_compile_args=COMPILE_ARGS,
            **common,
        )
    ]
    cuda = cuda_objects()
    if cuda is not None:
        extension = CppExtension(
            "gconv._cuda",
            sorted(glob("csrc/cuda/*.cpp")),
            depends=sorted(headers + cuda.sources + glob("csrc/cuda/*.h")),
            extra_compile_args=[*COMPILE_ARGS, f"-DGCONV_CUDA_ARCHITECTURES={','.join(cuda.codes)}"],
            extra_objects=[],
            library_dirs=cuda.libraries(),
            libraries=["cudart_static", "pthread", "dl", "rt"],
            **common,
        )
        extension.cuda = cuda
        extensions.append(extension)
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": parallel_compile(BuildExtension)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(
        packages=PACKAGES,
        package_dir=FOLDERS,
        package_data={
            "": ["*.html", "*.css", "*.js", "*.svg", "*.csv", "*.json", "*.txt", "*.inc", "records/*.csv"]
        },
        **extension_options(),
    )
