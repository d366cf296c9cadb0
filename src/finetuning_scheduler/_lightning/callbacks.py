"""Lightning's callbacks as a schedule needs them: what they are told, know and forget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from .hooks import noted_saves
from .package import (
    Callback,
    EarlyStopping,
    EarlyStoppingReason,
    MisconfigurationException,
    ModelCheckpoint,
    Trainer,
    pl,
)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the trainer's own list of callbacks, which its hooks go through."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return callbacks


def move_first(trainer: Trainer, callback: Callback) -> int:
    """Let a callback's hooks be called before those of all others, in the trainer's own list; return its place so far.

    Lightning may be going through the list, and be at this callback: it goes on with the one behind it.
    """
    callbacks = callbacks_of(trainer)
    place = next(index for index, each in enumerate(callbacks) if each is callback)
    callbacks.insert(0, callbacks.pop(place))
    return place


def move_back(trainer: Trainer, callback: Callback, place: int) -> None:
    """Put a callback where it stood before :func:`move_first`, in a new list, since Lightning may be in the old one."""
    others = [each for each in callbacks_of(trainer) if each is not callback]
    vars(trainer)["callbacks"] = [*others[:place], callback, *others[place:]]


def refuse_other_package(trainer: Trainer) -> None:
    """Raise an error if the trainer, or a callback that stops or saves, is of the Lightning package not in use.

    Such an object would do its work, but is an instance of no class that is known here.

    Raises:
        MisconfigurationException: It says which packages are mixed and what to import.
    """
    mine, other = pl.__name__, "pytorch_lightning" if pl.__name__ == "lightning.pytorch" else "lightning.pytorch"
    names = {Trainer.__name__, EarlyStopping.__name__, ModelCheckpoint.__name__}
    for found in (trainer, *callbacks_of(trainer)):
        for kind in type(found).__mro__:
            if kind.__name__ in names and kind.__module__.startswith(f"{other}."):
                raise MisconfigurationException(
                    f"expected one Lightning package, got two: FinetuningScheduler uses `{mine}`, and "
                    f"{type(found).__name__} is of `{other}`. Fix: import everything from `{mine}`; or everything from "
                    f"`{other}`, before `finetuning_scheduler` and without importing `{mine}`."
                )


class AttachableCallback(Callback):
    """A callback that learns of its trainer before any callback's ``setup`` hook has run.

    Lightning calls ``setup`` in list order, and ``EarlyStopping.setup`` replaces the ``None`` of
    ``check_on_train_epoch_end``. Whoever wants to see the user's own arguments has to look before that; the only
    earlier moment is when the trainer hands each callback the module's ``log`` function.
    """

    def on_attach(self, trainer: Trainer) -> None:
        """Called with the trainer that is about to fit, validate, test or predict."""

    @property
    def log(self) -> Any:
        """The module's ``log`` function."""
        return self.__dict__["log"]

    @log.setter
    def log(self, function: Any) -> None:
        self.__dict__["log"] = function
        self.on_attach(function.__self__.trainer)


class InspectableEarlyStopping(EarlyStopping):
    """``EarlyStopping`` whose verdict and moment of checking a subclass can see and change."""

    @property
    def check_on_train_epoch_end(self) -> bool | None:
        """When the check runs: at the end of the training epoch, of validation, or (``None``) not yet decided."""
        return self._check_on_train_epoch_end

    @check_on_train_epoch_end.setter
    def check_on_train_epoch_end(self, value: bool | None) -> None:
        self._check_on_train_epoch_end = value

    def check(self, trainer: Trainer) -> None:
        """Check now."""
        self._run_early_stopping_check(trainer)

    def judge(self, current: torch.Tensor) -> tuple[bool, str | None]:
        """Tell whether the session should stop for this value of the monitored quantity, and why."""
        return super()._evaluate_stopping_criteria(current)

    def _validate_condition_metric(self, logs: dict[str, torch.Tensor]) -> bool:
        try:
            return super()._validate_condition_metric(logs)
        except RuntimeError as error:  # it lists the metrics that were logged
            raise MisconfigurationException(str(error)) from error

    def _evaluate_stopping_criteria(self, current: torch.Tensor) -> tuple[bool, str | None]:
        return self.judge(current)


class NotifyingModelCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that tells a subclass of each file it writes.

    With ``save_last`` it removes a checkpoint that is no longer among the best when the last one has been written anew:
    until then that one tells a run that is resumed from it of the removed one.
    """

    _outdated: tuple[str, ...] = ()
    _last_follows = False

    def before_save(self, filepath: str) -> None:
        """Called with the path of a checkpoint about to be written, when the best path is already up to date."""

    def after_save(self, trainer: Trainer, filepath: str) -> None:
        """Called by every rank when a checkpoint has been written, before another is removed for it."""

    def to_write(self, trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Tell, on every rank, what of a checkpoint is written; the given one stays."""
        return checkpoint

    def on_written(self, trainer: Trainer, filepath: str, checkpoint: dict[str, Any]) -> None:
        """Called by every rank after :meth:`after_save` with the whole checkpoint, whose tensors are the model's."""

    def note_saved(self, step: int | None) -> None:
        """Save no more at this optimizer step, if there is one."""
        if step is not None:
            self._last_global_step_saved = step

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.before_save(filepath)
        with noted_saves(trainer.strategy, partial(self.to_write, trainer)) as written:
            super()._save_checkpoint(trainer, filepath)
        self.after_save(trainer, filepath)
        if (checkpoint := written.get(str(filepath))) is not None:
            self.on_written(trainer, filepath, checkpoint)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        self._last_follows = bool(self.save_last)
        try:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        finally:
            self._last_follows = False

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        outdated, self._outdated = self._outdated, ()
        for filepath in outdated:
            if filepath not in self.best_k_models:
                super()._remove_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._last_follows:
            self._outdated = (*self._outdated, filepath)
        else:
            super()._remove_checkpoint(trainer, filepath)


@contextmanager
def at_end_of_epoch(trainer: Trainer) -> Iterator[None]:
    """Let the trainer's counters be for a while what they were at the end of the epoch that has just ended."""
    progress = trainer.fit_loop.epoch_progress
    for counters in (progress.total, progress.current):
        counters.completed -= 1
    try:
        yield
    finally:
        for counters in (progress.total, progress.current):
            counters.completed += 1


# What a checkpoint callback learns while it runs; everything else is how it was configured.
_CHECKPOINT_STATE = (
    "_last_checkpoint_saved",
    "_last_global_step_saved",
    "_last_time_checked",
    "best_k_models",
    "best_model_path",
    "best_model_score",
    "current_score",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
)
_DIRECTORIES = "given_and_chosen_directory"  # the attribute in which a checkpoint callback is told
_CHECKPOINT_CONFIGURATION = (
    "CHECKPOINT_NAME_LAST",
    "FILE_EXTENSION",
    "_enable_version_counter",
    "_every_n_epochs",
    "_every_n_train_steps",
    "_train_time_interval",
    "auto_insert_metric_name",
    "filename",
    "mode",
    "monitor",
    "save_last",
    "save_on_exception",
    "save_top_k",
    "save_weights_only",
    "verbose",
)


def forget_checkpoints(callback: ModelCheckpoint) -> None:
    """Let a checkpoint callback start anew; it chooses a directory anew, too, unless it has been given one."""
    fresh = vars(ModelCheckpoint(monitor=callback.monitor, mode=callback.mode))
    vars(callback).update({name: fresh[name] for name in _CHECKPOINT_STATE if name in fresh})
    callback.dirpath = vars(callback).get(_DIRECTORIES, (callback.dirpath, None))[0]


def note_directory(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Note which directory a checkpoint callback has been given; to be asked by every rank, before its ``setup``."""
    if vars(callback).get(_DIRECTORIES, (None, ""))[1] != callback.dirpath:
        chosen = callback.dirpath is None or str(callback.dirpath) == default_checkpoint_directory(trainer)
        vars(callback)[_DIRECTORIES] = (None if chosen else callback.dirpath, callback.dirpath)


def note_chosen_directory(callback: ModelCheckpoint) -> None:
    """Note which directory a trainer has chosen for a checkpoint callback."""
    given, _ = vars(callback).get(_DIRECTORIES, (callback.dirpath, None))
    vars(callback)[_DIRECTORIES] = (given, callback.dirpath)


def forget_scores(callback: EarlyStopping) -> None:
    """Let an early stopping callback start anew."""
    callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
    callback.stopping_reason, callback.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
    callback.wait_count = callback.stopped_epoch = 0


def default_checkpoint_directory(trainer: Trainer) -> str:
    """Tell where a checkpoint callback saves that has been given no directory; to be asked by every rank."""
    directory: str = ModelCheckpoint()._ModelCheckpoint__resolve_ckpt_dir(trainer)  # type: ignore[attr-defined]
    return directory


def is_default_checkpoint(callback: Callback, trainer: Trainer) -> bool:
    """Whether a callback is configured like the one that a trainer adds by itself.

    Only what use does not change is compared. The directory is chosen when a trainer uses the callback first.
    """
    if type(callback) is not ModelCheckpoint:
        return False
    default = ModelCheckpoint()
    if any(getattr(callback, name) != getattr(default, name) for name in _CHECKPOINT_CONFIGURATION):
        return False
    return callback.dirpath is None or str(callback.dirpath) == str(default_checkpoint_directory(trainer))


def validation_metrics(trainer: Trainer) -> set[str]:
    """Name the metrics that the validation inside a fit has logged."""
    results = trainer.fit_loop.epoch_loop.val_loop._results
    return set(results.metrics(on_step=False)["callback"])
