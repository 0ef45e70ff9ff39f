"""What the tests of the Triton kernels share: the dtypes they run at."""

import checks
import pytest
import torch

# The interpreter computes bfloat16 wrongly, so that is for a GPU alone.
DTYPES = (torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.needs_cuda))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=checks.dtype_name)
