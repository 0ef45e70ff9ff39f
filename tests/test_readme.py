"""README.md: its code runs, its tables say what the code does, and the files it names exist."""

import contextlib
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision_models import require_torchvision

import gconv
from gconv import backend, gpu, info

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def table(heading):
    """The cells of the first table under a heading, without the table's own heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize("index", range(len(CODE)))
def test_python_code_runs(index, ops, capsys):
    if "torchvision" in CODE[index]:
        require_torchvision()
    names = {}
    with gconv.set_policy("error"):
        exec(compile(CODE[index], f"README.md, Python block {index + 1}", "exec"), names)
    printed = capsys.readouterr().out
    if "gconv.freeze(" in CODE[index]:
        assert names["logits"].shape == (1, 1000)
    elif "calls" in names:
        assert names["logits"].shape == (2, 10) and "cpu." in printed
        assert len(CODE[index].strip().splitlines()) <= 18, "the example is to stay short"
    elif "block" in names:
        assert names["y"].shape == (2, 256, 28, 28) and names["model"].memory == "ultra"
    elif "UNet" in names:
        assert names["UNet"]()(torch.randn(1, 3, 8, 8)).shape == (1, 32, 8, 8)
    else:
        assert "layer1.0.conv2+bn2+relu → fused" in printed


def test_there_is_code():
    assert len(CODE) == 5


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("row", table("What runs where"), ids=lambda row: row[0])
def test_support_table(row, ops, monkeypatch):
    monkeypatch.setattr(backend, "POINTWISE_BFLOAT16_TO_TORCH", False)  # the text below the table says where
    name, *cells = row
    stem = re.match(r"`(\w+)`", name)
    op = stem[1] if stem else "grouped_conv"
    sizes = [5] if "other kernel size" in name else {int(n) for n in re.findall(r"(\d)×\d", name)} or [3]
    device = "meta" if "elsewhere" in name else "cuda" if "GPU" in name else "cpu"
    if device == "cuda" and gpu.missing_triton():
        pytest.skip(gpu.missing_triton())
    if any(" or " in cell for cell in cells):
        monkeypatch.setattr(gpu, "_missing_cuda", None)  # else Triton
        cells = [cell.partition(" or ")[0] for cell in cells]
    for size, (dtype, cell) in itertools.product(sizes, zip(DTYPES, cells, strict=True)):
        groups, padding = (1, 0) if size == 1 else (4, 1)
        with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
            x = torch.empty(1, 8, 8, 8, dtype=dtype, device=device)
            weight = torch.empty(8, 8 // groups, size, size, dtype=dtype, device=device)
        geometry = {"stride": 1, "padding": padding, "groups": groups}
        decision = backend.choose(op, x, *([] if op == "batch_norm" else [weight]), **geometry)
        assert decision.backend == cell, f"{name}, {dtype}: the table says {cell}, choose says {decision}"


def test_geometry_in_words():
    text = " ".join(README.split())
    assert "stride 1 or 2, any dilation, padding up to twice the dilation" in text
    assert backend.geometry_reason(2, 14, 7) is None and backend.geometry_reason(1, 2, 1) is None
    assert backend.geometry_reason(3, 0, 1) and backend.geometry_reason(1, 3, 1)
    assert "1×1 kernels take stride 1 or 2, one group and no padding" in text
    assert backend.geometry_reason(2, 0, 1, 1, 1) is None
    assert backend.geometry_reason(1, 1, 1, 1, 1) and backend.geometry_reason(1, 0, 1, 1, 2)


def test_environment_variables_are_all_there():
    assert {row[0].strip("`") for row in table("Environment variables")} == set(info.VARIABLES)


def test_names_of_gconv_exist():
    extensions = {"_C", "_cuda"}  # not built everywhere
    for path in set(re.findall(r"`gconv\.([\w.]+)", README)) - extensions:
        value = gconv
        for part in path.split("."):
            if path in ("info", "bench"):
                break
            value = getattr(value, part)


def test_make_verbs_exist():
    verbs = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= verbs


def test_paths_exist():
    named = set(re.findall(r"(?:csrc|gconv|models|bench|tests)/[\w/]+\.(?:py|h|cpp)", README)) | {"LICENSE"}
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    for file in re.findall(r"`(\w+\.(?:py|cpp))`", README.split("## How to add an op")[1].split("\n## ")[0]):
        assert list(ROOT.glob(f"*/{file}")), file


def test_markers_of_the_benchmark_tables():
    from gconv.bench import readme

    without = readme.update(README, [], [], [])
    assert all(without.count(marker) == 1 for pair in readme.MARKERS.values() for marker in pair)
    assert without.count("No run has been recorded yet") == len(readme.MARKERS)
