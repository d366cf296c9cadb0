"""What the text of a regular expression tells before it is tried on any name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

_SET = r"\[\^?\]?(?:\\.|[^\]\\])*\]"
_OTHERS = (
    r"\\."  # an escaped character
    r"|[*+?][?+]?|\{\d*,?\d*\}[?+]?"  # a quantifier
    r"|."
)
# a bracket that is never closed takes all that follows, so that this is looked through once
_TOKEN = re.compile(rf"{_SET}|\[(?:\\.|[^\]\\])*\\?|{_OTHERS}", re.DOTALL)
_TOKEN_OUTSIDE_SETS = re.compile(_OTHERS, re.DOTALL)
_WHOLE_SET = re.compile(_SET, re.DOTALL)
# escaped characters and sets, which are kept, or a part that makes no expression slower than it is without it
_KEPT_OR_HARMLESS = re.compile(rf"(\\.|{_SET})|\A\(\?[aims]+\)|\(\?!\\d\)|\(\?<!\\d\)|(?<=\()\?:", re.DOTALL)
_QUANTIFIERS = ("*", "+", "?", "{")
_COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}[?+]?")
_SMALL_REPEAT = 4
# quantifiers, and groups of alternatives, with which a name of 200 characters still takes well under a second
_MOST_WIDE = 3
_MOST_NARROW = 4


def grouped(pattern: str) -> str:
    """Put a pattern in parentheses where it needs them to be a part of a longer one."""
    return f"(?:{pattern})" if _has_alternatives(_tokens(pattern)) else pattern


def leading_parts(pattern: str) -> Iterator[str | None]:
    """What every match begins with, as far as the pattern fixes it: literal text, and None for any one character."""
    # a comment may hold parentheses and brackets that mean nothing
    if "(?#" in pattern or _has_alternatives(tokens := _tokens(pattern)):
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


def may_take_long(pattern: str) -> bool:
    """Whether a backtracking engine may take long over one name: judged by the form, on the safe side."""
    if "(?#" in pattern:  # a comment may hold whatever looks like something else
        return True
    pattern = _KEPT_OR_HARMLESS.sub(lambda found: found[1] or "", pattern)
    if re.search(r"\(\?|\\[1-9]", pattern):  # look-arounds, flags, references
        return True
    tokens = _tokens(pattern)
    wide = narrow = 0
    alternatives: list[int] = []  # of each open group
    for token, following in zip(tokens, [*tokens, ""][1:], strict=True):
        if token == "(":
            alternatives.append(0)
        elif token == "|" and alternatives:
            alternatives[-1] = 1
        elif token == ")":
            if following.startswith(("*", "+", "{")):
                return True
            narrow += alternatives.pop() if alternatives else 0
        elif token.startswith(_QUANTIFIERS):
            wide += _repeats(token) > _SMALL_REPEAT
            narrow += _repeats(token) <= _SMALL_REPEAT
    return wide > _MOST_WIDE or narrow > _MOST_NARROW


def differs_in_regex(pattern: str) -> bool:
    """Whether the package ``regex`` may read a pattern otherwise than ``re``: fuzzy matches, and sets within sets."""
    unescaped = re.sub(r"\\N\{[^}]*\}|\\.", "", pattern, flags=re.DOTALL)
    return re.search(r"\{(?!\d*,?\d*\})|\[:", unescaped) is not None


def largest_repeat(pattern: str) -> float:
    """How often the counted repeats, one inside the other, write out the same part of a pattern."""
    largest = 1.0
    inside = [1.0]  # the largest product within each open group
    closed = 1.0  # that of the group that has just been closed
    for token in _tokens(pattern):
        if token == "(":
            inside.append(1.0)
        elif token == ")" and len(inside) > 1:
            closed = inside.pop()
            inside[-1] = max(inside[-1], closed)
            continue
        elif token.startswith("{") and (times := _written_out(token)) > 1:
            inside[-1] = max(inside[-1], closed * times)
            largest = max(largest, inside[-1])
        closed = 1.0
    return largest


def number_boundaries(pattern: str) -> list[int]:
    """The places of the unescaped dots beside a number, which may match its further digits."""
    tokens = _tokens(pattern)
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
    tokens = _tokens(pattern)
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


def _tokens(pattern: str) -> list[str]:
    """Take a pattern apart, in time that grows linearly with its length."""
    tokens: list[str] = _TOKEN.findall(pattern)
    if tokens and tokens[-1].startswith("[") and not _WHOLE_SET.fullmatch(tokens[-1]):
        never_closed = tokens.pop()
        tokens += _TOKEN_OUTSIDE_SETS.findall(never_closed)
    return tokens


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


def _repeats(quantifier: str) -> float:
    """How often a quantifier repeats at most."""
    if quantifier[0] == "?":
        return 1
    counted = _COUNTED.fullmatch(quantifier)
    if counted is None or (counted[2] and not counted[3]):
        return 1 if counted is None and quantifier[0] == "{" else float("inf")
    return float(counted[3] or counted[1] or 0)


def _written_out(quantifier: str) -> float:
    """How often a counted repeat is written out; text such as `{x}` is none."""
    counted = _COUNTED.fullmatch(quantifier)
    return 1 if counted is None else max(float(counted[1] or 0), float(counted[3] or 0), 1)
