"""Parameters that thaw in different phases, but that fully sharded data parallel has flattened into one tensor."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ..view import CONTAINERS

_EMPTY = -1  # the phase of a unit in which nothing has to stay


@dataclass(frozen=True)
class Unit:
    """A module that is wrapped, and the parameters that are flattened into one tensor with it.

    Args:
        path: The module's name in the whole model; empty for the model itself.
        names: The parameters' full names, in order.
        phase_of: The phase of each parameter that thaws at all.
        plain: The whole model without wrappers.
    """

    path: str
    names: Sequence[str]
    phase_of: Mapping[str, int]
    plain: nn.Module

    @property
    def is_aligned(self) -> bool:
        """Whether all its parameters thaw in the same phase, or none does."""
        return len({self.phase_of.get(name) for name in self.names}) == 1

    def __str__(self) -> str:
        by_phase: dict[int, list[str]] = defaultdict(list)
        for name in self.names:
            by_phase[self.phase_of.get(name, -1)].append(name)
        never = by_phase.pop(-1, None)
        phases = [f"phase {phase}: {', '.join(names)}" for phase, names in sorted(by_phase.items())]
        phases += [f"no phase: {', '.join(never)}"] if never else []
        return f"{self.path or type(self.plain).__name__} with {'; '.join(phases)}"

    def separation(self) -> list[str] | None:
        """Find modules to make units of their own, so that each unit has the parameters of one phase.

        Returns:
            ``None`` if the parameters of one module itself, such as a weight and its bias, thaw in different phases.
        """
        if any(len({self.phase_of.get(name) for name in names}) > 1 for names in self._own.values()):
            return None
        return self._apart(self.path)[0]

    def _apart(self, path: str, around: int | None = _EMPTY) -> tuple[list[str], int | None]:
        """Find the modules below ``path`` that cannot stay in its unit.

        Args:
            path: A module.
            around: The phase of what holds the module, if it need not be a unit of its own.

        Returns:
            The modules, and the phase of what stays.
        """
        inner = self._inner.get(path, [])
        uniform = Counter(next(iter(self._phases[part])) for part in inner if len(self._phases[part]) == 1)
        staying = around
        if own := self._own.get(path):
            staying = self.phase_of.get(own[0])
        elif uniform and around not in uniform:
            staying = uniform.most_common(1)[0][0]
        found: list[str] = []
        for part in inner:
            phases = self._phases[part]
            below, left = self._apart(part, staying) if len(phases) > 1 else ([], next(iter(phases)))
            found += below
            if staying == _EMPTY:
                staying = left
            elif left != staying:
                found.append(part)
        return found, staying

    @cached_property
    def _own(self) -> Mapping[str, list[str]]:
        """By module, its own parameters; those of a container count as the parameters of the module around it."""
        own: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            own[self._wrappable(name.rpartition(".")[0])].append(name)
        return own

    @cached_property
    def _phases(self) -> Mapping[str, set[int | None]]:
        """By module, the phases of all parameters in it."""
        phases: dict[str, set[int | None]] = defaultdict(set)
        for path, names in self._own.items():
            here = {self.phase_of.get(name) for name in names}
            phases[path] |= here
            while path != self.path:
                path = self._wrappable(path.rpartition(".")[0])
                phases[path] |= here
        return phases

    @cached_property
    def _inner(self) -> Mapping[str, list[str]]:
        """By module, the outermost modules inside it that can be units."""
        inner: dict[str, list[str]] = defaultdict(list)
        for path in self._phases:
            if path != self.path:
                inner[self._wrappable(path.rpartition(".")[0])].append(path)
        return inner

    def _wrappable(self, path: str) -> str:
        """Return the innermost module around a path, itself included, that has a forward pass."""
        while path != self.path and isinstance(self.plain.get_submodule(path), CONTAINERS):
            path = path.rpartition(".")[0]
        return path
