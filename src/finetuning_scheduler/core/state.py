"""What a session keeps on disk: plain values, which survive JSON as well as ``torch.save``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CheckpointError, Problem
from .optim.states import group_differences
from .plan import Plan
from .transitions import Progress
from .view import ModelView

VERSION = 1
M = TypeVar("M", bound=BaseModel)


class SavedProgress(BaseModel):
    """The state of a session. What can be derived from the schedule is not in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(description="Format of the state.")
    phase: int = Field(ge=0, description="The phase being executed.")
    best_phase: int = Field(ge=0, description="The phase of the best state so far.")
    entry_epoch: int = Field(ge=0, description="The epoch in which the phase began.")
    entry_step: int = Field(ge=0, description="The optimizer step at which the phase began.")
    parameter_groups: list[list[str]] = Field(description="The names of each parameter group's parameters, in order.")
    warmup: dict[int, int] = Field(default={}, description="Steps behind it of each warm-up in progress, by phase.")

    @property
    def progress(self) -> Progress:
        """Where the session was."""
        return Progress(self.phase, self.best_phase, self.entry_epoch, self.entry_step)


def saved(progress: Progress, parameter_groups: Sequence[Sequence[str]], warmup: Mapping[int, int]) -> dict[str, Any]:
    """Return the state of a session as plain values; keys are text, as JSON has no others."""
    return {
        "version": VERSION,
        **asdict(progress),
        "parameter_groups": [list(names) for names in parameter_groups],
        "warmup": {str(phase): done for phase, done in warmup.items()},
    }


def check(state: Mapping[str, Any], plan: Plan, view: ModelView) -> SavedProgress:
    """Read a saved state that a session of this plan is to continue.

    Raises:
        CheckpointError: It is of a newer format, of no known form, or of another schedule, model or optimizer.
    """
    version = state.get("version")
    if isinstance(version, int) and version > VERSION:
        message = f"expected checkpoint state of format {VERSION} or older, got format {version}"
        raise CheckpointError(Problem(message, fix="Resume with the newer release that wrote the checkpoint."))
    read = read_as(SavedProgress, state)
    if read.phase > plan.last_phase:
        message = f"expected a checkpoint of a phase up to {plan.last_phase}, got one of phase {read.phase}"
        raise CheckpointError(Problem(message, fix="Resume with a schedule and `max_depth` that reach that phase."))
    stored = [view.merged(names) for names in read.parameter_groups]
    planned = [group.names for group in plan.phases[read.phase].groups]
    if problems := group_differences(planned, stored):
        raise CheckpointError(problems)
    return read


def read_as(kind: type[M], state: object, place: str = "checkpoint state") -> M:
    """Read a mapping as a model.

    Raises:
        CheckpointError: With every key that is missing, unknown or of the wrong kind.
    """
    fix = "Resume from a checkpoint that this package has written, or with the release that wrote it."
    if not isinstance(state, Mapping):
        raise CheckpointError(Problem(f"{place}: expected a mapping, got {type(state).__name__}", fix=fix))
    try:
        return kind.model_validate(dict(state))
    except ValidationError as error:
        raise CheckpointError(
            [
                Problem(f"{place}: `{'.'.join(map(str, details['loc']))}`: {details['msg']}", fix=fix)
                for details in error.errors(include_url=False, include_input=False)
            ]
        ) from error
