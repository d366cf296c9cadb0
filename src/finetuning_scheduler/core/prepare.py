"""The gate: everything that can be wrong with a schedule is found here, before anything is touched."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..errors import OptimizerError, ScheduleFileError
from .optim.checks import check_phases
from .schedule.draft import draft
from .schedule.names import ParameterIndex
from .schedule.resolve import Resolution, resolve_names
from .schedule.schedule import Schedule, ScheduleSource


def read(source: ScheduleSource, model: nn.Module | ParameterIndex) -> Resolution:
    """Read a schedule, look its names up in a model and try the classes that it installs."""
    try:
        drafted = draft(source.to_dict() if isinstance(source, Schedule) else source)
    except ScheduleFileError as error:
        return Resolution(errors=(error,))
    index = model if isinstance(model, ParameterIndex) else ParameterIndex.of(model)
    named = resolve_names(drafted, index)
    problems, warnings = check_phases(drafted.phases, source=drafted.source, lines=drafted.class_lines)
    errors = (*named.errors, OptimizerError(problems)) if problems else named.errors
    return replace(named, errors=errors, warnings=(*named.warnings, *warnings))


def resolve(source: ScheduleSource, model: nn.Module | ParameterIndex) -> Resolution:
    """Replace the selectors of a schedule by full names, in the order the model registers them.

    Raises:
        ScheduleError: With everything that is wrong with the schedule, its selectors and its classes.
    """
    resolution = read(source, model)
    _ = resolution.schedule
    return resolution
