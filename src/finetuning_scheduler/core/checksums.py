"""Have parameters changed? Told by a checksum of each, without a copy of its values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from .optim.param_groups import mesh_of

# Tensors of one size are read as integers, whose sums are exact: a sum of floats hides what rounding takes away.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Checksums:
    """Checksums of parameters at one moment. They stay on the parameters' devices, so that nothing waits for these.

    Tensors of a kind whose values cannot be read as they are, such as quantised ones, have none.
    """

    values: Mapping[str, torch.Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, parameters: Mapping[str, nn.Parameter]) -> Checksums:
        """Read the parameters once."""
        local = {name: _local(parameter) for name, parameter in parameters.items()}
        return cls({name: _checksum(tensor) for name, tensor in local.items() if tensor is not None})

    def changed(self, later: Checksums) -> set[str]:
        """Name the parameters that differ at a later moment; waits for each device once."""
        by_device: dict[torch.device, list[str]] = defaultdict(list)
        for name, value in self.values.items():
            if name in later.values:
                by_device[value.device].append(name)
        changed: set[str] = set()
        for device, names in by_device.items():
            before = torch.stack([self.values[name] for name in names])
            after = torch.stack([later.values[name].to(device) for name in names])
            changed.update(name for name, differs in zip(names, (before != after).tolist(), strict=True) if differs)
        return changed


class Resting:
    """Tells frozen parameters that rest from those that move without the optimizer, as mean teachers do.

    Attributes:
        moving: The names of those that are known to move.
    """

    def __init__(self) -> None:
        self.moving: set[str] = set()
        self._begun: Checksums | None = None

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note the values of what is frozen from now on, of all that a model has."""
        self._begun = Checksums.of(self.of(parameters))

    def of(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Choose those that are frozen and not known to move."""
        return {name: each for name, each in parameters.items() if not each.requires_grad and name not in self.moving}

    def moved(self, parameters: Mapping[str, nn.Parameter]) -> set[str]:
        """Find those that are frozen, have other values than at the beginning, and were not known to move."""
        found = set() if self._begun is None else self._begun.changed(Checksums.of(self.of(parameters)))
        self.moving |= found
        return found


def _local(parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the part of a parameter that lies on this rank, or ``None`` if it cannot be read."""
    if isinstance(parameter, UninitializedParameter):
        return None
    tensor: Any = parameter.detach()
    if mesh_of(parameter) is not None:
        tensor = tensor.to_local()
    readable = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    return tensor if readable and (tensor.is_complex() or tensor.element_size() in _INTEGERS) else None


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Add up the bits of a tensor's values, its rows weighted by their place: rows that change places count too."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = numbers.view(_INTEGERS[numbers.element_size()])
    rows = bits.flatten(1).sum(dim=1, dtype=torch.int64) if bits.dim() > 1 else bits.to(torch.int64)
    return (rows.flatten() * torch.arange(1, rows.numel() + 1, device=rows.device)).sum()
