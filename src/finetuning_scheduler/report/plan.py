"""What each phase of a schedule will be, as plain values: for people, for programs, for comparison with a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.optim import Optimizer

from ..core.optim.param_groups import PlannedGroup
from ..core.plan import PhaseState
from ..core.prepare import Prepared
from ..core.schedule.collapse import collapsed, counted_by_module
from ..core.schedule.model import Phase
from ..core.settings import Settings
from ..core.simulation import Simulation, like_optimizer
from ..core.view import ModelView
from .costs import Costs
from .memory import Bytes, OptimizerMaker
from .pages import plan_fragment
from .shapes import GroupPlan, MemoryPlan, PhasePlan, PlanReport
from .tables import plan_table


class ReadablePlan(PlanReport):
    """What a schedule will do; printed it is a table, and in a notebook, too."""

    def __str__(self) -> str:
        return "\n".join(plan_table(self))

    def _repr_html_(self) -> str:
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
) -> ReadablePlan:
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
    return ReadablePlan(
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
