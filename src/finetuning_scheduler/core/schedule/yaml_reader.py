"""Read YAML 1.2 into plain values, with the line of every key and item."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from ...errors import Problem, ScheduleFileError
from .yaml_events import DocumentBuilder, KeyPath

MAX_BYTES = 64 * 2**20

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
