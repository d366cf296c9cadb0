"""What a user probably means by a selector that matches nothing or too much, as a pattern that does it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .expression import INVALID, MAX_CHARACTERS, Clock, Expression, compiled
from .names import ParameterIndex, matching_names
from .patterns import grouped, number_boundaries, with_dots_escaped, with_numbers_guarded

_NamesOf = Callable[[Expression, ParameterIndex], list[str]]
_PREFIX = "re:"
# with `.*` before them, these may take very long to match nothing
_COSTLY = re.compile(r"[*?{]|[.)]\+")
# what shell patterns consist of
_GLOB_TOKEN = re.compile(r"\*+|\?|\[[!^]?\]?[^\]]*\]|.", re.DOTALL)


def suggested_pattern(selector: str, index: ParameterIndex, clock: Clock) -> tuple[str, list[str]] | None:
    """Find the pattern that a selector which matches nothing stands for.

    Tried are, in this order, the selector without the prefix `re:`, as a shell pattern, and as a part of names. Each
    costs what a selector that begins with `.*` does.

    Returns:
        The pattern and the names that it selects, or None if none of these selects any.

    Raises:
        TimeoutError: The time is up.
    """
    if len(selector) > MAX_CHARACTERS:
        return None
    bare = selector.removeprefix(_PREFIX).strip()
    tried = [(bare, matching_names)] if bare not in ("", selector) else []
    tried += [(_from_glob(bare), matching_names)] if "*" in bare or "?" in bare else []
    tried += [(pattern, _whole_names) for pattern in _around(bare)]
    for pattern, names_of in tried:
        matched = _thawable(names_of, pattern, index, clock)
        # each correction selects less, and one may need another
        while matched and (overrun := number_overruns(pattern, matched, clock)) is not None:
            pattern, _ = overrun
            matched = _thawable(names_of, pattern, index, clock)
        if matched:
            return pattern, matched
    return None


def number_overruns(selector: str, matched: Sequence[str], clock: Clock) -> tuple[str, str] | None:
    """Return a selector with its numbers ended where a match runs across them, and one name it then leaves out.

    Raises:
        TimeoutError: The time is up.
    """
    up_to_dots = not compiled(selector, clock).whole(matched[:1])

    def matches(pattern: str, names: Sequence[str]) -> list[str]:
        expression = compiled(pattern, clock)
        return expression.up_to_dots(names) if up_to_dots else expression.whole(names)

    overruns: dict[int, str] = {}
    for place in number_boundaries(selector):
        kept = set(matches(with_numbers_guarded(selector, [place]), matched))
        name = next((name for name in matched if name not in kept), None)
        if name is not None:
            overruns[place] = name
    if not overruns:
        return None
    guarded = with_numbers_guarded(selector, overruns)
    intended = matches(guarded, matched)
    # where nothing is left, the longer number is what the user means
    if not intended:
        return None
    plain = with_dots_escaped(selector, overruns)
    corrected = plain if len(matches(plain, intended)) == len(intended) else guarded
    return corrected, next(iter(overruns.values()))


def _around(pattern: str) -> list[str]:
    """Patterns for the names that end with, or at least contain, what a pattern matches."""
    fragment = pattern.removesuffix(".*")
    # a single character occurs in names by chance
    if len(re.findall(r"\w", fragment)) < 2 or _COSTLY.search(fragment):
        return []
    return [f".*{grouped(fragment)}", f".*{grouped(fragment)}.*"]


def _from_glob(glob: str) -> str:
    r"""Translate a shell pattern to a regular expression: `*.bias` becomes `.*\.bias`."""
    return "".join(_from_glob_token(token) for token in _GLOB_TOKEN.findall(glob))


def _from_glob_token(token: str) -> str:
    if token.startswith("*"):
        return ".*"
    if token == "?":
        return "."
    if len(token) > 1:
        return f"[^{token[2:]}" if token.startswith("[!") else token
    return re.escape(token)


def _whole_names(expression: Expression, index: ParameterIndex) -> list[str]:
    return expression.whole(index.candidates(expression.pattern))


def _thawable(names_of: _NamesOf, pattern: str, index: ParameterIndex, clock: Clock) -> list[str]:
    try:
        matched = [pattern] if pattern in index.positions else names_of(compiled(pattern, clock), index)
    except INVALID:
        return []
    return [name for name in matched if name in index.positions and name not in index.fixed]
