"""Everything the package raises for a schedule or configuration that cannot be used.

- ScheduleError (a ValueError)
    - ScheduleFileError: the file cannot be read, or is not YAML
    - ScheduleFormatError: wrong keys, types or values, gaps, duplicates
    - SelectorError: selectors that do not fit the model
    - OptimizerError: an optimizer or LR scheduler that cannot be used
    - CheckpointError: a checkpoint that cannot be used

Every error holds all the problems that were found. When they are of several kinds, the error is a plain
`ScheduleError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

MAX_PROBLEMS = 5_000  # of a kind, that are looked for; nobody reads more
_MAX_SHOWN = 100
_MAX_CHARACTERS = 4_000


class Line(int):
    """A line of a file, counted from 1, that knows the column as well, counted from 1."""

    column: int | None

    def __new__(cls, line: int, column: int | None = None) -> Line:
        """Make a line."""
        made = super().__new__(cls, line)
        made.column = column
        return made


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where it is and what to do about it; `str()` gives it as one line."""

    message: str
    fix: str | None = None
    source: str | None = None
    line: int | None = None
    phase: int | None = None
    selector: str | None = None

    @property
    def column(self) -> int | None:
        """The column of its line, counted from 1, where known."""
        return getattr(self.line, "column", None)

    @property
    def where(self) -> str:
        """The place, as far as it is known.

        For example `file.yaml:12, phase 2, selector 'x.y'`.
        """
        parts = []
        if self.source is not None:
            parts.append(self.source if self.line is None else f"{self.source}:{self.line}")
        if self.phase is not None:
            parts.append(f"phase {self.phase}")
        if self.selector is not None:
            parts.append(f"selector '{self.selector}'")
        return ", ".join(parts)

    def __str__(self) -> str:
        where, message = _cut(self.where), _cut(self.message)
        text = f"{where}: {message}" if where else message
        if self.fix is not None:
            text = f"{text.rstrip('.')}. Fix: {self.fix[:1].upper()}{_cut(self.fix[1:])}"
        return _one_line(text)


class ScheduleError(ValueError):
    """A schedule, or what it asks of a model, cannot be used.

    `problems` holds everything that was found. `renumbered` is set when the phase numbers have gaps: the user's
    schedule, numbered from 0 in the order of its keys.
    """

    def __init__(
        self,
        problems: Problem | Iterable[Problem],
        headline: str | None = None,
        renumbered: Mapping[int, Any] | None = None,
    ) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.headline = headline
        self.renumbered: dict[int, Any] | None = None if renumbered is None else dict(renumbered)
        # what pickle calls the class with when an error crosses a process boundary
        super().__init__(self.problems, self.headline, self.renumbered)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            text = str(self.problems[0])
            return text if self.headline is None else f"{self.headline}: {text}"
        headline = f"{len(self.problems)} problems found" if self.headline is None else self.headline
        lines = [f"{i}. {problem}" for i, problem in enumerate(self.problems[:_MAX_SHOWN], start=1)]
        if len(self.problems) > _MAX_SHOWN:
            lines.append(f"... and {len(self.problems) - _MAX_SHOWN:,} more, in the attribute `problems`")
        return "\n".join([f"{headline}:", *lines])


class ScheduleFileError(ScheduleError):
    """A schedule file that cannot be read or is not one YAML document in UTF-8."""


class ScheduleFormatError(ScheduleError):
    """A schedule with wrong keys, types or values, with gaps between its phases, or with duplicates."""


class SelectorError(ScheduleError):
    """Selectors that match nothing, overlap, or select what cannot be thawed."""


class OptimizerError(ScheduleError):
    """An optimizer or LR scheduler that does not exist, does not take its arguments, or is not supported."""


class CheckpointError(ScheduleError):
    """A checkpoint that is missing, unreadable, or was written without this package."""


@contextmanager
def in_file(path: object) -> Iterator[None]:
    """Let the problems of a checkpoint's content tell which file it is."""
    try:
        yield
    except CheckpointError as error:
        if path is None:
            raise
        raise CheckpointError(
            [replace(problem, source=problem.source or str(path)) for problem in error.problems]
        ) from error


def joined(errors: Sequence[ScheduleError]) -> ScheduleError:
    """Make one error of several: of the class that they share, else a plain `ScheduleError`."""
    if len(errors) == 1:
        return errors[0]
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else ScheduleError
    renumbered = next((error.renumbered for error in errors if error.renumbered is not None), None)
    return kind([problem for error in errors for problem in error.problems], renumbered=renumbered)


def _cut(text: str) -> str:
    """Leave out the middle of a text that is too long to be read."""
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def _one_line(text: str) -> str:
    """Show control characters and line breaks as escapes, so that a message stays one line of any log."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: ascii(found.group())[1:-1], text)
