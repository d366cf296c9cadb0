"""The schedule files that a run leaves in its artifacts directory, none of which replaces a file of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from .generate import Heuristic, generate, phase_comments
from .names import frozen_by_others
from .schedule import Schedule
from .yaml_writer import write_schedule


def schedule_path(model: nn.Module, directory: str | PathLike[str]) -> Path:
    """Return where the schedule in force for a model is saved: ``<directory>/<Class>_ft_schedule.yaml``."""
    return Path(directory) / f"{type(model).__name__}_ft_schedule.yaml"


def save_schedule(
    schedule: Schedule,
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    source: str | PathLike[str] | None = None,
) -> Path:
    """Write a schedule, expanded to full names and with a comment on each phase, and return its path.

    A file of other content that already lies there, perhaps edited by hand, is kept under a numbered name. If it is
    the very file the schedule was read from, it stays and the expanded schedule goes beside it.

    Args:
        schedule: The resolved schedule.
        model: The model it was resolved against.
        directory: Made if missing.
        source: The user's schedule file, if there is one.
    """
    path = schedule_path(model, directory)
    if source is not None and path.exists() and path.samefile(source):
        path = path.with_name(f"{path.stem}_expanded.yaml")
    return _write_beside_others(schedule, path, comments=phase_comments(schedule, model))


def save_renumbered(phases: Mapping[int, Any], model: nn.Module, directory: str | PathLike[str]) -> Path:
    """Write a renumbered copy of a schedule whose phase numbers have gaps, and return its path."""
    path = Path(directory) / f"{type(model).__name__}_ft_schedule_valid.yaml"
    return _write_beside_others(phases, path)


def _write_beside_others(
    schedule: Schedule | Mapping[int, Any], path: Path, comments: Sequence[str] | None = None
) -> Path:
    """Write a schedule; a file of other content at that path gets the first unused number."""
    fresh = path.with_name(f"{path.name}.new")
    write_schedule(schedule, fresh, comments=comments)
    if path.exists() and path.read_bytes() != fresh.read_bytes():
        path.rename(_unused(path))
    return fresh.replace(path)


def _unused(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
        number += 1
    return candidate


class ScheduleImplMixin:
    """Schedule generation under its documented name."""

    @staticmethod
    def gen_ft_schedule(module: nn.Module, dump_loc: str | PathLike[str], heuristic: Heuristic = "pairs") -> Path:
        """Write the default schedule of any module to ``<dump_loc>/<Class>_ft_schedule.yaml`` and return that path.

        Parameters that are frozen (``requires_grad=False``) stay out of it.

        Raises:
            ScheduleError: The module has no parameters that can be trained.
        """
        frozen = frozen_by_others(module.named_parameters())
        return save_schedule(generate(module, heuristic, frozen=frozen), module, dump_loc)
