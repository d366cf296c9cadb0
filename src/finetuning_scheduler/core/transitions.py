"""When a phase ends: a pure function of the schedule's limits and the progress made so far; and who is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import nn

from .schedule.model import Phase

_FEW_GROUPS = 8  # whose learning rates a line lists


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


@dataclass(frozen=True)
class Moment:
    """Where a training loop is, as the loop itself knows it.

    Attributes:
        epoch: The epoch about to start or, inside one, the one that is running.
        step: Optimizer steps taken so far.
        between_epochs: Whether it lies between two epochs.
        out_of_patience: Whether the monitored quantity has stopped improving.
    """

    epoch: int
    step: int
    between_epochs: bool = True
    out_of_patience: bool = False


@dataclass(frozen=True)
class Decision:
    """The answer to "does the phase end here?"."""

    advance: bool
    reason: Reason | None = None


STAY = Decision(advance=False)


def decide(limits: Phase, progress: Progress, moment: Moment) -> Decision:
    """Decide whether a phase ends at this moment.

    The epoch limit only counts between epochs, and a phase whose limit lies in the past still lasts one epoch (or one
    step).

    Args:
        limits: The phase being executed.
        progress: Where the session entered that phase.
        moment: Where the loop is.
    """
    if moment.out_of_patience:
        return Decision(True, Reason.PATIENCE)
    over = 0 <= limits.max_transition_epoch <= moment.epoch
    if moment.between_epochs and over and moment.epoch > progress.entry_epoch:
        return Decision(True, Reason.EPOCH)
    if 0 <= limits.max_transition_step <= moment.step and moment.step > progress.entry_step:
        return Decision(True, Reason.STEP)
    return STAY


@dataclass(frozen=True)
class Transition:
    """A phase entered: what ended the one before and what is trainable now.

    Attributes:
        learning_rates: Of all groups; ``None`` under an optimizer that has none.
        new_groups: How many of these, the last ones, the transition has added.
    """

    left: int
    entered: int
    reason: Reason
    epoch: int
    step: int
    trainable: int
    share: float
    learning_rates: tuple[float | None, ...]
    new_groups: int = 0

    def __str__(self) -> str:
        return (
            f"Phase {self.left} -> {self.entered} ({self.reason.value}) at epoch {self.epoch}, step {self.step}: "
            f"{self.trainable:,} parameters trainable ({self.share:.2%}), learning rates {self._rates()}"
        )

    def _rates(self) -> str:
        """Say the groups' learning rates, of many groups those of the new ones only: each line tells what changes."""
        if len(self.learning_rates) <= _FEW_GROUPS:
            return _listed(self.learning_rates)
        first_new = len(self.learning_rates) - self.new_groups
        older = [lr for lr in self.learning_rates[:first_new] if lr is not None]
        said = [f"{_listed(self.learning_rates[first_new:])} in new groups"] if self.new_groups else []
        if older:
            low, high = f"{min(older):g}", f"{max(older):g}"
            said.append(f"{low if low == high else f'{low} to {high}'} in {len(older)} others")
        return ", ".join(said) or "none"


def _listed(rates: Sequence[float | None]) -> str:
    return f"[{', '.join('none' if lr is None else f'{lr:g}' for lr in rates)}]"


class Listener:
    """Told whenever a session changes what is trained. What has to follow the phases derives from it."""

    def before_thaw(self, thawed: Mapping[str, nn.Parameter]) -> None:
        """Called when these parameters, by name, are about to be thawed."""

    def after_thaw(self) -> None:
        """Called after each change of ``requires_grad``: at the start, at a transition, and in a resumed run.

        The optimizer has its new groups by then.
        """

    def on_transition(self, transition: Transition) -> None:
        """Called when another phase has been entered; not at the start, and not in a run that is resumed."""
