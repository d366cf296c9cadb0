"""Are results equal but for rounding?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .padding import PaddedBatch
from .rounding import close
from .stand_ins import real
from .state import State
from .trees import flatten

# What results may differ by, as a share of their greatest value, and what gradients may.
_RESULTS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_GRADIENTS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_TF32 = 5e-3
_DEPTH = 6  # of objects within objects


@dataclass(frozen=True)
class Comparison:
    """Compares what two runs of a step have led to.

    Args:
        kept_as: The type in which outputs were kept, if another than their own.
        padding: What counts of each row, if not all does.
    """

    kept_as: torch.dtype | None = None
    padding: PaddedBatch | None = None

    def close(self, actual: Tensor, expected: Tensor) -> bool:
        """Whether two tensors are equal but for rounding."""
        if self.padding is not None:
            actual, expected = self.padding.without_padding(actual), self.padding.without_padding(expected)
        return close(actual, expected, self._share(_RESULTS, expected))

    def results(self, plain: object, replayed: object, where: str) -> str | None:
        """Tell how two results differ in structure or in values."""
        one, form = flatten(plain)
        other, other_form = flatten(replayed)
        if form != other_form:
            return f"{where} has another structure"
        same = all(self._alike(real(expected), real(actual)) for expected, actual in zip(one, other, strict=True))
        return None if same else f"{where} has other values"

    def gradients(self, plain: Sequence[Tensor | None] | None, replayed: Sequence[Tensor | None] | None) -> str | None:
        """Tell if gradients differ, relative to their own greatest value or a hundredth of the greatest of all."""
        different = "a gradient has other values"
        if plain is None or replayed is None:
            return None if plain is replayed else different
        greatest = max((float(each.abs().max()) for each in plain if each is not None and each.numel()), default=0.0)
        for one, other in zip(plain, replayed, strict=True):
            if one is None or other is None:
                if one is not other:
                    return different
            elif not close(other, one, self._share(_GRADIENTS, one), least=greatest / 100):
                return different
        return None

    def states(self, plain: State, replayed: State) -> str | None:
        """Tell what two runs have left in different states."""
        for (name, one), (_, other) in zip(plain.values(), replayed.values(), strict=False):
            if not self._alike(one, other):
                return f"`{name}` has other values after the step"
        if plain.generators.differs(replayed.generators):
            return "another number of random numbers is drawn"
        return None

    def _share(self, shares: Mapping[torch.dtype, float], tensor: Tensor) -> float:
        share = shares.get(tensor.dtype, 1e-4)
        if self.kept_as is not None:
            share = max(share, shares.get(self.kept_as, 0.0))
        rounds = torch.get_float32_matmul_precision() != "highest" or torch.backends.cudnn.allow_tf32
        return max(share, _TF32) if tensor.is_cuda and rounds else share

    def _alike(self, one: Any, other: Any, depth: int = _DEPTH) -> bool:
        """Whether two values are equal; objects by their attributes, some levels deep."""
        if one is other:
            return True
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return self.close(real(other), real(one))
        if type(one) is not type(other):
            return False
        if isinstance(one, (list, tuple)):
            return len(one) == len(other) and all(map(self._alike, one, other))
        if isinstance(one, Mapping):
            return one.keys() == other.keys() and all(self._alike(one[key], other[key], depth - 1) for key in one)
        if isinstance(one, float):
            return self.close(torch.tensor(other), torch.tensor(one))
        if hasattr(one, "__dict__") and depth > 0:
            return self._alike(vars(one), vars(other), depth - 1)
        return depth <= 0 or bool(one == other)
