"""Read YAML 1.2 into plain values, with the line of every key and item.

Reading the parser's events, not the library's nodes or objects, keeps the lines of aliases, tells quoted from plain
scalars, and goes on after a duplicate key or a tag, also when the file turns out to be broken further down. Nothing but
dicts, lists and scalars is ever built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)

from ...errors import MAX_PROBLEMS, Line, Problem, ScheduleFileError
from .values import MAX_DEPTH, KeyPath, plain_scalar

# What a file may hold: several times the names of the largest models, and what is read in seconds and little memory.
MAX_BYTES = 16 * 2**20
MAX_VALUES = 250_000
MAX_ALIASED_VALUES = 50_000

# section 5.1 of YAML 1.2: what a file may not hold
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")

_QUOTE = "put text that begins with `*` in quotes"
_CORE_TAG = "tag:yaml.org,2002:"
_TAGGED_TYPES: Mapping[str, tuple[type, ...]] = {
    "!!null": (type(None),),
    "!!bool": (bool,),
    "!!int": (int,),
    "!!float": (int, float),
}


@dataclass(frozen=True)
class Document:
    """A YAML document as plain Python values.

    Attributes:
        data: The value of its root.
        lines: The line, counted from 1, of each key and item by its path, such as `(0, "params", 2)`.
        source: The file's name.
        problems: Those that did not stop the reading.
    """

    data: Any
    lines: Mapping[KeyPath, int]
    source: str
    problems: tuple[Problem, ...] = ()


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read one YAML 1.2 document.

    Raises:
        ScheduleFileError: The file cannot be read or is not YAML.
    """
    source = os.fsdecode(path)
    reader = _Reader(source, _read_text(source))
    try:
        data = reader.document()
    except ScheduleFileError:
        raise
    # the library lets more than its own exceptions out (AssertionError, IndexError, ...)
    except Exception as error:
        raise ScheduleFileError([*reader.problems, _syntax_problem(error, source)]) from error
    return Document(data, reader.lines, source, tuple(reader.problems))


class _Reader:
    """Makes plain values of the parser's events; each `_value` takes all events of one value."""

    def __init__(self, source: str, text: str) -> None:
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._events: Iterator[Any] = YAML(typ="safe", pure=True).parse(text)
        # value and size by anchor; None while the value is being read
        self._anchors: dict[str, tuple[Any, int] | None] = {}
        self._values = 0
        self._aliased_values = 0

    def document(self) -> Any:
        """Read the only document.

        Raises:
            ScheduleFileError: What follows would mean nothing.
            Exception: Whatever the parser raises for what is not YAML.
        """
        next(self._events)  # the start of the stream
        if not isinstance(next(self._events), DocumentStartEvent):
            raise self._fatal("expected a schedule, got an empty file", None, "write at least phase 0")
        data = self._value(next(self._events), ())
        next(self._events)  # the end of the document
        event = next(self._events)
        if isinstance(event, DocumentStartEvent):
            raise self._fatal("expected one YAML document, got a second one", _line(event), "remove it, with its `---`")
        return data

    def _value(self, event: Any, path: KeyPath) -> Any:
        if isinstance(event, AliasEvent):
            return self._aliased(event)
        before = self._values
        self._count(1, _line(event))
        if isinstance(event, ScalarEvent):
            value = self._scalar(event)
        else:
            self._check_container(event, path)
            value = self._mapping(path) if isinstance(event, MappingStartEvent) else self._sequence(path)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._values - before)
        return value

    def _check_container(self, event: Any, path: KeyPath) -> None:
        if event.ctag is not None and _short(event.ctag) not in ("!", "!!map", "!!seq"):
            self._refuse_tag(event.ctag, _line(event))
        if len(path) >= MAX_DEPTH:
            raise self._fatal(f"expected at most {MAX_DEPTH} nested levels, got more", _line(event), "flatten it")
        if event.anchor is not None:
            self._anchors[event.anchor] = None

    def _sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), SequenceEndEvent):
            place = (*path, len(items))
            self.lines[place] = _line(event)
            items.append(self._value(event, place))
        return items

    def _mapping(self, path: KeyPath) -> dict[Any, Any]:
        entries: dict[Any, Any] = {}
        first_lines: dict[Any, int] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            line = _line(event)
            key = self._value(event, (*path, None))
            if self._is_usable_key(key, line, first_lines):
                place = (*path, key)
                first_lines[key] = self.lines[place] = line
                entries[key] = self._value(next(self._events), place)
            else:  # what stands below is read for its problems; its lines are nobody's
                self._value(next(self._events), (*path, object()))
        return entries

    def _is_usable_key(self, key: Any, line: int, first_lines: Mapping[Any, int]) -> bool:
        if isinstance(key, (dict, list)):
            kind = "mapping" if isinstance(key, dict) else "list"
            self._problem(f"expected a number or a string as key, got a {kind}", line, "use a number or a string")
            return False
        if key in first_lines:
            first = first_lines[key]
            message = f"expected each key once, got {key!r} on line {first} and again on line {line}"
            self._problem(message, line, f"merge lines {first} and {line}, or remove one")
            return False
        return True

    def _aliased(self, event: AliasEvent) -> Any:
        anchor, line = event.anchor, _line(event)
        if anchor not in self._anchors:
            message = f"expected an alias of an anchor above it, got `*{anchor}`"
            is_selector = re.fullmatch(r"[\w-]+", anchor) is None
            raise self._fatal(message, line, _QUOTE if is_selector else "write the values out")
        found = self._anchors[anchor]
        if found is None:
            message = f"expected a finite structure, got the alias `*{anchor}` inside its own anchor"
            raise self._fatal(message, line, "write the values out")
        value, size = found
        self._count(size, line)
        self._aliased_values += size
        if self._aliased_values > MAX_ALIASED_VALUES:
            message = f"expected aliases of at most {MAX_ALIASED_VALUES:,} values, got more"
            raise self._fatal(message, line, "use fewer aliases")
        return value

    def _count(self, values: int, line: int) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise self._fatal(f"expected at most {MAX_VALUES:,} values, got more", line, "select by expressions")

    def _scalar(self, event: ScalarEvent) -> Any:
        # JSON, a subset of YAML 1.2, escapes characters beyond U+FFFF as surrogate pairs
        text = event.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        tag = None if event.ctag is None else _short(event.ctag)
        if tag in ("!", "!!str") or (tag is None and not event.implicit[0]):
            return text
        if tag is not None and tag not in _TAGGED_TYPES:
            self._refuse_tag(tag, _line(event))
            return text
        try:
            value = plain_scalar(text)
        except ValueError:  # Python's limit on the digits of an int
            message = f"expected a number of ordinary size, got one of {len(text):,} digits"
            self._problem(message, _line(event), "write a smaller number")
            return 0
        if tag is None:
            return value
        if type(value) not in _TAGGED_TYPES[tag]:
            message = f"expected a value of the YAML type `{tag}`, got {text[:60]!r}"
            self._problem(message, _line(event), "remove the tag")
        return float(value) if tag == "!!float" and isinstance(value, int) else value

    def _refuse_tag(self, tag: object, line: int) -> None:
        self._problem(f"expected plain YAML, got the tag `{_short(tag)}`", line, "remove the tag; no objects are built")

    def _problem(self, message: str, line: int | None, fix: str) -> None:
        if len(self.problems) == MAX_PROBLEMS:
            raise ScheduleFileError(self.problems)
        self.problems.append(Problem(message, fix, source=self.source, line=line))

    def _fatal(self, message: str, line: int | None, fix: str) -> ScheduleFileError:
        self._problem(message, line, fix)
        return ScheduleFileError(self.problems)


def _line(event: Any) -> Line:
    return _place(event.start_mark)


def _place(mark: Any) -> Line:
    return Line(mark.line + 1, mark.column + 1)


def _short(tag: object) -> str:
    return str(tag).replace(_CORE_TAG, "!!")


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
    line, fix = None, "correct the YAML"
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else _place(mark)
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        if error.context == "while scanning an alias":
            fix = _QUOTE
    return Problem(f"expected valid YAML 1.2, got an error: {reason}", fix, source=source, line=line)
