"""Validate a phase: what pydantic finds wrong, in the words of this package, and numbers that are written as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from .model import ClassInit, LRSchedulerSpec, OptimizerSpec, Phase
from .values import KeyPath, exponent_number, leaves, number
from .wording import closest, did_you_mean, shown

# what was expected, with the limits that pydantic names, and what to do, by pydantic's type of error
_EXPECTED = {
    "string_type": ("a string", "write text, in quotes if it looks like a number"),
    "string_unicode": ("Unicode text", "remove the halves of surrogate pairs"),
    "string_too_short": ("a non-empty string", "fill it in, or remove it"),
    "int_type": ("an integer", "write a whole number without quotes"),
    "float_type": ("a number", "write a number without quotes, such as 1.0e-05"),
    "finite_number": ("a finite number", "write a number such as 1.0e-05"),
    "greater_than": ("a number greater than 0", "write a number such as 1.0e-05"),
    "greater_than_equal": ("{ge:g} or more", "correct it"),
    "less_than_equal": ("{le:g} or less", "correct it"),
    "bool_type": ("true or false", "write true or false without quotes"),
    "tuple_type": ("a list", "write a list"),
    "too_short": ("a list of at least one item", "fill it in, or remove it"),
    "dict_type": ("a mapping", "write `key: value` pairs below it"),
    "model_type": ("a mapping", "write `key: value` pairs below it"),
}
_NESTED_MODELS: Mapping[str, type[BaseModel]] = {
    "new_optimizer": OptimizerSpec,
    "optimizer_init": ClassInit,
    "new_lr_scheduler": LRSchedulerSpec,
    "lr_scheduler_init": ClassInit,
}


def phase_errors(raw: Mapping[Any, Any]) -> list[Mapping[str, Any]]:
    """Return pydantic's errors about a phase, without those that only follow from others."""
    try:
        Phase.model_validate(raw)
    except ValidationError as error:
        found: list[Mapping[str, Any]] = [*error.errors(include_url=False)]
        # a list with a wrong item is not also too short
        return [details for details in found if details["type"] != "too_short" or not details["input"]]
    return []


def numbers_in_text(raw: Mapping[Any, Any], errors: Sequence[Mapping[str, Any]]) -> dict[KeyPath, int | float]:
    """Return the numbers that stand as text in a phase, which has these errors, by their place.

    Where a number is expected, that is all that YAML 1.2 takes for one. Among the arguments of a class, whose types
    nobody knows here, it is only what YAML 1.1 readers such as PyYAML leave as text: `1e-06`.
    """
    numbers: dict[KeyPath, int | float | None] = {}
    for details in errors:
        if details["type"] in ("int_type", "float_type") and isinstance(details["input"], str):
            value = number(details["input"])
            numbers[details["loc"]] = None if details["type"] == "int_type" and isinstance(value, float) else value
    for path, leaf in leaves(raw):
        if isinstance(leaf, str) and path[2:3] == ("init_args",):
            numbers[path] = exponent_number(leaf)
    return {path: value for path, value in numbers.items() if value is not None}


def explained(details: Mapping[str, Any]) -> tuple[str, str]:
    """Return the message and the fix for one of pydantic's errors about a phase."""
    kind, location, value = details["type"], details["loc"], details["input"]
    name = key_name(location)
    if kind == "missing":
        return f"expected the key `{name}`, got none", f"add `{location[-1]}`"
    if kind == "extra_forbidden":
        return _unknown_key(location)
    if kind == "invalid_key":
        return f"expected keys that are strings, got {shown(location[-1])}", "quote the key, or remove it"
    limits = details.get("ctx", {})
    expected, fix = details["msg"], "correct it"
    if kind in _EXPECTED:
        expected, fix = _EXPECTED[kind]
        expected = expected.format_map(limits)
    if kind == "greater_than_equal" and limits["ge"] < 0:
        fix = "correct it, or leave it out for no limit"
    if kind == "tuple_type" and isinstance(value, str):
        fix = f"make it a list: `{name}: [{value}]`"
    return with_key_name(location, f"expected {expected}, got {shown(value)}"), fix


def with_key_name(location: Sequence[Any], message: str) -> str:
    """Begin a message with the place of a value in a phase, unless it is about the phase itself."""
    return f"`{key_name(location)}`: {message}" if location else message


def key_name(location: Sequence[Any]) -> str:
    """Write the place of a value in a phase as code does: `a.b[2]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def _unknown_key(location: Sequence[int | str]) -> tuple[str, str]:
    *parents, key = location
    model: type[BaseModel] = Phase
    for parent in parents:
        model = _NESTED_MODELS.get(str(parent), model)
    known = list(model.model_fields)
    where = f" in `{'.'.join(map(str, parents))}`" if parents else ""
    fix = did_you_mean(closest(key, known), "remove it")
    return f"expected one of the keys {', '.join(known)}{where}, got `{key}`", fix
