"""CSV records of the layer benchmark: one row per layer, mode and dtype of a run; rows are only ever
appended."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence

from . import machine
from .rivals import RIVALS

__all__ = ["COLUMNS", "FOLDER", "append", "latest_run", "load", "newest_record"]

# An installed copy inside a checkout records into the checkout.
_HOME = os.path.join(machine.checkout(), "bench") if machine.checkout() else os.path.dirname(__file__)
FOLDER = os.path.join(os.path.abspath(_HOME), "records")

_WHERE = ("date", "commit", "machine", "device", "cores", "isa", "threads", "gconv", "torch", "python")
_WHAT = (
    "model", "layer", "count", "in_channels", "out_channels", "groups", "size", "stride", "batch", "dtype",
    "mode", "conditions",
)  # fmt: skip
# "error_ratio" is our worst error as a multiple of torch's own; without a match there are no times of ours.
_HOW = ("kernel", "match", "error_ratio", "worst")
_TIMES = tuple(
    f"{name}_ms{suffix}" for name in ("gconv", *RIVALS) for suffix in ("", "_p20", "_p80")
)  # medians, and the 20th and 80th percentile
_CONCLUSION = (
    "best", "ratio", "ratio_low", "ratio_high", "gflops", "gbps", "flops", "bytes", "roof_ms", "roof_percent",
    "bound", "copy_gbps", "gemm_gflops", "gconv_peak_mb", "best_peak_mb", "rounds", "dropped", "noisy",
    "note",
)  # fmt: skip
COLUMNS = (*_WHERE, *_WHAT, *_HOW, *_TIMES, *_CONCLUSION)

_TEXT = {
    "date", "commit", "machine", "device", "isa", "gconv", "torch", "python", "model", "layer", "dtype",
    "mode", "conditions", "kernel", "match", "worst", "best", "bound", "note",
}  # fmt: skip
_FLAGS = {"match": ("no", "yes"), "noisy": ("no", "yes")}


def _format(key: str, value) -> str:
    if value is None:
        return ""
    if key in _FLAGS:
        return _FLAGS[key][bool(value)]
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _parse(key: str, text: str):
    if key in _FLAGS:
        return text == _FLAGS[key][1]
    if key in _TEXT:
        return text
    if text == "":
        return None
    number = float(text)
    return int(number) if number.is_integer() and "." not in text and "e" not in text else number


def append(path: str, rows: Iterable[dict]) -> None:
    """Appends the rows; a new file gets the heading. ValueError if the file has other columns or a row
    unknown keys."""
    rows = list(rows)
    for row in rows:
        unknown = set(row) - set(COLUMNS)
        if unknown:
            raise ValueError(f"records: row: want the keys of COLUMNS, got also {sorted(unknown)}")
    exists = os.path.exists(path) and os.path.getsize(path) > 0
    if exists:
        with open(path, newline="", encoding="utf-8") as file:
            heading = tuple(next(csv.reader(file)))
        if heading != COLUMNS:
            raise ValueError(
                f"records: {path}: want the columns {', '.join(COLUMNS)}, got {', '.join(heading)}"
            )
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not exists:
            writer.writerow(COLUMNS)
        writer.writerows([_format(key, row.get(key)) for key in COLUMNS] for row in rows)


def load(path: str) -> list[dict]:
    """All rows, numbers as numbers. ValueError if a column is missing."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"records: {path}: want the columns of the layer benchmark, missing {sorted(missing)}"
            )
        return [{key: _parse(key, row[key]) for key in COLUMNS} for row in reader]


def latest_run(rows: Sequence[dict]) -> list[dict]:
    """The rows of the newest run in them."""
    newest = max((row["date"] for row in rows), default=None)
    return [row for row in rows if row["date"] == newest]


def newest_record(folder: str = FOLDER) -> str | None:
    """The record whose newest run is the newest of all, or None if there is no record."""
    if not os.path.isdir(folder):
        return None
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".csv")]
    dated = [(max((row["date"] for row in load(path)), default=""), path) for path in paths]
    return max(dated)[1] if dated else None
