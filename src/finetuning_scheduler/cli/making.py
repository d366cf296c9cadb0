"""Schedules of a model by heuristic or by role, said in short patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from ..core.schedule.collapse import collapsed, counted_by_module
from ..core.schedule.expression import Clock, compiled
from ..core.schedule.generate import generate
from ..core.schedule.names import matching_names
from ..core.schedule.resolve import REST
from ..errors import Problem, ScheduleError
from .outline import ModelOutline
from .roles import Roles

LAYER_DECAY = 0.9  # of the layer-wise schedule: a common value, to be changed


@dataclass(frozen=True)
class PhaseDraft:
    """A phase to be written.

    Attributes:
        title: What it is.
        names: The parameters that it thaws.
        selectors: What is written for them.
        keys: What else the phase says.
    """

    title: str
    names: Sequence[str]
    selectors: Sequence[str] = ()
    keys: dict[str, Any] = field(default_factory=dict)


def by_heuristic(outline: ModelOutline, heuristic: str) -> list[PhaseDraft]:
    """Make the phases of a heuristic; what comes frozen, or cannot be trained, stays out.

    - ``pairs``: two parameters a phase, from the last to the first, under their full names.
    - ``blocks``: a phase each block, from the last to the first.
    - ``head-first``: the head, then everything.
    - ``layer-wise``: the head, then everything with learning rates that fall from block to block.

    Raises:
        ScheduleError: There is nothing to thaw.
    """
    if heuristic in ("pairs", "blocks"):
        schedule = generate(outline.structure, "blocks" if heuristic == "blocks" else "pairs", frozen=outline.frozen)
        groups = [list(phase.params) for phase in schedule.phases]
        if heuristic == "pairs":
            return [PhaseDraft("", names, names) for names in groups]
        drafts = [PhaseDraft(_title(names, position), names) for position, names in enumerate(groups)]
        return with_selectors(outline, drafts)
    keys = {"lr_decay": LAYER_DECAY} if heuristic == "layer-wise" else {}
    head, rest = by_roles(outline, ["head", "rest"])
    return [head, PhaseDraft("everything", rest.names, rest.selectors, keys)]


def by_roles(outline: ModelOutline, texts: Sequence[str]) -> list[PhaseDraft]:
    """Make a phase of each text, such as ``head`` and ``upper half``.

    Raises:
        ScheduleError: A text means nothing in the model, or nothing that is left.
    """
    roles = Roles(outline, thawable(outline))
    taken: set[str] = set()
    drafts = []
    for text in texts:
        names = roles.of(text, taken)
        taken.update(names)
        drafts.append(PhaseDraft(text, names))
    rest = texts[-1].strip() == "rest" and not outline.frozen
    written = with_selectors(outline, drafts[:-1] if rest else drafts)
    return [*written, PhaseDraft(drafts[-1].title, drafts[-1].names, [REST])] if rest else written


def thawable(outline: ModelOutline) -> list[str]:
    """Name the parameters that a generated schedule can thaw, in order.

    Raises:
        ScheduleError: There are none.
    """
    fixed = outline.index.fixed
    names = [name for name in outline.parameters if name not in fixed and name not in outline.frozen]
    if not names:
        raise ScheduleError(
            Problem("expected a model with parameters to thaw, got none", "name another", outline.source)
        )
    return names


def with_selectors(outline: ModelOutline, drafts: Iterable[PhaseDraft]) -> list[PhaseDraft]:
    """Say the names of each phase in patterns that select these and no others."""
    there = counted_by_module(outline.parameters)
    written = []
    for draft in drafts:
        names = sorted(draft.names, key=outline.index.positions.__getitem__)
        patterns = list(_exact(collapsed(names, there), set(names), outline))
        written.append(PhaseDraft(draft.title, names, patterns, draft.keys))
    return written


def _exact(patterns: Iterable[str], names: set[str], outline: ModelOutline) -> Iterator[str]:
    """Let the dots behind numbers be dots where a pattern selects more without; else write the names out."""
    left = set(names)
    for pattern in patterns:
        path, whole = pattern.removesuffix(".*"), r"\..*" if pattern.endswith(".*") else ""
        after_numbers = re.sub(r"(?<=[\d\])])\.", r"\\.", path) + whole
        for tried in dict.fromkeys((pattern, after_numbers, path.replace(".", r"\.") + whole)):
            found = {tried} if tried in names else set(matching_names(compiled(tried, Clock()), outline.index))
            found -= outline.index.aliases.keys() | outline.index.fixed.keys()
            if found and found <= names:
                left -= found
                yield tried
                break
    yield from sorted(left, key=outline.index.positions.__getitem__)


def _title(names: Sequence[str], position: int) -> str:
    """Say what a phase of the heuristic `blocks` is: the path that its names share tells it."""
    shared = list(
        takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(".") for name in names), strict=False))
    )
    path = [parts[0] for parts in shared if parts[0] != names[0].split(".")[-1]]
    if any(character.isdigit() for character in "".join(path)):
        return f"block {'.'.join(path)}"
    return "after the last block" if position == 0 else "before or between blocks"
