"""The 1,797 handwritten digits that scikit-learn ships (no download): 8x8 pixels, here enlarged to 32x32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["TRAIN", "load"]

SIZE = 32
TRAIN = 0.75


def load(seed: int = 0) -> dict[str, Tensor]:
    """x_train [1348, 1, 32, 32], y_train, x_test [449, 1, 32, 32], y_test; float32, standardised by the
    training part.

    The split is drawn from `seed`. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
    Digits, UCI Machine Learning Repository, 1998. Raises ModuleNotFoundError, naming the cure, where
    scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "bench: the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    y = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order.split([round(TRAIN * len(x)), len(x) - round(TRAIN * len(x))])
    mean, std = x[train].mean(), x[train].std()
    x = (x - mean) / std
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}
