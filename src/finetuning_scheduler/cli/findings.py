"""What was found in a schedule: each finding with its place, the line of the file and a caret below it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..core.schedule.draft import draft
from ..core.schedule.resolve import Resolution, resolve_names
from ..errors import Line, Problem, ScheduleError, ScheduleFileError
from .outline import ModelOutline
from .output import Output, wrapped
from .shapes import Finding, Kind

STYLES: dict[Kind, str] = {"error": "bold red", "warning": "bold yellow", "notice": "bold cyan"}
_LONGEST_LINE = 160


def readable(path: str) -> str:
    """Return the path of a schedule's file that is there.

    Raises:
        ScheduleFileError: It is not.
    """
    if Path(path).is_dir():
        raise ScheduleFileError(Problem("expected a schedule file, got a folder", "name the YAML file in it", path))
    if not Path(path).exists():
        message = "expected a schedule file, but there is none of that name"
        raise ScheduleFileError(Problem(message, "check the path; `fts new` writes one", path))
    return path


def resolved(path: str, outline: ModelOutline) -> Resolution:
    """Read a schedule for a model; what is wrong with it is in the result.

    Only what the schedule needs is imported: names and settings are looked at without PyTorch.
    """
    if outline.module is not None:
        from ..core.prepare import read_for

        return read_for(outline.view, Path(path))
    try:
        drafted = draft(path)
    except ScheduleFileError as error:
        return Resolution(errors=(error,))
    if any(phase.new_optimizer or phase.new_lr_scheduler for phase in drafted.phases.values()):
        from ..core.prepare import read

        return read(Path(path), outline.index)
    return resolve_names(drafted, outline.index)


def usable(path: str, outline: ModelOutline) -> Resolution:
    """Read a schedule that has to be right.

    Raises:
        ScheduleError: With everything that is wrong with it.
    """
    found = resolved(readable(path), outline)
    if found.errors:
        raise ScheduleError([problem for error in found.errors for problem in error.problems])
    return found


def findings(found: Resolution, path: str) -> list[Finding]:
    """List what is to be said about a schedule: errors, warnings, notices, each from the top of the file on."""
    problems = [Finding.of(problem) for error in found.errors for problem in error.problems]
    said: list[tuple[Kind, Sequence[str]]] = [("warning", found.warnings), ("notice", found.notices)]
    texts = [_of_text(text, path, kind) for kind, lines in said for text in lines]
    ranks = {"error": 0, "warning": 1, "notice": 2}
    return sorted([*problems, *texts], key=lambda each: (ranks[each.kind], each.line or 0, each.column or 0))


def print_findings(output: Output, found: Iterable[Finding], *, with_fix: bool = True) -> None:
    """Print each finding: ``file:line:column: kind: message``, the line with a caret, and what to do."""
    texts: dict[str, list[str]] = {}
    for finding in found:
        _print_head(output, finding)
        if finding.file is not None and finding.line is not None:
            if finding.file not in texts:
                texts[finding.file] = _lines_of(finding.file)
            _print_snippet(output, finding, texts[finding.file])
        if finding.fix is not None and with_fix:
            fix = finding.fix[:1].upper() + finding.fix[1:]
            for line in wrapped(fix, output.console.width, indent=9, first="    Fix: "):
                output.print(line)
        output.print()


def _print_head(output: Output, finding: Finding) -> None:
    from rich.text import Text

    place = [finding.file or "", *(str(number) for number in (finding.line, finding.column) if number is not None)]
    where = f"{':'.join(place)}: " if finding.file else ""
    phase = "" if finding.phase is None else f"phase {finding.phase}: "
    lines = wrapped(f"{where}{finding.kind}: {phase}{finding.message}", output.console.width, indent=4, first="")
    first = Text(lines[0])
    start = len(where)
    if lines[0].startswith(where):
        first.stylize("bold", 0, start)
        first.stylize(STYLES[finding.kind], start, start + len(finding.kind) + 1)
    output.print(first)
    for line in lines[1:]:
        output.print(line)


def _print_snippet(output: Output, finding: Finding, lines: Sequence[str]) -> None:
    """Print the line of the file, and below it carets from the column on."""
    from rich.text import Text

    number = finding.line or 0
    if not 1 <= number <= len(lines):
        return
    line = lines[number - 1].replace("\t", " ").rstrip()
    gutter = f"{number:>6} | "
    line_text = Text(gutter, "dim").append(line[:_LONGEST_LINE], "not dim")
    output.print(line_text)
    if finding.column is not None:
        start = min(finding.column - 1, len(line))
        length = _marked_length(line[start:], finding.selector)
        carets = "^" * max(1, min(length, _LONGEST_LINE - start))
        output.print(Text(f"{'':>6} | {' ' * start}", "dim").append(carets, f"not dim {STYLES[finding.kind]}"))


def _marked_length(rest: str, selector: str | None) -> int:
    """How much of a line, from a finding's column on, it is about: a selector, or a key with what stands behind it."""
    if selector is not None and rest.startswith((selector, f"'{selector}'", f'"{selector}"')):
        return len(selector) + (2 if rest[0] in "'\"" else 0)
    return len(re.sub(r"\s+#.*", "", rest).rstrip())


def _lines_of(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except OSError:
        return []


def _of_text(text: str, path: str, kind: Kind) -> Finding:
    """Take a line about a schedule apart: it begins with the place, and what to do stands at its end."""
    phase = r"(?:phase (?P<phase>\d+)(?:, selector '(?P<selector>.*?)')?: )?"
    place = rf"(?:{re.escape(path)}(?::(?P<line>\d+))?, )?{phase}"
    found = re.fullmatch(rf"{place}(?P<message>.*?)(?:\. Fix: (?P<fix>.*))?", text, re.DOTALL)
    if found is None:
        return Finding(kind=kind, message=text)
    line = None if found["line"] is None else int(found["line"])
    column = None
    if line is not None:
        lines = _lines_of(path)
        here = lines[line - 1] if line <= len(lines) else ""
        at = here.find(found["selector"]) if found["selector"] else len(here) - len(here.lstrip())
        column = at + 1 if at >= 0 else None
    problem = Problem(
        found["message"],
        found["fix"],
        path if line is not None else None,
        None if line is None else Line(line, column),
        None if found["phase"] is None else int(found["phase"]),
        found["selector"],
    )
    return Finding.of(problem, kind)
