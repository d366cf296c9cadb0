"""Parts of a model by what people call them: head, embeddings, vision tower, the upper half of the blocks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from ..core.schedule.expression import INVALID, Clock, compiled
from ..core.schedule.names import matching_names
from ..core.schedule.wording import closest, did_you_mean, listed
from ..errors import Problem, ScheduleError
from .outline import ModelOutline

# What a part of a name says, by what it is called.
NAMED: Mapping[str, re.Pattern[str]] = {
    role: re.compile(rf"(^|\.)({parts})(\.|$)")
    for role, parts in {
        "head": r"(\w+_)?head|heads|classifier|fc|score|qa_outputs|logits|output_layer",
        "projector": r"(\w*_)?(projector|connector|merger|projection)|mm_projector|qformer|abstractor",
        "vision": r"vision\w*|visual\w*|image_encoder|vit|img_\w+",
        "language": r"language_model|text_model|text_encoder|language\w*|llm|lm",
    }.items()
}
_FRACTIONS = {"half": 1 / 2, "third": 1 / 3, "quarter": 1 / 4, "two thirds": 2 / 3, "three quarters": 3 / 4}
_PART = re.compile(r"(upper|lower) (?:(\d+(?:\.\d+)?) ?%|(half|third|quarter|two thirds|three quarters))")
_COUNT = re.compile(r"(last|first) (\d+)(?: blocks?)?")


@dataclass(frozen=True)
class Roles:
    """What each part of one model is.

    Attributes:
        outline: The model.
        names: The parameters that a schedule can name, in order.
    """

    outline: ModelOutline
    names: Sequence[str]

    @property
    def block_of(self) -> Mapping[str, str]:
        """The block of each parameter that is in one."""
        return self.outline.block_of

    @cached_property
    def head(self) -> list[str]:
        """The head: what is called so after the last block, else all that comes after it, else the last module."""
        last = max((place for place, name in enumerate(self.names) if name in self.block_of), default=-1)
        after = list(self.names[last + 1 :]) if last >= 0 else list(self.names)
        called = [name for name in after if NAMED["head"].search(name)]
        if called or (after and last >= 0):
            return called or after
        module = self.names[-1].rpartition(".")[0]
        return [name for name in self.names if name.rpartition(".")[0] == module]

    def of(self, text: str, taken: Collection[str] = ()) -> list[str]:
        """Find the parameters that a text means, such as ``head + upper half of vision``.

        Args:
            text: Roles, joined by ``+``; what is no role is a name or a pattern.
            taken: Parameters that earlier phases have.

        Raises:
            ScheduleError: There are none.
        """
        found = {name for term in text.split("+") for name in self._term(term.strip())}.difference(taken)
        if not found:
            there = [*self._there(), "rest"]
            fix = did_you_mean(closest(text, there), f"use {listed(there)}, upper half, last 4, or a pattern")
            what = "which it lacks" if not taken else "which is empty or in an earlier phase"
            raise ScheduleError(Problem(f"expected a part of {self.outline.title}, got {text!r}, {what}", fix))
        return [name for name in self.names if name in found]

    def _term(self, term: str) -> Iterable[str]:
        """The parameters of one role, of what is called ``of`` another where it says so."""
        part, _, role = term.partition(" of ")
        scope = list(self._term(role)) if role else self.names
        if part in ("head", "embeddings"):
            return set(scope).intersection(self.head if part == "head" else self._embeddings())
        if part == "rest":
            return scope
        if part in NAMED:
            return [name for name in scope if NAMED[part].search(name)]
        if (number := _wanted(part)) is not None:
            return self._blocks(*number, scope)
        return set(scope).intersection(self._pattern(part))

    def _blocks(self, side: str, wanted: float, scope: Iterable[str]) -> list[str]:
        """The parameters of the upper or lower blocks in a scope: as many as wanted, or a share if that is below 1."""
        inside = [name for name in scope if name in self.block_of]
        blocks = list(dict.fromkeys(self.block_of[name] for name in inside))
        number = min(len(blocks), ceil(len(blocks) * wanted - 1e-9) if wanted < 1 else int(min(wanted, len(blocks))))
        chosen = set(blocks[len(blocks) - number :] if side in ("upper", "last") else blocks[:number])
        return [name for name in inside if self.block_of[name] in chosen]

    def _embeddings(self) -> list[str]:
        first = next((place for place, name in enumerate(self.names) if name in self.block_of), 0)
        return list(self.names[:first])

    def _pattern(self, pattern: str) -> list[str]:
        if pattern in self.outline.parameters:
            return [pattern]
        try:
            return matching_names(compiled(pattern, Clock()), self.outline.index)
        except (*INVALID, TimeoutError) as error:
            fix = f"use {listed(self._there())}, rest, or a regular expression"
            raise ScheduleError(Problem(f"expected a part of the model, got {pattern!r}", fix)) from error

    def _there(self) -> list[str]:
        """The roles that the model has."""
        named = [role for role, pattern in NAMED.items() if role != "head" and any(map(pattern.search, self.names))]
        return ["head", *named, *(["embeddings"] if self._embeddings() else [])]


def _wanted(part: str) -> tuple[str, float] | None:
    """Read which blocks, and how many or what share of them."""
    if (share := _PART.fullmatch(part)) is not None:
        fraction = float(share[2]) / 100 if share[2] else _FRACTIONS[share[3]]
        return (share[1], fraction) if fraction < 1 else (share[1], float("inf"))
    count = _COUNT.fullmatch(part)
    return None if count is None else (count[1], float(count[2]))
