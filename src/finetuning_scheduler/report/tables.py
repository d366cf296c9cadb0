"""Plans and learning rates as text: plain lines that fit 80 columns, and Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from .shapes import GroupPlan, MemoryPlan, PhasePlan, PlanReport

WIDTH = 80
_COLUMNS = ("phase", "trained", "share", "groups", "new at", "memory", "step", "saved")
_MOST_GROUPS = 8  # of a phase that are told one by one
_EXPLAINED = (
    "memory: weights, gradients and optimizer state, without activations; step: cost relative to training all "
    "parameters; saved: share of a step that frozen-prefix reuse saves once its outputs are recorded."
)


def plan_table(report: PlanReport, width: int = WIDTH) -> Iterator[str]:
    """Say a plan in lines of plain text: a table of all phases, then each phase."""
    yield from wrapped(summary(report), width)
    yield ""
    yield from aligned([_COLUMNS, *map(_row, report.phases)], left=("new at",))
    yield ""
    for text in (_EXPLAINED, *report.notes):
        yield from wrapped(text, width)
    for phase in report.phases:
        yield ""
        yield from _phase_lines(phase, width)


def plan_markdown(report: PlanReport) -> Iterator[str]:
    """Say a plan in Markdown."""
    yield summary(report)
    yield ""
    yield from markdown([(*_COLUMNS, "thaws"), *((*_row(phase), _code(phase.thaws)) for phase in report.phases)])
    yield ""
    yield from (f"- {text}" for text in (_EXPLAINED, *report.notes))
    yield ""
    head = ("group", "phase", "parameters", "learning rate", "options")
    yield from markdown([head, *group_rows(report)])
    yield ""
    yield from (f"- Phase {phase.phase} ends {phase.ends}." for phase in report.phases)


def summary(report: PlanReport) -> str:
    """Say in a sentence what a plan is of."""
    last = report.phases[-1]
    phases = "1 phase" if len(report.phases) == 1 else f"{len(report.phases):,} phases"
    frozen = f", {report.frozen_parameters:,} of them in no phase" if report.frozen_parameters else ""
    return (
        f"{report.model}: {report.parameters:,} parameters{frozen}, {phases}, {last.groups:,} parameter groups in the "
        f"end; {report.optimizer}, precision {report.precision}; at most {size(report.most_memory)}, against "
        f"{size(report.full_memory.total)} for training everything."
    )


def group_rows(report: PlanReport) -> Iterator[tuple[str, ...]]:
    """Say all groups, a row each."""
    for phase in report.phases:
        for group in phase.new_groups:
            yield group.name, str(phase.phase), f"{group.parameters:,}", _rate(group.learning_rate), _options(group)


def _row(phase: PhasePlan) -> tuple[str, ...]:
    return (
        str(phase.phase),
        f"{phase.trainable_parameters:,}",
        percent(phase.share),
        str(phase.groups),
        rates([group.learning_rate for group in phase.new_groups]),
        size(phase.memory.total) + ("" if phase.memory.optimizer_state is not None else "+"),
        f"{phase.step_cost:.2f}",
        percent(phase.reuse_saves),
    )


def _phase_lines(phase: PhasePlan, width: int) -> Iterator[str]:
    yield from wrapped(f"Phase {phase.phase} ends {phase.ends}", width)
    yield from _item("thaws", ", ".join(phase.thaws), width)
    for group in phase.new_groups[:_MOST_GROUPS]:
        options = f", {_options(group)}" if group.options else ""
        text = f"{group.name}: {group.parameters:,} parameters at {_rate(group.learning_rate)}{options}"
        yield from _item("group", text, width)
    if more := phase.new_groups[_MOST_GROUPS:]:
        at = rates([group.learning_rate for group in more])
        yield from _item("", f"and {len(more):,} more, up to {more[-1].name}, at {at}", width)
    if phase.lr_warmup_steps:
        yield from _item("warm-up", f"{phase.lr_warmup_steps:,} steps", width)
    yield from _item("optimizer", phase.optimizer, width)
    if phase.new_lr_scheduler is not None:
        yield from _item("LR scheduler", f"{phase.new_lr_scheduler}, new{_restart(phase)}", width)
    yield from _item("memory", memory_text(phase.memory), width)


def _restart(phase: PhasePlan) -> str:
    if phase.restart_learning_rates is None:
        return ""
    said = ", ".join(map(_rate, phase.restart_learning_rates[:8]))
    more = ", ..." if len(phase.restart_learning_rates) > 8 else ""
    return f"; earlier groups go on from {said}{more}"


def memory_text(memory: MemoryPlan) -> str:
    """Say what memory is for."""
    state = "unknown" if memory.optimizer_state is None else size(memory.optimizer_state)
    return f"weights {size(memory.weights)}, gradients {size(memory.gradients)}, optimizer state {state}"


def _item(name: str, text: str, width: int) -> Iterator[str]:
    yield from wrapped(text, width, first=f"  {name:<13}", indent=15)


def _options(group: GroupPlan) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in group.options.items()
    )


def _code(patterns: Sequence[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns).replace("|", "\\|")


def _rate(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:g}"


def rates(values: Sequence[float | None]) -> str:
    """Say learning rates in short."""
    distinct = list(dict.fromkeys(values))
    if len(distinct) > 2:
        numbers = [value for value in distinct if value is not None]
        return f"{min(numbers):g}..{max(numbers):g}"
    return ", ".join(map(_rate, distinct)) or "-"


def percent(share: float) -> str:
    """Say a share; one that is not zero is never said to be."""
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def size(number: int) -> str:
    """Say a number of bytes."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def wrapped(text: str, width: int, *, first: str = "", indent: int = 0) -> list[str]:
    """Wrap text between words; words, such as patterns, stay whole."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def aligned(rows: Iterable[Sequence[str]], left: Sequence[str] = ()) -> Iterator[str]:
    """Align columns, to the right but for those that are named; the first row has the names."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(row, widths, rows[0], strict=True)
        )
        yield "  ".join(cells).rstrip()


def markdown(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Make a table in Markdown; the first row has the names."""
    for number, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if not number:
            yield f"|{'---|' * len(row)}"
