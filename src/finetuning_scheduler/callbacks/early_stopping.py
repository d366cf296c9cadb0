"""Early stopping that ends a phase, and only in the last phase the session."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._lightning import (
    EarlyStoppingReason,
    InspectableEarlyStopping,
    LightningModule,
    Trainer,
    forget_scores,
    validation_metrics,
)
from .phase_holder import PhaseHolder


class FTSEarlyStopping(InspectableEarlyStopping):
    """``EarlyStopping`` for a fine-tuning schedule; it takes the same arguments.

    Before the last phase, running out of patience ends the phase instead of the session. A value that is not finite
    and the two thresholds stop the session as in Lightning. The best score carries over phases; the wait count
    restarts with each. Unless ``check_on_train_epoch_end`` says otherwise the check runs at the end of validation, or
    at the end of the training epoch if there is no validation or the monitored quantity is not logged there.

    Without a :class:`FinetuningScheduler` in the trainer it behaves as ``EarlyStopping``.

    Raises:
        MisconfigurationException: The monitored quantity was not logged by the first check.
    """

    phase_exhausted = False
    _scheduler: PhaseHolder | None = None
    stands_for: str | None = None
    _patience_counts = True
    _given_moment: bool | None = None
    _moment_is_open = False
    _step = -1
    judged_step = -1  # the optimizer step after which the last check was made

    def begin(self, scheduler: PhaseHolder, *, ends_phases: bool = True) -> None:
        """Attach the scheduler whose phases this callback ends.

        Args:
            scheduler: The scheduler.
            ends_phases: Whether running out of patience counts at all.
        """
        self._scheduler = scheduler
        self._patience_counts = ends_phases
        self._given_moment = self.check_on_train_epoch_end

    def let_go(self) -> None:
        """Act as ``EarlyStopping`` again, checking when the user has asked for."""
        if self._scheduler is not None:
            self.check_on_train_epoch_end = self._given_moment
        self._scheduler, self._moment_is_open = None, False

    def forget(self) -> None:
        """Forget the scores of an earlier fit."""
        forget_scores(self)
        self._step = self.judged_step = -1
        self.phase_exhausted = False

    def enter_phase(self) -> None:
        """Restart the wait count for a phase that begins."""
        self.wait_count = 0
        self.phase_exhausted = False

    def keeper(self) -> Callable[[], None]:
        """Return a function that takes back :meth:`enter_phase`."""
        wait_count, phase_exhausted = self.wait_count, self.phase_exhausted

        def take_back() -> None:
            self.wait_count, self.phase_exhausted = wait_count, phase_exhausted

        return take_back

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: that of the user's own class, if this object stands for one of it."""
        key = super().state_key
        return key if self.stands_for is None else key.replace(type(self).__qualname__, self.stands_for, 1)

    @property
    def has_stopped_session(self) -> bool:
        """Whether the last check decided to stop the whole session."""
        return self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED

    def end_phase_instead(self) -> None:
        """Let the session that it has ended for want of patience go on: other phases follow the last one by now."""
        if self.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED:
            self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
            self.stopped_epoch = 0
            self.phase_exhausted = self._patience_counts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle when the check runs."""
        if self.check_on_train_epoch_end is None and stage == "fit" and self._scheduler is not None:
            self._moment_is_open = trainer.enable_validation
            self.check_on_train_epoch_end = not trainer.enable_validation
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, unless the monitored quantity turns out to be logged by training only."""
        if self._moment_is_open and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._moment_is_open = False
            self.check_on_train_epoch_end = self.monitor not in validation_metrics(trainer)
        self._step = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, if this is the moment for it."""
        self._step = trainer.global_step
        super().on_train_epoch_end(trainer, pl_module)

    def catch_up(self, trainer: Trainer) -> None:
        """Check a validation that the run which is resumed was interrupted right after."""
        self._step = trainer.global_step
        if self.monitor in trainer.callback_metrics:
            self.check(trainer)

    @property
    def checks_after_validation(self) -> bool:
        """Whether it is known that the check is made at the end of validation."""
        return self.check_on_train_epoch_end is False and not self._moment_is_open

    def judge(self, current: torch.Tensor) -> tuple[bool, str | None]:
        """Turn "out of patience" into the end of the phase while other phases are to come."""
        if self._scheduler is None:
            return super().judge(current)
        self.judged_step = self._step
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        stop, message = super().judge(current)
        if not stop or self.stopping_reason is not EarlyStoppingReason.PATIENCE_EXHAUSTED:
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
