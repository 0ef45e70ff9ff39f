"""Compares two records of layers, or two of whole networks, row by row, and fails on a regression."""

from __future__ import annotations

from dataclasses import dataclass

from . import records
from .networks import CONTESTANTS, is_ours

__all__ = ["Finding", "compare", "show"]

# What names a row, in layers' records and in whole networks'.
LAYER_KEY = ("model", "layer", "mode", "dtype", "batch", "threads", "conditions")
MODEL_KEY = ("model", "size", "mode", "dtype", "batch", "threads", "conditions")
TOLERANCE = 0.05


@dataclass(frozen=True)
class Finding:
    """What became of one row: "same", "faster", "slower", "wrong", "missing" or "new"; the last run's
    figure in each."""

    key: tuple
    before: float | None
    after: float | None
    kind: str

    @property
    def regression(self) -> bool:
        return self.kind in ("slower", "wrong", "missing")


def _rows(path: str) -> dict[tuple, dict]:
    """gconv's newest row for each key, its time as "gconv_ms"; one for each of its ways to run a model."""
    rows: dict[tuple, dict] = {}
    for row in sorted(records.load(path), key=lambda row: row["date"]):
        kind = "a sweep" if "relative" in row else "depths" if "depth" in row else None
        if kind:
            raise ValueError(f"compare: {path}: want a record of layers or of networks, got one of {kind}")
        if "layer" in row:
            rows[tuple(row[key] for key in LAYER_KEY)] = row
        elif is_ours(row):
            if row["contestant"] != "gconv":
                row["model"] += f", {CONTESTANTS[row['contestant']].label}"
            times = {f"gconv_ms{end}": row[f"ms{end}"] for end in ("", "_p20", "_p80")}
            rows[tuple(row[key] for key in MODEL_KEY)] = row | times
    return rows


def compare(before: str, after: str, metric: str = "ratio", tolerance: float = TOLERANCE) -> list[Finding]:
    """Findings for every row of either record.

    metric "ratio" compares the speed-up over the best alternative, which cancels the machine's mood: slower
    means below by more than `tolerance` and with intervals that do not touch. "ms" compares gconv's own
    milliseconds: slower means above by more than `tolerance` with p20 to p80 ranges that do not touch.
    """
    if metric not in ("ratio", "ms"):
        raise ValueError(f"compare: metric: want ratio or ms, got {metric!r}")
    old, new = _rows(before), _rows(after)
    return [_judge(key, old.get(key), new.get(key), metric, tolerance) for key in dict.fromkeys((*old, *new))]


def _judge(key: tuple, a: dict | None, b: dict | None, metric: str, tolerance: float) -> Finding:
    value, low, high = (
        ("ratio", "ratio_low", "ratio_high")
        if metric == "ratio"
        else ("gconv_ms", "gconv_ms_p20", "gconv_ms_p80")
    )
    before, after = (row[value] if row else None for row in (a, b))
    if b is None:
        return Finding(key, before, after, "missing")
    if not b["match"]:
        return Finding(key, before, after, "wrong")
    if a is None or before is None or after is None:
        return Finding(key, before, after, "new")
    gain = after / before if metric == "ratio" else before / after  # above 1 is better
    apart = a[high] < b[low] or b[high] < a[low]
    if apart and gain < 1 - tolerance:
        return Finding(key, before, after, "slower")
    if apart and gain > 1 + tolerance:
        return Finding(key, before, after, "faster")
    return Finding(key, before, after, "same")


def show(findings: list[Finding], metric: str) -> str:
    """A plain table and a last line that sums it up."""
    unit = "×" if metric == "ratio" else " ms"

    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}{unit}"

    table = [("model", "layer or size", "mode", "dtype", "before", "after", "finding")]
    for f in findings:
        kind = f.kind.upper() if f.regression else f.kind
        table.append((*map(str, f.key[:4]), text(f.before), text(f.after), kind))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table]
    bad = sum(f.regression for f in findings)
    faster = sum(f.kind == "faster" for f in findings)
    lines.append(
        f"{len(findings)} rows: {bad} regressions, {faster} faster, {len(findings) - bad - faster} others"
    )
    return "\n".join(lines)
