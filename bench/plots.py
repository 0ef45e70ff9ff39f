"""The pictures of the report, as PNG bytes. Colours are Okabe and Ito's, told apart by people with colour
blindness."""

from __future__ import annotations

import io

import numpy as np

from .machine import is_gpu
from .networks import CONTESTANTS, is_ours
from .rivals import LABELS, RIVALS, VARIANTS
from .shapes import whose
from .train import Training

__all__ = ["STEPS", "TITLES", "by_mode", "depths", "missing", "networks", "roofline", "times", "training"]

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#767676"
)  # fmt: skip
COLOURS = {
    "gconv": BLUE, "gconv_triton": SKY, "gconv_cuda": BLACK,
    "eager_nchw": GREY, "eager_channels_last": ORANGE, "compile": RED, "onnxruntime": GREEN,
    "openvino": PURPLE, "gconv_shared": BLUE, "gconv_ultra": SKY, "checkpoint": BLACK,
}  # fmt: skip
MARKERS = {
    "gconv": "D", "gconv_triton": "<", "gconv_cuda": ">",
    "eager_nchw": "v", "eager_channels_last": "s", "compile": "o", "onnxruntime": "^",
    "openvino": "P", "gconv_shared": "D", "gconv_ultra": "X", "checkpoint": "^",
}  # fmt: skip
DPI = 160


def missing() -> str | None:
    """Why no picture can be drawn, in one line, or None."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return "pictures need matplotlib, which is not installed: pip install matplotlib"
    return None


def _figure(width: float, height: float, columns: int = 1, rows: int = 1, **kwargs):
    # Figure without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _titled(figure, what: str, row: dict, end: str = "") -> bytes:
    """The finished picture under the title of the run that a row is from."""
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    threads = row["device"] if is_gpu(row) else threads
    figure.suptitle(f"{what}, batch {row['batch']}, {row['dtype']}, {threads}{end}", fontsize=12)
    return _png(figure)


def _plain_ticks(axis) -> None:
    """1, 2, 5, 10, 20, … in plain digits on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def training(result: Training) -> bytes:
    """Loss of every step of all three, and below how far apart they are against what is allowed."""
    stock, twin, ours = (np.asarray(result[name].losses) for name in ("stock", "twin", "gconv"))
    steps = np.arange(1, len(stock) + 1)
    per_epoch = len(steps) / result.options.epochs
    figure, axes = _figure(9, 6.6, rows=2, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    top, bottom = axes[0, 0], axes[1, 0]

    top.plot(steps, stock, color=ORANGE, linewidth=4.5, solid_capstyle="round", label="stock torch.nn, NCHW")
    top.plot(steps, twin, color=BLACK, linewidth=1, linestyle=":", label="stock torch.nn, channels_last")
    top.plot(steps, ours, color=BLUE, linewidth=1.3, label="gconv, channels_last")
    top.set_ylabel("training loss (cross entropy)")
    top.set_ylim(bottom=0)
    finding = "the loss curves lie on each other" if result.checks[0].ok else "THE LOSS CURVES PART"
    top.set_title(f"A small ResNeXt on handwritten digits: {finding}", loc="left", fontsize=12)
    top.legend(frameon=False, fontsize=10, loc="upper right")

    allowed = np.asarray(result.allowed)
    tiny = allowed.min() / 100
    bottom.fill_between(steps, tiny, allowed, color=GREY, alpha=0.18, linewidth=0, label="allowed")
    bottom.plot(
        steps, np.maximum(np.abs(twin - stock), tiny), color=BLACK, linewidth=1, linestyle=":",
        label="stock: channels_last from NCHW",
    )  # fmt: skip
    bottom.plot(
        steps, np.maximum(np.abs(ours - stock), tiny), color=BLUE, linewidth=1, label="gconv from stock NCHW"
    )
    bottom.set_yscale("log")
    bottom.set_ylim(bottom=tiny)
    bottom.set_ylabel("difference of the loss")
    bottom.set_xlabel(f"training step ({per_epoch:.0f} per epoch, batch {result.options.batch})")
    bottom.set_xlim(0, len(steps))
    bottom.legend(frameon=False, fontsize=9, loc="lower right", ncols=3)
    for ax in (top, bottom):
        for epoch in range(1, result.options.epochs):
            ax.axvline(epoch * per_epoch, color=BLACK, alpha=0.08, linewidth=0.8)
    return _png(figure)


def _of_several(rows: list[dict]) -> bool:
    return len({row["model"] for row in rows}) > 1


def by_mode(rows: list[dict]) -> dict[str, list[dict]]:
    modes: dict[str, list[dict]] = {}
    for row in rows:
        modes.setdefault(row["mode"], []).append(row)
    return modes


TITLES = {"inference": "inference", "training": "training (forward + backward)"}
STEPS = {"inference": "inference", "training": "a training step"}


def roofline(rows: list[dict]) -> bytes:
    """GFLOP/s over arithmetic intensity under the roofs of the same run; one arrow per layer, best rival to
    gconv."""
    modes = by_mode(rows)
    figure, axes = _figure(6.2 * len(modes), 5.6, columns=len(modes), sharey=True)
    speeds = [
        r["flops"] / r[key] / 1e6 for r in rows for key in ("gconv_ms", f"{r['best']}_ms") if r.get(key)
    ]
    low, high = min(speeds) / 1.6, max(*speeds, *(r["gemm_gflops"] for r in rows)) * 1.6
    for ax, (mode, group) in zip(axes[0], modes.items()):
        copy, gemm = group[0]["copy_gbps"], group[0]["gemm_gflops"]
        intensity = np.array([r["flops"] / r["bytes"] for r in group])
        x = np.geomspace(intensity.min() / 2.2, intensity.max() * 2.2, 200)
        ax.plot(x, np.minimum(gemm, copy * x), color=BLACK, linewidth=1.8)
        ax.text(
            0.02, 0.98, f"roofs: matrix product {gemm:.0f} GFLOP/s, copy {copy:.1f} GB/s", ha="left",
            va="top", fontsize=9, transform=ax.transAxes,
        )  # fmt: skip
        for r, i in zip(group, intensity):
            best = r["flops"] / r[f"{r['best']}_ms"] / 1e6
            ax.plot(
                i,
                best,
                marker="o",
                markersize=7,
                markerfacecolor="white",
                markeredgecolor=RED,
                linestyle="none",
            )
            if r.get("gconv_ms"):
                ours = r["flops"] / r["gconv_ms"] / 1e6
                crowded = bool(((intensity > i) & (intensity < 1.35 * i)).any())  # on its right
                ax.annotate(
                    "",
                    (i, ours),
                    (i, best),
                    arrowprops={"arrowstyle": "->", "color": GREY, "shrinkA": 4, "shrinkB": 4},
                )
                ax.plot(i, ours, marker="D", markersize=7, color=BLUE, linestyle="none")
                ax.annotate(
                    f"{r['in_channels'] // r['groups']}, {r['size']}²" if _of_several(rows) else r["layer"],
                    (i, ours),
                    xytext=(-8, 2) if crowded else (8, 2),
                    ha="right" if crowded else "left",
                    textcoords="offset points",
                    fontsize=9,
                    color=BLUE,
                )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_ylim(low, high)
        ax.set_xlim(x[0], x[-1])
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        _plain_ticks(ax.yaxis)
        ax.grid(True, which="major", alpha=0.2)
        ax.set_xlabel("arithmetic intensity (FLOP per compulsory byte)")
        ax.set_title(TITLES[mode], fontsize=11, loc="left")
    axes[0, 0].set_ylabel("GFLOP/s")
    ours = axes[0, 0].plot([], [], marker="D", markersize=7, color=BLUE, linestyle="none", label="gconv")
    best = axes[0, 0].plot(
        [], [], marker="o", markersize=7, markerfacecolor="white", markeredgecolor=RED, linestyle="none",
        label="best of the others",
    )  # fmt: skip
    axes[0, 0].legend(handles=[*ours, *best], frameon=False, fontsize=9, loc="lower right")
    return _titled(
        figure, f"Roofline of conv 3×3 + BN + ReLU: {whose(row['model'] for row in rows)}", rows[0]
    )


def times(rows: list[dict]) -> bytes:
    """Median time of every contestant by layer with a p20 to p80 whisker, the roof, and the speed-up
    above."""
    modes = by_mode(rows)
    names = [n for n in (*RIVALS, *VARIANTS, "gconv") if any(r.get(f"{n}_ms") for r in rows)]
    several = _of_several(rows)
    # Names of networks need more room than those of one network's layers.
    width = max(10.0, 1.1 * max(map(len, modes.values()))) if several else 10.0
    figure, axes = _figure(width, 3.5 * len(modes), rows=len(modes))
    step = 0.6 / max(1, len(names) - 1)
    for ax, (mode, group) in zip(axes[:, 0], modes.items()):
        at = np.arange(len(group))
        for k, name in enumerate(names):
            low, middle, high = (
                np.array([r.get(f"{name}_ms{end}") or np.nan for r in group], dtype=float)
                for end in ("_p20", "", "_p80")
            )
            ours = name == "gconv"
            ax.errorbar(
                at + (k - (len(names) - 1) / 2) * step, middle, np.maximum([middle - low, high - middle], 0),
                fmt=MARKERS[name], markersize=9 if ours else 7, color=COLOURS[name], label=LABELS[name],
                elinewidth=1.4, zorder=3 if ours else 2,
            )  # fmt: skip
        for i, r in enumerate(group):
            ax.plot([i - 0.4, i + 0.4], [r["roof_ms"]] * 2, color=BLACK, linewidth=1.2, linestyle=(0, (4, 2)))
            if i:
                ax.axvline(i - 0.5, color=BLACK, alpha=0.08, linewidth=0.8)
            wins = (r.get("ratio") or 0) >= 1
            ax.text(
                i, 0.985, f"{r['ratio']:.2f}×" if r.get("ratio") else "wrong", ha="center", va="top",
                fontsize=10, fontweight="bold", color=BLUE if wins else RED,
                transform=ax.get_xaxis_transform(),
            )  # fmt: skip
        ax.plot([], [], color=BLACK, linewidth=1.2, linestyle=(0, (4, 2)), label="roof of this machine")
        ax.set_yscale("log")
        _plain_ticks(ax.yaxis)
        ax.set_xlim(-0.5, len(group) - 0.5)
        ax.set_xticks(
            at,
            [
                (f"{r['model']}\n" if several else "")
                + f"{r['layer']}\n{r['in_channels'] // r['groups']} per group, {r['size']}²"
                for r in group
            ],
            fontsize=8 if several else 9,
        )
        ax.set_ylabel("ms (log scale)")
        ax.set_title(f"{TITLES[mode]}: ms, and gconv's speed-up over the best other", fontsize=11, loc="left")
        ax.grid(True, axis="y", which="major", alpha=0.25)
        ax.set_axisbelow(True)
        bottom, top = ax.get_ylim()
        ax.set_ylim(bottom, top * (top / bottom) ** 0.12)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    return _png(figure)


def networks(rows: list[dict]) -> bytes:
    """Bars of every contestant's time per image, with a p20 to p80 whisker, and of its memory: dark what a
    step takes at its peak, light what was resident before, and in words what it keeps for the
    backward."""
    order = list(CONTESTANTS)
    rows = sorted(rows, key=lambda row: order.index(row["contestant"]))
    modes = by_mode([row for row in rows if row.get("ms")])
    heights = [0.9 + 0.36 * len(group) for group in modes.values()]
    figure, axes = _figure(
        11, sum(heights) + 0.6, columns=2, rows=len(modes), gridspec_kw={"height_ratios": heights}
    )
    for (left, right), (mode, group) in zip(axes, modes.items()):
        at = np.arange(len(group))
        batch = group[0]["batch"]
        colours = [COLOURS.get(row["contestant"], SKY) for row in group]
        ms = np.array([row["ms_per_image"] for row in group])
        low, high = (np.array([row[f"ms_{end}"] / batch for row in group]) for end in ("p20", "p80"))
        whiskers = np.maximum([ms - low, high - ms], 0)
        left.barh(at, ms, 0.66, color=colours, xerr=whiskers, error_kw={"elinewidth": 1.2})
        for i, row in enumerate(group):
            ours = is_ours(row)
            text = f"{row['ms_per_image']:.3g} ms" + (f"  {row['ratio']:.2f}×" if ours else "")
            left.text(max(ms[i], high[i]) + 0.012 * ms.max(), i, text, va="center", fontsize=9,
                      fontweight="bold" if ours else "normal")  # fmt: skip
        left.set_xlim(0, max(ms.max(), high.max()) * 1.32)
        left.set_title(f"{STEPS[mode]}: ms per image", fontsize=11, loc="left")
        peak, step = (np.array([row.get(key) or 0.0 for row in group]) for key in ("peak_mb", "step_mb"))
        right.barh(at, peak, 0.66, color=colours, alpha=0.3)
        right.barh(at, step, 0.66, left=peak - step, color=colours)
        for i, row in enumerate(group):
            if not row.get("peak_mb"):
                continue
            ratio = row.get("memory_ratio")
            ours = is_ours(row)
            text = f"{step[i]:.0f} of {peak[i]:.0f}" + (f"  {ratio:.2f}×" if ours and ratio else "")
            if row.get("kept_mb") is not None:
                text += f"  {row['kept_mb']:.0f} kept"
            right.text(peak[i] + 0.012 * peak.max(), i, text, va="center", fontsize=9,
                       fontweight="bold" if ours else "normal")  # fmt: skip
        right.set_xlim(0, max(peak.max(), 1) * 1.62)
        right.set_title(f"{STEPS[mode]}: memory at the peak, MiB; dark: the step's", fontsize=11, loc="left")
        for ax, names in ((left, True), (right, False)):
            ax.set_yticks(at, [CONTESTANTS[row["contestant"]].label for row in group] if names else [])
            ax.invert_yaxis()
            ax.tick_params(axis="y", length=0)
            ax.grid(True, axis="x", alpha=0.25)
            ax.set_axisbelow(True)
    first = rows[0]
    what = f"{first['model']}, {first['size']}×{first['size']}"
    return _titled(figure, what, first, "; ×: relative to the fastest other")


def depths(rows: list[dict]) -> bytes:
    """Curves of every contestant over the depth: what a step's forward keeps for its backward, and the most
    that the step allocates, per image."""
    figure, axes = _figure(12, 5.2, columns=2)
    curves: dict[str, list[dict]] = {}
    for row in rows:
        if row.get("kept_mb") is not None:
            curves.setdefault(row["contestant"], []).append(row)
    panels = (("kept_mb", "kept for the backward"), ("allocated_mb", "allocated at the peak of a step"))
    for ax, (key, title) in zip(axes[0], panels):
        for name, curve in curves.items():
            ours = is_ours(curve[0])
            per_image = [row[key] / row["batch"] for row in curve]
            ax.plot(
                [row["depth"] for row in curve], per_image, color=COLOURS.get(name, GREEN),
                marker=MARKERS.get(name, "o"), markersize=7, linewidth=2.2 if ours else 1.4,
                zorder=3 if ours else 2, label=CONTESTANTS[name].label,
            )  # fmt: skip
            ax.annotate(
                f"{per_image[-1]:.3g}", (curve[-1]["depth"], per_image[-1]), xytext=(8, 0), va="center",
                textcoords="offset points", fontsize=9, color=COLOURS.get(name, GREEN),
            )  # fmt: skip
        ticks = sorted({row["depth"] for row in rows})
        ax.set_xticks(ticks)
        ax.set_xlim(0, ticks[-1] * 1.09)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("layers L")
        ax.set_ylabel("MiB per image")
        ax.set_title(title, fontsize=11, loc="left")
        ax.grid(True, alpha=0.25)
        ax.set_axisbelow(True)
    axes[0, 0].legend(frameon=False, fontsize=9, loc="upper left")
    first = rows[0]
    what = f"DenseNet-BC, k = {first['growth']}, {first['size']}×{first['size']}: memory of training"
    return _titled(figure, what, first)
