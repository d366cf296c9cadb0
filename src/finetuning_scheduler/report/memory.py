"""Bytes of weights, gradients and optimizer state, told from shapes: nothing of a model's size is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..core.optim.build import emptied, empty_optimizer
from ..core.optim.param_groups import Options, PlannedGroup
from ..core.schedule.model import OptimizerSpec

# What Lightning's `precision` makes of weights; those not named here leave them as they are.
_WEIGHTS = {
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64": torch.float64,
    "64-true": torch.float64,
}
PRECISIONS = ("32-true", "32", "16-mixed", "bf16-mixed", *_WEIGHTS)
_MOST_VALUES = 2**26  # of a tensor that is allocated because its optimizer looks at values

Tensor = tuple[torch.Size, torch.dtype]


class Bytes:
    """Tells how much memory tensors take.

    Args:
        precision: As Lightning's ``Trainer`` takes it.
    """

    def __init__(self, precision: str) -> None:
        self._dtype = _WEIGHTS.get(precision)
        self._known: dict[Any, int | None] = {}

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """Return the type that a tensor has in training."""
        return self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype

    def of(self, tensors: Iterable[torch.Tensor]) -> int:
        """Count the bytes of tensors, or of as many gradients."""
        return sum(tensor.numel() * self.dtype_of(tensor).itemsize for tensor in tensors)

    def of_state(
        self, make: OptimizerMaker, groups: Iterable[PlannedGroup], tensors: Mapping[str, torch.Tensor]
    ) -> int | None:
        """Count the bytes that an optimizer keeps after its first step; ``None`` if that cannot be told.

        Args:
            make: The optimizer.
            groups: Its groups.
            tensors: The model's tensors by name; others, which are not the model's, are not counted.
        """
        total = 0
        for group in groups:
            options = make.known(group.options)
            for tensor in (tensors[name] for name in group.names if name in tensors):
                key = (make, tensor.shape, self.dtype_of(tensor), repr(options))
                if key not in self._known:
                    self._known[key] = _state_bytes(make, (tensor.shape, self.dtype_of(tensor)), options)
                one = self._known[key]
                if one is None:
                    return None
                total += one
        return total


class OptimizerMaker:
    """Makes optimizers like one that is there, or that a phase installs, over other parameters."""

    def __init__(self, like: Optimizer | OptimizerSpec) -> None:
        optimizer = empty_optimizer(like) if isinstance(like, OptimizerSpec) else emptied(like)
        self._optimizer = optimizer if not optimizer.param_groups else None  # a wrapper is not copied

    def known(self, options: Options) -> dict[str, Any]:
        """Leave of a group's options those that the optimizer has."""
        return {} if self._optimizer is None else {k: v for k, v in options.items() if k in self._optimizer.defaults}

    def over(self, parameter: nn.Parameter, options: Options) -> Optimizer | None:
        """Make one of a single group."""
        if self._optimizer is None:
            return None
        made = emptied(self._optimizer)
        # Implementations of a step that update many tensors at once keep the same state and want a real device.
        plain: dict[str, Any] = {key: False for key in ("foreach", "fused", "capturable") if key in made.defaults}
        rate = {"lr": 1e-3} if "lr" in made.defaults and made.defaults["lr"] is not None else {}
        made.param_groups = [{**made.defaults, **options, **plain, **rate, "params": [parameter]}]
        return made


def _state_bytes(make: OptimizerMaker, tensor: Tensor, options: Options) -> int | None:
    """Let an optimizer make a step of one tensor; without values, or with, if it looks at them."""
    shape, dtype = tensor
    for device in ("meta", "cpu") if shape.numel() <= _MOST_VALUES else ("meta",):
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        optimizer = make.over(parameter, options)
        if optimizer is None:
            return None
        parameter.grad = torch.zeros_like(parameter)
        try:
            _step(optimizer)
        except Exception:  # noqa: BLE001  # of a class of anybody's, on a device without values
            continue
        return _count(optimizer.state[parameter])
    return None


def _step(optimizer: Optimizer) -> None:
    closure: Callable[[], Any] = lambda: torch.zeros(())  # noqa: E731
    optimizer.step(closure)


def _count(state: object) -> int:
    """Count the bytes of all tensors inside."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.itemsize
    if isinstance(state, Mapping):
        return sum(map(_count, state.values()))
    return sum(map(_count, state)) if isinstance(state, (list, tuple)) else 0
