"""The schedule that a user has asked for: generated in implicit mode, else read; and saved where artifacts go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from os import PathLike
from typing import Any, Protocol

from torch import nn

from ._lightning import MisconfigurationException
from .core.prepare import read_for
from .core.ranks import Ranks
from .core.schedule.files import ScheduleImplMixin, save_renumbered, save_schedule
from .core.schedule.generate import implicit, reinitialised
from .core.schedule.resolve import Resolution
from .core.schedule.schedule import Schedule, ScheduleSource
from .core.view import ModelView
from .errors import Problem, ScheduleError
from .strategy_adapters.base import StrategyAdapter, overrides


class Implicit(Protocol):
    """How a schedule is generated, and what each of its transitions installs."""

    reinit_optim_cfg: dict[str, Any] | None
    reinit_lr_cfg: dict[str, Any] | None

    @staticmethod
    def gen_ft_schedule(module: nn.Module, dump_loc: str | PathLike[str]) -> str | PathLike[str]:
        """Write the default schedule of a module and return its path."""
        ...


def read_source(
    source: ScheduleSource | None, reinitialisation: Implicit, view: ModelView, directory: str
) -> Resolution:
    """Read a schedule; a copy without gaps is written of one whose numbers have gaps.

    Args:
        source: What the user gave; ``None`` generates a schedule.
        reinitialisation: What a generated one installs.
        view: The model.
        directory: Where the copy goes.
    """
    found = read_given(source, reinitialisation, view)
    return found.with_notes(lambda phases: _renumbered_note(phases, view.plain, directory))


def read_given(source: ScheduleSource | None, reinitialisation: Implicit, view: ModelView) -> Resolution:
    """Read a schedule, or generate it, and write nothing."""

    def generated(model: nn.Module, *, frozen: Collection[str]) -> ScheduleSource:
        optimizer, lr_scheduler = reinitialisation.reinit_optim_cfg, reinitialisation.reinit_lr_cfg
        return implicit(model, optimizer, lr_scheduler, frozen=frozen)

    return read_for(view, source, generated)


def generated_by(adapter: StrategyAdapter, owner: Implicit, directory: str) -> str | PathLike[str] | None:
    """Let the adapter, or the callback, write a schedule if one of them overrides how; to be called by rank zero.

    Args:
        adapter: The strategy's adapter.
        owner: The callback.
        directory: Where the schedule goes.

    Returns:
        The path of the schedule; ``None`` if there is no override.

    Raises:
        ScheduleError: The override has returned something else than a path.
    """
    path: Any  # whatever an override returns
    if overrides(adapter, StrategyAdapter, "gen_ft_schedule"):
        path = adapter.gen_ft_schedule(directory)
    elif getattr(owner.gen_ft_schedule, "__func__", owner.gen_ft_schedule) is not ScheduleImplMixin.gen_ft_schedule:
        path = owner.gen_ft_schedule(adapter.trainer.lightning_module, directory)
    else:
        return None
    if not isinstance(path, (str, PathLike)):
        message = f"expected `gen_ft_schedule` to return the path of the schedule that it has written, got {path!r}"
        raise ScheduleError(Problem(message, fix="Return the path."))
    return path


def with_reinitialisation(path: str | PathLike[str], owner: Implicit) -> ScheduleSource:
    """Return the schedule that an override has written, with what each of its transitions installs.

    Raises:
        ScheduleError: Something is to be installed, and the file is no schedule.
    """
    optimizer, lr_scheduler = owner.reinit_optim_cfg, owner.reinit_lr_cfg
    if optimizer is None and lr_scheduler is None:
        return path
    return reinitialised(Schedule.parse(path).to_dict(), optimizer, lr_scheduler)


def save(
    ranks: Ranks,
    make: Callable[[], Schedule],
    model: nn.Module,
    directory: str,
    source: str | PathLike[str] | None = None,
) -> str:
    """Save a schedule on rank zero and return its path on every rank.

    Args:
        ranks: The ranks.
        make: Makes the schedule.
        model: The model it is for.
        directory: Made if missing.
        source: The user's schedule file, if there is one.

    Raises:
        MisconfigurationException: On every rank, if the directory cannot be written to.
    """
    try:
        return ranks.from_zero(lambda: str(save_schedule(make(), model, directory, source=source)))
    except OSError as error:
        raise MisconfigurationException(
            f"expected a directory to write the schedule to, got `log_dir` {directory} "
            f"({type(error).__name__}: {error}). Fix: Set `log_dir` to a directory that can be written to."
        ) from error


def _renumbered_note(phases: Mapping[int, Any], model: nn.Module, directory: str) -> Problem:
    """Write a copy of a schedule without gaps and say where it is."""
    try:
        path = save_renumbered(phases, model, directory)
        return Problem(f"a copy with the phases renumbered from 0 was written to {path}")
    except OSError as failure:
        text = f"no copy with the phases renumbered from 0 could be written to {directory} ({failure})"
        return Problem(text, fix="Set `log_dir` to a directory that can be written to.")
