"""How long a whole run may take: what compiles is left out first, then what is still to come; both are
said."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

__all__ = ["Budget"]

COMPILE_SHARE = 0.7  # of the seconds: later nothing more is compiled


class Budget:
    """`seconds` from now on, or as long as it takes."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = math.inf if seconds is None else seconds, clock
        self.began = clock()

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.began)

    @property
    def over(self) -> bool:
        """Whether nothing more may be begun."""
        return self.left <= 0

    @property
    def compile_seconds(self) -> float | None:
        """How long something may still be compiled; None: as long as it takes."""
        if math.isinf(self.seconds):
            return None
        return max(0.0, self.left - (1 - COMPILE_SHARE) * self.seconds)

    @property
    def text(self) -> str:
        """Why something is left out."""
        return f"the {self.seconds:g} s of --budget are used up"

    def spend(self, error: type[Exception]) -> None:
        """Raises `error` where nothing more may be compiled."""
        if self.compile_seconds == 0:
            raise error(self.text)
