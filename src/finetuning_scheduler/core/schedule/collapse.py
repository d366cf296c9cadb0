"""Many names, said in a few: whole modules as ``encoder.*``, numbered ones as ``layers.[0-3].weight``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name


def collapsed(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Say names in a few patterns.

    Args:
        names: The names.
        everything: All names that there are, these among them: a module of which all are meant is said as a whole.
    """
    chosen = list(dict.fromkeys(names))
    there, meant = Counter(_prefixes(everything)), Counter(_prefixes(chosen))
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


def _range(numbers: Sequence[int]) -> str:
    found = sorted(set(numbers))
    if len(found) == 1:
        return str(found[0])
    if found == list(range(found[0], found[-1] + 1)):
        return f"[{found[0]}-{found[-1]}]"
    return f"[{','.join(map(str, found))}]" if len(found) <= 8 else "*"
