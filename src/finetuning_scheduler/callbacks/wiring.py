"""Put the multi-phase callbacks in place of those that the user, or the trainer, has configured."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch

from .._lightning import Callback, EarlyStopping, ModelCheckpoint, Trainer, callbacks_of
from ..errors import Problem
from .checkpoint import FTSCheckpoint
from .early_stopping import FTSEarlyStopping

DEFAULT_MONITOR = "val_loss"
C = TypeVar("C", FTSEarlyStopping, FTSCheckpoint)


def install(trainer: Trainer, *, early_stopping: bool, checkpoint: bool) -> list[Problem]:
    """Make the trainer hold one ``FTSEarlyStopping`` and one ``FTSCheckpoint``, in place, the user's own untouched.

    Args:
        trainer: The trainer whose callbacks are looked at; calling this twice changes nothing more.
        early_stopping: Whether to add an ``FTSEarlyStopping`` if there is no early stopping.
        checkpoint: Whether to add an ``FTSCheckpoint`` if there is no checkpoint.

    Returns:
        What is wrong with the user's configuration.
    """
    callbacks = callbacks_of(trainer)
    _drop_default_checkpoint(callbacks)
    problems = [
        *_substitute(callbacks, EarlyStopping, FTSEarlyStopping),
        *_substitute(callbacks, ModelCheckpoint, FTSCheckpoint),
    ]
    if early_stopping and not _all(callbacks, EarlyStopping):
        first_checkpoint = next((i for i, c in enumerate(callbacks) if isinstance(c, ModelCheckpoint)), len(callbacks))
        callbacks.insert(first_checkpoint, FTSEarlyStopping(monitor=DEFAULT_MONITOR))
    if checkpoint and not _all(callbacks, ModelCheckpoint):
        callbacks.append(FTSCheckpoint(monitor=DEFAULT_MONITOR))
    return problems


def find(trainer: Trainer, kind: type[C]) -> C | None:
    """Return the trainer's callback of that kind."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def _all(callbacks: list[Callback], kind: type[Callback]) -> list[Callback]:
    return [callback for callback in callbacks if isinstance(callback, kind)]


def _drop_default_checkpoint(callbacks: list[Callback]) -> None:
    """Remove the checkpoint callback that a trainer adds by itself: it monitors nothing, so it knows no best."""
    pristine = _comparable(ModelCheckpoint())
    for index, callback in enumerate(callbacks):
        if type(callback) is ModelCheckpoint and _comparable(callback) == pristine:
            callbacks[index] = FTSCheckpoint(monitor=DEFAULT_MONITOR)
            return


def _comparable(callback: Callback) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(callback).items() if name not in ("log", "log_dict", "_fs")}


def _substitute(callbacks: list[Callback], base: type[Callback], multi_phase: type[C]) -> list[Problem]:
    present = [(index, callback) for index, callback in enumerate(callbacks) if isinstance(callback, base)]
    if len(present) > 1:
        kinds = ", ".join(type(callback).__name__ for _, callback in present)
        message = f"expected at most one {base.__name__} callback, got {len(present)} ({kinds})"
        return [Problem(message, fix=f"Keep one {base.__name__} or {multi_phase.__name__}.")]
    for index, callback in present:
        if type(callback) is base:
            callbacks[index] = _multi_phase_form(callback, multi_phase(monitor=DEFAULT_MONITOR))
        elif not isinstance(callback, multi_phase):
            message = f"expected {base.__name__} or {multi_phase.__name__}, got its subclass {type(callback).__name__}"
            fix = f"Derive {type(callback).__name__} from finetuning_scheduler.{multi_phase.__name__}."
            return [Problem(message, fix=fix)]
    return []


def _multi_phase_form(callback: Callback, form: C) -> C:
    """Give ``form`` the same behaviour as a user's callback in every argument.

    The instance's attributes are taken over instead of its arguments: the base classes store some of these under
    another name or sign, and attributes stay right when a release of Lightning adds an argument.
    """
    form.__dict__.update({name: _own(value) for name, value in vars(callback).items()})
    return form


def _own(value: Any) -> Any:
    """Copy what training changes in place, so that the user's callback stays as it was."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value
