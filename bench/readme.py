"""The benchmark table of README.md, generated from a record between two markers."""

from __future__ import annotations

from . import records
from .rivals import LABELS

__all__ = ["END", "START", "table", "update"]

START, END = "<!-- bench:layers:start -->", "<!-- bench:layers:end -->"
HEADINGS = {"inference": "Inference", "training": "Training (forward + backward)"}


def _shape(row: dict) -> str:
    return (
        f"{row['in_channels']}→{row['out_channels']}, {row['in_channels'] // row['groups']} per group, "
        f"{row['size']}×{row['size']}" + (f", stride {row['stride']}" if row["stride"] > 1 else "")
    )


def _cells(row: dict) -> str:
    if not row["match"]:
        return "wrong result | – | – | –"
    best = f"{row[row['best'] + '_ms']:.2f} ({LABELS[row['best']]})"
    return f"{row['gconv_ms']:.2f} | {best} | **{row['ratio']:.2f}×** | {row['roof_percent']:.0f} %"


def table(rows: list[dict]) -> str:
    """Markdown for the rows of one run (of one model, batch and dtype): a table for each mode."""
    if not rows:
        return "No run has been recorded yet: `python -m gconv.bench layers --record`."
    first = rows[0]
    lines = [
        f"{first['model']}'s 3×3 layers as conv + BN + ReLU, {first['dtype']}, batch {first['batch']}, "
        f"{first['threads']} threads of {first['device']} ({first['isa']}), torch {first['torch']}, "
        f"{first['date'][:10]}, commit {first['commit']}. In the same run a matrix product reached "
        f"{first['gemm_gflops']:.0f} GFLOP/s and a copy {first['copy_gbps']:.1f} GB/s. "
        f"Medians in ms, {first['conditions']}; the speed-up is over the best of the others in that run.",
    ]
    for mode, heading in HEADINGS.items():
        group = [row for row in rows if row["mode"] == mode]
        if not group:
            continue
        lines += [
            "",
            f"| {heading} | shape | gconv | best other | speed-up | of the roof |",
            "|---|---|--:|--:|--:|--:|",
        ]
        lines += [f"| {row['layer']} | {_shape(row)} | {_cells(row)} |" for row in group]
    return "\n".join(lines)


def update(text: str, rows: list[dict]) -> str:
    """`text` with what stands between the markers replaced. ValueError if the markers are not there once
    each, in order."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"readme: want the markers {START} and {END} once each, in this order")
    head, rest = text.split(START)
    _, tail = rest.split(END)
    return f"{head}{START}\n{table(rows)}\n{END}{tail}"


def newest_rows(record: str | None = None) -> list[dict]:
    """The newest float32 run of a record, or of the newest record there is."""
    path = record or records.newest_record()
    rows = [row for row in records.load(path) if row["dtype"] == "float32"] if path else []
    return records.latest_run(rows)
