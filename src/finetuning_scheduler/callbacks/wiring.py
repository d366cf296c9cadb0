"""Put multi-phase callbacks in the place of what user, module or trainer have configured, for one fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .._lightning import (
    Callback,
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    Trainer,
    callbacks_of,
    forget_checkpoints,
    forget_scores,
    is_default_checkpoint,
    move_back,
    move_first,
    note_chosen_directory,
    note_directory,
)
from ..core.state import read_as
from ..errors import CheckpointError, Problem
from .checkpoint import FTSCheckpoint
from .early_stopping import FTSEarlyStopping
from .phase_holder import PhaseHolder
from .saved_states import SavedCheckpointing, SavedMetric, SavedScheduling, SavedStopping

DEFAULT_MONITOR = "val_loss"
C = TypeVar("C", FTSEarlyStopping, FTSCheckpoint)


@dataclass
class Wiring:
    """The callbacks that drive the phases of one fit.

    Attributes:
        early_stopping: Ends phases; ``None`` if nothing does but limits.
        checkpoint: Knows the best checkpoint; ``None`` if there is none.
        lines: What the user should know about who drives.
    """

    early_stopping: FTSEarlyStopping | None = None
    checkpoint: FTSCheckpoint | None = None
    lines: list[str] = field(default_factory=list)
    owes_save: bool = False  # the checkpoint that is being loaded has a score that ``checkpoint`` has not met yet
    _replaced: list[tuple[Callback, Callback]] = field(default_factory=list)
    _moved: tuple[Callback, int] | None = None  # the scheduler, and its place among the trainer's callbacks

    def begin(
        self, scheduler: PhaseHolder, trainer: Trainer, *, ends_phases: bool, restores_best: bool, forget: bool
    ) -> None:
        """Attach the scheduler to the callbacks that drive its phases.

        Args:
            scheduler: The scheduler.
            trainer: The trainer.
            ends_phases: Whether running out of patience ends a phase.
            restores_best: Whether the best checkpoint is restored between phases.
            forget: Whether the fit is no continuation, so that what they know of an earlier one is forgotten.
        """
        if self.early_stopping is not None:
            self.early_stopping.begin(scheduler, ends_phases=ends_phases)
        if self.checkpoint is not None:
            self.checkpoint.begin(scheduler, trainer, verifies=restores_best)
        for callback in callbacks_of(trainer):
            if isinstance(callback, ModelCheckpoint):
                note_directory(callback, trainer)
        for callback in callbacks_of(trainer) if forget else ():
            if isinstance(callback, (FTSEarlyStopping, FTSCheckpoint)):
                callback.forget()
            elif isinstance(callback, ModelCheckpoint):
                forget_checkpoints(callback)
            elif isinstance(callback, EarlyStopping):
                forget_scores(callback)

    def put_first(self, scheduler: Callback, trainer: Trainer) -> None:
        """Let the scheduler's hooks be called before those of other callbacks until :meth:`undo`.

        What reads or logs learning rates, groups or trained parameters as an epoch or a batch starts then sees those of
        the phase that begins there, wherever it is listed.
        """
        self._moved = scheduler, move_first(trainer, scheduler)

    def put_back(self, trainer: Trainer) -> None:
        """Undo :meth:`put_first`."""
        if self._moved is not None:
            move_back(trainer, *self._moved)
            self._moved = None

    def complete(self, checkpoint: Mapping[str, Any], progress: Mapping[str, Any] | None) -> None:
        """Find the state of the callbacks that drive in a checkpoint, however it has been written.

        A file may have been written when others drove, or by the user's own objects after a fit; what these do not
        know, the scheduler's progress does.

        Args:
            checkpoint: A checkpoint that is being loaded; it gets what its callbacks are going to look for.
            progress: The scheduler's state in it.

        Raises:
            CheckpointError: A state is damaged; with each key that is missing or of the wrong kind.
        """
        states = checkpoint.get("callbacks", {})
        if progress is None:
            return
        read = read_as(SavedScheduling, progress, "state of the FinetuningScheduler")
        if self.early_stopping is not None:
            earlier = _state_of(self.early_stopping, states) or {}
            exhausted = progress.get("phase_exhausted", earlier.get("phase_exhausted", False))
            self.early_stopping.phase_exhausted = bool(exhausted)
        if (driver := self.checkpoint) is not None and (state := _state_of(driver, states)) is not None:
            metric = read.metrics.get(driver.monitor or "")
            given = state.get("score")
            state = {
                "current_ckpt_depth": progress.get("phase", 0),
                "best_ckpt_depth": progress.get("best_phase", 0),
                "score": metric.tensor if isinstance(metric, SavedMetric) else metric,
                **state,
            }
            read_as(SavedCheckpointing, state, f"state of {type(driver).__name__}")
            self.owes_save = _differ(given, state.get("current_score"))
            states[driver.state_key] = state
        if (stopping := self.early_stopping) is not None and (state := _state_of(stopping, states)) is not None:
            if type(stopping).load_state_dict is EarlyStopping.load_state_dict:  # a user's class reads what it likes
                read_as(SavedStopping, state, f"state of {type(stopping).__name__}")
            states[stopping.state_key] = state

    def undo(self, trainer: Trainer) -> None:
        """Put the user's own objects back, which have seen all that their multi-phase forms have."""
        callbacks = callbacks_of(trainer)
        for callback in callbacks if self.checkpoint is not None else ():
            if isinstance(callback, ModelCheckpoint):
                note_chosen_directory(callback)
        for own, form in self._replaced:
            for index, callback in enumerate(callbacks):
                if callback is form:
                    callbacks[index] = own
        self._replaced.clear()
        self.put_back(trainer)
        for driver in (self.early_stopping, self.checkpoint):
            if driver is not None:
                driver.let_go()

    def _take(self, own: Callback, form: Callback, callbacks: list[Callback]) -> None:
        callbacks[callbacks.index(own)] = form
        self._replaced.append((own, form))


def wire(trainer: Trainer, *, early_stopping: bool, checkpoint: bool) -> Wiring:
    """Make the trainer hold the callbacks that drive the phases, in place.

    Of several of a kind, one drives: a multi-phase form, else the first that monitors something and keeps what can be
    restored. An object of another class is replaced by a multi-phase form that shares its state; the others stay as
    they are, and so does one that monitors nothing.

    Args:
        trainer: The trainer whose callbacks are looked at.
        early_stopping: Whether to add an ``FTSEarlyStopping`` if there is no early stopping.
        checkpoint: Whether to add an ``FTSCheckpoint`` if no checkpoint monitors anything.
    """
    callbacks = callbacks_of(trainer)
    wiring = Wiring()
    kinds = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
    if checkpoint and len(kinds) == 1 and is_default_checkpoint(kinds[0], trainer):
        # The trainer's own, as far as anybody can tell: it saves each epoch and knows no best.
        vars(kinds[0])["monitor"] = DEFAULT_MONITOR
    stoppings = [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
    if (stopping := _driver(stoppings, FTSEarlyStopping)) is not None:
        wiring.early_stopping = _multi_phase(stopping, FTSEarlyStopping)
        wiring._take(stopping, wiring.early_stopping, callbacks)
    elif early_stopping:
        wiring.early_stopping = FTSEarlyStopping(monitor=DEFAULT_MONITOR)
        first_checkpoint = next((i for i, c in enumerate(callbacks) if isinstance(c, ModelCheckpoint)), len(callbacks))
        callbacks.insert(first_checkpoint, wiring.early_stopping)
    savings = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    if (saving := _driver(savings, FTSCheckpoint)) is not None:
        wiring.checkpoint = _multi_phase(saving, FTSCheckpoint)
        wiring._take(saving, wiring.checkpoint, callbacks)
    elif checkpoint:
        wiring.checkpoint = FTSCheckpoint(monitor=DEFAULT_MONITOR)
        callbacks.append(wiring.checkpoint)
        savings = [*savings, wiring.checkpoint]
    wiring.lines += _lines(wiring.early_stopping, stoppings, "the others stop the session")
    wiring.lines += _lines(wiring.checkpoint, savings, "the others only save")
    return wiring


def _differ(score: Any, met: Any) -> bool:
    if score is None:
        return False
    return met is None or (float(score) != float(met) and not (math.isnan(score) and math.isnan(met)))


def _state_of(driver: Callback, states: Mapping[Any, Any]) -> Mapping[str, Any] | None:
    """Find the state of a callback with the same settings, whatever its class was called."""
    settings = driver.state_key.partition("{")[2]
    alike = (key for key in states if settings and isinstance(key, str) and key.partition("{")[2] == settings)
    key = driver.state_key if driver.state_key in states else next(alike, None)
    if key is None:
        return None
    if not isinstance(found := states[key], Mapping):
        message = f"expected the state of {type(driver).__name__} to be a mapping, got {type(found).__name__}"
        fix = "Resume from a checkpoint that this package has written, or with the release that wrote it."
        raise CheckpointError(Problem(message, fix=fix))
    return found


def _driver(candidates: Sequence[Callback], multi_phase: type[C]) -> Callback | None:
    """Choose the callback that drives the phases."""
    explicit: list[Callback] = [callback for callback in candidates if isinstance(callback, multi_phase)]
    monitoring: list[Callback] = [callback for callback in candidates if getattr(callback, "monitor", None) is not None]
    best: list[Callback] = [callback for callback in explicit if callback in monitoring]
    usable: list[Callback] = [callback for callback in monitoring if _keeps_states(callback)]
    chosen: list[Callback] = [*best, *usable, *monitoring, *explicit]
    return chosen[0] if chosen else None


def _keeps_states(callback: Callback) -> bool:
    """Whether what a callback saves could be restored; early stopping saves nothing that could not."""
    return not isinstance(callback, ModelCheckpoint) or not (callback.save_top_k == 0 or callback.save_weights_only)


def _multi_phase(callback: Callback, multi_phase: type[C]) -> C:
    """Return an object of a multi-phase class that shares the callback's state, and keeps what its class does."""
    if isinstance(callback, multi_phase):
        return callback
    kind = type(callback)
    base = multi_phase.__mro__[2]  # Lightning's class, below the one that makes its verdicts visible
    form_class = multi_phase if kind is base else type(f"FTS{kind.__name__}", (multi_phase, kind), {})
    form: C = object.__new__(form_class)
    # All arguments are taken over, in whatever form the base class keeps them; and the user's object goes on
    # answering, since both are the same state.
    form.__dict__ = callback.__dict__
    form.stands_for = kind.__qualname__
    return form


def _lines(driver: Callback | None, candidates: Sequence[Callback], others: str) -> list[str]:
    if driver is None or len(candidates) < 2:
        return []
    name, monitor = type(driver).__name__, getattr(driver, "monitor", None)
    return [f"Of {len(candidates)} callbacks, {name} that monitors {monitor!r} drives the phases; {others}."]
