"""Have parameters changed? Told by a checksum of each, without a copy of its values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from .optim.param_groups import mesh_of

# Tensors of one size are read as integers, whose sums are exact: a sum of floats hides what rounding takes away.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALL = 1 << 16  # values of a tensor that is read together with others of its shape
_BATCH = 1 << 20  # values that are read together


@dataclass(frozen=True)
class Checksums:
    """Checksums of parameters at one moment. They stay on the parameters' devices, so that nothing waits for these.

    Tensors of a kind whose values cannot be read as they are, such as quantised ones, have none.

    Attributes:
        batches: Names, and the checksums of these in one tensor.
    """

    batches: Sequence[tuple[Sequence[str], torch.Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, parameters: Mapping[str, nn.Parameter]) -> Checksums:
        """Read the parameters once."""
        small: dict[Any, dict[str, torch.Tensor]] = defaultdict(dict)
        batches: list[tuple[Sequence[str], torch.Tensor]] = []
        for name, parameter in parameters.items():
            if (tensor := _local(parameter)) is None:
                continue
            if tensor.numel() <= _SMALL:
                small[tensor.shape, tensor.dtype, tensor.device][name] = tensor
            else:
                batches.append(((name,), _checksums(tensor.unsqueeze(0))))
        for alike in small.values():
            names, tensors = list(alike), list(alike.values())
            size = max(1, _BATCH // max(1, tensors[0].numel()))
            for first in range(0, len(names), size):
                part = slice(first, first + size)
                batches.append((names[part], _checksums(torch.stack(tensors[part]))))
        return cls(batches)

    @property
    def names(self) -> set[str]:
        """The names of the parameters that have a checksum."""
        return {name for names, _ in self.batches for name in names}

    def only(self, chosen: Collection[str]) -> Checksums:
        """Keep the checksums of some parameters."""
        kept = []
        for names, values in self.batches:
            if places := [place for place, name in enumerate(names) if name in chosen]:
                kept.append(([names[place] for place in places], values[places]))
        return Checksums(kept)

    def changed(self, later: Checksums) -> set[str]:
        """Name the parameters that differ at a later moment; waits for the devices."""
        before, after = self._numbers(), later._numbers()
        return {name for name, number in before.items() if name in after and after[name] != number}

    def _numbers(self) -> dict[str, int]:
        """Fetch the checksums."""
        by_device: dict[torch.device, list[tuple[Sequence[str], torch.Tensor]]] = defaultdict(list)
        for names, values in self.batches:
            by_device[values.device].append((names, values))
        numbers: dict[str, int] = {}
        for batches in by_device.values():
            names = [name for named, _ in batches for name in named]
            numbers.update(zip(names, torch.cat([values for _, values in batches]).tolist(), strict=True))
        return numbers


class Resting:
    """Tells frozen parameters that rest from those that move without the optimizer, as mean teachers do.

    Attributes:
        moving: The names of those that are known to move.
    """

    def __init__(self) -> None:
        self.moving: set[str] = set()
        self._begun: Checksums | None = None

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note the values of parameters that may rest from now on."""
        self._begun = Checksums.of(parameters)

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


def _checksums(tensors: torch.Tensor) -> torch.Tensor:
    """Add up the bits of each tensor of a batch, its rows weighted by their place: those that change places count."""
    numbers = torch.view_as_real(tensors) if tensors.is_complex() else tensors
    if numbers.dim() < 3:  # a tensor of one dimension is a column
        bits = numbers.reshape(len(numbers), -1).contiguous().view(_INTEGERS[numbers.element_size()])
        rows = bits.to(torch.int64)
    else:
        lines = numbers.reshape(len(numbers), numbers.shape[1], -1).contiguous()
        rows = lines.view(_widest(lines)).sum(dim=2, dtype=torch.int64)
    return (rows * torch.arange(1, rows.shape[1] + 1, device=rows.device)).sum(dim=1)


def _widest(lines: torch.Tensor) -> torch.dtype:
    """Choose the integers that a line's values are read as, many at a time: of eight bytes, where they fill a line."""
    size = lines.element_size()
    return torch.int64 if lines.shape[2] * size % 8 == 0 else _INTEGERS[size]
