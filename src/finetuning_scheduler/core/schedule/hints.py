"""What a user probably means by a selector that matches nothing or too much, as a pattern that does it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .names import ParameterIndex, matches_prefix, matches_whole, matching_names
from .patterns import compiled, grouped, number_boundaries, with_dots_escaped, with_numbers_guarded

_NamesOf = Callable[[re.Pattern[str], ParameterIndex], list[str]]
_PREFIX = "re:"
# with `.*` before them, these may take very long to match nothing
_COSTLY = re.compile(r"[*?{]|[.)]\+")
# what shell patterns consist of
_GLOB_TOKEN = re.compile(r"\*+|\?|\[[!^]?\]?[^\]]*\]|.", re.DOTALL)


def suggested_pattern(selector: str, index: ParameterIndex) -> tuple[str, list[str]] | None:
    """Find the pattern that a selector which matches nothing stands for.

    Tried are, in this order, the selector without the prefix `re:`, as a shell pattern, and as a part of names. Each
    costs what a selector that begins with `.*` does.

    Returns:
        The pattern and the names that it selects, or None if none of these selects any.
    """
    bare = selector.removeprefix(_PREFIX).strip()
    tried = [(bare, matching_names)] if bare not in ("", selector) else []
    tried += [(_from_glob(bare), matching_names)] if "*" in bare or "?" in bare else []
    tried += [(pattern, _whole_names) for pattern in _around(bare)]
    for pattern, names_of in tried:
        matched = _thawable(names_of, pattern, index)
        # each correction selects less, and one may need another
        while matched and (overrun := number_overruns(pattern, matched)) is not None:
            pattern, _ = overrun
            matched = _thawable(names_of, pattern, index)
        if matched:
            return pattern, matched
    return None


def number_overruns(selector: str, matched: Sequence[str]) -> tuple[str, str] | None:
    """Return a selector with its numbers ended where a match runs across them, and one name it then leaves out."""
    matches = matches_whole if matches_whole(compiled(selector), matched[0]) else matches_prefix
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


def _whole_names(pattern: re.Pattern[str], index: ParameterIndex) -> list[str]:
    return [name for name in index.candidates(pattern.pattern) if pattern.fullmatch(name)]


def _thawable(names_of: _NamesOf, pattern: str, index: ParameterIndex) -> list[str]:
    try:
        matched = [pattern] if pattern in index.positions else names_of(compiled(pattern), index)
    except (re.error, OverflowError, RecursionError):
        return []
    return [name for name in matched if name in index.positions and name not in index.fixed]
