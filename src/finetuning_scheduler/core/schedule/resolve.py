"""From selectors, names and regular expressions, to full parameter names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice, takewhile
from typing import Any

from ...errors import MAX_PROBLEMS, Problem, ScheduleError, ScheduleFormatError, SelectorError, joined
from .draft import Draft
from .expression import INVALID, Clock, compiled, too_slow
from .hints import number_overruns, suggested_pattern
from .model import Phase
from .names import ParameterIndex, closest_names, matching_names
from .schedule import Schedule
from .wording import did_you_mean, listed

MAX_SUGGESTIONS = 5  # a search for similar names costs far more than a look-up
REST = "*"  # selects every parameter that no other selector of the schedule selects


@dataclass(frozen=True)
class Resolution:
    """A schedule in full parameter names, as far as it can be used.

    Attributes:
        phases: The phases before the first one that cannot be used: all of them if there are no errors.
        errors: What is wrong with it, by kind.
        notices: What the user may want to know, one line each.
        warnings: What the user should look at, one line each.
        frozen: The number of parameters in no phase.
        source: The file's name, if it is one.
        class_lines: The file's line of each class to install, as in :class:`.Draft`.
    """

    phases: tuple[Phase, ...] = ()
    errors: tuple[ScheduleError, ...] = ()
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    frozen: int = 0
    source: str | None = None
    class_lines: Mapping[tuple[int, str], int] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        """The schedule.

        Raises:
            ScheduleError: With everything that is wrong with it.
        """
        if self.errors:
            raise joined(self.errors)
        return Schedule(phases=self.phases)

    def with_notes(self, note: Callable[[Mapping[int, Any]], Problem]) -> Resolution:
        """Add what a function has to say about a renumbered schedule to the error that has brought it up."""
        errors = [
            error
            if error.renumbered is None
            else type(error)([*error.problems, note(error.renumbered)], renumbered=error.renumbered)
            for error in self.errors
        ]
        return replace(self, errors=tuple(errors))


def resolve_names(drafted: Draft, index: ParameterIndex) -> Resolution:
    """Replace the selectors of a schedule by full names, in the order the model registers them."""
    resolver = _Resolver(index, drafted)
    selected: dict[int, dict[str, list[str]]] = {}
    for number, phase in drafted.phases.items():
        if len(resolver.problems) >= MAX_PROBLEMS:  # what stands below is looked at when these are mended
            break
        selected[number] = resolver.selected(number, phase.params)
    resolver.take_rest(selected)
    phases = {
        number: drafted.phases[number].model_copy(update={"params": tuple(dict.fromkeys(chain(*names.values())))})
        for number, names in selected.items()
    }
    problems = (*resolver.problems, *islice(resolver.overlaps(), MAX_PROBLEMS))
    errors: list[ScheduleError] = []
    if drafted.problems:
        errors.append(ScheduleFormatError(drafted.problems, renumbered=drafted.renumbered))
    if problems:
        errors.append(SelectorError(problems))
    broken = {problem.phase for problem in problems}
    if errors:  # what is left once the others are corrected is not known
        broken.update(resolver.rest_phases)
    usable = takewhile(lambda number: number in phases and number not in broken, count())
    return Resolution(
        phases=tuple(phases[number] for number in usable),
        errors=tuple(errors),
        notices=(*drafted.notices, *resolver.notices),
        warnings=(*drafted.warnings, *resolver.warnings),
        frozen=len(index.names) - len(resolver.owners),
        source=drafted.source,
        class_lines=drafted.class_lines,
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
        self.rest_phases: list[int] = []
        self.suggestions = 0
        self.clock = Clock()

    def selected(self, number: int, selectors: Sequence[str]) -> dict[str, list[str]]:
        """The full names that each selector of a phase stands for; none yet for the rest."""
        names: dict[str, list[str]] = {}
        problems_before = len(self.problems)
        self.dropped.clear()
        for selector in selectors:
            if len(self.problems) >= MAX_PROBLEMS:
                break
            names[selector] = self._selected(number, selector)
            self._claim(number, selector, names[selector])
        if not (any(names.values()) or number in self.rest_phases or len(self.problems) > problems_before):
            message = f"expected a parameter to thaw, got only {listed(self.dropped)}"
            fix = "name registered floating point parameters, or remove the phase"
            line = self.drafted.lines.get((number, selectors[0]))
            self.problems.append(Problem(message, fix, self.drafted.source, line, number))
        return names

    def take_rest(self, selected: Mapping[int, dict[str, list[str]]]) -> None:
        """Give what no selector has taken to the one phase that asks for it."""
        if not self.rest_phases:
            return
        first, *others = self.rest_phases
        for number in others:
            message = f"expected the rest in one phase only, but {self._place(first, REST)} already has it"
            self.problems.append(self._problem(number, REST, message, "remove one of the two"))
        rest = [name for name in self.index.names if name not in self.owners and name not in self.index.fixed]
        if not rest:
            message = "expected a parameter that no other selector matches, but none is left"
            self.problems.append(self._problem(first, REST, message, "remove it, or leave parameters to it"))
        selected[first][REST] = rest
        self._claim(first, REST, rest)

    def overlaps(self) -> Iterator[Problem]:
        """One problem for each two selectors of different phases that select the same parameters."""
        for (first, first_selector, second, second_selector), names in self.shared.items():
            place = self._place(first, first_selector)
            message = f"expected each parameter in one phase, but {place} already has {listed(names, limit=20)}"
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
        if selector == REST:
            self.rest_phases.append(number)
            return []
        try:
            return self._expressed(number, selector)
        except TimeoutError:
            self.problems.append(self._problem(number, selector, *too_slow(self.clock)))
            return []

    def _expressed(self, number: int, selector: str) -> list[str]:
        """The names that a selector stands for as a regular expression."""
        try:
            expression = compiled(selector, self.clock)
        except INVALID as error:
            message = f"expected a parameter name or a regular expression, got an invalid one: {error}"
            fix = self._pattern_hint(selector) or "correct the expression"
            self.problems.append(self._problem(number, selector, message, fix))
            return []
        matched = matching_names(expression, self.index)
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
            self._notice(number, selector, f"left out, since their dtype has no gradient: {listed(fixed)}")
        return [name for name in registered if name not in self.index.fixed]

    def _notice_aliases(self, number: int, selector: str, aliases: Iterable[str], selected: set[str]) -> None:
        dropped = [
            f"{alias} (registered as {self.index.aliases[alias]})"
            for alias in aliases
            if self.index.aliases[alias] not in selected
        ]
        self.dropped += dropped
        if dropped:
            message = f"aliases of tied parameters are dropped, the registered name thaws them: {listed(dropped)}"
            self._notice(number, selector, message)

    def _warn_about_numbers(self, number: int, selector: str, matched: Sequence[str]) -> None:
        if len(matched) < 2:
            return
        overrun = number_overruns(selector, matched, self.clock)
        if overrun is not None:
            corrected, unintended = overrun
            message = f"the match runs across a number: it also selects {unintended}"
            self.warnings.append(str(self._problem(number, selector, message, f"write '{corrected}'")))

    def _no_match(self, number: int, selector: str) -> Problem:
        fix = self._pattern_hint(selector)
        if fix is None:
            near = closest_names(selector, self.index) if self.suggestions <= MAX_SUGGESTIONS else []
            fix = did_you_mean(near, "use names of the model's named_parameters()")
        return self._problem(number, selector, "expected to match a parameter, but matches none", fix)

    def _pattern_hint(self, selector: str) -> str | None:
        """What to write instead of a selector, if that is plain; None once enough has been suggested."""
        self.suggestions += 1
        found = suggested_pattern(selector, self.index, self.clock) if self.suggestions <= MAX_SUGGESTIONS else None
        return None if found is None else f"write `{found[0]}` to match {listed(found[1], limit=1)}"

    def _place(self, number: int, selector: str) -> str:
        line = self.drafted.lines.get((number, selector))
        return f"phase {number} by selector '{selector}'" + ("" if line is None else f" on line {line}")

    def _problem(self, number: int, selector: str, message: str, fix: str | None = None) -> Problem:
        line = self.drafted.lines.get((number, selector))
        return Problem(message, fix, self.drafted.source, line, number, selector)

    def _notice(self, number: int, selector: str, message: str) -> None:
        self.notices.append(str(self._problem(number, selector, message)))
