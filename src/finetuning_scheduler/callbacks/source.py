"""The schedule a user asked for: generated in implicit mode, else read, resolved against the model, and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, TypeVar, cast

from torch import nn

from .._lightning import MisconfigurationException, Trainer
from ..core.prepare import resolve
from ..core.schedule.files import save_renumbered, save_schedule
from ..core.schedule.generate import implicit
from ..core.schedule.resolve import Resolution
from ..core.schedule.schedule import Schedule
from ..errors import Problem, ScheduleError

T = TypeVar("T")
Share = Callable[[Any], Any]


def resolve_source(
    source: Schedule | Mapping[Any, Any] | str | PathLike[str] | None,
    model: nn.Module,
    directory: str,
    reinit_optim_cfg: Mapping[str, Any] | None = None,
    reinit_lr_cfg: Mapping[str, Any] | None = None,
) -> Resolution:
    """Resolve a schedule.

    Args:
        source: What the user gave; ``None`` generates a schedule.
        model: The model.
        directory: Where a renumbered copy of a schedule with gaps goes.
        reinit_optim_cfg: In implicit mode, what ``new_optimizer`` of each phase after the first is.
        reinit_lr_cfg: In implicit mode, what ``new_lr_scheduler`` of each phase after the first is.

    Raises:
        ScheduleError: With everything that is wrong with the schedule.
    """
    try:
        if source is None:
            source = implicit(model, reinit_optim_cfg, reinit_lr_cfg)
        return resolve(source, model)
    except ScheduleError as error:
        if error.renumbered is None:
            raise
        try:
            path = save_renumbered(error.renumbered, model, directory)
            note = Problem(f"a copy with the phases renumbered from 0 was written to {path}")
        except OSError as failure:
            text = f"no copy with the phases renumbered from 0 could be written to {directory} ({failure})"
            note = Problem(text, fix="Set `log_dir` to a directory that can be written to.")
        raise type(error)([*error.problems, note]) from error


def save_on_rank_zero(
    trainer: Trainer,
    share: Share,
    schedule: Schedule,
    model: nn.Module,
    directory: str,
    source: str | PathLike[str] | None = None,
) -> str:
    """Save a schedule and return its path on every rank.

    Args:
        trainer: Its global rank zero writes.
        share: Gives every rank what global rank zero has.
        schedule: The resolved schedule.
        model: The model it was resolved against.
        directory: Made if missing.
        source: The user's schedule file, if there is one.

    Raises:
        MisconfigurationException: On every rank, if the directory cannot be written to.
    """
    try:
        return on_rank_zero(trainer, share, lambda: str(save_schedule(schedule, model, directory, source=source)))
    except OSError as error:
        raise MisconfigurationException(
            f"expected a directory to write the schedule to, got `log_dir` {directory} "
            f"({type(error).__name__}: {error}). Fix: Set `log_dir` to a directory that can be written to."
        ) from error


def on_rank_zero(trainer: Trainer, share: Share, function: Callable[[], T]) -> T:
    """Call a function on global rank zero and give every rank what it returns, or raises.

    Args:
        trainer: Tells which rank this is.
        share: Gives every rank what global rank zero has.
        function: What to call.

    Raises:
        Exception: What the function has raised; another rank gets a ``RuntimeError`` for what cannot be sent.
    """
    outcome: T | None = None
    failure: Exception | None = None
    if trainer.is_global_zero:
        try:
            outcome = function()
        except Exception as error:  # noqa: BLE001 - raised below, when the other ranks no longer wait for an outcome
            failure = error
    sent = failure if failure is None or _can_be_sent(failure) else RuntimeError(f"{type(failure).__name__}: {failure}")
    outcome, sent = share((outcome, sent))
    if (failure := failure or sent) is not None:
        raise failure
    return cast("T", outcome)


def _can_be_sent(error: Exception) -> bool:
    return isinstance(error, (OSError, ScheduleError))
