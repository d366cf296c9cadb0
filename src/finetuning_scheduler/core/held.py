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

WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"
_SPARED = 4  # of the free memory, one part in so many is what copies may take
# What stands for a tensor: one of these, and its number or its parameter's name.
_TENSOR, _FROZEN = "\0tensor ", "\0frozen "


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
        states: The optimizer's state, if it is one of tensors and numbers by position and name.
        tensors: The other ones.
        frozen: The names of the frozen parameters whose values are the model's own, here or in the rest.
        rest: What ``torch.save`` has made of the content, with words in the place of tensors.
    """

    phase: int
    weights: Mapping[str, Tensor | str]
    states: Mapping[int, Mapping[str, Any]]
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

        def noted(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if (name := names.get(_place(leaf))) is not None:
                return _FROZEN + name
            found.append(leaf)
            return f"{_TENSOR}{len(found) - 1}"

        others = copy(checkpoint[WEIGHTS])  # it keeps its class and, as an attribute, its metadata
        weights: dict[str, Tensor | str] = {}
        for key, value in checkpoint[WEIGHTS].items():
            if isinstance(value, Tensor):
                weights[key] = names.get(_place(value)) or value
                del others[key]
        states, optimizers = _states(checkpoint[OPTIMIZERS])
        content = {**checkpoint, OPTIMIZERS: optimizers}
        rest = {key: mapped(value, noted) for key, value in content.items() if key != WEIGHTS} | {WEIGHTS: others}
        inside = [value for value in weights.values() if isinstance(value, Tensor)]
        inside += [value for state in states.values() for value in state.values() if isinstance(value, Tensor)]
        _refuse_large([*found, *inside])
        buffer = BytesIO()
        torch.save(rest, buffer)
        used = {value for value in weights.values() if isinstance(value, str)}
        used.update(_frozen_in(rest))
        copied = _Copies().of
        return cls(
            phase,
            mapped(weights, copied),
            mapped(states, lambda leaf: on_host(leaf) if isinstance(leaf, Tensor) else leaf),
            [copied(tensor) for tensor in found],
            frozenset(used),
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

        def filled(leaf: Any) -> Any:
            if not isinstance(leaf, str):
                return leaf
            if leaf.startswith(_FROZEN):
                return values_of(leaf.removeprefix(_FROZEN))
            return self.tensors[int(leaf.removeprefix(_TENSOR))].clone() if leaf.startswith(_TENSOR) else leaf

        with stand_ins(BytesIO(self.rest)) as foreign:
            content = mapped(torch.load(BytesIO(self.rest), weights_only=True), filled)
        if self.states:
            content[OPTIMIZERS][0]["state"] = mapped(self.states, _cloned)
        return content, foreign

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
    return (tensor.detach() if tensor.requires_grad else tensor).to("cpu", copy=True)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Copy nested mappings and sequences, with what a function makes of everything else that is in them."""
    if type(value) in (dict, OrderedDict):
        copied = copy(value)
        for key, item in value.items():
            copied[key] = mapped(item, change)
        return copied
    if type(value) in (list, tuple):
        return type(value)([mapped(item, change) for item in value])
    return change(value)


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _states(optimizers: Sequence[Any]) -> tuple[Mapping[int, Mapping[str, Any]], Sequence[Any]]:
    """Take the state out of an optimizer's state dictionary, unless it has other things in it than most have."""
    kinds = (Tensor, int, float, bool, str, type(None))
    first = optimizers[0] if optimizers else None
    states = first.get("state") if type(first) is dict else None
    plain = type(states) is dict and all(
        type(state) is dict and all(isinstance(value, kinds) for value in state.values()) for state in states.values()
    )
    if first is None or states is None or not plain:
        return {}, optimizers
    return states, [{**first, "state": {}}, *optimizers[1:]]


def _frozen_in(value: Any) -> set[str]:
    found: set[str] = set()

    def noted(leaf: Any) -> Any:
        if isinstance(leaf, str) and leaf.startswith(_FROZEN):
            found.add(leaf.removeprefix(_FROZEN))
        return leaf

    mapped(value, noted)
    return found


class _Copies:
    """Copies tensors, what several keys share once."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def of(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
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
