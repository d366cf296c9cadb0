"""How commands answer: text for people, JSON for programs, short errors, exit statuses."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import Problem, ScheduleError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console
    from rich.text import Text

OK, PROBLEMS, USAGE = 0, 1, 2  # exit statuses of every command
MOST_COLUMNS = 100  # of running text; tables take what they need

Force = Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else; the documentation has its shape.")]


class Output:
    """Where one command's answer goes."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json

    @cached_property
    def console(self) -> Console:
        """Standard output: with colours on a terminal, without any control codes elsewhere."""
        return _console(stderr=False)

    @cached_property
    def errors(self) -> Console:
        """Standard error."""
        return _console(stderr=True)

    def print(self, line: str | Text = "", style: str | None = None) -> None:
        """Print a line as it is: it is not wrapped, and nothing in it is taken for mark-up."""
        self.console.print(line, style=style, soft_wrap=True)

    def paragraph(self, text: str, *, indent: int = 0, style: str | None = None, first: str | None = None) -> None:
        """Print running text, wrapped between words, with a hanging indent; ``first`` begins the first line."""
        for line in wrapped(text, self.console.width, indent=indent, first=first):
            self.print(line, style=style)

    def answer(self, shape: BaseModel) -> None:
        """Print the answer for programs."""
        sys.stdout.write(shape.model_dump_json(indent=2) + "\n")

    def fail(self, problems: Sequence[Problem]) -> None:
        """Say on standard error why there is no answer; for programs, on standard output as well."""
        if self.as_json:
            from .shapes import Failure, Finding

            self.answer(Failure(problems=[Finding.of(problem) for problem in problems]))
        for problem in problems:
            said = problem.message if not problem.where else f"{problem.where}: {problem.message}"
            for line in wrapped(said, self.errors.width, indent=7, first="error: "):
                self.errors.print(line, style="red", soft_wrap=True)
            if problem.fix is not None:
                fix = problem.fix[:1].upper() + problem.fix[1:]
                for line in wrapped(fix, self.errors.width, indent=7, first="  Fix: "):
                    self.errors.print(line, soft_wrap=True)


@contextmanager
def answering(*, as_json: bool) -> Iterator[Output]:
    """Give a command its output; what goes wrong is said in short and ends it with status 2.

    What others print meanwhile, such as a user's module that is imported, goes to standard error.
    """
    output = Output(as_json=as_json)
    try:
        with quiet():
            yield output
    except ScheduleError as error:
        output.fail(error.problems)
        raise typer.Exit(USAGE) from error
    except BrokenPipeError as error:  # `fts params model | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(OK) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Let warnings of libraries that only matter in training go unsaid."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def foreign_code() -> Iterator[None]:
    """Run code that is not ours: what it prints goes to standard error, so that the answer stays alone."""
    with redirect_stdout(sys.stderr):
        yield


def wrapped(text: str, width: int, *, indent: int = 0, first: str | None = None) -> list[str]:
    """Wrap text between words; words are never broken, so that names and paths can be copied."""
    return textwrap.wrap(
        text,
        max(40, min(width, MOST_COLUMNS)),
        initial_indent=" " * indent if first is None else first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first or ""]


def counted(number: int, noun: str) -> str:
    """Say how many there are: ``1 tensor``, ``1,234 tensors``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def share(part: int, whole: int) -> str:
    """Say a share in per cent; what is little is not said to be none."""
    per_cent = 100 * part / whole if whole else 0.0
    return "< 0.1 %" if 0 < per_cent < 0.05 else f"{per_cent:.1f} %"


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else shutil.get_terminal_size((80, 24)).columns
    return Console(file=stream, stderr=stderr, markup=False, emoji=False, highlight=False, width=width)
