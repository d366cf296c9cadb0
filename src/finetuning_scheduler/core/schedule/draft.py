"""From what a user wrote to valid phases: every problem is found, each with the line it is on.

Reading goes on after a problem, so that all problems can be reported together.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from ...errors import Problem
from .model import ClassInit, LRSchedulerSpec, OptimizerSpec, Phase
from .wording import closest, did_you_mean, listed, shown
from .yaml_reader import MAX_DEPTH, KeyPath, read_document


@dataclass(frozen=True)
class Draft:
    """What could be understood of a schedule, and what is wrong with it.

    `phases` holds the usable phases under the numbers the user gave them. `lines` is the file's line of each selector
    by phase and selector, `class_lines` that of each class to install by phase and key. `renumbered` is set when the
    numbers have gaps.
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

    def draft(self, data: Any) -> Draft:
        keys: dict[int, Any] = {}
        phases: dict[int, Phase] = {}
        renumbered = None
        if not isinstance(data, Mapping) or not data:
            got = "an empty mapping" if isinstance(data, Mapping) else shown(data)
            self._problem(
                (), f"expected a mapping of phase numbers to phases, got {got}", "write `0:` with `params:` below it"
            )
        else:
            keys = self._phase_keys(data)
            renumbered = self._renumbered(keys, data)
            phases = {number: phase for number in sorted(keys) if (phase := self._phase(number, keys[number], data))}
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

    def _phase_keys(self, data: Mapping[Any, Any]) -> dict[int, Any]:
        """The keys of the phases by the number they stand for."""
        keys: dict[int, Any] = {}
        for key in data:
            number = _phase_number(key)
            if number is None or number < 0:
                self._problem(
                    (key,),
                    f"expected a phase number (0, 1, 2, ...) as key, got {shown(key)}",
                    "number the phases from 0",
                )
            elif number in keys:
                self._problem(
                    (key,),
                    f"expected each phase number once, got {shown(keys[number])} and {shown(key)}",
                    "remove one of the two",
                    number,
                )
            else:
                keys[number] = key
        converted = [f"{shown(key)} to {number}" for number, key in keys.items() if type(key) is not int]
        if converted:
            self._notice((), f"phase keys were converted to integers: {listed(converted)}")
        return keys

    def _renumbered(self, keys: Mapping[int, Any], data: Mapping[Any, Any]) -> dict[int, Any] | None:
        numbers = sorted(keys)
        if not numbers or numbers[-1] == len(numbers) - 1:
            return None
        gap = next(number for number in range(len(numbers)) if number not in keys)
        after = next(number for number in numbers if number > gap)
        missing = f"phase {gap} is missing" if after == gap + 1 else f"phases {gap} to {after - 1} are missing"
        self._problem(
            (keys[after],),
            f"expected phase numbers from 0 without gaps, got {listed(list(map(str, numbers)))}; {missing}",
            "renumber the phases from 0",
        )
        try:
            return {position: plain(data[keys[number]]) for position, number in enumerate(numbers)}
        except TooDeepError:
            return None

    def _phase(self, number: int, key: Any, data: Mapping[Any, Any]) -> Phase | None:
        try:
            raw = plain(data[key])
        except TooDeepError:
            self._problem((key,), f"expected at most {MAX_DEPTH} nested levels, got more", "flatten it", number)
            return None
        if not isinstance(raw, dict):
            self._problem(
                (key,), f"expected a mapping with `params`, got {shown(raw)}", "write `params:` below it", number
            )
            return None
        raw = self._fit_for_phase_0(raw, key) if number == 0 else raw
        phase = self._validated(number, key, raw)
        return None if phase is None else self._without_duplicates(number, key, phase)

    def _fit_for_phase_0(self, raw: dict[Any, Any], key: Any) -> dict[Any, Any]:
        kept = dict(raw)
        for name in ("new_optimizer", "new_lr_scheduler"):
            if kept.pop(name, None) is not None:
                self._problem(
                    (key, name), f"expected `{name}` in later phases only", "remove it, or move it to a later phase", 0
                )
        for name in ("lr", "lr_decay", "lr_decay_min_scale"):
            if kept.get(name) is not None:
                kept.pop(name)
                reason = "the initial optimizer sets the learning rate of phase 0"
                self._warning((key, name), f"`{name}` is dropped: {reason}", 0)
        return kept

    def _validated(self, number: int, key: Any, raw: dict[Any, Any]) -> Phase | None:
        """The phase, without the fields that are wrong; None if `params` is."""
        try:
            return Phase.model_validate(raw)
        except ValidationError as error:
            # a list with a wrong item is not also too short
            wrong = [details for details in error.errors(include_url=False) if not _is_repeated(details)]
        for details in wrong:
            message, fix = _explained(details)
            self._problem((key, *details["loc"]), message, fix, number)
        # an empty location is the phase itself
        wrong_fields = {details["loc"][0] if details["loc"] else "params" for details in wrong}
        usable = {name: value for name, value in raw.items() if name not in wrong_fields}
        return Phase.model_validate(usable) if "params" in usable else None

    def _without_duplicates(self, number: int, key: Any, phase: Phase) -> Phase:
        for position, selector in enumerate(phase.params):
            line = self._line((key, "params", position))
            if line is not None:
                self.selector_lines.setdefault((number, selector), line)
        for name in ("new_optimizer", "new_lr_scheduler"):
            line = self._line((key, name)) if getattr(phase, name) is not None else None
            if line is not None:
                self.class_lines[number, name] = line
        unique = tuple(dict.fromkeys(phase.params))
        if len(unique) == len(phase.params):
            return phase
        repeated = [repr(selector) for selector, count in Counter(phase.params).items() if count > 1]
        self._notice((key, "params"), f"selectors listed more than once are used once: {listed(repeated)}", number)
        return phase.model_copy(update={"params": unique})

    def _line(self, path: KeyPath) -> int | None:
        """The line of a path, or of the nearest thing around it."""
        for length in range(len(path), 0, -1):
            try:
                if path[:length] in self.lines:
                    return self.lines[path[:length]]
            except TypeError:  # an unhashable key in pydantic's location
                continue
        return None

    def _located(self, path: KeyPath, message: str, fix: str | None = None, phase: int | None = None) -> Problem:
        return Problem(message, fix, self.source, self._line(path), phase)

    def _problem(self, path: KeyPath, message: str, fix: str | None = None, phase: int | None = None) -> None:
        self.problems.append(self._located(path, message, fix, phase))

    def _notice(self, path: KeyPath, message: str, phase: int | None = None) -> None:
        self.notices.append(str(self._located(path, message, phase=phase)))

    def _warning(self, path: KeyPath, message: str, phase: int | None = None) -> None:
        self.warnings.append(str(self._located(path, message, phase=phase)))


def _phase_number(key: Any) -> int | None:
    """The phase number a key stands for, or None."""
    if isinstance(key, bool) or not isinstance(key, (int, float, str)):
        return None
    try:
        number = int(key)
    except (ValueError, OverflowError):
        return None
    if number.bit_length() > 63 or (isinstance(key, float) and number != key):
        return None
    return number


# pydantic's error types in the words of this package: what was expected, and what to do
_EXPECTED = {
    "string_type": ("a string", "write text, in quotes if it looks like a number"),
    "string_unicode": ("Unicode text", "remove the halves of surrogate pairs"),
    "string_too_short": ("a non-empty string", "fill it in, or remove it"),
    "int_type": ("an integer", "write a whole number without quotes"),
    "float_type": ("a number", "write a number without quotes, such as 1.0e-05"),
    "finite_number": ("a finite number", "write a number such as 1.0e-05"),
    "greater_than": ("a number greater than 0", "write a number such as 1.0e-05"),
    "bool_type": ("true or false", "write true or false without quotes"),
    "tuple_type": ("a list", "write a list"),
    "too_short": ("a list of at least one item", "fill it in, or remove it"),
    "dict_type": ("a mapping", "write `key: value` pairs below it"),
    "model_type": ("a mapping", "write `key: value` pairs below it"),
}


def _explained(details: Mapping[str, Any]) -> tuple[str, str]:
    """The message and fix for one of pydantic's errors about a phase."""
    kind, location, value = details["type"], details["loc"], details["input"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    if kind == "missing":
        return f"expected the key `{name}`, got none", f"add `{location[-1]}`"
    if kind == "extra_forbidden":
        return _unknown_key(location)
    if kind == "invalid_key":
        return f"expected keys that are strings, got {shown(location[-1])}", "quote the key, or remove it"
    expected, fix = _EXPECTED.get(kind, (details["msg"], "correct it"))
    if kind == "less_than_equal":
        expected, fix = f"{details['ctx']['le']:g} or less", "correct it"
    if kind == "greater_than_equal":
        least = details["ctx"]["ge"]
        expected, fix = (
            f"{least:g} or more",
            "correct it, or leave it out for no limit" if least < 0 else "correct it",
        )
    if kind == "tuple_type" and isinstance(value, str):
        fix = f"make it a list: `{name}: [{value}]`"
    subject = f"`{name}`: " if name else ""
    return f"{subject}expected {expected}, got {shown(value)}", fix


def _is_repeated(details: Mapping[str, Any]) -> bool:
    return details["type"] == "too_short" and len(details["input"]) > 0


def _unknown_key(location: tuple[int | str, ...]) -> tuple[str, str]:
    *parents, key = location
    model: type[BaseModel] = Phase
    for parent in parents:
        model = _nested_models().get(str(parent), model)
    known = list(model.model_fields)
    where = f" in `{'.'.join(map(str, parents))}`" if parents else ""
    fix = did_you_mean(closest(key, known), "remove it")
    return f"expected one of the keys {', '.join(known)}{where}, got `{key}`", fix


def _nested_models() -> dict[str, type[BaseModel]]:
    return {
        "new_optimizer": OptimizerSpec,
        "optimizer_init": ClassInit,
        "new_lr_scheduler": LRSchedulerSpec,
        "lr_scheduler_init": ClassInit,
    }


class TooDeepError(ValueError):
    """A structure with more levels than any schedule needs, perhaps one that contains itself."""


def plain(value: Any, depth: int = 0) -> Any:
    """A copy that shares no container with `value`: mappings, and the namespaces of LightningCLI, become dicts.

    LightningCLI lists even the arguments that only a running session can fill in; these are left out.
    """
    if depth > MAX_DEPTH:
        raise TooDeepError
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        copied = {key: plain(item, depth + 1) for key, item in value.items()}
        if isinstance(arguments := copied.get("init_args"), dict):
            unfilled = [key for key in ("params", "optimizer") if arguments.get(key, value) is None]
            copied["init_args"] = {key: item for key, item in arguments.items() if key not in unfilled}
        return copied
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    return value
