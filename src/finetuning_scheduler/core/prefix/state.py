"""What a step changes besides its result: modules and random generators, noted and brought back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .generators import Generators
from .inside import Inside

# Parts that a step has no business with, or that are there for whole modules.
_LEFT_ALONE = ("_parameters", "_modules", "forward", "_compiled_call_impl")


@dataclass(frozen=True)
class State:
    """The attributes, buffers and attribute tensors of modules and their classes, and the generators, at one moment."""

    modules: tuple[tuple[nn.Module, dict[str, Any]], ...]
    classes: tuple[tuple[type, dict[str, Any]], ...]
    inside: Inside
    generators: Generators

    @classmethod
    def of(cls, modules: Iterable[nn.Module], step: Callable[..., Any] | None = None) -> State:
        """Note the present state, with what is inside attributes and the variables around a step."""
        modules = list(modules)
        classes = {each: None for kind in {type(module) for module in modules} for each in own_classes(kind)}
        return cls(
            tuple((module, _noted(vars(module))) for module in modules),
            tuple((kind, _noted(class_values(kind))) for kind in classes),
            Inside(_objects(modules, classes), step),
            Generators.now(),
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Bring it back, into the objects that were there."""
        for module, noted in self.modules:
            _restore(vars(module), noted)
        for kind, noted in self.classes:
            _restore_class(kind, noted)
        self.inside.restore()
        self.generators.restore()

    def values(self) -> list[tuple[str, list[Any]]]:
        """Return what can be compared of each module's state, attribute by attribute."""
        found = []
        named = [(type(module).__name__, noted) for module, noted in self.modules]
        for owner, noted in (*named, *((kind.__name__, noted) for kind, noted in self.classes)):
            for name, (original, copied) in noted.items():
                if isinstance(original, (Tensor, bool, int, float, str)):
                    found.append((f"{owner}.{name}", [copied]))
                elif isinstance(original, (list, dict)):
                    leaves = copied.values() if isinstance(copied, dict) else copied
                    found.append((f"{owner}.{name}", [_unwrapped(each) for each in leaves]))
        return found


def _objects(modules: Iterable[nn.Module], classes: Iterable[type]) -> Iterable[Any]:
    """Give what attributes hold, tensors and what is there for whole modules apart; and the methods of classes."""
    for attributes in (*(vars(module) for module in modules), *(class_values(kind) for kind in classes)):
        for name, value in attributes.items():
            if name not in (*_LEFT_ALONE, "_buffers") and not isinstance(value, Tensor):
                yield value
    for kind in classes:
        yield from (value for value in vars(kind).values() if isinstance(value, FunctionType))


def own_classes(kind: type) -> list[type]:
    """Return the classes of a module that belong neither to Python nor to PyTorch nor to Lightning."""
    libraries = ("builtins", "abc", "typing", "torch", "lightning", "pytorch_lightning", "lightning_fabric")
    return [each for each in kind.__mro__ if each.__module__.partition(".")[0] not in libraries]


def class_values(kind: type) -> dict[str, Any]:
    """Return the values, not the methods, that a class holds itself."""
    kinds = (Tensor, bool, int, float, str, list, dict, set, deque)
    return {name: value for name, value in vars(kind).items() if isinstance(value, kinds) and not name.startswith("__")}


def _noted(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Pair each value with a copy of its content, one level deep."""
    return {name: (value, _copied(value)) for name, value in attributes.items() if name not in _LEFT_ALONE}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: (each, each.detach().clone() if isinstance(each, Tensor) else each) for key, each in value.items()}
    if type(value) in (list, deque):
        return [(each, each.detach().clone() if isinstance(each, Tensor) else each) for each in value]
    return set(value) if isinstance(value, set) else value


def _restore(attributes: dict[str, Any], noted: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in attributes if name not in noted and name not in _LEFT_ALONE]:
        del attributes[name]
    for name, (value, copied) in noted.items():
        attributes[name] = value
        if isinstance(value, Tensor):
            _fill(value, copied)
        elif isinstance(value, dict):
            _fill_all(copied.values())
            if _identities(value) != {key: id(each) for key, (each, _) in copied.items()}:
                value.clear()
                value.update({key: each for key, (each, _) in copied.items()})
        elif type(value) in (list, deque):
            _fill_all(copied)
            value.clear()
            value.extend(each for each, _ in copied)
        elif isinstance(value, set):
            value.clear()
            value.update(copied)


def _restore_class(kind: type, noted: dict[str, tuple[Any, Any]]) -> None:
    values = class_values(kind)
    _restore(values, noted)
    for name, value in values.items():
        if vars(kind).get(name) is not value:
            setattr(kind, name, value)


def _identities(value: dict[Any, Any]) -> dict[Any, int]:
    return {key: id(each) for key, each in value.items()}


def _fill_all(pairs: Iterable[tuple[Any, Any]]) -> None:
    for value, content in pairs:
        _fill(value, content)


def _fill(value: Any, content: Any) -> None:
    if isinstance(value, Tensor) and not torch.equal(value, content):
        value.data.copy_(content)  # not a change to autograd, which may have saved it


def _unwrapped(pair: Any) -> Any:
    return pair[1] if isinstance(pair, tuple) else pair
