"""Are tensors equal but for rounding?"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def close(actual: Tensor, expected: Tensor, *, least: float = 0.0, tolerance: float | None = None) -> bool:
    """Whether two tensors are equal but for rounding, relative to their greatest value."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not (actual.is_floating_point() or actual.is_complex()):
        return torch.equal(actual, expected)
    if not actual.numel():
        return True
    exact = torch.complex128 if actual.is_complex() else torch.float64
    one, other = actual.detach().to(exact), expected.detach().to(exact)
    finite = torch.isfinite(other)
    if not torch.equal(finite, torch.isfinite(one)) or not torch.equal(
        one[~finite].nan_to_num(), other[~finite].nan_to_num()
    ):
        return False
    scale = max(float(other[finite].abs().max()) if bool(finite.any()) else 0.0, least)
    allowed = (TOLERANCE.get(actual.dtype, 1e-4) if tolerance is None else tolerance) * scale
    return bool(((one - other)[finite].abs() <= allowed + 1e-30).all())
