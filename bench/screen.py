"""A live table with progress bars in a terminal; plain lines where stdout is a file or rich is not installed.

Nothing refreshes in the background: a thread that redraws the screen would take a core from what is being
measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from rich.text import Text
except ImportError:
    Console = None

__all__ = ["Cell", "Screen", "say"]

STYLES = {"good": "bold green", "bad": "bold red", "dim": "dim", "": ""}
REDRAW_SECONDS = 0.2
PLAIN_STEP_SECONDS = 15.0  # how often a plain log hears of a step that is still running


class Cell(str):
    """The text of a table cell with a meaning: "good", "bad", "dim" or ""."""

    mood: str

    def __new__(cls, text: object, mood: str = ""):
        cell = super().__new__(cls, text)
        cell.mood = mood
        return cell


def _console():
    return Console(highlight=False) if Console else None


def say(text: str = "", mood: str = "") -> None:
    """One line of text."""
    console = _console()
    if console and console.is_terminal:
        console.print(Text(text, style=STYLES[mood]))
    else:
        print(text, flush=True)


class Screen:
    """`with Screen(title, columns, total) as screen:` then `step`, `tick`, `row`.

    columns: (heading, "left" | "right", width) with the width that plain lines are aligned to; total: how
    many rows or epochs the overall bar counts; optional: headings a narrow terminal does without, first to go
    first (plain lines have them all).
    """

    def __init__(self, title: str, columns: Sequence[tuple], total: int, unit: str = "rows", optional=()):
        self.title, self.columns, self.total, self.unit = title, columns, total, unit
        console = _console()
        self.console = console if console and console.is_terminal else None
        self.optional = list(optional)
        self.done = 0
        self.live = None
        self._drawn = self._said = 0.0
        self._began = time.perf_counter()

    def __enter__(self) -> Screen:
        if self.console is None:
            print(f"\n{self.title}", flush=True)
            return self
        self.table = Table(
            title=self.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
        )
        self.shown = self._fitting()
        for heading, justify, _ in (self.columns[i] for i in self.shown):
            self.table.add_column(heading, justify=justify, no_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            auto_refresh=False,
        )
        self.overall = self.progress.add_task(self.unit, total=self.total)
        self.current = self.progress.add_task("", total=1)
        self.live = Live(Group(self.table, self.progress), console=self.console, auto_refresh=False)
        self.live.__enter__()
        self._draw(force=True)
        return self

    def __exit__(self, *exc) -> None:
        if self.live:
            self.progress.update(self.current, visible=False)
            self._draw(force=True)
            self.live.__exit__(*exc)
        sys.stdout.flush()

    def _fitting(self) -> list[int]:
        """The indices of the columns that fit the terminal's width."""
        shown = list(range(len(self.columns)))
        for heading in self.optional:
            if sum(self.columns[i][2] + 2 for i in shown) <= self.console.width:
                break
            shown = [i for i in shown if self.columns[i][0] != heading]
        return shown

    def _draw(self, force: bool = False) -> None:
        now = time.perf_counter()
        if self.live and (force or now - self._drawn >= REDRAW_SECONDS):
            self._drawn = now
            self.live.refresh()

    def step(self, description: str, total: int = 1) -> None:
        """A new step begins, of `total` ticks."""
        self._description = description
        if self.live:
            self.progress.reset(self.current, total=total, description=description)
            self._draw(force=True)
        self._said = time.perf_counter()

    def tick(self, done: int, total: int | None = None, description: str | None = None) -> None:
        """`done` ticks of the step are over; `total` may be corrected on the way, and is None where it is not
        known."""
        self._description = description or self._description
        if self.live:
            self.progress.update(self.current, completed=done, total=total, description=self._description)
            self._draw()
        elif time.perf_counter() - self._said >= PLAIN_STEP_SECONDS:
            self._said = time.perf_counter()
            count = f" {done}/{total}" if total else ""
            print(f"  … {self._description}{count} ({self._said - self._began:.0f} s)", flush=True)

    def row(self, cells: Sequence[str]) -> None:
        """A finished row; its cells may be `Cell`s with a mood."""
        self.done += 1
        if self.live:
            chosen = (cells[i] for i in self.shown)
            self.table.add_row(*(Text(str(c), style=STYLES[getattr(c, "mood", "")]) for c in chosen))
            self.progress.update(self.overall, completed=self.done)
            self._draw(force=True)
            return
        if self.done == 1:
            self._print([heading for heading, _, _ in self.columns])
        self._print(cells)

    def _print(self, cells: Sequence[str]) -> None:
        aligned = [
            str(c).rjust(width) if justify == "right" else str(c).ljust(width)
            for c, (_, justify, width) in zip(cells, self.columns)
        ]
        print("  ".join(aligned).rstrip(), flush=True)
