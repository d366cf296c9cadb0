"""What the callbacks ask of the scheduler that runs them, so that they need not import it."""

from __future__ import annotations

from typing import Protocol


class PhaseHolder(Protocol):
    """Something that executes a schedule's phases."""

    @property
    def curr_depth(self) -> int:
        """The phase being executed."""

    @property
    def depth_remaining(self) -> int:
        """How many phases are still to come; 0 in the last one."""
