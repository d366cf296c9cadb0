"""Nested inputs and outputs as a list of leaves and a form, from which the like can be built again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .refusal import Refused

PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    Enum,
    slice,
    range,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)
Leaf: TypeAlias = Any


@dataclass(frozen=True)
class Form:
    """How leaves are nested; ``kind`` is ``None`` for a leaf. Forms are equal if leaves stand in the same places."""

    kind: type | None = None
    keys: tuple[Any, ...] = ()
    inner: tuple[Form, ...] = ()

    @property
    def code(self) -> str:
        """Write the form as text, equal for equal forms in every process."""
        if self.kind is None:
            return "."
        keys = ",".join(repr(key) for key in self.keys)
        inner = ",".join(form.code for form in self.inner)
        return f"{self.kind.__module__}.{self.kind.__qualname__}[{keys}]({inner})"

    def build(self, leaves: Sequence[Leaf]) -> Any:
        """Nest leaves in this form."""
        remaining = iter(leaves)

        def built(form: Form) -> Any:
            if form.kind is None:
                return next(remaining)
            return _made(form.kind, form.keys, [built(each) for each in form.inner])

        return built(self)


_LEAF = Form()


def flatten(value: object) -> tuple[list[Leaf], Form]:
    """Take nested lists, tuples, mappings and dataclasses apart. What is of no such kind is a leaf."""
    leaves: list[Leaf] = []

    def taken(value: Any) -> Form:
        parts = _parts(value)
        if parts is None:
            leaves.append(value)
            return _LEAF
        keys, values = parts
        return Form(type(value), keys, tuple([taken(each) for each in values]))

    return leaves, taken(value)


def mapped(function: Callable[[Leaf], Leaf], value: Any) -> Any:
    """Apply a function to each leaf."""
    leaves, form = flatten(value)
    return form.build([function(leaf) for leaf in leaves])


def mapped_by_number(function: Callable[[int, Leaf], Leaf], value: Any) -> Any:
    """Apply a function to each leaf and its number."""
    leaves, form = flatten(value)
    return form.build([function(number, leaf) for number, leaf in enumerate(leaves)])


def is_plain(leaf: object) -> bool:
    """Whether a leaf is a value whose content is known by its text."""
    return isinstance(leaf, PLAIN)


def first_rows(value: Any, rows: int, take: int) -> Any:
    """Return the first of a batch's rows: of tensors along their first dimension, and of lists of plain values.

    Raises:
        Refused: It holds something whose rows are not known.
    """
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            raise Refused(f"the batch holds a tensor without rows ({value.layout})")
        return value[:take] if value.dim() and len(value) == rows else value
    if isinstance(value, (list, tuple)) and len(value) == rows and all(is_plain(each) for each in value):
        return value[:take] if type(value) in (list, tuple) else value
    if is_plain(value):
        return value
    parts = _parts(value)
    if parts is None:
        raise Refused(f"the batch holds a {type(value).__name__}, whose rows are not known")
    return _made(type(value), parts[0], [first_rows(each, rows, take) for each in parts[1]])


def _parts(value: Any) -> tuple[tuple[Any, ...], list[Any]] | None:
    """Return keys and values of a container, or ``None`` for a leaf."""
    if isinstance(value, (Tensor, *PLAIN)):
        return None
    if isinstance(value, Mapping):
        return tuple(value), list(value.values())
    if type(value) in (list, tuple):
        return (), list(value)
    if isinstance(value, tuple) and hasattr(value, "_fields") and not hasattr(value, "batch_sizes"):
        return (), list(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = tuple(field.name for field in fields(value) if field.init)
        return names, [getattr(value, name) for name in names]
    return None


def _made(kind: type, keys: tuple[Any, ...], values: list[Any]) -> Any:
    if kind in (list, tuple):
        return kind(values)
    if kind in (dict, OrderedDict):
        return kind(zip(keys, values, strict=True))
    if is_dataclass(kind):
        return kind(**dict(zip(keys, values, strict=True)))
    if issubclass(kind, Mapping):
        constructor: Callable[[dict[Any, Any]], Any] = kind
        return constructor(dict(zip(keys, values, strict=True)))
    return kind(*values)
