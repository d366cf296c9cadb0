"""The names of a model's parameters, made for look-ups by name and by regular expression.

The work grows linearly with the number of tensors plus the number of selectors: names are looked up in a dict, and a
regular expression is tried only on the names that begin like it, found by bisection in the sorted names.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from .expression import Expression
from .patterns import leading_parts
from .wording import closest

if TYPE_CHECKING:
    from torch import nn

# a search for similar names costs far more than a look-up
MAX_NAMES_COMPARED = 2_000
MAX_RANGES = 256
FROZEN_BY_SCHEDULE = "frozen_by_schedule"  # marks parameters, so that what their author froze can be told from them


def frozen_by_others(named: Iterable[tuple[str, nn.Parameter]]) -> frozenset[str]:
    """Name the parameters that somebody else than a schedule has frozen, and that could be trained."""
    return frozenset(
        name
        for name, parameter in named
        if not (parameter.requires_grad or getattr(parameter, FROZEN_BY_SCHEDULE, False))
        and (parameter.is_floating_point() or parameter.is_complex())
    )


@dataclass(frozen=True)
class ParameterIndex:
    """The names of a model's parameters, made for look-ups.

    Attributes:
        names: The registered names, in order.
        aliases: The other names of tied parameters, each with the registered one.
        fixed: The parameters whose dtype has no gradient, with that dtype.
    """

    names: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ParameterIndex:
        """Index a model's parameters."""
        registered: dict[int, str] = {}
        aliases: dict[str, str] = {}
        fixed: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in registered:
                aliases[name] = registered[id(parameter)]
                continue
            registered[id(parameter)] = name
            if not (parameter.is_floating_point() or parameter.is_complex()):
                fixed[name] = str(parameter.dtype)
        return cls(tuple(registered.values()), aliases, fixed)

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """The place of each registered name in the order of registration."""
        return {name: position for position, name in enumerate(self.names)}

    @cached_property
    def sorted_names(self) -> Sequence[str]:
        """Registered names and aliases in alphabetical order."""
        return sorted((*self.names, *self.aliases))

    def candidates(self, pattern: str) -> Iterator[str]:
        """The names a regular expression can match, judged by how it begins; every other name cannot match."""
        names = self.sorted_names
        ranges = [(0, len(names))]
        length = 0
        for part in leading_parts(pattern):
            if part is None:
                ranges = [stretch for span in ranges for stretch in _split(names, length, *span)]
            else:
                ranges = [stretch for span in ranges for stretch in _narrowed(names, length, part, *span)]
            length += 1 if part is None else len(part)
            if len(ranges) > MAX_RANGES:
                break
        for start, end in ranges:
            yield from names[start:end]


def matching_names(expression: Expression, index: ParameterIndex) -> list[str]:
    """The names an expression matches whole; if there are none, those it matches up to a dot.

    Raises:
        TimeoutError: It takes too long.
    """
    candidates = list(index.candidates(expression.pattern))
    return expression.whole(candidates) or expression.up_to_dots(candidates)


def closest_names(selector: str, index: ParameterIndex) -> list[str]:
    """Up to three names that look like a selector, the closest first; of a large model, only some are compared."""
    names = [name for name in index.sorted_names if name not in index.aliases]
    if len(names) > MAX_NAMES_COMPARED:
        middle = bisect_left(names, selector)
        last = selector.rpartition(".")[2]
        near = names[max(0, middle - MAX_NAMES_COMPARED // 4) : middle + MAX_NAMES_COMPARED // 4]
        same_end = islice((name for name in names if name.endswith(last)), MAX_NAMES_COMPARED // 2)
        names = list(dict.fromkeys((*near, *same_end)))
    return closest(selector.replace("\\", ""), names, count=3)


def _narrowed(names: Sequence[str], length: int, part: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The stretch of a range of names that has `part` at `length`; the names share what comes before."""
    start = bisect_left(names, part, start, end, key=lambda name: name[length : length + len(part)])
    end = bisect_right(names, part, start, end, key=lambda name: name[length : length + len(part)])
    if start < end:
        yield start, end


def _split(names: Sequence[str], length: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The stretches of a range of names that share the character at `length`."""
    while start < end:
        character = names[start][length : length + 1]
        stop = bisect_right(names, character, start, end, key=lambda name: name[length : length + 1])
        if character:
            yield start, stop
        start = stop
