"""Are tensors equal but for rounding?"""

from __future__ import annotations

import torch
from torch import Tensor


def close(actual: Tensor, expected: Tensor, share: float, *, least: float = 0.0) -> bool:
    """Whether two tensors are equal but for rounding.

    Args:
        actual: One tensor.
        expected: The other.
        share: What they may differ by, as a share of the greatest value.
        least: Taken for the greatest value if that is less.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype or actual.layout != expected.layout:
        return False
    actual, expected = actual.detach().to_dense(), expected.detach().to_dense()
    if not (actual.is_floating_point() or actual.is_complex()):
        return torch.equal(actual, expected)
    if not actual.numel():
        return True
    exact = torch.complex128 if actual.is_complex() else torch.float64
    one, other = actual.to(exact), expected.to(exact)
    finite = torch.isfinite(other)
    if not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()):
        return False
    scale = max(float(other[finite].abs().max()) if bool(finite.any()) else 0.0, least)
    return bool(((one - other)[finite].abs() <= share * scale + 1e-30).all())
