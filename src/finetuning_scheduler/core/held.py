"""What a checkpoint holds, in memory, as it was written: what is frozen stays where it is, in the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn

from .foreign import stand_ins
from .memory import free_memory
from .view import plain_name

WEIGHTS = "state_dict"
_SPARED = 4  # of the free memory, one part in so many is what copies may take
_TENSOR = "finetuning_scheduler.tensor"  # what stands for a tensor is a mapping of this key to its place or name


class NoRoomError(MemoryError):
    """What should be held takes more memory than may be taken."""


@dataclass(frozen=True)
class Held:
    """What a checkpoint holds, in the memory of the machine.

    Everything but the tensors is kept as it would be in a file, and read as a file is: no code runs, and whoever is
    given it may keep and change it.

    Attributes:
        phase: The phase in which it was written.
        weights: Tensors among the weights, by key; or the name of the frozen parameter whose values they are.
        tensors: The other ones.
        frozen: The names of the frozen parameters whose values are the model's own, here or in the rest.
        rest: What ``torch.save`` has made of the content, with numbers or names in the place of tensors.
    """

    phase: int
    weights: Mapping[str, Tensor | str]
    tensors: Sequence[Tensor]
    frozen: frozenset[str]
    rest: bytes

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], phase: int, resting: Mapping[str, nn.Parameter]) -> Held:
        """Copy a checkpoint that has just been written.

        Args:
            checkpoint: What has been written. Its tensors may be the model's.
            phase: In which phase.
            resting: The frozen parameters that do not move, by name. Of their values there are no copies.

        Raises:
            NoRoomError: The copies would take more than a part of the memory that is free.
        """
        names: Mapping[Any, str] = {
            place: name for name, parameter in resting.items() if (place := _place(parameter)) is not None
        }
        found: list[Tensor] = []
        frozen: set[str] = set()
        weights: dict[str, Tensor | str] = {}

        def noted(tensor: Tensor) -> Any:
            if (place := _place(tensor)) in names:
                frozen.add(names[place])
                return {_TENSOR: names[place]}
            found.append(tensor)
            return {_TENSOR: len(found) - 1}

        content = {key: mapped(value, noted) for key, value in checkpoint.items() if key != WEIGHTS}
        others = copy(checkpoint[WEIGHTS])  # it keeps its class and, as an attribute, its metadata
        for key, value in checkpoint[WEIGHTS].items():
            if isinstance(value, Tensor):
                weights[key] = names.get(_place(value)) or value
                del others[key]
        content[WEIGHTS] = others
        mine = [value for value in weights.values() if isinstance(value, Tensor)]
        _refuse_large([*found, *mine])
        frozen.update(value for value in weights.values() if isinstance(value, str))
        copied = _Copies()
        buffer = BytesIO()
        torch.save(content, buffer)
        return cls(
            phase,
            {key: value if isinstance(value, str) else copied.of(value) for key, value in weights.items()},
            [copied.of(tensor) for tensor in found],
            frozenset(frozen),
            buffer.getvalue(),
        )

    @cached_property
    def changed(self) -> Mapping[str, Tensor]:
        """The weights that are not the model's own."""
        return {key: value for key, value in self.weights.items() if not isinstance(value, str)}

    def keys_of(self, name: str) -> Sequence[str]:
        """Tell by which keys a parameter takes values among the weights that these do not have."""
        return self._keys.get(name, () if name in self._saved else (name,))

    @cached_property
    def _keys(self) -> Mapping[str, list[str]]:
        keys: dict[str, list[str]] = {}
        for key, value in self.weights.items():
            if isinstance(value, str):
                keys.setdefault(value, []).append(key)
        return keys

    @cached_property
    def _saved(self) -> frozenset[str]:
        return frozenset(map(plain_name, self.weights))

    def read(self, values_of: Callable[[str], Tensor]) -> tuple[dict[str, Any], Sequence[str]]:
        """Return the content, without the weights in :attr:`weights`, and the names of objects that stand-ins are for.

        Args:
            values_of: Gives the values of a frozen parameter.
        """

        def tensor_of(found: dict[str, Any]) -> Any:
            place = found[_TENSOR]
            return values_of(place) if isinstance(place, str) else self.tensors[place].clone()

        with stand_ins(BytesIO(self.rest)) as foreign:
            content = torch.load(BytesIO(self.rest), weights_only=True)
        return mapped(content, lambda value: value, tensor_of), foreign

    def all_weights(self, content: Mapping[str, Any], values_of: Callable[[str], Tensor]) -> dict[str, Any]:
        """Give all weights in their order, for whoever may keep or change them."""
        weights: dict[str, Any] = OrderedDict(
            (key, values_of(value) if isinstance(value, str) else value.clone()) for key, value in self.weights.items()
        )
        weights.update(content[WEIGHTS])
        if (metadata := getattr(content[WEIGHTS], "_metadata", None)) is not None:
            weights._metadata = metadata  # type: ignore[attr-defined]
        return weights


def on_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the memory of the machine."""
    return tensor.detach().to("cpu", copy=True)


def mapped(value: Any, tensor: Callable[[Tensor], Any], stand_in: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Copy nested containers with what functions make of tensors, and of what stands for one."""
    if isinstance(value, Tensor):
        return tensor(value)
    if type(value) in (list, tuple):
        return type(value)(mapped(item, tensor, stand_in) for item in value)
    if type(value) not in (dict, OrderedDict):
        return value
    if stand_in is not None and len(value) == 1 and _TENSOR in value:
        return stand_in(value)
    copied = copy(value)
    copied.update({key: mapped(item, tensor, stand_in) for key, item in value.items()})
    return copied


class _Copies:
    """Copies tensors, what several keys share once."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        if (place := _place(tensor)) is None:
            return on_host(tensor)
        if place not in self._made:
            self._made[place] = on_host(tensor)
        return self._made[place]


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """Tell where a plain tensor's values lie; ``None`` if it has none, or keeps them in a way of its own."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or not tensor.numel():
        return None
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _refuse_large(tensors: Sequence[Tensor]) -> None:
    needed, free = sum(tensor.numel() * tensor.element_size() for tensor in tensors), free_memory()
    if needed > free // _SPARED:
        raise NoRoomError(f"it takes {needed:,} bytes, and {free:,} are free")
