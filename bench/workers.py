"""Contestants in processes of their own, so that memory, caches and compiled code are their own; they speak
JSON lines and wait for their turns."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable

import gconv

__all__ = ["Worker", "WorkerDied", "tell"]

CHUNK = 1 << 16
WAIT_SECONDS = 1.0  # between two calls of on_wait


class WorkerDied(RuntimeError):
    """A contestant's process ended before it was told to; the message ends with the last lines it wrote."""


def tell(**message) -> None:
    """A worker's message to the process that started it."""
    print(json.dumps(message), flush=True)


class Worker:
    """The process `python -m module arguments...` of the contestant `label`; role: what messages call it."""

    def __init__(self, label: str, role: str, module: str, *arguments: str):
        self.label, self.role = label, role
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (open for as long as the process lives)
        parent = os.path.dirname(os.path.dirname(os.path.abspath(gconv.__file__)))
        path = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "GCONV_FALLBACK": "silent"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
        )
        self.heard = b""

    def tell(self, word: str) -> None:
        try:
            self.process.stdin.write(word.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.failure() from None

    def _line(self, on_wait: Callable[[], None] | None) -> bytes:
        """The next line of its stdout, b"" at the end."""
        while b"\n" not in self.heard:
            while on_wait and not select.select([self.process.stdout], [], [], WAIT_SECONDS)[0]:
                on_wait()
            more = os.read(self.process.stdout.fileno(), CHUNK)
            if not more:
                return b""
            self.heard += more
        line, _, self.heard = self.heard.partition(b"\n")
        return line + b"\n"

    def hear(
        self,
        event: str,
        on_other: Callable[[dict], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> dict:
        """The next message that is `event`; others on the way go to on_other. on_wait is called every second
        until something is heard; without it nothing runs here in the meantime."""
        while line := self._line(on_wait):
            if not line.startswith(b"{"):
                continue  # something a library printed
            message = json.loads(line)
            if message["event"] == event:
                return message
            if on_other:
                on_other(message)
        raise self.failure()

    def failure(self) -> WorkerDied:
        self.process.wait()
        self.errors.seek(0)
        tail = self.errors.read().decode(errors="replace").strip().splitlines()[-12:]
        return WorkerDied(
            f"the {self.role} process of {self.label} ended with status {self.process.returncode}:\n"
            + "\n".join(tail)
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()
