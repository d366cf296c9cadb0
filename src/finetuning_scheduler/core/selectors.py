"""From names and regular expressions to parameter names.

The work grows linearly with the number of tensors plus the number of selectors: names are looked up in a dict, and a
regular expression is tried only on the names that begin like it, found by bisection in the sorted names.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from torch import nn

from finetuning_scheduler.core.patterns import (
    compiled,
    leading_parts,
    number_boundaries,
    with_dots_escaped,
    with_numbers_guarded,
)
from finetuning_scheduler.core.reinit import check_phases
from finetuning_scheduler.core.schedule import Draft, Phase, Schedule, ScheduleSource, draft
from finetuning_scheduler.errors import OptimizerError, Problem, ScheduleError, ScheduleFormatError, SelectorError

# a search for similar names costs far more than a look-up
MAX_SUGGESTIONS = 5
MAX_NAMES_COMPARED = 2_000
MAX_RANGES = 256


@dataclass(frozen=True)
class ParameterIndex:
    """The names of a model's parameters, made for look-ups.

    `names` are the registered names in order, `aliases` the other names of tied parameters with the registered one,
    `fixed` the parameters whose dtype has no gradient, with that dtype.
    """

    names: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ParameterIndex:
        """Index a model's parameters."""
        registered: dict[int, str] = {}
        aliases: dict[str, str] = {}
        fixed: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in registered:
                aliases[name] = registered[id(parameter)]
                continue
            registered[id(parameter)] = name
            if not (parameter.is_floating_point() or parameter.is_complex()):
                fixed[name] = str(parameter.dtype)
        return cls(tuple(registered.values()), aliases, fixed)

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """The place of each registered name in the order of registration."""
        return {name: position for position, name in enumerate(self.names)}

    @cached_property
    def sorted_names(self) -> Sequence[str]:
        """Registered names and aliases in alphabetical order."""
        return sorted((*self.names, *self.aliases))

    def candidates(self, pattern: str) -> Iterator[str]:
        """The names a regular expression can match, judged by how it begins; every other name cannot match."""
        names = self.sorted_names
        ranges = [(0, len(names))]
        length = 0
        for part in leading_parts(pattern):
            if part is None:
                ranges = [stretch for span in ranges for stretch in _split(names, length, *span)]
            else:
                ranges = [stretch for span in ranges for stretch in _narrowed(names, length, part, *span)]
            length += 1 if part is None else len(part)
            if len(ranges) > MAX_RANGES:
                break
        for start, end in ranges:
            yield from names[start:end]


@dataclass(frozen=True)
class Resolution:
    """A schedule in full parameter names.

    `frozen` is the number of parameters in no phase. `notices` and `warnings` are one line each.
    """

    schedule: Schedule
    notices: tuple[str, ...]
    warnings: tuple[str, ...]
    frozen: int


def resolve(source: ScheduleSource, model: nn.Module | ParameterIndex) -> Resolution:
    """Replace the selectors of a schedule by full names, in the order the model registers them.

    Raises `ScheduleError` with everything that is wrong with the schedule and its selectors.
    """
    index = model if isinstance(model, ParameterIndex) else ParameterIndex.of(model)
    drafted = draft(source)
    resolver = _Resolver(index, drafted)
    phases = [resolver.phase(number, phase) for number, phase in drafted.phases.items()]
    reinit_problems, reinit_warnings = check_phases(drafted.phases, source=drafted.source, lines=drafted.class_lines)
    problems = (*resolver.problems, *resolver.overlaps())
    if reinit_problems and not problems and not drafted.problems:
        raise OptimizerError(reinit_problems)
    if reinit_problems:
        raise ScheduleError((*drafted.problems, *problems, *reinit_problems), renumbered=drafted.renumbered)
    if drafted.problems and problems:
        raise ScheduleError((*drafted.problems, *problems), renumbered=drafted.renumbered)
    if drafted.problems:
        raise ScheduleFormatError(drafted.problems, renumbered=drafted.renumbered)
    if problems:
        raise SelectorError(problems)
    return Resolution(
        Schedule(phases=tuple(phases)),
        (*drafted.notices, *resolver.notices),
        (*drafted.warnings, *resolver.warnings, *reinit_warnings),
        len(index.names) - len(resolver.owners),
    )


class _Resolver:
    """Goes over the phases of one schedule, collecting what it finds."""

    def __init__(self, index: ParameterIndex, drafted: Draft) -> None:
        self.index = index
        self.drafted = drafted
        self.problems: list[Problem] = []
        self.notices: list[str] = []
        self.warnings: list[str] = []
        # the phase and selector that took each parameter first
        self.owners: dict[str, tuple[int, str]] = {}
        self.shared: dict[tuple[int, str, int, str], list[str]] = defaultdict(list)
        # what the phase at hand names but cannot thaw
        self.dropped: list[str] = []
        self.suggestions = 0

    def phase(self, number: int, phase: Phase) -> Phase:
        """The phase with full names instead of selectors."""
        names: dict[str, None] = {}
        found_problem = False
        self.dropped.clear()
        for selector in phase.params:
            before = len(self.problems)
            selected = self._selected(number, selector)
            found_problem |= len(self.problems) > before
            names.update(dict.fromkeys(selected))
            self._claim(number, selector, selected)
        if not names and not found_problem:
            self.problems.append(
                Problem(
                    f"expected a parameter to thaw, got only {_listed(self.dropped)}",
                    "name registered floating point parameters, or remove the phase",
                    self.drafted.source,
                    self.drafted.lines.get((number, phase.params[0])),
                    number,
                )
            )
        return phase.model_copy(update={"params": tuple(names)})

    def overlaps(self) -> Iterator[Problem]:
        """One problem for each two selectors of different phases that select the same parameters."""
        for (first, first_selector, second, second_selector), names in self.shared.items():
            line = self.drafted.lines.get((first, first_selector))
            place = f"phase {first} by selector '{first_selector}'" + ("" if line is None else f" on line {line}")
            message = f"expected each parameter in one phase, but {place} already has {', '.join(names)}"
            yield self._problem(second, second_selector, message, "take it out of one of the two phases")

    def _claim(self, number: int, selector: str, names: Iterable[str]) -> None:
        for name in names:
            owner, owner_selector = self.owners.setdefault(name, (number, selector))
            if owner != number:
                self.shared[owner, owner_selector, number, selector].append(name)

    def _selected(self, number: int, selector: str) -> list[str]:
        """The registered names a selector stands for, without aliases and parameters that cannot be thawed."""
        if selector in self.index.positions:
            return self._named(number, selector)
        if selector in self.index.aliases:
            self._notice_aliases(number, selector, [selector], set())
            return []
        try:
            pattern = compiled(selector)
        except (re.error, OverflowError, RecursionError) as error:
            message = f"expected a parameter name or a regular expression, got an invalid one: {error}"
            self.problems.append(self._problem(number, selector, message, "correct the expression"))
            return []
        matched = matching_names(pattern, self.index)
        if not matched:
            self.problems.append(self._no_match(number, selector))
            return []
        self._warn_about_numbers(number, selector, matched)
        return self._thawable(number, selector, matched)

    def _named(self, number: int, name: str) -> list[str]:
        if name not in self.index.fixed:
            return [name]
        message = f"expected a floating point or complex parameter, got dtype {self.index.fixed[name]}"
        self.problems.append(self._problem(number, name, message, "remove it: it has no gradient"))
        return []

    def _thawable(self, number: int, selector: str, matched: Iterable[str]) -> list[str]:
        registered = sorted(
            (name for name in matched if name in self.index.positions), key=self.index.positions.__getitem__
        )
        aliases = [name for name in matched if name in self.index.aliases]
        self._notice_aliases(number, selector, aliases, set(registered))
        fixed = [f"{name} ({self.index.fixed[name]})" for name in registered if name in self.index.fixed]
        self.dropped += fixed
        if fixed:
            self._notice(number, selector, f"left out, since their dtype has no gradient: {_listed(fixed)}")
        return [name for name in registered if name not in self.index.fixed]

    def _notice_aliases(self, number: int, selector: str, aliases: Iterable[str], selected: set[str]) -> None:
        dropped = [
            f"{alias} (registered as {self.index.aliases[alias]})"
            for alias in aliases
            if self.index.aliases[alias] not in selected
        ]
        self.dropped += dropped
        if dropped:
            message = f"aliases of tied parameters are dropped, the registered name thaws them: {_listed(dropped)}"
            self._notice(number, selector, message)

    def _warn_about_numbers(self, number: int, selector: str, matched: Sequence[str]) -> None:
        if len(matched) < 2:
            return
        overrun = number_overruns(selector, matched)
        if overrun is not None:
            corrected, unintended = overrun
            message = f"the match runs across a number: it also selects {unintended}"
            self.warnings.append(str(self._problem(number, selector, message, f"write '{corrected}'")))

    def _no_match(self, number: int, selector: str) -> Problem:
        fix = "use names of the model's named_parameters()"
        if self.suggestions < MAX_SUGGESTIONS:
            self.suggestions += 1
            near = closest_names(selector, self.index)
            fix = f"did you mean {' or '.join(near)}?" if near else fix
        return self._problem(number, selector, "expected to match a parameter, but matches none", fix)

    def _problem(self, number: int, selector: str, message: str, fix: str | None = None) -> Problem:
        line = self.drafted.lines.get((number, selector))
        return Problem(message, fix, self.drafted.source, line, number, selector)

    def _notice(self, number: int, selector: str, message: str) -> None:
        self.notices.append(str(self._problem(number, selector, message)))


def number_overruns(selector: str, matched: Sequence[str]) -> tuple[str, str] | None:
    """A selector with its numbers ended where a match runs across them, and one name it then leaves out."""
    matches = _whole if _whole(compiled(selector), matched[0]) else _matches_prefix
    overruns: dict[int, str] = {}
    for place in number_boundaries(selector):
        guarded = compiled(with_numbers_guarded(selector, [place]))
        name = next((name for name in matched if not matches(guarded, name)), None)
        if name is not None:
            overruns[place] = name
    if not overruns:
        return None
    guarded = compiled(with_numbers_guarded(selector, overruns))
    intended = [name for name in matched if matches(guarded, name)]
    # where nothing is left, the longer number is what the user means
    if not intended:
        return None
    plain = compiled(with_dots_escaped(selector, overruns))
    corrected = plain if all(matches(plain, name) for name in intended) else guarded
    return corrected.pattern, next(iter(overruns.values()))


def matching_names(pattern: re.Pattern[str], index: ParameterIndex) -> list[str]:
    """The names a pattern matches whole; if there are none, those it matches up to a dot."""
    candidates = list(index.candidates(pattern.pattern))
    whole = [name for name in candidates if pattern.fullmatch(name)]
    return whole or [name for name in candidates if _matches_prefix(pattern, name)]


def closest_names(selector: str, index: ParameterIndex) -> list[str]:
    """Up to three names that look like a selector, the closest first; of a large model, only some are compared."""
    names = [name for name in index.sorted_names if name not in index.aliases]
    if len(names) > MAX_NAMES_COMPARED:
        middle = bisect_left(names, selector)
        last = selector.rpartition(".")[2]
        near = names[max(0, middle - MAX_NAMES_COMPARED // 4) : middle + MAX_NAMES_COMPARED // 4]
        same_end = islice((name for name in names if name.endswith(last)), MAX_NAMES_COMPARED // 2)
        names = list(dict.fromkeys((*near, *same_end)))
    return difflib.get_close_matches(selector.replace("\\", ""), names, n=3, cutoff=0.6)


def _whole(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.fullmatch(name) is not None


def _matches_prefix(pattern: re.Pattern[str], name: str) -> bool:
    """Whether the pattern matches the name up to a dot, with or without the dot."""
    dots = (position for position, character in enumerate(name) if character == ".")
    return any(pattern.fullmatch(name, 0, dot) or pattern.fullmatch(name, 0, dot + 1) for dot in dots)


def _narrowed(names: Sequence[str], length: int, part: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The stretch of a range of names that has `part` at `length`; the names share what comes before."""
    start = bisect_left(names, part, start, end, key=lambda name: name[length : length + len(part)])
    end = bisect_right(names, part, start, end, key=lambda name: name[length : length + len(part)])
    if start < end:
        yield start, end


def _split(names: Sequence[str], length: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The stretches of a range of names that share the character at `length`."""
    while start < end:
        character = names[start][length : length + 1]
        stop = bisect_right(names, character, start, end, key=lambda name: name[length : length + 1])
        if character:
            yield start, stop
        start = stop


def _listed(items: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit:,} more"
