"""The schemas of the ops where the C++ extension, which defines them otherwise, is not built: the Triton
kernels need no compiler."""

import re
from importlib import resources

import torch

_OP = re.compile(r'GCONV_OP\(((?:\s*"[^"]*")+)\s*\)')
_LITERAL = re.compile(r'"([^"]*)"')
_libraries: list[torch.library.Library] = []  # definitions live as long as these


def schemas() -> list[str]:
    """Of every op that takes tensors, as schemas.inc has them."""
    text = resources.files(__package__).joinpath("schemas.inc").read_text(encoding="utf-8")
    return ["".join(_LITERAL.findall(literals)) for literals in _OP.findall(text)]


def define() -> None:
    """Defines torch.ops.gconv.*, without any kernel."""
    library = torch.library.Library("gconv", "DEF")
    for schema in schemas():
        library.define(schema)
    _libraries.append(library)
