"""Many calls of a test as one of pytest's, without those that repeat others. Free of torch: the tests of the
bare kernels use it too."""

import functools
import inspect
import itertools


def repeats(isa, dtype):
    """Whether the instruction set does with this dtype what avx512 does: avx512_bf16 and amx_bf16 are avx512
    for all but bfloat16."""
    return isa in ("avx512_bf16", "amx_bf16") and dtype is not None and not str(dtype).endswith("bfloat16")


def without_repeats(isa, chosen):
    """The (dtype, variant) of `chosen` that no other instruction set's test has."""
    return [(dtype, variant) for dtype, variant in chosen if not repeats(isa, dtype)]


def together(**axes):
    """Runs a test for every combination of these arguments as one of pytest's, which cost more each than the
    ops on a few pixels. The report shows the arguments of the call that failed."""

    def decorate(test):
        @functools.wraps(test)
        def run(*args, **kwargs):
            for values in itertools.product(*axes.values()):
                chosen = dict(zip(axes, values))
                if not repeats(kwargs.get("isa"), chosen.get("dtype")):
                    test(*args, **kwargs, **chosen)

        signature = inspect.signature(test)
        rest = [p for name, p in signature.parameters.items() if name not in axes]
        run.__signature__ = signature.replace(parameters=rest)
        return run

    return decorate
