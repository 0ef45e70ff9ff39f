"""CSV records: of the layer benchmark one row per layer, mode and dtype of a run, of whole networks one per
contestant, of a sweep one per batch and number of threads, of depths one per depth and contestant; rows are
only ever appended."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence

from . import machine
from .rivals import RIVALS, VARIANTS

__all__ = [
    "ALL", "COLUMNS", "DEPTH_COLUMNS", "EACH", "FOLDER", "KERNEL_COLUMNS", "MODEL_COLUMNS", "SWEEP_COLUMNS",
    "append", "is_total", "latest_run", "load", "newest_record", "path_of", "where",
]  # fmt: skip

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
# gconv's backends on a GPU, beside gconv, which is what it chooses by itself; what the host takes to launch a
# call there; and what else ran: versions of CUDA and so on.
_VARIANT_TIMES = tuple(f"{name}_ms{suffix}" for name in VARIANTS for suffix in ("", "_p20", "_p80"))
_LIBRARIES = ("libraries",)
_GPU = (*_VARIANT_TIMES, "gconv_host_ms", "best_host_ms")
COLUMNS = (*_WHERE, *_WHAT, *_HOW, *_TIMES, *_CONCLUSION, *_LIBRARIES, *_GPU)
# The layer of a row that sums up all layers of its model, each as often as the model has it. Its `count` is
# their number, and its `best` is EACH: for every layer the best of the others there.
ALL, EACH = "all", "each"

# Columns that older records do not have. New ones come last, and are listed here.
_PARTS = ("forward_ms", "backward_ms", "update_ms")  # of a training step, medians
_ADDED = ("kept_mb", *_LIBRARIES, *_GPU, *_PARTS)

# ratio: the time of the fastest contestant other than gconv, `best`, over this one's. step_mb: the peak of
# one step above what was resident before it; memory_ratio: this one's over that of `best`. kept_mb: what a
# training step's forward keeps for its backward. All in MiB.
MODEL_COLUMNS = (
    *_WHERE, "model", "size", "batch", "dtype", "mode", "conditions", "contestant", "precision", "kernel",
    "own_convolutions", "convolutions", "fallbacks", "match", "error_ratio", "worst", "ms", "ms_p20",
    "ms_p80", "ms_per_image", "images_per_s", "best", "ratio", "ratio_low", "ratio_high", "step_mb",
    "peak_mb", "memory_ratio", "compile_s", "gflop", "gflops", "copy_gbps", "gemm_gflops", "rounds",
    "dropped", "noisy", "note", "kept_mb", *_LIBRARIES, *_PARTS,
)  # fmt: skip
# Of one training step: kept_mb as above, allocated_mb the peak of what is allocated on top of what there was
# before it, step_mb and peak_mb resident memory.
DEPTH_COLUMNS = (
    *_WHERE, "model", "depth", "growth", "size", "batch", "dtype", "mode", "contestant", "parameters",
    "kernel", "match", "error_ratio", "worst", "kept_mb", "allocated_mb", "step_mb", "peak_mb", "compile_s",
    "note", *_LIBRARIES,
)  # fmt: skip
# relative: images per second over those of the same layer at the reference batch and as many threads.
SWEEP_COLUMNS = (
    *_WHERE, *_WHAT, "contestant", "kernel", "match", "error_ratio", "worst", "ms", "ms_p20", "ms_p80",
    "images_per_s", "reference", "relative", "relative_low", "relative_high", "rounds", "dropped", "noisy",
    *_LIBRARIES,
)  # fmt: skip
# Of one kernel: bytes are those none can avoid, copy_percent their rate as a share of the copy's, floor_ms
# the least time by bytes and operations, and floor_percent its share of ms.
KERNEL_COLUMNS = (
    *_WHERE, "model", "layer", "op", "in_channels", "out_channels", "groups", "size", "stride", "batch",
    "dtype", "conditions", "contestant", "kernel", "match", "error_ratio", "worst", "ms", "ms_p20", "ms_p80",
    "best", "ratio", "ratio_low", "ratio_high", "gflops", "gbps", "flops", "bytes", "copy_percent",
    "floor_ms", "floor_percent", "bound", "copy_gbps", "gemm_gflops", "host_ms", "rounds", "dropped",
    "noisy", "note", *_LIBRARIES,
)  # fmt: skip
SCHEMAS = {  # by the end of the file's name
    "": COLUMNS,
    "-models": MODEL_COLUMNS,
    "-sweep": SWEEP_COLUMNS,
    "-depth": DEPTH_COLUMNS,
    "-kernels": KERNEL_COLUMNS,
}

_TEXT = {
    "date", "commit", "machine", "device", "isa", "gconv", "torch", "python", "model", "layer", "dtype",
    "mode", "conditions", "kernel", "match", "worst", "best", "bound", "note", "contestant", "precision",
    "fallbacks", "libraries", "op",
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


def path_of(machine_name: str, columns: Sequence[str] = COLUMNS, folder: str = FOLDER) -> str:
    """The record of a machine for rows of these columns."""
    end = next(end for end, schema in SCHEMAS.items() if schema == columns)
    return os.path.join(folder, f"{machine_name}{end}.csv")


def where(facts: dict) -> dict:
    """What the rows of a run say about the machine, from `machine.facts()`."""
    return {key: facts[key] for key in (*_WHERE, *_LIBRARIES)}


def is_total(row: dict) -> bool:
    """Whether a row of the layer benchmark sums up the others."""
    return row["layer"] == ALL


def append(path: str, rows: Iterable[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Appends the rows; a new file gets the heading. A file from before a column was added gets that column,
    empty in the rows there are. ValueError if the file has other columns or a row unknown keys."""
    rows = list(rows)
    for row in rows:
        unknown = set(row) - set(columns)
        if unknown:
            raise ValueError(f"records: row: want the keys of the columns, got also {sorted(unknown)}")
    exists = os.path.exists(path) and os.path.getsize(path) > 0
    if exists and _heading(path) != columns and not _widen(path, columns):
        raise ValueError(
            f"records: {path}: want the columns {', '.join(columns)}, got {', '.join(_heading(path))}"
        )
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not exists:
            writer.writerow(columns)
        writer.writerows([_format(key, row.get(key)) for key in columns] for row in rows)


def _heading(path: str) -> tuple[str, ...]:
    with open(path, newline="", encoding="utf-8") as file:
        return tuple(next(csv.reader(file), ()))


def _missing(heading: Iterable[str], columns: Sequence[str]) -> set[str]:
    """Which of the columns a file with this heading would need to have."""
    return set(columns) - set(_ADDED) - set(heading)


def _widen(path: str, columns: Sequence[str]) -> bool:
    """Gives a file that lacks only columns added since, all of them at the end, their names and no values.
    False, and nothing done, for any other file."""
    heading = _heading(path)
    new = columns[len(heading) :]
    if (*heading, *new) != tuple(columns) or not set(new) <= set(_ADDED):
        return False
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    widened = f"{path}.new"
    with open(widened, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [columns, *([*row, *[""] * len(new)] for row in rows[1:])]
        )
    os.replace(widened, path)
    return True


def load(path: str, columns: Sequence[str] | None = None) -> list[dict]:
    """All rows, numbers as numbers; of whichever benchmark it is, or of these columns. None for columns that
    were added after the file was made; ValueError if another is missing."""
    if columns is None:
        heading = _heading(path)
        columns = next((schema for schema in SCHEMAS.values() if not _missing(heading, schema)), COLUMNS)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = _missing(reader.fieldnames or (), columns)
        if missing:
            raise ValueError(f"records: {path}: want the columns of a benchmark, missing {sorted(missing)}")
        return [{key: _parse(key, row.get(key, "")) for key in columns} for row in reader]


def latest_run(rows: Sequence[dict]) -> list[dict]:
    """The rows of the newest run in them."""
    newest = max((row["date"] for row in rows), default=None)
    return [row for row in rows if row["date"] == newest]


def newest_record(
    folder: str = FOLDER, columns: Sequence[str] = COLUMNS, gpu: bool | None = None
) -> str | None:
    """The record of these columns, of a GPU or of a CPU if `gpu` says so, whose newest run is the newest of
    all, or None if there is none."""
    if not os.path.isdir(folder):
        return None
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".csv")]
    dated = []
    for path in paths:
        if _missing(_heading(path), columns):
            continue
        rows = load(path, columns)
        if gpu is None or {machine.is_gpu(row) for row in rows} <= {gpu}:
            dated.append((max((row["date"] for row in rows), default=""), path))
    return max(dated)[1] if dated else None
