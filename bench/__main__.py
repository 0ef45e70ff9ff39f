"""`python -m gconv.bench`: trains beside stock PyTorch, times layers and whole networks against its best, and
reports it all."""

from __future__ import annotations

import argparse
import os
import sys
import time

from .devices import DEVICES
from .kernels import PARTS

DEMO_SECONDS = 220.0  # of the six minutes of `make demo`; the rest is for setup and build
COMPILE_SECONDS = 6.0  # of torch.compile and the check, for each of the 14 rows

_DTYPE = "float32 if not given, and bfloat16 on a GPU"

EPILOG = """\
examples
  python -m gconv.bench demo                              train, time the layers, write one page (minutes)
  python -m gconv.bench layers --quick                    all layers, few repeats
  python -m gconv.bench layers --layers s1,s2d --mode training --no-compile
  python -m gconv.bench layers --dtype bfloat16 --record  append the rows to bench/records/<machine>.csv
  python -m gconv.bench layers --model widths             1 to 112 channels per group, of several networks
  python -m gconv.bench models --record                   ResNeXt-50 whole: inference and training steps
  python -m gconv.bench models --dtype bfloat16 --mode training --without torch.compile
  python -m gconv.bench models --model densenet121        time, and peak and kept memory, of its forms
  python -m gconv.bench depth                             memory of DenseNets against their depth
  python -m gconv.bench sweep --batch 1,32                images per second against those of N = 8
  python -m gconv.bench kernels                           forward and each gradient alone, against a copy
  python -m gconv.bench layers --device cuda              on a GPU: bfloat16, N = 256, cold L2
  python -m gconv.bench train --seed 1                    only the training comparison
  python -m gconv.bench report --out gconv-report         draw the page again from its results.json
  python -m gconv.bench readme --check                    fail if README.md is not up to date
  python -m gconv.bench compare before.csv after.csv      fail on a regression

exit status: 0 all is well; 1 a wrong result, loss curves that differ, a regression, an outdated table;
2 wrong usage or something missing.
"""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"want a whole number of 1 or more, got {text!r}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(","))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"want a number of seconds above 0, got {text!r}")
    return seconds


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"want some of {', '.join(PARTS)}, got {text!r}")
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gconv.bench",
        description="Benchmarks of gconv against the best that torch offers here. Correct first, then timed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    demo = command("demo", "train on real images and time the layers, then one HTML page of both")
    layers = command("layers", "time conv + BN + ReLU on named layers of a real model")
    kernels = command("kernels", "time forward and gradients one by one against the bandwidth of a copy")
    models = command("models", "time whole networks: inference and training steps, time and memory")
    sweep = command("sweep", "time layers at several batches and numbers of threads against each other")
    depth = command("depth", "measure the memory of training DenseNets against their depth; nothing is timed")
    train = command(
        "train", "train a small ResNeXt on digits with stock torch.nn and gconv and compare the loss curves"
    )
    for parser_ in (demo, layers, kernels, models, sweep, depth, train):
        parser_.add_argument(
            "--out", default="gconv-report", help="folder for the page, the pictures and results.json"
        )
    for parser_ in (layers, kernels, models, sweep):
        parser_.add_argument("--device", choices=DEVICES, default="cpu", help="what to measure")
    for parser_ in (layers, kernels, models):
        parser_.add_argument(
            "--budget",
            type=_seconds,
            default=None,
            help="seconds for the whole run: what compiles is left out first; no limit if not given",
        )
    for parser_ in (demo, layers, kernels, models, depth, train):
        parser_.add_argument("--threads", type=int, default=0, help="threads of torch; 0: its own choice")
    for parser_ in (demo, layers, kernels, sweep):
        parser_.add_argument(
            "--model",
            default="resnext50_32x4d",
            help='whose layers; a wrong name lists them; "widths": of several networks',
        )
        parser_.add_argument("--layers", default=None, help="some of them, as in s1,s2d; all if not given")
        parser_.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help=_DTYPE)
        parser_.add_argument(
            "--flush",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="overwrite the caches before every call: cold caches; if not given, on a GPU alone",
        )
        parser_.add_argument(
            "--fresh-memory",
            action="store_true",
            help="give freed memory back before every call: page faults",
        )
    for parser_ in (demo, layers, kernels, models):
        parser_.add_argument(
            "--batch", type=_count, default=None, help="images per call; if not given 8, and 256 on a GPU"
        )
    for parser_ in (demo, layers):
        parser_.add_argument(
            "--no-compile", action="store_true", help="leave out torch.compile (it compiles for seconds)"
        )
    for parser_ in (demo, layers, models, sweep):
        parser_.add_argument("--mode", choices=("inference", "training", "both"), default="both")
    kernels.add_argument(
        "--parts", type=_parts, default=PARTS, help=f"some of {','.join(PARTS)}; all if not given"
    )
    for parser_ in (demo, layers, kernels, models, sweep):
        parser_.add_argument(
            "--repeats", type=_count, default=None, help="exactly so many rounds instead of a time budget"
        )
        parser_.add_argument("--quick", action="store_true", help="a fifth of the time, for a first look")
    for parser_ in (demo, layers, kernels, models, sweep, depth):
        parser_.add_argument(
            "--record", action="store_true", help="append the rows to the record in bench/records"
        )
    models.add_argument("--model", default="resnext50_32x4d", help="one of gconv.models")
    models.add_argument("--size", type=_count, default=None, help="of the images; 224, or 32 for digits")
    for parser_, seconds, each in (
        (layers, 5.0, "layer and mode"),
        (kernels, 2.0, "kernel"),
        (models, 60.0, "mode"),
    ):
        parser_.add_argument("--seconds", type=_seconds, default=seconds, help=f"of timing, for each {each}")
    for parser_ in (models, depth):
        parser_.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help=_DTYPE)
        parser_.add_argument(
            "--without", default=None, help="contestants to leave out, as in torch.compile,onnxruntime"
        )
    depth.add_argument("--depths", type=_counts, default=(40, 64, 100, 136, 190), help="L = 6 n + 4 of each")
    depth.add_argument("--growth", type=_count, default=12, help="k, the channels that a layer adds")
    depth.add_argument("--batch", type=_count, default=4, help="images per step")
    depth.add_argument("--size", type=_count, default=32, help="of the images")
    depth.add_argument(
        "--compile-seconds", type=float, default=60.0, help="in which torch.compile gets as far as it gets"
    )
    sweep.add_argument("--batch", type=_counts, default=(1, 8, 32), help="as in 1,8,32")
    sweep.add_argument(
        "--threads", type=_counts, default=None, help="as in 1,2; one and all of torch's if not given"
    )
    sweep.add_argument(
        "--reference",
        type=_count,
        default=None,
        help="the batch that others are compared with; if not given 8, and 256 on a GPU",
    )
    for parser_ in (demo, train):
        parser_.add_argument("--epochs", type=int, default=8)
        parser_.add_argument("--seed", type=int, default=0)

    report = command("report", "draw the page of a finished run again")
    report.add_argument("--out", default="gconv-report", help="the folder with its results.json")

    readme = command("readme", "write the newest records into the benchmark tables of README.md")
    readme.add_argument(
        "--readme", default=None, help="the file with the markers; the checkout's if not given"
    )
    readme.add_argument(
        "--record",
        default=None,
        help="a record of layers; the newest of bench/records, and the newest of a GPU, if not given",
    )
    readme.add_argument("--models-record", default=None, help="the same of whole networks")
    readme.add_argument("--depth-record", default=None, help="the same of memory against depth")
    readme.add_argument("--kernels-record", default=None, help="the same of kernels one by one")
    readme.add_argument(
        "--check", action="store_true", help="change nothing, fail if the table is out of date"
    )

    compare = command("compare", "compare two records of layers or of networks and fail on a regression")
    compare.add_argument("before")
    compare.add_argument("after")
    compare.add_argument(
        "--metric", choices=("ratio", "ms"), default="ratio", help="speed-up over the best, or own time"
    )
    compare.add_argument(
        "--tolerance", type=float, default=0.05, help="a change by less than this share is none"
    )
    return parser


def _plan(options: argparse.Namespace, seconds: float, **changes):
    from . import timing

    plan = timing.Plan(seconds=seconds, **changes)
    if options.quick:
        plan = timing.Plan(min_rounds=3, seconds=seconds / 5)
    if options.repeats is not None:
        plan = timing.Plan(min_rounds=options.repeats, max_rounds=options.repeats)
    flush = getattr(options, "flush", False)
    plan.flush = _device(options).cold if flush is None else flush
    plan.fresh = getattr(options, "fresh_memory", False)
    return plan


def _device(options: argparse.Namespace):
    """The device of the options, found once; what they leave open is then the device's."""
    from . import devices

    if not hasattr(options, "found"):
        options.found = devices.get(getattr(options, "device", "cpu"))
        for key, value in (("batch", "batch"), ("dtype", "dtype"), ("reference", "batch")):
            if getattr(options, key, 0) is None:
                setattr(options, key, getattr(options.found, value))
    return options.found


def _modes(options: argparse.Namespace) -> tuple[str, ...]:
    from .layers import MODES

    return MODES if options.mode == "both" else (options.mode,)


def _train(options: argparse.Namespace):
    from . import train
    from .screen import say

    result = train.run(train.Options(seed=options.seed, epochs=options.epochs, threads=options.threads))
    say()
    for c in result.contestants:
        memory = "" if c.training_mb is None else f", {c.training_mb:.0f} MB of it training"
        say(
            f"{c.label} ({c.layout}): test accuracy {100 * c.accuracy[-1]:.2f} %, {c.epoch_seconds:.2f} s "
            f"per epoch, peak memory {c.peak_mb:.0f} MB{memory}"
        )
    for check in result.checks:
        say(f"{'✓' if check.ok else '✗ FAILED:'} {check.text}", "good" if check.ok else "bad")
    return result


def _say_what_ran(result) -> None:
    """What is to be known beside the rows of a finished run."""
    from .screen import say

    if hasattr(result, "roofs"):
        roofs = result.roofs
        say(
            f"roofs of this run: copy {roofs.copy_gbps:.1f} GB/s, matrix product {roofs.gemm_gflops:.0f} "
            f"GFLOP/s ({roofs.dtype})"
        )
        for label, reason in result.skipped.items():
            say(f"left out: {label}: {reason}", "dim")
    if any(row.get("noisy") for row in result.rows):
        say(
            "* more than half of the rounds were disturbed by something else on this machine; all were kept",
            "dim",
        )


def _rivals(options: argparse.Namespace) -> tuple[str, ...]:
    """Who competes on the device, less what compiles where that is not wanted."""
    from . import rivals

    on_gpu = ("eager_nchw", "eager_channels_last", "compile")
    return tuple(
        name
        for name in rivals.RIVALS
        if not (options.no_compile and name == "compile")
        and (_device(options).name == "cpu" or name in on_gpu)
    )


def _kernels(options: argparse.Namespace):
    from . import budget, kernels, shapes
    from .screen import say

    device = _device(options)
    result = kernels.run(
        kernels.Options(
            shapes=shapes.select(options.model, options.layers),
            batch=options.batch,
            dtype=options.dtype,
            parts=options.parts,
            plan=_plan(options, options.seconds),
            device=device,
            budget=budget.Budget(options.budget),
        )
    )
    _say_what_ran(result)
    for row in result.wrong:
        name = kernels.NAMES[row["contestant"]]
        say(f"FAILED: wrong result of {name} on {row['layer']} {row['op']}: {row['note']}", "bad")
    return result


def _layers(options: argparse.Namespace, seconds: float):
    from . import budget, layers, shapes
    from .screen import say

    device = _device(options)
    result = layers.run(
        layers.Options(
            shapes=shapes.select(options.model, options.layers),
            batch=options.batch,
            dtype=options.dtype,
            modes=_modes(options),
            rivals=_rivals(options),
            plan=_plan(options, seconds),
            device=device,
            budget=budget.Budget(getattr(options, "budget", None)),
        )
    )
    _say_what_ran(result)
    for note in dict.fromkeys(
        f"{row['layer']} {row['mode']}: {row['note']}" for row in result.rows if row["note"]
    ):
        say(note, "bad")
    for row in result.wrong:
        say(f"FAILED: wrong result on {row['layer']} {row['mode']}: {row['note']}", "bad")
    return result


def _models(options: argparse.Namespace):
    from . import budget, models
    from .networks import CONTESTANTS
    from .screen import say

    device = _device(options)

    result = models.run(
        models.Options(
            model=options.model,
            size=options.size or models.default_size(options.model),
            batch=options.batch,
            dtype=options.dtype,
            modes=_modes(options),
            contestants=models.pick(options.model, options.without, device=device.name),
            plan=_plan(options, options.seconds, min_rounds=5),
            device=device,
            budget=budget.Budget(options.budget),
        )
    )
    _say_what_ran(result)
    for row in result.rows:
        if row.get("convolutions"):
            say(
                f"{row['mode']}: {row['own_convolutions']} of {row['convolutions']} convolutions ran on "
                f"gconv's kernels ({row['kernel']}); "
                + (f"fell back: {row['fallbacks']}" if row["fallbacks"] else "nothing fell back")
            )
        if row["note"]:
            mood = "dim" if row["match"] else "bad"
            say(f"{CONTESTANTS[row['contestant']].label}, {row['mode']}: {row['note']}", mood)
    for row in result.wrong:
        say(f"FAILED: wrong result in {row['mode']}: {row['note']}", "bad")
    return result


def _sweep(options: argparse.Namespace):
    import torch

    from . import shapes, sweep
    from .screen import say

    device = _device(options)
    everyone = {torch.get_num_threads()} if device.name == "cuda" else {1, torch.get_num_threads()}
    threads = options.threads or tuple(sorted(everyone))
    result = sweep.run(
        sweep.Options(
            shapes=shapes.select(options.model, options.layers),
            batches=options.batch,
            threads=threads,
            reference=options.reference,
            dtype=options.dtype,
            modes=_modes(options),
            plan=_plan(options, 5.0),
            device=device,
        )
    )
    _say_what_ran(result)
    timed = [row for row in result.rows if row.get("relative")]
    say(
        f"{len(timed) - len(result.cliffs)} of {len(timed)} rates are at least {sweep.CLIFF:g} of those at "
        f"N = {options.reference}"
    )
    for row in result.wrong:
        say(f"FAILED: wrong result on {row['layer']} {row['mode']} at N = {row['batch']}", "bad")
    return result


def _depth(options: argparse.Namespace):
    from . import depth, models
    from .screen import say

    _device(options)

    result = depth.run(
        depth.Options(
            depths=options.depths,
            growth=options.growth,
            size=options.size,
            batch=options.batch,
            dtype=options.dtype,
            contestants=models.pick(depth.MODEL, options.without, depth.CHOICE),
            compile_seconds=options.compile_seconds,
        )
    )
    for label, reason in result.skipped.items():
        say(f"left out: {label}: {reason}", "dim")
    for note in dict.fromkeys(row["note"] for row in result.rows if row["match"] and row["note"]):
        say(note, "dim")
    for row in result.wrong:
        say(f"FAILED: wrong result at L = {row['depth']}: {row['note']}", "bad")
    return result


def _finish(options: argparse.Namespace, **found) -> int:
    from . import machine, records, report
    from .screen import say

    facts = next((run.facts for run in found.values() if hasattr(run, "facts")), None) or machine.facts()
    findings = report.Findings(facts, **found)
    parts = (
        ("layers", findings.layers, records.COLUMNS),
        ("models", findings.networks, records.MODEL_COLUMNS),
        ("sweep", findings.sweep, records.SWEEP_COLUMNS),
        ("depth", findings.depths, records.DEPTH_COLUMNS),
        ("kernels", findings.kernels, records.KERNEL_COLUMNS),
    )
    for name, run, columns in parts:
        if not run:
            continue
        path = os.path.join(options.out, f"{name}.csv")
        if os.path.exists(path):
            os.remove(path)
        records.append(path, run.rows, columns)
        if options.record:
            path = records.path_of(facts["machine"], columns)
            records.append(path, run.rows, columns)
            say(f"recorded: {path}")
    page = report.write(options.out, findings)
    say()
    say(f"report: {page}", "good")
    if findings.bad:
        say("FAILED: see above", "bad")
    return int(findings.bad)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command != "sweep" and getattr(options, "threads", 0):
        import torch

        torch.set_num_threads(options.threads)
    from .workers import WorkerDied

    began = time.perf_counter()
    try:
        if options.command == "demo":
            training = _train(options)
            # A slow machine gets fewer repeats per layer, not a longer demo.
            left = DEMO_SECONDS - (time.perf_counter() - began)
            layers = _layers(options, seconds=min(2.0, max(0.4, left / 14 - COMPILE_SECONDS)))
            status = _finish(options, layers=layers, training=training)
            print(f"done in {time.perf_counter() - began:.0f} s")
            return status
        if options.command == "layers":
            return _finish(options, layers=_layers(options, options.seconds))
        if options.command == "kernels":
            return _finish(options, kernels=_kernels(options))
        if options.command == "models":
            return _finish(options, networks=_models(options))
        if options.command == "sweep":
            return _finish(options, sweep=_sweep(options))
        if options.command == "depth":
            return _finish(options, depths=_depth(options))
        if options.command == "train":
            return _finish(options, training=_train(options))
        if options.command == "report":
            from . import report

            print(report.write(options.out, report.load(options.out)))
            return 0
        if options.command == "readme":
            return _readme(options)
        return _compare(options)
    except (ValueError, FileNotFoundError, ModuleNotFoundError, WorkerDied) as error:
        print(f"gconv.bench {options.command}: {error}", file=sys.stderr)
        return 2


def _readme(options: argparse.Namespace) -> int:
    from . import machine, readme, records

    path = options.readme or os.path.join(machine.checkout() or ".", "README.md")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    wanted = readme.update(
        text,
        readme.rows_of(options.record, records.COLUMNS),
        readme.rows_of(options.models_record, records.MODEL_COLUMNS),
        readme.rows_of(options.depth_record, records.DEPTH_COLUMNS),
        readme.rows_of(options.kernels_record, records.KERNEL_COLUMNS),
    )
    if options.check:
        if wanted != text:
            print(
                f"{path}: the benchmark tables are not those of the newest records: run `python -m "
                "gconv.bench readme`"
            )
        return int(wanted != text)
    with open(path, "w", encoding="utf-8") as file:
        file.write(wanted)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from .compare import compare, show

    findings = compare(options.before, options.after, options.metric, options.tolerance)
    print(show(findings, options.metric))
    return int(any(finding.regression for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
