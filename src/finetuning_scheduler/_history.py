"""The history of a fit: what Lightning's hooks tell of epochs, validations and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

from ._lightning import Trainer, around_saves
from .core.history.clock import Activity
from .core.history.recorder import Recorder
from .core.transitions import Moment


class FitHistory:
    """Keeps the history of one fit on every rank, since metrics may have to be reduced; rank zero writes it.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._recorder: Recorder | None = None
        self._hooked = ExitStack()
        self._reason = "trainer"
        self._ended_epoch = -1

    @property
    def begun(self) -> bool:
        """Whether the training has started."""
        return self._recorder is not None

    @property
    def recorder(self) -> Recorder:
        """What keeps the history; raises ``RuntimeError`` before the training has started."""
        if self._recorder is None:
            raise RuntimeError("expected a history that has begun")
        return self._recorder

    def begin(self, recorder: Recorder, state: Mapping[str, Any] | None, directory: str) -> None:
        """Begin, or go on with what a checkpoint or an earlier fit knows.

        An epoch that had ended when the checkpoint was written, but whose end this object was not told of, is recorded
        now.

        Args:
            recorder: Keeps the history.
            state: The state that the fit goes on from, if it does.
            directory: Where the file goes.
        """
        trainer, self._recorder = self._trainer, recorder
        epoch, step = trainer.current_epoch, trainer.global_step
        recorder.begin(Moment(epoch, step), state)
        if not recorder.has_recorded(epoch - 1):
            recorder.end_epoch(epoch - 1, step, self._metrics())
        self._hooked.enter_context(around_saves(trainer, partial(recorder.during, Activity.SAVING)))
        if trainer.is_global_zero:
            recorder.write_to(directory)

    def begin_validation(self) -> None:
        """Note that a validation inside the fit begins."""
        self.recorder.begin_validation()

    def end_validation(self) -> None:
        """Note that it has ended."""
        self.recorder.end_validation()

    def end_epoch(self) -> None:
        """Record the epoch that ends, with the metrics that there are by now."""
        self._ended_epoch = self._trainer.current_epoch
        self.recorder.end_epoch(self._ended_epoch, self._trainer.global_step, self._metrics())

    def complete_epoch(self) -> None:
        """Add the metrics that later hooks of the epoch's end have logged."""
        if self._ended_epoch >= 0:
            self.recorder.add_metrics(self._ended_epoch, self._metrics())
            self._ended_epoch = -1

    def restoring(self) -> AbstractContextManager[None]:
        """Count what a block takes as time for going back to the best state."""
        return nullcontext() if self._recorder is None else self._recorder.during(Activity.RESTORING)

    def note_reason(self, reason: str) -> None:
        """Note why the fit is about to end."""
        self._reason = reason

    def end(self) -> None:
        """Record the end of the fit, if it had begun."""
        self._hooked.close()
        if self._recorder is not None:
            self._recorder.end(self._reason, self._trainer.current_epoch, self._trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit goes on from."""
        return {} if self._recorder is None else {"history": self._recorder.state_dict()}

    def _metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._trainer.callback_metrics.items()}
