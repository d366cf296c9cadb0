"""From what a user wrote to valid phases: every problem is found, each with the line it is on.

Reading goes on after a problem, so that all problems can be reported together.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import MAX_PROBLEMS, Problem
from .model import Phase
from .validation import explained, key_name, numbers_in_text, phase_errors, with_key_name
from .values import KeyPath, Unreadable, leaves, plain, plain_entries, replaced
from .wording import listed, shown
from .yaml_reader import read_document

_CLASS_KEYS = ("new_optimizer", "new_lr_scheduler")
_LEARNING_RATE_KEYS = ("lr", "lr_decay", "lr_decay_min_scale")


@dataclass(frozen=True)
class Draft:
    """What could be understood of a schedule, and what is wrong with it.

    Attributes:
        phases: The usable phases under the numbers the user gave them.
        problems: What is wrong.
        notices: What the user may want to know, one line each.
        warnings: What the user should look at, one line each.
        source: The file's name, if it is one.
        lines: The file's line of each selector, by phase and selector.
        class_lines: The file's line of each class to install, by phase and key, and of the values with which an LR
            scheduler begins, by phase and argument.
        renumbered: The schedule numbered from 0, if the numbers have gaps.
    """

    phases: Mapping[int, Phase]
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    source: str | None = None
    lines: Mapping[tuple[int, str], int] = field(default_factory=dict)
    class_lines: Mapping[tuple[int, str], int] = field(default_factory=dict)
    renumbered: dict[int, Any] | None = None


def draft(source: Mapping[Any, Any] | str | os.PathLike[str]) -> Draft:
    """Understand as much of a mapping or YAML file as possible.

    Raises:
        ScheduleFileError: The file cannot be read or is not YAML.
    """
    if isinstance(source, (str, os.PathLike)):
        document = read_document(source)
        return _Drafter(document.source, document.lines, document.problems).draft(document.data)
    return _Drafter(None, {}).draft(source)


class _Drafter:
    """Goes over one schedule, collecting what it finds."""

    def __init__(self, source: str | None, lines: Mapping[KeyPath, int], problems: Sequence[Problem] = ()) -> None:
        self.source = source
        self.lines = lines
        self.problems = list(problems)
        self.notices: list[str] = []
        self.warnings: list[str] = []
        self.selector_lines: dict[tuple[int, str], int] = {}
        self.class_lines: dict[tuple[int, str], int] = {}
        self.converted: list[str] = []

    def draft(self, data: Any) -> Draft:
        entries = plain_entries(data)
        phases: dict[int, Phase] = {}
        renumbered = None
        if isinstance(entries, dict) and entries:
            keys = self._phase_keys(entries)
            renumbered = self._renumbered(keys, entries)
            for number in sorted(keys):
                if len(self.problems) >= MAX_PROBLEMS:  # what stands below is looked at when these are mended
                    break
                phase = self._phase(number, keys[number], entries[keys[number]])
                phases |= {} if phase is None else {number: phase}
        else:
            self._no_mapping(entries)
        if self.converted:
            self._notice((), f"text was taken for the numbers that it shows: {listed(self.converted)}")
        return Draft(
            phases,
            tuple(self.problems),
            tuple(self.notices),
            tuple(self.warnings),
            self.source,
            self.selector_lines,
            self.class_lines,
            renumbered,
        )

    def _no_mapping(self, data: Any) -> None:
        if isinstance(data, Unreadable):
            self._problem((), data.message, data.fix)
            return
        got = "an empty mapping" if isinstance(data, dict) else shown(data)
        message = f"expected a mapping of phase numbers to phases, got {got}"
        self._problem((), message, "write `0:` with `params:` below it")

    def _phase_keys(self, data: Mapping[Any, Any]) -> dict[int, Any]:
        """The keys of the phases by the number they stand for."""
        keys: dict[int, Any] = {}
        for key in data:
            number = _phase_number(key)
            if number is None:
                message = f"expected a phase number (0, 1, 2, ...) as key, got {shown(key)}"
                self._problem((key,), message, "number the phases from 0")
            elif number in keys:
                message = f"expected each phase number once, got {shown(keys[number])} and {shown(key)}"
                self._problem((key,), message, "remove one of the two", number)
            else:
                keys[number] = key
        converted = [f"{shown(key)} to {number}" for number, key in keys.items() if type(key) is not int]
        if converted:
            self._notice((), f"phase keys were converted to integers: {listed(converted)}")
        return keys

    def _renumbered(self, keys: Mapping[int, Any], data: Mapping[Any, Any]) -> dict[int, Any] | None:
        """The phases numbered from 0, if their numbers have gaps, which is a problem."""
        numbers = sorted(keys)
        gap = next((position for position, number in enumerate(numbers) if number != position), None)
        if gap is None:
            return None
        after = numbers[gap]
        missing = f"phase {gap} is missing" if after == gap + 1 else f"phases {gap} to {after - 1} are missing"
        got = listed([str(number) for number in numbers])
        message = f"expected phase numbers from 0 without gaps, got {got}; {missing}"
        self._problem((keys[after],), message, "renumber the phases from 0")
        phases = {position: plain(data[keys[number]]) for position, number in enumerate(numbers)}
        return None if any(isinstance(leaf, Unreadable) for _, leaf in leaves(phases)) else phases

    def _phase(self, number: int, key: Any, raw: Any) -> Phase | None:
        unreadable = [(path, leaf) for path, leaf in leaves(raw) if isinstance(leaf, Unreadable)]
        for path, leaf in unreadable:
            self._problem((key, *path), with_key_name(path, leaf.message), leaf.fix, number)
        if not isinstance(raw, dict):
            if not unreadable:
                message = f"expected a mapping with `params`, got {shown(raw)}"
                self._problem((key,), message, "write `params:` below it", number)
            return None
        fitting = self._fit_for_phase_0(raw, key) if number == 0 else raw
        phase = self._validated(number, key, fitting, {path[0] for path, _ in unreadable})
        if phase is None:
            return None
        self._keep_lines(number, key, phase)
        return self._without_duplicates(number, key, phase)

    def _fit_for_phase_0(self, raw: Mapping[Any, Any], key: Any) -> dict[Any, Any]:
        """Phase 0 without the keys that only later phases may have."""
        given = [name for name in (*_CLASS_KEYS, *_LEARNING_RATE_KEYS) if not _says_nothing(name, raw.get(name))]
        for name in given:
            if name in _CLASS_KEYS:
                message = f"expected `{name}` in later phases only"
                self._problem((key, name), message, "remove it, or move it to a later phase", 0)
            else:
                reason = "the initial optimizer sets the learning rate of phase 0"
                self._warning((key, name), f"`{name}` is dropped: {reason}", 0)
        return {name: value for name, value in raw.items() if name not in given}

    def _validated(self, number: int, key: Any, raw: dict[Any, Any], unreadable: Collection[Any]) -> Phase | None:
        """The phase, without the fields that are wrong or unreadable; None if `params` is."""
        errors = phase_errors(raw)
        if numbers := numbers_in_text(raw, errors):
            self.converted += [f"`{key_name(path)}` of phase {number}" for path in numbers if path[0] not in unreadable]
            raw = replaced(raw, numbers)
            errors = phase_errors(raw)
        wrong_fields = set(unreadable)
        for details in errors[:MAX_PROBLEMS]:
            # an empty location is the phase itself
            field_name = details["loc"][0] if details["loc"] else "params"
            if field_name not in unreadable:
                message, fix = explained(details)
                self._problem((key, *details["loc"]), message, fix, number)
                wrong_fields.add(field_name)
        usable = {name: value for name, value in raw.items() if name not in wrong_fields}
        return Phase.model_validate(usable) if "params" in usable else None

    def _keep_lines(self, number: int, key: Any, phase: Phase) -> None:
        """Remember the lines that later problems with selectors and classes are on."""
        for position, selector in enumerate(phase.params):
            line = self._line((key, "params", position))
            if line is not None:
                self.selector_lines.setdefault((number, selector), line)
        for name in _CLASS_KEYS:
            line = self._line((key, name))
            if line is not None and getattr(phase, name) is not None:
                self.class_lines[number, name] = line
        if (scheduler := phase.new_lr_scheduler) is not None:
            inside = ("lr_scheduler_init", "init_args")
            for path in (("init_pg_lrs",), *((*inside, name) for name in scheduler.lr_scheduler_init.init_args)):
                line = self._line((key, "new_lr_scheduler", *path))
                if line is not None:
                    self.class_lines[number, path[-1]] = line

    def _without_duplicates(self, number: int, key: Any, phase: Phase) -> Phase:
        repeated = [repr(selector) for selector, count in Counter(phase.params).items() if count > 1]
        if not repeated:
            return phase
        self._notice((key, "params"), f"selectors listed more than once are used once: {listed(repeated)}", number)
        return phase.model_copy(update={"params": tuple(dict.fromkeys(phase.params))})

    def _line(self, path: KeyPath) -> int | None:
        """The line of a path, or of the nearest thing around it."""
        around = (path[:length] for length in range(len(path), 0, -1))
        return next((self.lines[place] for place in around if place in self.lines), None)

    def _located(self, path: KeyPath, message: str, fix: str | None = None, phase: int | None = None) -> Problem:
        return Problem(message, fix, self.source, self._line(path), phase)

    def _problem(self, path: KeyPath, message: str, fix: str | None = None, phase: int | None = None) -> None:
        self.problems.append(self._located(path, message, fix, phase))

    def _notice(self, path: KeyPath, message: str, phase: int | None = None) -> None:
        self.notices.append(str(self._located(path, message, phase=phase)))

    def _warning(self, path: KeyPath, message: str, phase: int | None = None) -> None:
        self.warnings.append(str(self._located(path, message, phase=phase)))


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a key has its default, as in a phase that was read before."""
    return value is None or (isinstance(value, float) and value == Phase.model_fields[name].default)


def _phase_number(key: Any) -> int | None:
    """The phase number a key stands for, or None."""
    if isinstance(key, bool) or not isinstance(key, (int, float, str)):
        return None
    try:
        number = int(key)
    except (ValueError, OverflowError):
        return None
    if number < 0 or number.bit_length() > 63 or (isinstance(key, float) and number != key):
        return None
    return number
