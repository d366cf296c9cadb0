"""What each phase of a schedule will be, as plain values: for people, for programs, for comparison with a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.optim import Optimizer

from ..core.optim.param_groups import PlannedGroup
from ..core.plan import PhaseState
from ..core.prepare import Prepared
from ..core.schedule.collapse import collapsed, counted_by_module
from ..core.schedule.model import Phase
from ..core.settings import Settings
from ..core.simulation import Simulation, like_optimizer
from ..core.view import ModelView
from .costs import Basis, Costs
from .memory import Bytes, OptimizerMaker


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GroupPlan(_Plain):
    """A parameter group that a phase adds."""

    name: str = Field(description="Its name, as in a logger.")
    tensors: int
    parameters: int = Field(description="How many values they have.")
    learning_rate: float | None = Field(description="Its first; `null` under an optimizer that has none.")
    options: dict[str, Any] = Field(default={}, description="In which it differs from the optimizer's defaults.")


class MemoryPlan(_Plain):
    """Bytes on one device, without activations."""

    weights: int = Field(description="Of all parameters and buffers.")
    gradients: int
    optimizer_state: int | None = Field(description="After the first step; `null` if it cannot be told.")
    total: int


class PhasePlan(_Plain):
    """A phase."""

    phase: int
    thaws: list[str] = Field(description="The parameters that it thaws, as patterns.")
    thawed_tensors: int
    thawed_parameters: int = Field(description="How many values it thaws.")
    trainable_parameters: int = Field(description="How many are trained in it, those of earlier phases included.")
    share: float = Field(description="Their share of the model's.")
    new_groups: list[GroupPlan]
    groups: int = Field(description="How many parameter groups there are in it.")
    ends: str = Field(description="When it ends.")
    max_transition_epoch: int
    max_transition_step: int
    lr_warmup_steps: int
    optimizer: str = Field(description="The class in force.")
    new_lr_scheduler: str | None = Field(description="The class that it installs.")
    restart_learning_rates: list[float | None] | None = Field(
        description="At which the groups of earlier phases go on under its LR scheduler; `null` if they keep theirs."
    )
    memory: MemoryPlan
    step_cost: float = Field(description="Relative to a step that trains all parameters.")
    reuse_saves: float = Field(description="The share of a step that frozen-prefix reuse saves once all is recorded.")


class PlanReport(_Plain):
    """What a schedule will do. Its text is a table."""

    model: str = Field(description="The class of the model, or the name of its file.")
    parameters: int
    optimizer: str
    precision: str
    frozen_parameters: int = Field(description="How many values no phase trains.")
    phases: list[PhasePlan]
    costs_from: Basis = Field(description="What step costs were told from.")
    full_memory: MemoryPlan = Field(description="What training all parameters from the start would take.")
    notes: list[str] = []

    @property
    def most_memory(self) -> int:
        """The bytes of the phase that takes most."""
        return max(phase.memory.total for phase in self.phases)

    def __str__(self) -> str:
        from .tables import plan_table

        return "\n".join(plan_table(self))

    def _repr_html_(self) -> str:
        from .pages import plan_fragment

        return plan_fragment(self)


def plan_report(
    prepared: Prepared,
    view: ModelView,
    optimizer: Optimizer,
    settings: Settings,
    costs: Costs,
    *,
    precision: str = "32-true",
    buffers: Iterable[torch.Tensor] = (),
    title: str | None = None,
    notes: Iterable[str] = (),
) -> PlanReport:
    """Say what each phase will be.

    Args:
        prepared: What the gate has returned for the model and its optimizer.
        view: The model.
        optimizer: The user's optimizer, as it is before phase 0.
        settings: How the schedule is executed.
        costs: What steps cost.
        precision: As Lightning's ``Trainer`` takes it.
        buffers: The model's buffers, which take memory, too.
        title: What the model is called.
        notes: What else to say of it.
    """
    reporter = _Reporter(prepared, view, optimizer, precision, buffers)
    restarts = _restarts(prepared, view, optimizer, settings)
    phases = [
        reporter.phase(state, costs.steps[state.index], costs.saved[state.index], restarts.get(state.index))
        for state in prepared.plan.phases
    ]
    total = prepared.plan.model_parameter_count
    return PlanReport(
        model=title or type(view.plain).__name__,
        parameters=total,
        optimizer=type(optimizer).__name__,
        precision=precision,
        frozen_parameters=total - phases[-1].trainable_parameters,
        phases=phases,
        costs_from=costs.basis,
        full_memory=reporter.full_memory(),
        notes=[*notes, *costs.notes],
    )


class _Reporter:
    """Goes through the phases once, and keeps sums."""

    def __init__(
        self,
        prepared: Prepared,
        view: ModelView,
        optimizer: Optimizer,
        precision: str,
        buffers: Iterable[torch.Tensor],
    ) -> None:
        self._view, self._plan = view, prepared.plan
        self._bytes = Bytes(precision)
        self._names = counted_by_module(view.tensors)
        self._user = OptimizerMaker(optimizer)
        self._user_name = type(optimizer).__name__
        self._maker, self._since = self._user, 0
        self._weights = self._bytes.of([*view.trained.values(), *buffers])
        self._gradients = 0
        self._state: int | None = 0

    def phase(self, state: PhaseState, cost: float, saved: float, restarts: Sequence[float | None] | None) -> PhasePlan:
        limits, view = state.limits, self._view
        before = self._plan.phases[state.index - 1].trainable_count if state.index else 0
        installs = limits.new_lr_scheduler
        return PhasePlan(
            phase=state.index,
            thaws=collapsed(view.expanded(limits.params), self._names),
            thawed_tensors=len(limits.params),
            thawed_parameters=state.trainable_count - before,
            trainable_parameters=state.trainable_count,
            share=state.trainable_count / max(self._plan.model_parameter_count, 1),
            new_groups=[self._group(group) for group in state.new_groups],
            groups=len(state.groups),
            ends=ending(limits, is_last=state.index == self._plan.last_phase),
            max_transition_epoch=limits.max_transition_epoch,
            max_transition_step=limits.max_transition_step,
            lr_warmup_steps=limits.lr_warmup_steps,
            optimizer=self._optimizer_name(state),
            new_lr_scheduler=None if installs is None else _class_name(installs.lr_scheduler_init.class_path),
            restart_learning_rates=None if restarts is None else list(restarts),
            memory=self._memory(state),
            step_cost=cost,
            reuse_saves=saved,
        )

    def full_memory(self) -> MemoryPlan:
        """Count what one group of all parameters would take, under the user's optimizer."""
        trained = self._view.trained
        able = {name: each for name, each in trained.items() if each.is_floating_point() or each.is_complex()}
        state = self._bytes.of_state(self._user, [PlannedGroup(tuple(able), None)], trained)
        return _memory(self._weights, self._bytes.of(able.values()), state)

    def _optimizer_name(self, state: PhaseState) -> str:
        installed = state.optimizer
        return self._user_name if installed is None else _class_name(installed.optimizer_init.class_path)

    def _group(self, group: PlannedGroup) -> GroupPlan:
        sizes = [self._view.sizes[name] for name in group.names if name in self._view.sizes]
        options = {key: value for key, value in group.options.items() if isinstance(value, (bool, int, float, str))}
        return GroupPlan(
            name=group.label, tensors=len(group.names), parameters=sum(sizes), learning_rate=group.lr, options=options
        )

    def _memory(self, state: PhaseState) -> MemoryPlan:
        tensors = self._view.trained
        self._gradients += self._bytes.of(tensors[name] for name in state.limits.params)
        groups = state.new_groups
        if state.optimizer is not None and state.optimizer_since > self._since:
            self._maker, self._since = OptimizerMaker(state.optimizer), state.optimizer_since
            self._state, groups = 0, state.groups
        new = self._bytes.of_state(self._maker, groups, tensors)
        self._state = None if self._state is None or new is None else self._state + new
        return _memory(self._weights, self._gradients, self._state)


def _memory(weights: int, gradients: int, state: int | None) -> MemoryPlan:
    total = weights + gradients + (state or 0)
    return MemoryPlan(weights=weights, gradients=gradients, optimizer_state=state, total=total)


def ending(limits: Phase, *, is_last: bool = False) -> str:
    """Say when a phase ends."""
    said = [f"epoch {limits.max_transition_epoch}"] if limits.max_transition_epoch >= 0 else []
    said += [f"step {limits.max_transition_step}"] if limits.max_transition_step >= 0 else []
    until = f"at {' or '.join(said)}, or earlier by early stopping" if said else "by early stopping"
    return f"{until}, or with the trainer's limits" if is_last else until


def _class_name(path: str) -> str:
    return path.rpartition(".")[2]


def _restarts(
    prepared: Prepared, view: ModelView, optimizer: Optimizer, settings: Settings
) -> dict[int, Sequence[float | None]]:
    """Tell, by phase, the rates that a phase's LR scheduler gives the groups before it, where these are fixed."""
    installing = {state.index: state for state in prepared.plan.phases if state.limits.new_lr_scheduler is not None}
    fixed = {
        index: state.groups_before
        for index, state in installing.items()
        if not _keeps_rates(state.limits) and state.index > 0
    }
    if not fixed:
        return {}
    make = like_optimizer(optimizer, view)
    if make is None:
        return {}
    simulation = Simulation(prepared.schedule, view, make, settings)
    return {index: rates[: fixed[index]] for index, rates in enumerate(simulation.entries()) if index in fixed}


def _keeps_rates(limits: Phase) -> bool:
    installs = limits.new_lr_scheduler
    return installs is None or (installs.init_pg_lrs is None and installs.use_current_optimizer_pg_lrs)
