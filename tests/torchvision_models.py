"""torchvision's models where torchvision is installed, and a list of their names and shapes where it is not.

`python tests/torchvision_models.py` writes tests/data/torchvision_models.json from the torchvision at hand.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

# Of the DenseNets one for each growth rate: the others differ in how many layers a block has.
NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "densenet121",
    "densenet161",
)
DATA = Path(__file__).parent / "data" / "torchvision_models.json"
# Models whose initial weights with seed 0 are listed too: one of each kind of block.
SEEDED = ("resnet18", "resnext50_32x4d", "densenet121")

CURE = "pip install --no-deps torchvision==0.28.0 pillow"

_library = None  # its schemas live as long as it does


def import_torchvision():
    """The module torchvision; ImportError where it, or pillow, is not installed.

    Its wheel for GPUs imports beside a torch for the CPU alone once the two ops that it looks for at import
    have a schema; its models need no more.
    """
    global _library
    try:
        import torchvision
    except RuntimeError as error:
        if _library is not None or "torchvision::nms" not in str(error):
            raise
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            _library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision
    return torchvision


def require_torchvision():
    """The module torchvision; skips the test where it does not import."""
    try:
        return import_torchvision()
    except ImportError as error:
        pytest.skip(f"{error}: {CURE}")


def names_and_shapes(model):
    """{name: shape} of the model's state dict, in its order."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def first_values(model, count=4):
    """{name: its first values} of every tensor of more than one value that initialisation draws at random."""
    return {
        name: [round(value, 7) for value in tensor.flatten()[:count].tolist()]
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and tensor.flatten()[:count].unique().numel() > 1
    }


def main():
    try:
        torchvision = import_torchvision()
    except ImportError as error:
        raise SystemExit(f"{error}: {CURE}") from None
    shapes, seeded = {}, {}
    for name in NAMES:
        with torch.device("meta"):
            shapes[name] = names_and_shapes(getattr(torchvision.models, name)())
    for name in SEEDED:
        torch.manual_seed(0)
        seeded[name] = first_values(getattr(torchvision.models, name)())
    version = torchvision.__version__.partition("+")[0]
    sections = [f'"torchvision": "{version}"']
    for title, content in (("names_and_shapes", shapes), ("first_values_with_seed_0", seeded)):
        lines = [
            f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}"
            for name, value in content.items()
        ]
        sections.append(f'"{title}": {{\n' + ",\n".join(lines) + "\n}")
    DATA.write_text("{\n" + ",\n".join(sections) + "\n}\n")
    print(f"{DATA}: {len(shapes)} models of torchvision {version}")


if __name__ == "__main__":
    main()
