"""Regular expressions that are tried on names in bounded time, whoever has written them.

A backtracking engine may take years over one name. Expressions that cannot take long are left to ``re``; all others are
tried by the package ``regex``, which stops at a time limit.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import regex

from .patterns import differs_in_regex, largest_repeat, may_take_long

MAX_CHARACTERS = 10_000
MAX_REPEAT = 10_000  # of one character by all the counted repeats around it: engines write these out
SECONDS = 4.0  # of processor time: about a hundred times what 100 selectors take on a model of 40,000 tensors
_NAMES_BETWEEN_LOOKS = 64

INVALID = (re.error, regex.error, OverflowError, RecursionError)  # what `compiled` raises


class Clock:
    """The time that all expressions of a schedule together may take, whatever else the machine is doing.

    One expression gets half of what is left, so that one which takes long spoils no other.

    Args:
        seconds: Seconds of processor time.

    Attributes:
        seconds: The same.
        left: What is left of them.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = self.left = seconds

    @property
    def is_over(self) -> bool:
        """Whether what is left is not worth a try."""
        return self.left < self.seconds / 100

    @contextmanager
    def running(self) -> Iterator[float]:
        """Count the time that the block takes; gives the seconds that it may take.

        Raises:
            TimeoutError: The time is up.
        """
        if self.is_over:
            raise TimeoutError
        start = time.thread_time()
        try:
            yield self.left / 2
        finally:
            self.left -= time.thread_time() - start


class Expression:
    """A compiled regular expression.

    Args:
        pattern: Its text.
        clock: Stops it.
        may_take_long: Whether it is one that has to be stopped.

    Attributes:
        pattern: Its text.
    """

    def __init__(self, pattern: str, clock: Clock, *, may_take_long: bool) -> None:
        self.pattern = pattern
        self._clock = clock
        self._plain = None if may_take_long else re.compile(pattern)
        self._timed = regex.compile(pattern, regex.VERSION0) if self._plain is None else None

    def whole(self, names: Iterable[str]) -> list[str]:
        """The names that it matches whole.

        Raises:
            TimeoutError: The time is up.
        """
        return self._those(names, self._matches)

    def up_to_dots(self, names: Iterable[str]) -> list[str]:
        """The names that it matches up to a dot, with or without the dot.

        Raises:
            TimeoutError: The time is up.
        """
        return self._those(names, self._matches_up_to_a_dot)

    def _those(self, names: Iterable[str], matches: Callable[[str], bool]) -> list[str]:
        found = []
        with self._clock.running() as seconds:
            end = time.thread_time() + seconds
            for place, name in enumerate(names):
                if place % _NAMES_BETWEEN_LOOKS == 0 and time.thread_time() >= end:
                    raise TimeoutError
                if matches(name):
                    found.append(name)
        return found

    def _matches_up_to_a_dot(self, name: str) -> bool:
        dots = (position for position, character in enumerate(name) if character == ".")
        return any(self._matches(name, dot) or self._matches(name, dot + 1) for dot in dots)

    def _matches(self, name: str, end: int | None = None) -> bool:
        end = len(name) if end is None else end
        if self._plain is not None:
            return self._plain.fullmatch(name, 0, end) is not None
        timed: regex.Pattern[str] = self._timed
        return timed.fullmatch(name, 0, end, timeout=self._clock.left / 2) is not None


def compiled(pattern: str, clock: Clock | None = None) -> Expression:
    """Compile a pattern.

    Args:
        pattern: The pattern.
        clock: Stops it; without one, it has the whole of a schedule's time for itself.

    Raises:
        re.error: It is no regular expression, or a longer one than any model needs.
        OverflowError: A number in it is too large.
        RecursionError: It is nested too deep.
        regex.error: It is one for ``re`` only.
        TimeoutError: The time is up.
    """
    if len(pattern) > MAX_CHARACTERS:
        raise re.error(f"more than {MAX_CHARACTERS:,} characters")
    clock = clock or Clock()
    with clock.running(), warnings.catch_warnings():
        # both warn about sets such as `[[a]`; they work as documented
        warnings.simplefilter("ignore", FutureWarning)
        re.compile(pattern)
        if largest_repeat(pattern) > MAX_REPEAT:
            raise re.error(f"more than {MAX_REPEAT:,} repeats inside one another")
        slow = may_take_long(pattern)
        if slow and differs_in_regex(pattern):
            raise re.error("a brace that is no quantifier, or `[:`, in an expression that may take long: escape it")
        return Expression(pattern, clock, may_take_long=slow)


def too_slow(clock: Clock) -> tuple[str, str]:
    """Say what is wrong with an expression that takes too long, and what to do."""
    allowed = f"expected selectors that can be tried on all names within {clock.seconds:g} seconds"
    if clock.is_over:
        return f"{allowed}, got ones that take longer: this one was not tried to the end", "simplify those above"
    return f"{allowed}, got one that takes longer", "repeat no group that itself repeats, as `(.*)*` does"
