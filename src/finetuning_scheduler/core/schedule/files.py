"""The schedule files that a run leaves in its artifacts directory, none of which replaces a file of the user's."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from itertools import count
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import Problem, ScheduleError, ScheduleFileError
from ..drafts import draft_of, publish_new, remove_leftovers
from .generate import Heuristic, generate, phase_comments
from .names import frozen_by_others
from .schedule import Schedule
from .yaml_writer import schedule_text, write_schedule

_LONGEST_STEM = 100


def schedule_path(model: nn.Module, directory: str | PathLike[str]) -> Path:
    """Return where the schedule in force for a model is saved: ``<directory>/<Class>_ft_schedule.yaml``."""
    return Path(directory) / f"{file_stem(model)}_ft_schedule.yaml"


def file_stem(model: nn.Module) -> str:
    """Return the name of a model's class as the beginning of a file's name: a class may be called anything."""
    return re.sub(r"[^\w-]", "_", type(model).__name__)[:_LONGEST_STEM] or "model"


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
    if source is not None and _is_same(path, source):
        path = path.with_name(f"{path.stem}_expanded.yaml")
    return _write_beside_others(schedule, path, comments=phase_comments(schedule, model))


def save_renumbered(phases: Mapping[int, Any], model: nn.Module, directory: str | PathLike[str]) -> Path:
    """Write a renumbered copy of a schedule whose phase numbers have gaps, and return its path."""
    path = Path(directory) / f"{file_stem(model)}_ft_schedule_valid.yaml"
    return _write_beside_others(phases, path)


def _write_beside_others(
    schedule: Schedule | Mapping[int, Any], path: Path, comments: Sequence[str] | None = None
) -> Path:
    """Write a schedule; a file of other content at that path gets the first unused number.

    Several runs may do so in one directory at once: none of what they write is lost.
    """
    content = schedule_text(schedule, comments).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with draft_of(path) as file:
        file.write(content)
        while not _holds(path, content):
            try:
                publish_new(file, path)
            except FileExistsError:
                _set_aside(path)
    return path


def _set_aside(path: Path) -> None:
    """Give a file the first unused number; another run may do the same at the same time."""
    # under this name, it is this run's only
    taken = path.with_name(f"{path.stem}_kept_{uuid.uuid4().hex}{path.suffix}")
    try:
        path.rename(taken)
    except FileNotFoundError:
        return
    for number in count(1):
        numbered = path.with_name(f"{path.stem}_{number}{path.suffix}")
        try:
            os.link(taken, numbered)
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            if numbered.exists():
                continue
            taken.rename(numbered)
            return
        taken.unlink()
        return


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False


def _is_same(path: Path, other: str | PathLike[str]) -> bool:
    try:
        return path.samefile(other)
    except FileNotFoundError:
        return False


class ScheduleImplMixin:
    """Generating, reading and writing schedules under their documented names."""

    ft_schedule: Any = None  # what `save_schedule` saves; a class of its own may have one

    @staticmethod
    def gen_ft_schedule(module: nn.Module, dump_loc: str | PathLike[str], heuristic: Heuristic = "pairs") -> Path:
        """Write the default schedule of any module to ``<dump_loc>/<Class>_ft_schedule.yaml`` and return that path.

        Parameters that are frozen (``requires_grad=False``) stay out of it.

        Raises:
            ScheduleError: The module has no parameters that can be trained.
        """
        frozen = frozen_by_others(module.named_parameters())
        return save_schedule(generate(module, heuristic, frozen=frozen), module, dump_loc)

    @staticmethod
    def load_yaml_schedule(path: str | PathLike[str]) -> dict[int, dict[str, Any]]:
        """Read a schedule file as plain Python values, to be changed and used as ``ft_schedule``.

        Raises:
            ScheduleError: With everything that is wrong with the file, or why it cannot be read.
        """
        return Schedule.parse(path).to_dict()

    def save_schedule(self, path: str | PathLike[str]) -> Path:
        """Write ``ft_schedule`` as a YAML file, which is replaced if it is there, and return its path.

        Of a :class:`.FinetuningScheduler` whose fit has begun, that is the schedule in force, in full names.

        Raises:
            ScheduleError: There is no schedule, something is wrong with it, or the file cannot be written.
        """
        if self.ft_schedule is None:
            fix = "Set `ft_schedule`, or call it when the fit has begun: a generated one is known then."
            raise ScheduleError(Problem("expected a schedule to save, got none", fix=fix))
        schedule = Schedule.parse(self.ft_schedule)
        try:
            return write_schedule(schedule, path)
        except OSError as error:
            message = f"expected a file that the schedule can be written to, got {path} ({error.strerror or error})"
            fix = "Name a file in a directory that can be written to."
            raise ScheduleFileError(Problem(message, fix=fix)) from error
