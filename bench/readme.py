"""The benchmark tables of README.md, generated from the records between pairs of markers."""

from __future__ import annotations

from collections.abc import Sequence

from . import records
from .layers import best_ms, describe, gemm_percent
from .machine import describe as describe_machine
from .machine import is_gpu
from .networks import CONTESTANTS, is_ours
from .rivals import LABELS
from .shapes import whose

__all__ = [
    "MARKERS",
    "depth_table",
    "kernels_table",
    "layers_part",
    "layers_table",
    "models_table",
    "rows_of",
    "update",
]

MODEL, SEVERAL = "resnext50_32x4d", "several"

MARKERS = {
    part: (f"<!-- bench:{part}:start -->", f"<!-- bench:{part}:end -->")
    for part in ("layers", "models", "depth")
}
HEADINGS = {"inference": "Inference", "training": "Training (forward + backward)"}
STEPS = {"inference": "inference", "training": "training step"}


DISTURBED = "\\* more than half of the rounds were disturbed by something else on the machine; all were kept."


def _legend(rows: list[dict]) -> list[str]:
    """The lines that explain the star of disturbed rows, where there are any."""
    return ["", DISTURBED] if any(row["noisy"] for row in rows) else []


def _star(row: dict) -> str:
    return "\\*" if row["noisy"] else ""


def _shape(row: dict) -> str:
    against = ", against the best of each" if records.is_total(row) else ""
    return describe(row, " per group", ", stride ") + against


def _cells(row: dict) -> str:
    if not row["match"]:
        return "wrong result | – | – | – | –"
    digits = 3 if is_gpu(row) else 2
    best = f"{best_ms(row):.{digits}f}"
    if not records.is_total(row):
        best += f" ({LABELS[row['best']]})"
    return (
        f"{row['gconv_ms']:.{digits}f}{_star(row)} | {best} | **{row['ratio']:.2f}×** | "
        f"{gemm_percent(row):.0f} % | {row['roof_percent']:.0f} %"
    )


def _where(row: dict) -> str:
    return f"{describe_machine(row)}, torch {row['torch']}, {row['date'][:10]}, commit {row['commit']}"


def layers_table(rows: list[dict]) -> str:
    """Markdown for the rows of one run (of one model, batch and dtype): a table for each mode."""
    if not rows:
        return "No run has been recorded yet: `python -m gconv.bench layers --record`."
    first = rows[0]
    models = {row["model"] for row in rows}
    lines = [
        f"Conv 3×3 + BN + ReLU: {whose(models)}, {first['dtype']}, batch {first['batch']}, "
        f"{_where(first)}. In the same run a matrix product reached "
        f"{first['gemm_gflops']:.0f} GFLOP/s and a copy {first['copy_gbps']:.1f} GB/s. "
        f"Medians in ms, {first['conditions']}; the speed-up is over the best of the others in that run.",
    ]
    for mode, heading in HEADINGS.items():
        group = [row for row in rows if row["mode"] == mode]
        if not group:
            continue
        lines += [
            "",
            f"| {heading} | shape | gconv | best other | speed-up | of the matrix product | of the roof |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        for row in group:
            name = row["layer"] if len(models) == 1 else f"{row['model']} {row['layer']}"
            lines.append(f"| {name} | {_shape(row)} | {_cells(row)} |")
    return "\n".join([*lines, *_legend(rows)])


def _kept_cells(row: dict) -> str:
    kept = row["kept_mb"]
    return "– | –" if kept is None else f"{kept:.0f} | {kept / row['batch']:.1f}"


def _model_cells(row: dict) -> str:
    if not row["match"]:
        return "wrong result | – | – | – | –"
    speed = f"**{row['ratio']:.2f}×**" if is_ours(row) else f"{row['ratio']:.2f}×"
    memory = "–" if row.get("memory_ratio") is None else f"{row['memory_ratio']:.2f}×"
    megabytes = "–" if row["step_mb"] is None else f"{row['step_mb']:.0f}"
    time = f"{row['ms_per_image']:.{3 if is_gpu(row) else 1}f}{_star(row)}"
    return f"{time} | {row['images_per_s']:.1f} | {speed} | {megabytes} | {memory}"


def models_table(rows: list[dict]) -> str:
    """Markdown for the newest run of every model, size, batch, dtype and mode: a table of each, the fastest
    contestant first."""
    if not rows:
        return "No run has been recorded yet: `python -m gconv.bench models --record`."
    lines, run = [], None
    kinds: dict[tuple, dict[str, list[dict]]] = {}
    for row in sorted(rows, key=lambda row: (is_gpu(row), list(STEPS).index(row["mode"]))):
        kind = (*(row[key] for key in ("model", "size", "batch", "dtype")), is_gpu(row))
        kinds.setdefault(kind, {}).setdefault(row["mode"], []).append(row)
    for of_kind in kinds.values():
        for mode, of_mode in of_kind.items():
            of_mode = sorted(records.latest_run(of_mode), key=lambda row: row["ms"] or float("inf"))
            first = of_mode[0]
            if run != (first["model"], first["dtype"], first["date"]):
                run = first["model"], first["dtype"], first["date"]
                lines += [
                    "",
                    f"{first['model']}, {first['size']}×{first['size']}, {first['dtype']}, batch "
                    f"{first['batch']}, {_where(first)}. In the same run a matrix product reached "
                    f"{first['gemm_gflops']:.0f} GFLOP/s. Medians, {first['conditions']}; speed and memory "
                    "are relative to the fastest other contestant.",
                ]
            keeps = any(row["kept_mb"] is not None for row in of_mode)
            lines += [
                "",
                f"| {first['dtype']} {STEPS[mode]} | precision | ms per image | images/s | speed "
                "| MB of a step | of the best's |" + " MB kept | per image |" * keeps,
                "|---|---|--:|--:|--:|--:|--:|" + "--:|--:|" * keeps,
            ]
            for row in of_mode:
                label = CONTESTANTS[row["contestant"]].label if row["contestant"] in CONTESTANTS else "?"
                cells = _model_cells(row) + f" | {_kept_cells(row)}" * keeps
                lines.append(f"| {label} | {row['precision']} | {cells} |")
    return "\n".join([*lines[1:], *_legend(rows)])


def depth_table(rows: list[dict]) -> str:
    """Markdown for the newest float32 run: MB kept and at the peak per image, a row for each contestant and a
    column for each depth."""
    rows = records.latest_run([row for row in rows if row["dtype"] == "float32"])
    if not rows:
        return "No run has been recorded yet: `python -m gconv.bench depth --record`."
    first = rows[0]
    depths = sorted({row["depth"] for row in rows})
    found = {(row["contestant"], row["depth"]): row for row in rows}
    lines = [
        f"DenseNet-BC, k = {first['growth']}, {first['size']}×{first['size']}, {first['dtype']}, batch "
        f"{first['batch']}, {_where(first)}. MB per image kept for the backward / allocated at the peak of a "
        "training step, against the number of layers L.",
        "",
        "| MB per image | " + " | ".join(f"L = {depth}" for depth in depths) + " |",
        "|---|" + "--:|" * len(depths),
    ]
    for name in dict.fromkeys(row["contestant"] for row in rows):
        cells = [CONTESTANTS[name].label if name in CONTESTANTS else "?"]
        for row in (found.get((name, depth)) for depth in depths):
            if row is None or row["kept_mb"] is None:
                cells.append("–" if row is None or row["match"] else "wrong result")
            else:
                kept, peak = (row[key] / row["batch"] for key in ("kept_mb", "allocated_mb"))
                cells.append(f"{kept:.1f} / {peak:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def totals_line(rows: list[dict]) -> str:
    """One sentence with the sums of a run whose layers have no table."""
    sums = [row for row in rows if records.is_total(row)]
    if not sums:
        return ""
    first = sums[0]
    found = ", ".join(
        f"{row['mode']} {row['gconv_ms']:.1f} ms against {best_ms(row):.1f}, **{row['ratio']:.2f}×**"
        for row in sums
    )
    return (
        f"In {first['dtype']} ({first['date'][:10]}, commit {first['commit']}) all {first['count']} layers "
        f"of {first['model']} together: {found}."
    )


def kernels_table(rows: list[dict]) -> str:
    """Markdown for the newest run of every model and dtype: gconv's kernels and the fastest other's time; no
    text without rows."""
    newest: dict[tuple, list[dict]] = {}
    for row in rows:
        newest.setdefault((row["model"], row["dtype"]), []).append(row)
    parts = []
    for of_kind in newest.values():
        run = records.latest_run(of_kind)
        first, times = run[0], {(r["layer"], r["op"], r["contestant"]): r["ms"] for r in run}
        lines = [
            f"Kernels one by one: {first['model']}, {first['dtype']}, batch {first['batch']}, "
            f"{_where(first)}. A copy reached {first['copy_gbps']:.0f} GB/s in the same run. Medians in ms, "
            f"{first['conditions']}.",
            "",
            "| kernel | layer | contestant | ms | best other | speed-up | GB/s | of a copy | of the floor |",
            "|---|---|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in run:
            if row["kernel"] and row["match"]:
                other = times[row["layer"], row["op"], row["best"]]
                lines.append(
                    f"| {row['op']} | {row['layer']} | {LABELS[row['contestant']]} | {row['ms']:.4f}"
                    f"{_star(row)} | {other:.4f} | **{row['ratio']:.2f}×** | {row['gbps']:.0f} | "
                    f"{row['copy_percent']:.0f} % | {row['floor_percent']:.0f} % |"
                )
        parts.append("\n".join([*lines, *_legend(run)]))
    return "\n\n".join(parts)


def layers_part(rows: list[dict]) -> str:
    """What README.md says of records of layers: of CPUs, and after it of GPUs where there are any."""
    parts = [_device_part([row for row in rows if not is_gpu(row)], "float32")]
    by_model: dict[str, list[dict]] = {}
    for row in filter(is_gpu, rows):
        by_model.setdefault(row["model"], []).append(row)
    for of_model in by_model.values():
        dtypes = {row["dtype"] for row in of_model}
        parts.append(_device_part(of_model, "bfloat16" if "bfloat16" in dtypes else min(dtypes)))
    return "\n\n".join(parts)


def _device_part(rows: list[dict], dtype: str) -> str:
    """The newest run of ResNeXt-50 in this dtype, or of another model where there is none; the sums of its
    other dtypes; and the newest run of several networks' layers."""
    runs: dict[str, list[dict]] = {}
    for row in rows:
        runs.setdefault(row["date"], []).append(row)
    newest: dict[tuple[str, str], list[dict]] = {}
    for _, run in sorted(runs.items()):
        names = {row["model"] for row in run}
        newest[SEVERAL if len(names) > 1 else names.pop(), run[0]["dtype"]] = run
    singles = [key for key in newest if key[0] != SEVERAL and key[1] == dtype]
    head = (MODEL, dtype) if (MODEL, dtype) in newest else singles[-1] if singles else None
    parts = [layers_table(newest[head] if head else [])]
    others = (run for key, run in newest.items() if head and key[0] == head[0] and key != head)
    parts += filter(None, map(totals_line, others))
    if (SEVERAL, dtype) in newest:
        parts.append(layers_table(newest[SEVERAL, dtype]))
    return "\n\n".join(parts)


def update(
    text: str, layers: list[dict], networks: list[dict], depths: list[dict], kernels: Sequence[dict] = ()
) -> str:
    """`text` with what stands between the markers replaced, from the rows of records of each; of kernels
    those of GPUs, behind the layers. ValueError if a pair of markers is not there once, in order."""
    of_kernels = kernels_table([row for row in kernels if is_gpu(row)])
    parts = {
        "layers": "\n\n".join(filter(None, (layers_part(layers), of_kernels))),
        "models": models_table(networks),
        "depth": depth_table(depths),
    }
    for part, table in parts.items():
        start, end = MARKERS[part]
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise ValueError(f"readme: want the markers {start} and {end} once each, in this order")
        head, rest = text.split(start)
        _, tail = rest.split(end)
        text = f"{head}{start}\n{table}\n{end}{tail}"
    return text


def rows_of(record: str | None, columns: tuple[str, ...]) -> list[dict]:
    """All rows of a record, or of the newest one of a CPU and the newest one of a GPU with these columns;
    none where there is no record."""
    paths = [record] if record else [records.newest_record(columns=columns, gpu=gpu) for gpu in (False, True)]
    return [row for path in paths if path for row in records.load(path, columns)]
