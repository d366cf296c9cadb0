"""Early stopping that ends a phase, and only in the last phase the session."""

from __future__ import annotations

from typing import Any

import torch

from .._lightning import EarlyStoppingReason, InspectableEarlyStopping, LightningModule, Trainer
from .phase_holder import PhaseHolder


class FTSEarlyStopping(InspectableEarlyStopping):
    """``EarlyStopping`` for a fine-tuning schedule; it takes the same arguments.

    Before the last phase, running out of patience ends the phase instead of the session. A value that is not finite
    and the two thresholds stop the session as in Lightning. The best score carries over phases; the wait count
    restarts with each. Unless ``check_on_train_epoch_end`` says otherwise the check runs at the end of validation, or
    at the end of the training epoch if there is no validation or the monitored quantity is only logged there.

    Without a :class:`FinetuningScheduler` in the trainer it behaves as ``EarlyStopping``.

    Raises:
        MisconfigurationException: The monitored quantity was not logged by the first check.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begin(None)

    def begin(self, scheduler: PhaseHolder | None, *, ends_phases: bool = True) -> None:
        """Attach the scheduler whose phases this callback ends.

        Args:
            scheduler: The scheduler, or ``None`` to act as ``EarlyStopping``.
            ends_phases: Whether running out of patience counts at all.
        """
        self._scheduler = scheduler
        self._patience_counts = ends_phases
        self._moment_is_open = False
        self.phase_exhausted = False

    def forget(self) -> None:
        """Forget the scores of another module that the same trainer has fitted."""
        self.best_score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.enter_phase()

    def enter_phase(self) -> None:
        """Restart the wait count for a phase that begins."""
        self.wait_count = 0
        self.phase_exhausted = False

    @property
    def has_stopped_session(self) -> bool:
        """Whether the last check decided to stop the whole session."""
        return self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle when the check runs."""
        if self.check_on_train_epoch_end is None and stage == "fit":
            self._moment_is_open = trainer.enable_validation
            self.check_on_train_epoch_end = not trainer.enable_validation
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, unless the monitored quantity turns out to be logged at the end of the training epoch only."""
        if self._moment_is_open and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._moment_is_open = False
            self.check_on_train_epoch_end = self.monitor not in trainer.callback_metrics
        super().on_validation_end(trainer, pl_module)

    def judge(self, current: torch.Tensor) -> tuple[bool, str | None]:
        """Turn "out of patience" into the end of the phase while other phases are to come."""
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        stop, message = super().judge(current)
        if not stop or self.stopping_reason is not EarlyStoppingReason.PATIENCE_EXHAUSTED or self._scheduler is None:
            return stop, message
        if self._patience_counts and self._scheduler.depth_remaining == 0:
            return stop, message
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        if not self._patience_counts:
            return False, None
        self.phase_exhausted = True
        return False, (
            f"Monitored metric {self.monitor} did not improve in the last {self.wait_count} records."
            f" Best score: {self.best_score:.3f}. Phase {self._scheduler.curr_depth} ends."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return ``EarlyStopping``'s state and whether the phase has run out of patience."""
        return {**super().state_dict(), "phase_exhausted": self.phase_exhausted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self.phase_exhausted = state_dict["phase_exhausted"]
