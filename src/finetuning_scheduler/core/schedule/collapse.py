"""Many names, said in a few: whole modules as ``encoder.*``, numbered ones as ``layers.[0-3].weight``.

What is said can be put into a schedule: each is a name or a regular expression.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name
_MAX_TENS = 16


def counted_by_module(names: Iterable[str]) -> Counter[str]:
    """Count the names in each module; to collapse several lists of names of one model."""
    return Counter(_prefixes(names))


def collapsed(names: Iterable[str], everything: Iterable[str] | Counter[str]) -> list[str]:
    """Say names in a few patterns.

    Args:
        names: The names.
        everything: All names that there are, these among them: a module of which all are meant is said as a whole. Or
            what :func:`counted_by_module` says of them.
    """
    chosen = list(dict.fromkeys(names))
    there = everything if isinstance(everything, Counter) else counted_by_module(everything)
    meant = counted_by_module(chosen)
    entries: dict[str, None] = {}
    for name in chosen:
        whole = next((p for p in _prefixes([name]) if there[p] == meant[p] > 1), None)
        entries[name if whole is None else f"{whole}.*"] = None
    return _with_numbers_joined(entries)


def _prefixes(names: Iterable[str]) -> Iterator[str]:
    """Yield the paths of the modules around each name, from the outside in."""
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:length]) for length in range(1, len(parts)))


def _with_numbers_joined(entries: Iterable[str]) -> list[str]:
    """Join entries that differ in numbers only."""
    alike: dict[str, list[list[int]]] = {}
    for entry in entries:
        alike.setdefault(_NUMBER.sub("#", entry), []).append([int(number) for number in _NUMBER.findall(entry)])
    joined = []
    for shape, numbers in alike.items():
        ranges = [_range([row[column] for row in numbers]) for column in range(len(numbers[0]))]
        between = shape.split("#")
        joined.append("".join(text for pair in zip(between, [*ranges, ""], strict=True) for text in pair))
    return joined


def _range(numbers: Iterable[int]) -> str:
    """Say numbers as a regular expression, ten by ten."""
    tens: dict[int, list[int]] = {}
    for number in sorted(set(numbers)):
        tens.setdefault(number // 10, []).append(number % 10)
    if len(tens) > _MAX_TENS:
        return r"\d+"
    said = [f"{ten or ''}{_digits(last)}" for ten, last in tens.items()]
    return said[0] if len(said) == 1 else f"({'|'.join(said)})"


def _digits(digits: Sequence[int]) -> str:
    """Say digits, in order, as a regular expression."""
    first, last = digits[0], digits[-1]
    if len(digits) == 1:
        return str(first)
    return f"[{first}-{last}]" if len(digits) == last - first + 1 > 2 else f"[{''.join(map(str, digits))}]"
