"""A plan as a page: one file of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .shapes import PhasePlan, PlanReport
from .tables import group_rows, percent, rates, size, summary

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 92rem; padding: 0 1rem; }
.fts-scroll { overflow-x: auto; }
.fts-plan table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
.fts-plan th, .fts-plan td { border-bottom: 1px solid #8886; padding: .3rem .7rem; text-align: right;
  vertical-align: top; white-space: nowrap; }
.fts-plan .fts-text { min-width: 12rem; overflow-wrap: anywhere; text-align: left; white-space: normal; }
.fts-plan code { font-size: .9em; }
"""


def plan_page(report: PlanReport) -> str:
    """Make a page of a plan."""
    title = escape(f"Plan: {report.model}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{_content(report)}\n</body>\n</html>\n"
    )


def plan_fragment(report: PlanReport) -> str:
    """Make of a plan what a notebook shows."""
    style = "\n".join(line for line in _STYLE.splitlines() if not line.startswith((":root", "body")))
    return f"<style>{style}</style>{_content(report)}"


def _content(report: PlanReport) -> str:
    kinds = ("weights", "gradients", "optimizer state", "memory")
    phases = ("phase", "thaws", "trained", "share", "groups", "new at", *kinds, "step", "saved", "ends")
    groups = ("group", "phase", "parameters", "learning rate", "options")
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*report.notes, "Memory is told without activations."))
    return (
        f'<div class="fts-plan"><p>{escape(summary(report))}</p>'
        f"{_table(phases, map(_phase, report.phases), text={'thaws', 'ends'})}"
        f"{_table(groups, group_rows(report), text={'group', 'options'})}<ul>{notes}</ul></div>"
    )


def _phase(phase: PhasePlan) -> Sequence[str]:
    return (
        str(phase.phase),
        ", ".join(phase.thaws),
        f"{phase.trainable_parameters:,}",
        percent(phase.share),
        str(phase.groups),
        rates([group.learning_rate for group in phase.new_groups]),
        size(phase.memory.weights),
        size(phase.memory.gradients),
        "unknown" if phase.memory.optimizer_state is None else size(phase.memory.optimizer_state),
        size(phase.memory.total),
        f"{phase.step_cost:.2f}",
        percent(phase.reuse_saves),
        phase.ends,
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], text: set[str]) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (' class="fts-text"' if name in text else "" for name in names)
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="fts-scroll"><table><tr>{cells("th", names)}</tr>{body}</table></div>'
