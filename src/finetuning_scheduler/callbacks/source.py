"""The schedule a user asked for: generated in implicit mode, else read, resolved against the model, and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, TypeVar, cast

from torch import nn

from .._lightning import MisconfigurationException, Trainer
from ..core.artifacts import save_renumbered, save_schedule
from ..core.generate import generate
from ..core.schedule import Schedule
from ..core.selectors import Resolution, resolve
from ..errors import OptimizerError, Problem, ScheduleError

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
            source = implicit_schedule(model, reinit_optim_cfg, reinit_lr_cfg)
        return resolve(plain_configuration(source) if isinstance(source, dict) else source, model)
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


def implicit_schedule(
    model: nn.Module, reinit_optim_cfg: Mapping[str, Any] | None, reinit_lr_cfg: Mapping[str, Any] | None
) -> dict[int, dict[str, Any]]:
    """Generate a schedule in which every phase after the first installs the given optimizer and LR scheduler.

    Args:
        model: The model to generate the schedule for.
        reinit_optim_cfg: What ``new_optimizer`` of a phase would be.
        reinit_lr_cfg: What ``new_lr_scheduler`` of a phase would be, without lists that depend on the number of groups.

    Raises:
        OptimizerError: A list depends on the number of groups, which differs from phase to phase.
    """
    reinit_optim_cfg, reinit_lr_cfg = plain_configuration(reinit_optim_cfg), plain_configuration(reinit_lr_cfg)
    if isinstance(reinit_lr_cfg, Mapping) and (problems := _per_group_lists(reinit_lr_cfg)):
        raise OptimizerError(problems)
    phases = generate(model).to_dict()
    for number, phase in phases.items():
        if number > 0 and reinit_optim_cfg is not None:
            phase["new_optimizer"] = reinit_optim_cfg
        if number > 0 and reinit_lr_cfg is not None:
            phase["new_lr_scheduler"] = reinit_lr_cfg
    return phases


def plain_configuration(value: Any) -> Any:
    """Copy a configuration, turning the namespaces that LightningCLI makes of ``class_path`` into dictionaries."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        plain = {key: plain_configuration(item) for key, item in value.items()}
        if isinstance(arguments := plain.get("init_args"), dict):
            # LightningCLI lists even the arguments that only a running session can fill in.
            plain["init_args"] = {
                key: item for key, item in arguments.items() if item is not None or key not in ("params", "optimizer")
            }
        return plain
    return [plain_configuration(item) for item in value] if isinstance(value, (list, tuple)) else value


def _per_group_lists(reinit_lr_cfg: Mapping[str, Any]) -> list[Problem]:
    problems = []
    fix = "Leave it out, or give it in the phases of an explicit schedule."
    if reinit_lr_cfg.get("init_pg_lrs") is not None:
        message = "expected `reinit_lr_cfg` to suit any number of parameter groups, got `init_pg_lrs`"
        problems.append(Problem(message, fix=fix))
    init = reinit_lr_cfg.get("lr_scheduler_init")
    arguments = init.get("init_args") if isinstance(init, Mapping) else None
    if isinstance(arguments, Mapping) and isinstance(arguments.get("min_lr"), (list, tuple)):
        message = "expected `reinit_lr_cfg` to suit any number of parameter groups, got a list as `min_lr`"
        problems.append(Problem(message, fix="Give one number."))
    return problems
