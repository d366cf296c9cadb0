"""Write schedules as YAML 1.2, with a comment on each phase."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..drafts import draft_of, publish
from .schedule import Schedule

# plain strings that no reader, YAML 1.1 ones included, takes for something else
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.*+?\\()|\[\]{}^$-]*")
_NOT_PLAIN = frozenset(["null", "true", "false", "yes", "no", "on", "off", "y", "n"])
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_ESCAPED = re.compile(rf'["\\]|{_UNPRINTABLE.pattern}')


def write_schedule(
    schedule: Schedule | Mapping[int, Any],
    path: str | os.PathLike[str],
    comments: Sequence[str] | None = None,
) -> Path:
    """Write a schedule as YAML 1.2 and return its path; a reader never sees half of the file.

    Args:
        schedule: The schedule, or its phases by number. Values that YAML cannot hold (a function among `init_args`)
            are written as the text of their `repr`.
        path: The file, whose directory is made if missing.
        comments: One line for each phase, written above it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(target) as file:
        file.write(schedule_text(schedule, comments).encode())
        publish(file, target)
    return target


def schedule_text(schedule: Schedule | Mapping[int, Any], comments: Sequence[str] | None = None) -> str:
    """Return what :func:`write_schedule` writes."""
    phases = schedule.to_dict() if isinstance(schedule, Schedule) else schedule
    lines = []
    for position, (number, phase) in enumerate(phases.items()):
        if comments is not None and position < len(comments):
            lines.append(f"# {' '.join(_UNPRINTABLE.sub(' ', comments[position]).split())}")
        lines.extend(_entry(number, phase, indent=0))
    return "\n".join(lines) + "\n"


def _entry(key: Any, value: Any, indent: int) -> Iterator[str]:
    """The lines of `key: value` in block style."""
    start = f"{' ' * indent}{_scalar_text(key)}:"
    if isinstance(value, Mapping) and value:
        yield start
        for inner_key, inner_value in value.items():
            yield from _entry(inner_key, inner_value, indent + 2)
    elif isinstance(value, (list, tuple)) and value:
        yield start
        for item in value:
            yield f"{' ' * indent}- {_flow(item)}"
    else:
        yield f"{start} {_flow(value)}"


def _flow(value: Any) -> str:
    """A value on one line; strings inside brackets are quoted, since `,` and `]` would end them."""
    if isinstance(value, Mapping):
        pairs = (f"{_scalar_text(key, quote=True)}: {_flow_item(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_flow_item, value))}]"
    return _scalar_text(value)


def _flow_item(value: Any) -> str:
    return _flow(value) if isinstance(value, (Mapping, list, tuple)) else _scalar_text(value, quote=True)


def _scalar_text(value: Any, quote: bool = False) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        # Python refuses to write very long numbers in decimal
        return str(int(value)) if value.bit_length() < 10_000 else hex(value)
    if isinstance(value, float):
        return _float_text(float(value))
    text = value if isinstance(value, str) else repr(value)
    if not quote and _PLAIN.fullmatch(text) and text.lower() not in _NOT_PLAIN:
        return text
    return f'"{_ESCAPED.sub(_escaped, text)}"'


def _float_text(value: float) -> str:
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    mantissa, exponent, power = repr(value).partition("e")
    # YAML 1.1 readers take `1e-06` for a string and `1.0e-06` for a number
    return repr(value) if not exponent or "." in mantissa else f"{mantissa}.0e{power}"


def _escaped(found: re.Match[str]) -> str:
    character = found.group()
    return f"\\{character}" if character in '"\\' else f"\\u{ord(character):04X}"
