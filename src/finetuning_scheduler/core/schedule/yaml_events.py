"""From the events of the YAML parser to plain Python values.

Working on events instead of the library's loader keeps line numbers, finds duplicate keys, goes on after a custom tag
and never builds anything but dicts, lists and scalars. Scalars follow the core schema of YAML 1.2.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from ...errors import Problem, ScheduleFileError

MAX_DEPTH = 100
MAX_ALIASED_VALUES = 1_000_000

# the core schema of YAML 1.2, section 10.3.2: the only plain scalars that are not strings
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")

_CORE_TAG = "tag:yaml.org,2002:"

_CORE_TAG = "tag:yaml.org,2002:"

KeyPath = tuple[Any, ...]


@dataclass
class _Container:
    """A mapping or sequence that is being read."""

    value: Any
    path: KeyPath
    line: int
    anchor: str | None
    size: int = 1
    key: Any = None
    key_line: int | None = None
    key_lines: dict[Any, int] = field(default_factory=dict)


_SKIPPED_KEY = object()


class DocumentBuilder:
    """Makes plain Python values out of the parser's events, one at a time."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.root: Any = None
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self.documents = 0
        self._open: list[_Container] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._aliased = 0

    def take(self, event: Any) -> None:
        """Take the parser's next event; raises `ScheduleFileError` for what makes the rest meaningless."""
        line = event.start_mark.line + 1
        if isinstance(event, ScalarEvent):
            self._put(self._scalar(event, line), line, 1, event.anchor)
        elif isinstance(event, MappingStartEvent):
            self._start({}, event, line)
        elif isinstance(event, SequenceStartEvent):
            self._start([], event, line)
        elif isinstance(event, (MappingEndEvent, SequenceEndEvent)):
            done = self._open.pop()
            self._put(done.value, done.line, done.size, done.anchor)
        elif isinstance(event, AliasEvent):
            self._alias(event.anchor, line)
        elif isinstance(event, DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise self._fatal("expected one YAML document, got a second one", line, "remove it, with its `---`")

    def _start(self, value: Any, event: Any, line: int) -> None:
        if event.ctag is not None and str(event.ctag) not in ("!", f"{_CORE_TAG}map", f"{_CORE_TAG}seq"):
            self._refuse_tag(event.ctag, line)
        if len(self._open) >= MAX_DEPTH:
            raise self._fatal(f"expected at most {MAX_DEPTH} nested levels, got more", line, "flatten it")
        if event.anchor is not None:
            self._anchors.pop(event.anchor, None)
        path: KeyPath = ()
        if self._open:
            parent = self._open[-1]
            path = (*parent.path, len(parent.value) if isinstance(parent.value, list) else parent.key)
        self._open.append(_Container(value, path, line, event.anchor))

    def _alias(self, anchor: str, line: int) -> None:
        if anchor not in self._anchors:
            reason = f"expected an alias of an anchor above it, got `*{anchor}`"
            if any(container.anchor == anchor for container in self._open):
                reason = f"expected a finite structure, got the alias `*{anchor}` inside its own anchor"
            raise self._fatal(reason, line, "write the values out")
        value, size = self._anchors[anchor]
        self._aliased += size
        if self._aliased > MAX_ALIASED_VALUES:
            raise self._fatal(
                f"expected aliases of at most {MAX_ALIASED_VALUES:,} values, got more", line, "use fewer aliases"
            )
        self._put(value, line, size, None)

    def _put(self, value: Any, line: int, size: int, anchor: str | None) -> None:
        """Put a finished value where it belongs: into the sequence or mapping that is open, or at the root."""
        if anchor is not None:
            self._anchors[anchor] = (value, size)
        if not self._open:
            self.root = value
            return
        parent = self._open[-1]
        parent.size += size
        if isinstance(parent.value, list):
            path = (*parent.path, len(parent.value))
            self.lines[path] = line
            parent.value.append(value)
        elif parent.key_line is None:
            self._key(parent, value, line)
        else:
            if parent.key is not _SKIPPED_KEY:
                parent.value[parent.key] = value
            parent.key = parent.key_line = None

    def _key(self, parent: _Container, key: Any, line: int) -> None:
        parent.key, parent.key_line = _SKIPPED_KEY, line
        if isinstance(key, (dict, list)):
            kind = "mapping" if isinstance(key, dict) else "list"
            self._problem(f"expected a number or a string as key, got a {kind}", line, "use a number or a string")
        elif key in parent.key_lines:
            first = parent.key_lines[key]
            self._problem(
                f"expected each key once, got {key!r} on line {first} and again on line {line}",
                line,
                f"merge lines {first} and {line}, or remove one",
            )
        else:
            parent.key = key
            parent.key_lines[key] = line
            path = (*parent.path, key)
            self.lines[path] = line

    def _scalar(self, event: ScalarEvent, line: int) -> Any:
        # JSON, a subset of YAML 1.2, escapes characters beyond U+FFFF as surrogate pairs
        text = event.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        if event.ctag is not None and str(event.ctag) != "!":
            return self._tagged_scalar(str(event.ctag), text, line)
        if not event.implicit[0] or event.ctag is not None:
            return text
        try:
            return _plain_scalar(text)
        except ValueError:  # Python's limit on the digits of an int
            self._problem(
                f"expected a number of ordinary size, got one of {len(text):,} digits", line, "write a smaller number"
            )
            return 0

    def _tagged_scalar(self, tag: str, text: str, line: int) -> Any:
        if tag == f"{_CORE_TAG}str":
            return text
        kinds: dict[str, tuple[type, ...]] = {
            f"{_CORE_TAG}null": (type(None),),
            f"{_CORE_TAG}bool": (bool,),
            f"{_CORE_TAG}int": (int,),
            f"{_CORE_TAG}float": (int, float),
        }
        if tag not in kinds:
            self._refuse_tag(tag, line)
            return text
        try:
            value = _plain_scalar(text)
        except ValueError:  # Python's limit on the digits of an int
            value = text
        if not isinstance(value, kinds[tag]):
            self._problem(
                f"expected a value of the YAML type `{_short(tag)}`, got {text[:60]!r}", line, "remove the tag"
            )
        return float(value) if tag == f"{_CORE_TAG}float" and isinstance(value, int) else value

    def _refuse_tag(self, tag: object, line: int) -> None:
        self._problem(f"expected plain YAML, got the tag `{_short(tag)}`", line, "remove the tag; no objects are built")

    def _problem(self, message: str, line: int, fix: str) -> None:
        self.problems.append(Problem(message, fix, source=self.source, line=line))

    def _fatal(self, message: str, line: int, fix: str) -> ScheduleFileError:
        return ScheduleFileError([*self.problems, Problem(message, fix, source=self.source, line=line)])


def _short(tag: object) -> str:
    return str(tag).replace(_CORE_TAG, "!!")


def _plain_scalar(text: str) -> Any:
    """The value of an unquoted scalar in YAML 1.2; raises ValueError for an int with too many digits."""
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
