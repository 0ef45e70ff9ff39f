"""Cross-compiles the kernels for aarch64 and runs their self-check under qemu: `make aarch64-check`.

AARCH64_CXX names the compiler (default aarch64-linux-gnu-g++), AARCH64_RUN the emulator (qemu-aarch64; empty
on an aarch64 machine). The self-check is tests/kernel_selfcheck.cpp.
"""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

from build_numpy_binding import FLAGS, OPTIMIZED, ROOT, kernel_sources


def main():
    compiler = shlex.split(os.environ.get("AARCH64_CXX", "aarch64-linux-gnu-g++"))
    emulator = shlex.split(os.environ.get("AARCH64_RUN", "qemu-aarch64"))
    missing = [command[0] for command in (compiler, emulator) if command and not shutil.which(command[0])]
    if missing:
        raise SystemExit(
            f"gconv: aarch64-check needs {' and '.join(missing)} "
            "(on Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user)"
        )
    folder = ROOT / "build" / "aarch64"
    folder.mkdir(parents=True, exist_ok=True)
    command = [*compiler, *FLAGS, *OPTIMIZED, f"-I{ROOT / 'csrc'}"]

    def compile_one(source):
        result = folder / f"{source.stem}.o"
        subprocess.run([*command, "-c", source, "-o", result], check=True)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [ROOT / "tests" / "kernel_selfcheck.cpp", *kernel_sources()]))
    program = folder / "kernel_selfcheck"
    subprocess.run([*command, "-static", *objects, "-o", program], check=True)
    raise SystemExit(subprocess.run([*emulator, program]).returncode)


if __name__ == "__main__":
    main()
