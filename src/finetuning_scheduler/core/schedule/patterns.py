"""What the text of a regular expression tells before it is tried on any name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence

_TOKEN = re.compile(
    r"\\."  # an escaped character
    r"|\[\^?\]?(?:\\.|[^\]\\])*\]"  # a set of characters
    r"|[*+?][?+]?|\{\d*,?\d*\}[?+]?"  # a quantifier
    r"|.",
    re.DOTALL,
)
_QUANTIFIERS = ("*", "+", "?", "{")


def compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern.

    Raises:
        re.error: It is no regular expression.
        OverflowError: A number in it is too large.
        RecursionError: It is nested too deep.
    """
    with warnings.catch_warnings():
        # `re` warns about sets such as `[[a]`; they work as it documents
        warnings.simplefilter("ignore", FutureWarning)
        return re.compile(pattern)


def grouped(pattern: str) -> str:
    """Put a pattern in parentheses where it needs them to be a part of a longer one."""
    return f"(?:{pattern})" if _has_alternatives(_TOKEN.findall(pattern)) else pattern


def leading_parts(pattern: str) -> Iterator[str | None]:
    """What every match begins with, as far as the pattern fixes it: literal text, and None for any one character."""
    tokens = _TOKEN.findall(pattern)
    # a comment may hold parentheses and brackets that mean nothing
    if "(?#" in pattern or _has_alternatives(tokens):
        return
    literal = ""
    for token, following in zip(tokens, [*tokens, ""][1:], strict=True):
        character = _literal(token)
        if following.startswith(_QUANTIFIERS) or (character is None and token != "."):
            break
        if character is not None:
            literal += character
            continue
        if literal:
            yield literal
        yield None
        literal = ""
    if literal:
        yield literal


def number_boundaries(pattern: str) -> list[int]:
    """The places of the unescaped dots beside a number, which may match its further digits."""
    tokens = _TOKEN.findall(pattern)
    dots = [place for place, token in enumerate(tokens) if token == "."]
    return [place for place in dots if _is_after_number(tokens, place) or _is_before_number(tokens, place)]


def with_dots_escaped(pattern: str, places: Collection[int]) -> str:
    r"""Let the dots at `places` match dots only: `1.*` becomes `1\..*`, and `.*1` becomes `.*\.1`."""
    return _with_boundaries(pattern, places, r"\.", r"\.", keep_dot=False)


def with_numbers_guarded(pattern: str, places: Collection[int]) -> str:
    r"""Let the dots at `places` match no further digit: `1.*` becomes `1(?!\d).*`, and `.*1` becomes `.*(?<!\d)1`."""
    return _with_boundaries(pattern, places, r"(?!\d)", r"(?<!\d)", keep_dot=True)


def _with_boundaries(pattern: str, places: Collection[int], after: str, before: str, *, keep_dot: bool) -> str:
    """Put a boundary after or before the numbers; a dot without a quantifier gives way to it unless it is kept."""
    tokens = _TOKEN.findall(pattern)
    for place in places:
        quantified = _is_quantified(tokens, place)
        dot = "." if quantified or keep_dot else ""
        if _is_after_number(tokens, place):
            tokens[place] = f"{after}{dot}"
        elif quantified:
            tokens[place + 1] += before
        else:
            tokens[place] = f"{dot}{before}"
    return "".join(tokens)


def _literal(token: str) -> str | None:
    """The character a token stands for, if it stands for one."""
    if len(token) == 1 and token not in r"\.^$*+?{[(|)":
        return token
    return token[1] if len(token) == 2 and token[0] == "\\" and not token[1].isalnum() else None


def _has_alternatives(tokens: Iterable[str]) -> bool:
    """Whether there is a `|` outside of all parentheses."""
    depth = 0
    for token in tokens:
        depth += (token == "(") - (token == ")")
        if token == "|" and depth == 0:
            return True
    return False


def _is_quantified(tokens: Sequence[str], place: int) -> bool:
    return place + 1 < len(tokens) and tokens[place + 1].startswith(_QUANTIFIERS)


def _is_after_number(tokens: Sequence[str], place: int) -> bool:
    """Whether a number, a set with digits, or a group that ends in one comes before the dot."""
    before = place - 1
    while before >= 0 and (tokens[before] == ")" or tokens[before].startswith(_QUANTIFIERS)):
        before -= 1
    return before >= 0 and _is_number(tokens[before])


def _is_before_number(tokens: Sequence[str], place: int) -> bool:
    after = place + (2 if _is_quantified(tokens, place) else 1)
    while after < len(tokens) and tokens[after] == "(":
        after += 1
    return after < len(tokens) and _is_number(tokens[after])


def _is_number(token: str) -> bool:
    if token.startswith("["):
        return not token.startswith("[^") and any(character.isdigit() for character in token)
    return token == r"\d" or token.isdigit()
