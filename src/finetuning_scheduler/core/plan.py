"""What each phase of a schedule will do to a model and its optimizer, computed before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .param_groups import split_no_decay
from .schedule import Phase, Schedule


@dataclass(frozen=True)
class PlannedGroup:
    """A parameter group that a phase adds to the optimizer."""

    names: tuple[str, ...]
    lr: float
    options: Mapping[str, Any]


@dataclass(frozen=True)
class PlannedPhase:
    """One phase, resolved against a model."""

    index: int
    limits: Phase
    groups: tuple[PlannedGroup, ...]
    parameter_count: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that the phase thaws."""
        return self.limits.params


@dataclass(frozen=True)
class Plan:
    """The phases that will be executed and the size of the model they share."""

    phases: tuple[PlannedPhase, ...]
    model_parameter_count: int

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        parameters: Mapping[str, nn.Parameter],
        *,
        default_lr: float,
        no_decay: Collection[str] = (),
        max_depth: int = -1,
    ) -> Plan:
        """Plan a schedule whose selectors are full parameter names.

        Args:
            schedule: The resolved schedule.
            parameters: The model's parameters by name.
            default_lr: Learning rate of a phase after the first that names none.
            no_decay: Fragments of names whose parameters get a group without weight decay.
            max_depth: Deepest phase to execute; -1 for all.
        """
        last = len(schedule.phases) - 1 if max_depth < 0 else min(max_depth, len(schedule.phases) - 1)
        phases = []
        for index, phase in enumerate(schedule.phases[: last + 1]):
            named = [(name, parameters[name]) for name in phase.params]
            lr = default_lr if phase.lr is None else phase.lr
            groups = tuple(
                PlannedGroup(tuple(name for name, _ in split), lr, options)
                for split, options in split_no_decay(named, no_decay)
            )
            phases.append(PlannedPhase(index, phase, groups, sum(p.numel() for _, p in named)))
        return cls(tuple(phases), sum(p.numel() for p in parameters.values()))

    @property
    def last_phase(self) -> int:
        """Index of the deepest phase to execute."""
        return len(self.phases) - 1

    def trainable_count(self, phase: int) -> int:
        """Count the parameters (elements, not tensors) that are trainable in ``phase``."""
        return sum(planned.parameter_count for planned in self.phases[: phase + 1])

    def overdue_phases(self) -> list[int]:
        """List the phases whose epoch limit is not larger than an earlier phase's; each of them lasts one epoch."""
        overdue, latest = [], -1
        for planned in self.phases:
            limit = planned.limits.max_transition_epoch
            if 0 <= limit <= latest:
                overdue.append(planned.index)
            latest = max(latest, limit)
        return overdue

    def unreachable_phases(self, *, max_epochs: int | None = None, max_steps: int = -1) -> list[int]:
        """List the phases that can only begin at or after a ceiling on epochs or optimizer steps.

        A phase that may also end by early stopping still counts as limited by its epoch or step limit: only a
        transition driven by that limit is certain.
        """
        for planned in self.phases[:-1]:
            epoch, step = planned.limits.max_transition_epoch, planned.limits.max_transition_step
            beyond_epochs = max_epochs is not None and 0 <= max_epochs <= epoch
            beyond_steps = 0 <= max_steps <= step
            if (beyond_epochs and (step < 0 or beyond_steps)) or (beyond_steps and (epoch < 0 or beyond_epochs)):
                return list(range(planned.index + 1, len(self.phases)))
        return []
