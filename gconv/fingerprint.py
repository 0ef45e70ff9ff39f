"""What a function does, comparably: how convert knows other projects' blocks, whatever they are called."""

import dis
import functools
from collections.abc import Callable
from types import CodeType


def _instructions(code: CodeType) -> tuple:
    def argument(i):
        if "_FAST" in i.opname:
            return i.arg
        if isinstance(i.argval, CodeType):
            return _instructions(i.argval)
        # Python 3.10 loads the qualified name of an inner function, which tells where it is written.
        return "" if isinstance(i.argval, str) and ".<locals>." in i.argval else i.argval

    instructions = tuple((i.opname, argument(i)) for i in dis.get_instructions(code))
    return instructions, code.co_argcount, code.co_kwonlyargcount, code.co_flags


def fingerprint(function: Callable) -> tuple | None:
    """What a function does: its instructions and those of its inner functions. Line numbers, comments,
    annotations, the docstring and the names of local variables are no part of it. None for what is no
    Python function or reads variables of one around it."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_freevars:
        return None
    return *_instructions(code), function.__defaults__


_known = functools.cache(fingerprint)


def same_code(function: Callable, known: Callable) -> bool:
    """Whether `function` does what `known`, a function of ours, does."""
    found = fingerprint(function)
    return found is not None and found == _known(known)
