"""What the package's logger says, and which parameters a message means."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Said:
    """A message of the package's logger, and how many optimizer steps the trainer had made by then."""

    level: int
    text: str
    step: int


class Ear(logging.Handler):
    """Listens to the package's logger."""

    def __init__(self, step: Callable[[], int] = lambda: 0) -> None:
        super().__init__(logging.INFO)
        self.said: list[Said] = []
        self.step = step

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(Said(record.levelno, record.getMessage(), self.step()))


@contextmanager
def listening(step: Callable[[], int] = lambda: 0) -> Iterator[list[Said]]:
    """Collect what the package's logger says from INFO upwards."""
    logger, ear = logging.getLogger("finetuning_scheduler"), Ear(step)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(ear)
    try:
        yield ear.said
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)


def warnings_in(said: Iterable[Said]) -> list[Said]:
    return [each for each in said if each.level >= logging.WARNING]


def the_only(said: Iterable[Said]) -> Said:
    """Return the only message, or fail with what was said instead."""
    messages = list(said)
    assert len(messages) == 1, f"expected one message, got {[each.text for each in messages]}"
    return messages[0]


def named_in(text: str, names: Iterable[str]) -> set[str]:
    """Which of the names a message means. Words with a dot, or in backquotes, are read as selectors of a schedule."""
    quoted = re.findall(r"`([^`\s]+)`", text)
    dotted = [word.rstrip(".:;") for word in re.split(r"[\s,'\"`]+", text) if "." in word.rstrip(".:;")]
    selectors = {*quoted, *dotted, *(word.strip("()") for word in dotted)}
    return {name for name in names if any(selects(selector, name) for selector in selectors)}


def selects(selector: str, name: str) -> bool:
    """Whether a selector matches a name whole or up to a dot."""
    if not selector[:1].isalpha():
        return False
    try:
        pattern = re.compile(selector)
    except re.error:
        return False
    prefixes = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
    return any(pattern.fullmatch(each) for each in (name, *prefixes, *(f"{prefix}." for prefix in prefixes)))


def names_of(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


def naming(said: Iterable[Said], names: Iterable[str], module: nn.Module) -> list[Said]:
    """The messages that mean all of these parameters of a module and no others."""
    return [each for each in said if named_in(each.text, names_of(module)) == set(names)]
