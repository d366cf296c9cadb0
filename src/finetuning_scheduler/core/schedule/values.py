"""Plain Python values: of scalars as YAML 1.2 writes them, and of what users give instead of dicts and lists."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 100

KeyPath = tuple[Any, ...]

# the core schema of YAML 1.2, section 10.3.2: the only plain scalars that are not strings
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


class TooDeepError(ValueError):
    """A structure with more levels than any schedule needs, perhaps one that contains itself."""


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


def plain(value: Any) -> Any:
    """Copy a value, sharing no container with it: mappings and the namespaces of LightningCLI become dicts.

    LightningCLI lists even the arguments that only a running session can fill in; these are left out.

    Raises:
        TooDeepError: It has more than `MAX_DEPTH` levels.
    """
    return _copied(value, 0)


def _copied(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise TooDeepError
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return _without_unfilled({key: _copied(item, depth + 1) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return [_copied(item, depth + 1) for item in value]
    return value


def _without_unfilled(mapping: dict[Any, Any]) -> dict[Any, Any]:
    """Leave out the arguments of a class that LightningCLI lists without a value."""
    arguments = mapping.get("init_args")
    if not isinstance(arguments, dict):
        return mapping
    unfilled = [key for key in ("params", "optimizer") if key in arguments and arguments[key] is None]
    return {**mapping, "init_args": {key: item for key, item in arguments.items() if key not in unfilled}}
