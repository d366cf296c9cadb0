"""Plain Python values: of scalars as YAML 1.2 writes them, and of what users give instead of dicts and lists."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

MAX_DEPTH = 100

KeyPath = tuple[Any, ...]

# sequences that stand for one value
_TEXT = (str, bytes, bytearray)

# the core schema of YAML 1.2, section 10.3.2: the only plain scalars that are not strings
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


class _TooDeepError(ValueError):
    """A structure with more levels than any schedule needs, perhaps one that contains itself."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that could not be read: what is wrong, and what to do."""

    message: str
    fix: str


def plain_scalar(text: str) -> Any:
    """Return what an unquoted scalar means in the core schema of YAML 1.2.

    Raises:
        ValueError: It is an integer with more digits than Python reads.
    """
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if found := _INFINITY.fullmatch(text):
        return float(f"{found[1]}inf")
    return math.nan if _NAN.fullmatch(text) else text


def number(text: str) -> int | float | None:
    """Return the number that a text is in YAML 1.2, or None."""
    try:
        value = plain_scalar(text)
    except ValueError:
        return None
    # the exact type: a truth value is an int, too
    return value if type(value) in (int, float) else None


def exponent_number(text: str) -> float | None:
    """Return the number that a text such as `1e-06` is, which YAML 1.1 readers leave as text for want of a dot."""
    value = float(text) if _EXPONENT.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Copy a value, sharing no container with it, as plain Python values.

    Mappings and the namespaces of LightningCLI become dicts, sequences and arrays lists, scalars of numpy numbers.
    LightningCLI lists even the arguments that only a running session can fill in; these are left out. What cannot be
    read, such as an interpolation of OmegaConf that leads nowhere, becomes `Unreadable` in its place; so does the whole
    value if it has more than `MAX_DEPTH` levels.
    """
    try:
        return _copied(value, 0)
    except _TooDeepError:
        return Unreadable(f"expected at most {MAX_DEPTH} nested levels, got more", "flatten it")


def plain_entries(value: Any) -> Any:
    """Copy a mapping like `plain`, each of its values for itself: one that is too deep leaves the others readable."""
    value = _opened(value)
    return _copied_mapping(value, plain) if isinstance(value, Mapping) else plain(value)


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Iterate over what plain dicts and lists hold in the end, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from leaves(item, (*path, position))
    else:
        yield path, value


def replaced(value: Any, replacements: Mapping[KeyPath, Any], path: KeyPath = ()) -> Any:
    """Copy plain dicts and lists, with other leaves at some paths."""
    if isinstance(value, dict):
        return {key: replaced(item, replacements, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, replacements, (*path, position)) for position, item in enumerate(value)]
    return replacements.get(path, value)


def _copied(value: Any, depth: int, *, listed: bool = False) -> Any:
    """Copy a value, as `plain` does; whether LightningCLI has listed it is told by the namespace that it stands in."""
    if depth > MAX_DEPTH:
        raise _TooDeepError
    given, value = value, _opened(value)
    if isinstance(value, Mapping):
        listed = listed or value is not given
        copied = _copied_mapping(value, lambda item: _copied(item, depth + 1, listed=listed))
        # an `optimizer` that a user has written is dropped later, with a warning
        unfilled = ("params", "optimizer") if listed else ("params",)
        return _without_unfilled(copied, unfilled) if isinstance(copied, dict) else copied
    if isinstance(value, Sequence) and not isinstance(value, _TEXT):
        length = _tried(len, value)
        if isinstance(length, Unreadable):
            return length
        return [_copied(_tried(getitem, value, position), depth + 1, listed=listed) for position in range(length)]
    return value


def _copied_mapping(mapping: Mapping[Any, Any], copied: Callable[[Any], Any]) -> dict[Any, Any] | Unreadable:
    keys = _tried(list, mapping)
    if isinstance(keys, Unreadable):
        return keys
    return {_opened(key): copied(_tried(getitem, mapping, key)) for key in keys}


def _opened(value: Any) -> Any:
    """What a namespace, or a scalar or array of numpy and its kin, holds; a tensor stays what its owner wants."""
    if (torch := sys.modules.get("torch")) is not None and isinstance(value, torch.Tensor):
        return value
    # looked up on the class: a class itself, or an object that has any attribute, is none of them
    method = next((name for name in ("as_dict", "tolist") if hasattr(type(value), name)), None)
    return value if method is None else _tried(getattr(value, method))


def _tried(read: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except Exception as error:  # noqa: BLE001  # whatever a foreign container raises is why it cannot be read
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Unreadable(f"expected a value that can be read, got an error: {reason}", "write the value out")


def _without_unfilled(mapping: dict[Any, Any], names: Sequence[str]) -> dict[Any, Any]:
    """Leave out the arguments of a class that LightningCLI lists without a value."""
    arguments = mapping.get("init_args")
    if not isinstance(arguments, dict):
        return mapping
    unfilled = [key for key in names if key in arguments and arguments[key] is None]
    return {**mapping, "init_args": {key: item for key, item in arguments.items() if key not in unfilled}}
