"""Schedules in YAML 1.2: read with the line number of every key and item, write with a comment on each phase."""

from __future__ import annotations

import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from finetuning_scheduler.core.yaml_events import DocumentBuilder, KeyPath
from finetuning_scheduler.errors import Problem, ScheduleFileError

if TYPE_CHECKING:
    from finetuning_scheduler.core.schedule import Schedule

MAX_BYTES = 64 * 2**20

# plain strings that no reader, YAML 1.1 ones included, takes for something else
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.*+?\\()|\[\]{}^$-]*")
_NOT_PLAIN = frozenset(["null", "true", "false", "yes", "no", "on", "off", "y", "n"])
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_ESCAPED = re.compile(rf'["\\]|{_UNPRINTABLE.pattern}')
# section 5.1 of YAML 1.2: what a file may not hold
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Document:
    """A YAML document as plain Python values.

    `lines` maps the path of each key and item, such as `(0, "params", 2)`, to its line, counted from 1. `problems` are
    those that did not stop the reading.
    """

    data: Any
    lines: Mapping[KeyPath, int]
    source: str
    problems: tuple[Problem, ...] = ()


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read one YAML 1.2 document; raises `ScheduleFileError` if the file cannot be read or is not YAML."""
    source = os.fsdecode(path)
    text = _read_text(source)
    builder = DocumentBuilder(source)
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            builder.take(event)
    except ScheduleFileError:
        raise
    # the library lets more than its own exceptions out (AssertionError, IndexError, ...)
    except Exception as error:
        raise ScheduleFileError([*builder.problems, _syntax_problem(error, source)]) from error
    if not builder.documents:
        raise ScheduleFileError(
            Problem("expected a schedule, got an empty file", "write at least phase 0", source=source)
        )
    return Document(builder.root, builder.lines, source, tuple(builder.problems))


def write_schedule(
    schedule: Schedule | Mapping[int, Any],
    path: str | os.PathLike[str],
    comments: Sequence[str] | None = None,
) -> Path:
    """Write a schedule as YAML 1.2 and return its path; a reader never sees half of the file.

    `comments` holds one line for each phase, written above it. Values that YAML cannot hold (a function among
    `init_args`) are written as the text of their `repr`.
    """
    phases = schedule if isinstance(schedule, Mapping) else schedule.to_dict()
    lines = []
    for position, (number, phase) in enumerate(phases.items()):
        if comments is not None and position < len(comments):
            lines.append(f"# {' '.join(_UNPRINTABLE.sub(' ', comments[position]).split())}")
        lines.extend(_entry(number, phase, indent=0))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def _read_text(source: str) -> str:
    try:
        # one byte more than allowed tells a file that is too large, also where a file has no size (a pipe)
        with Path(source).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise ScheduleFileError(_unreadable_problem(error, source)) from error
    if len(raw) > MAX_BYTES:
        message = f"expected a file of at most {MAX_BYTES:,} bytes, got a larger one"
        raise ScheduleFileError(Problem(message, "split the schedule", source=source))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"expected UTF-8 text, got byte 0x{raw[error.start]:02x} at offset {error.start}"
        line = raw.count(b"\n", 0, error.start) + 1
        raise ScheduleFileError(Problem(message, "save the file as UTF-8", source, line)) from error
    if forbidden := _FORBIDDEN.search(text):
        message = f"expected text, got the control character U+{ord(forbidden.group()):04X}"
        line = text.count("\n", 0, forbidden.start()) + 1
        raise ScheduleFileError(Problem(message, "remove it, or write it as an escape in quotes", source, line))
    return text


def _unreadable_problem(error: OSError | ValueError, source: str) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem("expected a schedule file, but it does not exist", "check the path", source=source)
    if isinstance(error, IsADirectoryError):
        return Problem("expected a schedule file, got a directory", "give the path of a YAML file", source=source)
    reason = getattr(error, "strerror", None) or str(error)
    return Problem(f"expected a schedule file, but it cannot be read: {reason}", "check the path", source=source)


def _syntax_problem(error: Exception, source: str) -> Problem:
    line = None
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        reason = ", ".join(part for part in (error.context, error.problem) if part)
    return Problem(f"expected valid YAML 1.2, got an error: {reason}", "correct the YAML", source=source, line=line)


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
