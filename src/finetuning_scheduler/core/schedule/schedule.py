"""A schedule: its phases in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from ...errors import ScheduleFormatError
from .draft import draft
from .model import Model, Phase
from .values import plain


class Schedule(Model, Mapping[int, Phase]):
    """The phases of a fine-tuning session, in order; a mapping of phase numbers to phases, too."""

    phases: tuple[Phase, ...] = Field(min_length=1, description="The phases; phase 0 comes first.")

    def __len__(self) -> int:
        return len(self.phases)

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]  # pydantic's yields pairs of names and values
        return iter(range(len(self.phases)))

    def __getitem__(self, number: int) -> Phase:
        try:
            return self.phases[range(len(self.phases)).index(number)]
        except ValueError:
            raise KeyError(number) from None

    def __eq__(self, other: object) -> bool:
        """Compare with a schedule, or with a mapping of numbers to phases such as a file holds."""
        if not isinstance(other, Mapping) or isinstance(other, Schedule):
            return super().__eq__(other)
        return dict(self) == dict(other)

    @classmethod
    def parse(cls, source: ScheduleSource) -> Schedule:
        """Make a schedule from a mapping or YAML file, which are left as they are.

        Raises:
            ScheduleError: With everything that is wrong with it.
        """
        drafted = draft(source.to_dict() if isinstance(source, Schedule) else source)
        if drafted.problems:
            raise ScheduleFormatError(drafted.problems, renumbered=drafted.renumbered)
        return cls(phases=tuple(drafted.phases.values()))

    def up_to(self, depth: int) -> Schedule:
        """The phases up to one of them; all if `depth` is -1 or larger than there are."""
        return self if depth < 0 else Schedule(phases=self.phases[: depth + 1])

    def to_dict(self) -> dict[int, dict[str, Any]]:
        """The schedule as plain Python values, `{0: {"params": [...]}, ...}`, without the defaults."""
        return {number: plain(phase.model_dump(exclude_defaults=True)) for number, phase in enumerate(self.phases)}


# `Path` tells LightningCLI to leave a path alone: it would read the file itself, and lines could not be named.
ScheduleSource = Schedule | Mapping[Any, Any] | str | Path | os.PathLike[str]
