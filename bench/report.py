"""One self-contained HTML page (pictures inside it, nothing loaded from elsewhere) with everything a run
found."""

from __future__ import annotations

import base64
import json
import os
import statistics

from . import plots, records
from .agreement import FACTOR
from .layers import Run
from .rivals import LABELS, RIVALS
from .roofs import Roofs
from .train import Training

__all__ = ["load", "save", "write"]

RESULTS = "results.json"
PAGE = "report.html"

METHOD = (
    "Correct first: every contestant's output, and in training every gradient and running statistic, is "
    "compared with float64. gconv must stay within 2 × torch's own error plus one unit in the last "
    "place, in the mean and at the worst element. Where the exact input of the ReLU is within rounding "
    "of 0 the upstream gradient is 0 for everyone, since there rounding alone decides.",
    "The contestants take turns (A B C, B C A, …), so a slow minute of a shared machine hits all of "
    "them. A turn of a fast one is an untimed call, which wakes its threads, and then several timed "
    "ones. Figures are medians.",
    "Inputs rotate over several buffers, so data come from where a network leaves them, the outer "
    "caches. Outputs are allocated by every call, as in use, and freed in between.",
    "Training is a forward and a backward with a random upstream gradient: gradients of x, weight, gamma "
    "and beta, running statistics updated.",
    "torch.compile runs inductor on channels_last with static shapes, for inference with frozen weights; "
    "compiling is not in its time.",
    "A round in which the kernel took the cores away (involuntary context switches, steal time), or in "
    "which a call jumped 4 ms and 25 % above its own median, is dropped for all contestants alike. A "
    "star marks rows in which more than half of the rounds were so disturbed that all of them were kept.",
    "The interval of a speed-up comes from resampling whole rounds. The roof is the larger of arithmetic "
    "at the rate of a matrix product and compulsory traffic at the rate of a copy, both measured in this "
    "run, their fastest repeat.",
)


def save(folder: str, layers: Run | None, training: Training | None, facts: dict) -> None:
    """Keeps everything the page is made from in `folder`/results.json."""
    data = {"facts": facts, "layers": None, "training": training.to_dict() if training else None}
    if layers:
        roofs = {
            "copy_gbps": layers.roofs.copy_gbps,
            "gemm_gflops": layers.roofs.gemm_gflops,
            "dtype": layers.roofs.dtype,
        }
        data["layers"] = {"rows": layers.rows, "roofs": roofs, "skipped": layers.skipped}
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, RESULTS), "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)


def load(folder: str) -> tuple[Run | None, Training | None, dict]:
    """What `save` kept. FileNotFoundError if it kept nothing there."""
    with open(os.path.join(folder, RESULTS), encoding="utf-8") as file:
        data = json.load(file)
    layers = data["layers"]
    if layers:
        layers = Run(layers["rows"], Roofs(**layers["roofs"]), data["facts"], layers["skipped"])
    training = Training.from_dict(data["training"]) if data["training"] else None
    return layers, training, data["facts"]


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _headlines(layers: Run | None, training: Training | None) -> list[dict]:
    lines = []
    if training:
        ours = training["gconv"]
        best = min((c for c in training.contestants if c.kind == "stock"), key=lambda c: c.epoch_seconds)
        lines += [{"ok": c.ok, "text": f"Training: {c.text}."} for c in training.checks if not c.ok]
        if training.ok:
            text = (
                f"Training: {training.checks[0].text}. Test accuracy {100 * best.accuracy[-1]:.2f} % with "
                f"stock torch.nn, {100 * ours.accuracy[-1]:.2f} % with gconv; {best.epoch_seconds:.2f} s per "
                f"epoch with stock ({best.layout}, its faster layout), {ours.epoch_seconds:.2f} s with "
                f"gconv: {best.epoch_seconds / ours.epoch_seconds:.2f}×."
            )
            lines.append({"ok": True, "text": text})
    if layers:
        for mode, rows in plots.by_mode(layers.rows).items():
            ratios = [row["ratio"] for row in rows if row.get("ratio")]
            wrong = [row["layer"] for row in rows if not row["match"]]
            text = f"Layers, {plots.TITLES[mode]}: "
            if ratios:
                slower = [row["layer"] for row in rows if row.get("ratio") and row["ratio"] < 1]
                text += (
                    f"{min(ratios):.2f}× to {max(ratios):.2f}× the best alternative, "
                    f"{statistics.geometric_mean(ratios):.2f}× in the geometric mean; "
                    + (f"slower on {', '.join(slower)}" if slower else "slower on none")
                    + ". "
                )
            text += (
                f"WRONG RESULT on {', '.join(wrong)}." if wrong else f"All {len(rows)} results match float64."
            )
            lines.append({"ok": not wrong, "text": text})
    return lines


def _kernels(contestant) -> str:
    return ", ".join(f"{name} ×{calls}" for name, calls in sorted(contestant.kernels.items())) or "torch.nn"


def pictures(layers: Run | None, training: Training | None) -> dict[str, bytes]:
    """PNGs by name; empty where matplotlib is missing."""
    if plots.missing():
        return {}
    drawn = {}
    if training:
        drawn["training"] = plots.training(training)
    if layers and layers.rows:
        drawn["roofline"] = plots.roofline(layers.rows)
        drawn["times"] = plots.times(layers.rows)
    return drawn


def page(layers: Run | None, training: Training | None, facts: dict, drawn: dict[str, bytes]) -> str:
    """The HTML."""
    import jinja2

    here = os.path.dirname(os.path.abspath(__file__))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    rows = [{key: row.get(key) for key in records.COLUMNS} for row in layers.rows] if layers else []
    skipped = dict(layers.skipped) if layers else {}
    if plots.missing():
        skipped["the pictures"] = plots.missing()
    return environment.get_template(PAGE).render(
        facts=facts,
        headlines=_headlines(layers, training),
        training=training,
        stock=training["stock"] if training else None,
        factor=f"{FACTOR:g}",
        rows=rows,
        modes=plots.by_mode(rows),
        titles=plots.TITLES,
        rivals=[name for name in RIVALS if any(row[f"{name}_ms"] for row in rows)],
        labels=LABELS,
        roofs=layers.roofs if layers else None,
        pictures={
            name: _inline(drawn[name]) if name in drawn else None
            for name in ("training", "roofline", "times")
        },
        skipped=skipped,
        method=METHOD,
        mean=statistics.fmean,
        kernels=_kernels,
        ms=lambda v: "–" if v is None else f"{v:.2f}",
        mb=lambda v: "–" if v is None else f"{v:.0f}",
    )


def write(folder: str, layers: Run | None, training: Training | None, facts: dict) -> str:
    """Writes results.json, the PNGs, layers.csv and report.html to `folder`; returns the path of the page."""
    save(folder, layers, training, facts)
    drawn = pictures(layers, training)
    for name, png in drawn.items():
        with open(os.path.join(folder, f"{name}.png"), "wb") as file:
            file.write(png)
    path = os.path.join(folder, PAGE)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page(layers, training, facts, drawn))
    return os.path.abspath(path)
