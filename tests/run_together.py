"""Many calls of a test as one of pytest's. Free of torch: the tests of the bare kernels use it too."""

import functools
import inspect
import itertools


def together(**axes):
    """Runs a test for every combination of these arguments as one of pytest's, which cost more each than the
    ops on a few pixels. The report shows the arguments of the call that failed."""

    def decorate(test):
        @functools.wraps(test)
        def run(*args, **kwargs):
            for values in itertools.product(*axes.values()):
                test(*args, **kwargs, **dict(zip(axes, values)))

        signature = inspect.signature(test)
        rest = [p for name, p in signature.parameters.items() if name not in axes]
        run.__signature__ = signature.replace(parameters=rest)
        return run

    return decorate
