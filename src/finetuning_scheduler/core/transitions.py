"""When a phase ends: a pure function of the schedule's limits and the progress made so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from .schedule.model import Phase


class Reason(str, Enum):
    """Why a phase ended. The value is the name a user knows it by."""

    PATIENCE = "early stopping"
    EPOCH = "max_transition_epoch"
    STEP = "max_transition_step"
    REQUEST = "request"


@dataclass
class Progress:
    """All that a schedule's execution has to remember; everything else is derived from the schedule.

    Epochs and optimizer steps count from the start of the session, not of the phase.
    """

    phase: int = 0
    best_phase: int = 0
    entry_epoch: int = 0
    entry_step: int = 0
    parameter_groups: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Decision:
    """The answer to "does the phase end here?"."""

    advance: bool
    reason: Reason | None = None


STAY = Decision(advance=False)


def decide(
    limits: Phase,
    progress: Progress,
    *,
    epoch: int,
    step: int,
    epoch_boundary: bool,
    patience_exhausted: bool = False,
) -> Decision:
    """Decide whether the phase described by ``limits`` ends now.

    Args:
        limits: The phase being executed.
        progress: Where the session entered that phase.
        epoch: The epoch about to start or, inside one, the one that is running.
        step: Optimizer steps taken so far.
        epoch_boundary: Whether this is asked between two epochs. The epoch limit only counts there, and a phase
            whose limit lies in the past still lasts one epoch.
        patience_exhausted: Whether the monitored quantity stopped improving.
    """
    if patience_exhausted:
        return Decision(True, Reason.PATIENCE)
    if epoch_boundary and 0 <= limits.max_transition_epoch <= epoch and epoch > progress.entry_epoch:
        return Decision(True, Reason.EPOCH)
    if 0 <= limits.max_transition_step <= step and step > progress.entry_step:
        return Decision(True, Reason.STEP)
    return STAY
