"""One self-contained HTML page (pictures inside it, nothing loaded from elsewhere) with everything a run
found."""

from __future__ import annotations

import base64
import json
import os
import statistics
from dataclasses import asdict, dataclass

from . import depth, kernels, layers, machine, models, plots, records, shapes, sweep
from .agreement import FACTOR
from .networks import CONTESTANTS, OURS
from .rivals import LABELS, RIVALS, VARIANTS
from .roofs import Roofs
from .train import Training

__all__ = ["Findings", "load", "save", "write"]

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
    "Whole networks: every contestant has a process of its own and they take turns step by step. A "
    "training step is forward, cross-entropy, backward and SGD with momentum; the gradients of the step "
    "before are dropped outside the clock. Memory is resident memory, at the peak of a step and above what "
    "was resident before it; kept is what of torch's allocations is alive at the end of the forward, without "
    "parameters, buffers and images. The logits, and in training every parameter's gradient and running "
    "statistic, are compared with float64: gconv may have 2 × torch's own error plus a small floor.",
    "A round in which the kernel took the cores away (involuntary context switches, steal time), or in "
    "which a call jumped 4 ms and 25 % above its own median, is dropped for all contestants alike. A "
    "star marks rows in which more than half of the rounds were so disturbed that all of them were kept.",
    "On a GPU times are between events on the stream, so the GPU's own: before every call its L2 cache is "
    "overwritten, for longer than the host takes to launch the call. Memory is torch's allocator's. cuDNN "
    "tries its algorithms (cudnn.benchmark) for everyone.",
    "The interval of a speed-up comes from resampling whole rounds. The roof is the larger of arithmetic "
    "at the rate of a matrix product and compulsory traffic at the rate of a copy, both measured in this "
    "run, their fastest repeat.",
)


@dataclass
class Findings:
    """What there is to report, and the machine's facts."""

    facts: dict
    layers: layers.Run | None = None
    training: Training | None = None
    networks: layers.Run | None = None
    sweep: sweep.Run | None = None
    depths: depth.Run | None = None
    kernels: layers.Run | None = None

    @property
    def bad(self) -> bool:
        """Whether a result is wrong or two loss curves part."""
        runs = (self.layers, self.networks, self.sweep, self.depths, self.kernels)
        return any(run and run.wrong for run in runs) or bool(self.training and not self.training.ok)


def save(folder: str, found: Findings) -> None:
    """Keeps everything the page is made from in `folder`/results.json."""

    def plain(run: layers.Run | None) -> dict | None:
        return run and {"rows": run.rows, "roofs": asdict(run.roofs), "skipped": run.skipped}

    data = {
        "facts": found.facts,
        "layers": plain(found.layers),
        "training": found.training and found.training.to_dict(),
        "networks": plain(found.networks),
        "sweep": found.sweep and {"rows": found.sweep.rows},
        "depths": found.depths and {"rows": found.depths.rows, "skipped": found.depths.skipped},
        "kernels": plain(found.kernels),
    }
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, RESULTS), "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)


def load(folder: str) -> Findings:
    """What `save` kept. FileNotFoundError if it kept nothing there."""
    with open(os.path.join(folder, RESULTS), encoding="utf-8") as file:
        data = json.load(file)
    facts = data["facts"]

    def run(kept: dict | None) -> layers.Run | None:
        return kept and layers.Run(kept["rows"], Roofs(**kept["roofs"]), facts, kept["skipped"])

    return Findings(
        facts,
        run(data["layers"]),
        data["training"] and Training.from_dict(data["training"]),
        run(data["networks"]),
        data["sweep"] and sweep.Run(data["sweep"]["rows"], facts),
        data["depths"] and depth.Run(data["depths"]["rows"], facts, data["depths"]["skipped"]),
        run(data["kernels"]),
    )


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _headlines(found: Findings) -> list[dict]:
    lines = []
    training = found.training
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
    if found.networks:
        for mode in plots.by_mode(found.networks.rows):
            lines += _network_headlines(found.networks.rows, mode)
    if found.depths and found.depths.rows:
        lines.append(_depth_headline(found.depths))
    if found.layers:
        for mode, rows in plots.by_mode(found.layers.rows).items():
            lines.append(_layers_headline(mode, rows))
    if found.sweep and found.sweep.rows:
        lines.append(_sweep_headline(found.sweep))
    return lines


def _network_headlines(rows: list[dict], mode: str) -> list[dict]:
    ours, best = models.ours_and_best(rows, mode)
    return [_network_headline(row, best, mode) for row in ours]


def _network_headline(ours: dict, best: dict, mode: str) -> dict:
    text = f"{ours['model']}, {ours['dtype']}, {plots.STEPS[mode]}: "
    if ours["contestant"] != "gconv":
        text = f"{CONTESTANTS[ours['contestant']].label}, {text}"
    if not ours["match"]:
        return {"ok": False, "text": text + f"WRONG RESULT: {ours['note']}."}
    text += (
        f"{ours['ms_per_image']:.1f} ms per image, {best['ms_per_image']:.1f} with the fastest other "
        f"({CONTESTANTS[best['contestant']].label}): {ours['ratio']:.2f}×"
        + (", slower" if ours["ratio"] < 1 else "")
    )
    if ours.get("memory_ratio") is not None:
        text += f", with {ours['memory_ratio']:.2f}× its peak memory of a step"
    if ours.get("kept_mb") and best.get("kept_mb"):
        text += f"; {ours['kept_mb']:.0f} MB kept for the backward, {best['kept_mb']:.0f} with that one"
    return {"ok": True, "text": text + ". The results match float64."}


def _depth_headline(run: depth.Run) -> dict:
    deepest = max(row["depth"] for row in run.rows)
    kept = [
        f"{row['kept_mb'] / row['batch']:.3g} with {CONTESTANTS[row['contestant']].label}"
        for row in run.rows
        if row["depth"] == deepest and row.get("kept_mb") is not None
    ]
    first = run.rows[0]
    text = (
        f"Memory against depth, k = {first['growth']}, L = {deepest}: MB per image kept: {', '.join(kept)}. "
    )
    wrong = [f"{CONTESTANTS[row['contestant']].label} at L = {row['depth']}" for row in run.wrong]
    text += f"WRONG RESULT of {', '.join(wrong)}." if wrong else "All results match float64."
    return {"ok": not wrong, "text": text}


def _layers_headline(mode: str, rows: list[dict]) -> dict:
    summed = [row for row in rows if records.is_total(row)]
    rows = [row for row in rows if not records.is_total(row)]
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
    for row in summed:
        text += f"All {row['count']} layers together: {row['ratio']:.2f}× the best of each. "
    text += f"WRONG RESULT on {', '.join(wrong)}." if wrong else f"All {len(rows)} results match float64."
    return {"ok": not wrong, "text": text}


def _sweep_headline(run: sweep.Run) -> dict:
    first = run.rows[0]
    relative = [row["relative"] for row in run.rows if row.get("relative")]
    cliffs = [f"{r['layer']} {r['mode']} N = {r['batch']} on {r['threads']}" for r in run.cliffs]
    text = (
        f"Batches and threads: {min(relative):.2f} to {max(relative):.2f} of the images per second at "
        f"N = {first['reference']}; " if relative else ""
    )  # fmt: skip
    text += f"below {sweep.CLIFF:g} at {', '.join(cliffs)}." if cliffs else f"nowhere below {sweep.CLIFF:g}."
    if run.wrong:
        text += f" WRONG RESULT on {', '.join(r['layer'] for r in run.wrong)}."
    return {"ok": not run.wrong, "text": text}


def _kernels(contestant) -> str:
    return ", ".join(f"{name} ×{calls}" for name, calls in sorted(contestant.kernels.items())) or "torch.nn"


def pictures(found: Findings) -> dict[str, bytes]:
    """PNGs by name; empty where matplotlib is missing."""
    if plots.missing():
        return {}
    drawn = {}
    if found.training:
        drawn["training"] = plots.training(found.training)
    if found.layers:
        rows = [row for row in found.layers.rows if not records.is_total(row)]
        if rows:
            drawn["roofline"] = plots.roofline(rows)
            drawn["times"] = plots.times(rows)
    if found.networks and any(row.get("ms") for row in found.networks.rows):
        drawn["networks"] = plots.networks(found.networks.rows)
    if found.depths and any(row.get("kept_mb") for row in found.depths.rows):
        drawn["depths"] = plots.depths(found.depths.rows)
    return drawn


def page(found: Findings, drawn: dict[str, bytes]) -> str:
    """The HTML."""
    import jinja2

    here = os.path.dirname(os.path.abspath(__file__))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )

    def rows_of(run, columns: tuple[str, ...]) -> list[dict]:
        return [{key: row.get(key) for key in columns} for row in run.rows] if run else []

    rows = rows_of(found.layers, records.COLUMNS)
    of_networks = rows_of(found.networks, records.MODEL_COLUMNS)
    skipped = {}
    for run in (found.layers, found.networks, found.depths, found.kernels):
        skipped |= run.skipped if run else {}
    if plots.missing():
        skipped["the pictures"] = plots.missing()

    usual = 3 if machine.is_gpu(found.facts) else 2

    def number(value: float | None, digits: int = usual, after: str = "") -> str:
        return "–" if value is None else f"{value:.{digits}f}{after}"

    training = found.training
    return environment.get_template(PAGE).render(
        facts=found.facts,
        headlines=_headlines(found),
        training=training,
        stock=training["stock"] if training else None,
        factor=f"{FACTOR:g}",
        networks=plots.by_mode(of_networks),
        sweep=plots.by_mode(rows_of(found.sweep, records.SWEEP_COLUMNS)),
        cliff=sweep.CLIFF,
        depths=rows_of(found.depths, records.DEPTH_COLUMNS),
        kernels=rows_of(found.kernels, records.KERNEL_COLUMNS),
        kernel_names=kernels.NAMES,
        machine=machine.describe(found.facts),
        rows=rows,
        whose=shapes.whose(row["model"] for row in rows) if rows else None,
        several=len({row["model"] for row in rows}) > 1,
        modes=plots.by_mode(rows),
        titles=plots.TITLES,
        steps=plots.STEPS,
        ran={
            mode: [name for name in (*VARIANTS, *RIVALS) if any(row.get(f"{name}_ms") for row in group)]
            for mode, group in plots.by_mode(rows).items()
        },
        ours=OURS,
        labels=LABELS | {name: contestant.label for name, contestant in CONTESTANTS.items()},
        roofs=found.layers.roofs if found.layers else None,
        pictures={name: _inline(png) for name, png in drawn.items()},
        skipped=skipped,
        method=METHOD,
        mean=statistics.fmean,
        ran_kernels=_kernels,
        is_total=records.is_total,
        describe=layers.describe,
        gemm_percent=layers.gemm_percent,
        number=number,
    )


def write(folder: str, found: Findings) -> str:
    """Writes results.json, the PNGs and report.html to `folder`; returns the path of the page."""
    save(folder, found)
    drawn = pictures(found)
    for name, png in drawn.items():
        with open(os.path.join(folder, f"{name}.png"), "wb") as file:
            file.write(png)
    path = os.path.join(folder, PAGE)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page(found, drawn))
    return os.path.abspath(path)
