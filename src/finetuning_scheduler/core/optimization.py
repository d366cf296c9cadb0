"""The optimizer and LR schedulers in force, and what entering a phase does to them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .optim.build import SchedulerSettings, build_lr_scheduler, build_optimizer
from .optim.param_groups import (
    NamedParameters,
    add_group,
    clone_group,
    group_names,
    join_group,
    keep_only,
    split_by_mesh,
)
from .optim.schedulers import cycles_momentum, reads_initial_lr, retarget
from .optim.states import state_by_name, with_state
from .optim.warmup import Warmup
from .plan import Options, Plan, PlannedGroup, PlannedPhase, deviating_options, is_exempt
from .schedule.model import LRSchedulerSpec, OptimizerSpec, Phase


class Optimization:
    """An optimizer whose parameter groups grow with the phases, and everything that has to follow.

    Args:
        optimizer: The optimizer of phase 0.
        lr_schedulers: The schedulers that act on it.
        parameters: The model's parameters by name.
        apply_lambdas: Whether new groups take a scheduler's last ``lr_lambda``.

    Attributes:
        optimizer: The optimizer in force; a phase may replace it.
        lr_schedulers: The schedulers in force; a phase may replace them by one.
        scheduler_settings: When the scheduler that a phase installed steps; ``None`` for the initial ones.
        group_names: The names of each group's parameters.
        options: By parameter name, the options in which its first group differed from the optimizer's defaults.
        warmup: The warm-ups in progress.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_schedulers: Iterable[LRScheduler],
        parameters: NamedParameters,
        *,
        apply_lambdas: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.lr_schedulers = list(lr_schedulers)
        self.scheduler_settings: SchedulerSettings | None = None
        self.warmup = Warmup(optimizer)
        self._parameters = parameters
        self._apply_lambdas = apply_lambdas
        self._installer = 0  # the phase that installed the optimizer in force
        self._replaced: dict[int, Optimizer] = {}  # by installer: an optimizer no longer in force, emptied
        self.group_names = group_names(optimizer, parameters)
        # What a scheduler has written into the groups is not the user's.
        written = ("momentum", "betas") if any(map(cycles_momentum, self.lr_schedulers)) else ()
        self._defaults = {key: value for key, value in optimizer.defaults.items() if key not in written}
        self.options = deviating_options(optimizer.param_groups, self._defaults, self.group_names)
        self._overrides: list[Options] = []

    @property
    def initial_lr(self) -> float:
        """Initial learning rate of the first group."""
        first = self.optimizer.param_groups[0]
        return float(first.get("initial_lr", first["lr"]))

    def match_phase0(self, phase: Phase, *, no_decay: Sequence[str], enforce: bool) -> str | None:
        """Make the groups hold exactly phase 0's parameters, with the hyper-parameters the user gave their groups.

        Args:
            phase: Phase 0.
            no_decay: Fragments of names; parameters that had no group get one without weight decay if they match.
            enforce: If not set, nothing is changed.

        Returns:
            If nothing was changed, how the groups differ.
        """
        held = {name for names in self.group_names for name in names}
        missing = [name for name in phase.params if name not in held]
        surplus = sorted(held - set(phase.params))
        difference = None
        if enforce:
            self._adopt(missing, phase, no_decay)
            keep_only(self.optimizer, self.lr_schedulers, [self._parameters[name] for name in phase.params])
            split_by_mesh(self.optimizer, self.lr_schedulers, self._parameters)
        elif missing or surplus:
            differences = f"missing {missing}, also held {surplus}"
            difference = f"The optimizer does not hold exactly phase 0's parameters: {differences}."
        self.group_names = group_names(self.optimizer, self._parameters)
        self._overrides = [
            next((self.options[name] for name in names if name in self.options), {}) for names in self.group_names
        ]
        return difference

    def _adopt(self, names: Sequence[str], phase: Phase, no_decay: Sequence[str]) -> None:
        """Give parameters of phase 0 that have no group the hyper-parameters of the first group that stays."""
        groups = self.optimizer.param_groups
        wanted = set(phase.params)
        index = next((i for i, held in enumerate(self.group_names) if not wanted.isdisjoint(held)), 0)
        splits: tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]] = ([], [])
        for name in names:
            exempt = is_exempt(name, no_decay) and groups[index].get("weight_decay", 0) != 0
            splits[exempt].append((name, self._parameters[name]))
            deviating = deviating_options(groups[index : index + 1], self._defaults, [[name]])
            self.options[name] = {**deviating[name], **({"weight_decay": 0.0} if exempt else {})}
        join_group(self.optimizer, index, splits[False])
        if splits[True]:
            clone_group(self.optimizer, self.lr_schedulers, index, splits[True], {"weight_decay": 0.0})

    def enter(self, planned: PlannedPhase) -> list[tuple[str, str]]:
        """Install what a phase brings along, then add its groups.

        Returns:
            For each replacement one line about it, and a full description.
        """
        reports = []
        if planned.limits.new_optimizer is not None:
            both = planned.limits.new_lr_scheduler is not None
            reports.append(self._replace_optimizer(planned, planned.limits.new_optimizer, scheduler_stays=not both))
        if planned.limits.new_lr_scheduler is not None:
            reports.append(self._replace_scheduler(planned.limits.new_lr_scheduler))
        self._add_groups(planned.groups)
        return reports

    def warm_up(self, planned: PlannedPhase) -> None:
        """Start a phase's warm-up over the groups it has just added (all groups in phase 0)."""
        if planned.limits.lr_warmup_steps > 0:
            count = len(self.group_names)
            first = count - len(planned.groups) if planned.index > 0 else 0
            self.warmup.start(planned.index, range(first, count), planned.limits.lr_warmup_steps)

    def state_with(
        self, states: Mapping[str, Mapping[str, Any]], plan: Plan, *, saved_in: int, present: int
    ) -> dict[str, Any] | None:
        """Build a ``state_dict`` of the present groups and learning rates with per-parameter state saved earlier.

        Args:
            states: Per-parameter optimizer state by name.
            plan: The phases, which tell the optimizer in force in each.
            saved_in: The phase the state was saved in.
            present: The phase being executed.

        Returns:
            ``None`` if the state does not fit the optimizer in force.
        """
        if self._installed_by(saved_in, plan) != self._installed_by(present, plan):
            now = state_by_name(self.optimizer.state_dict(), self.group_names)
            shared = now.keys() & states.keys()
            if type(self.emptied(plan, saved_in)) is not type(self.optimizer) or not shared:
                return None
            if any(now[name].keys() != states[name].keys() for name in shared):
                return None
        return with_state(self.optimizer, self._parameters, states)

    def _installed_by(self, phase: int, plan: Plan) -> int:
        """Tell which phase installed the optimizer in force in ``phase``; 0 if it is the initial one."""
        installers = [p.index for p in plan.phases[: phase + 1] if p.limits.new_optimizer is not None]
        return installers[-1] if installers else 0

    def emptied(self, plan: Plan, phase: int) -> Optimizer:
        """Return a copy of the optimizer in force in ``phase``, without groups, state and hooks.

        Args:
            plan: The phases, which tell the optimizer in force in each.
            phase: The present phase or an earlier one.
        """
        installer = self._installed_by(phase, plan)
        return _emptied(self._replaced.get(installer, self.optimizer))

    def _add_groups(self, groups: Iterable[PlannedGroup]) -> None:
        for group in groups:
            options = {key: value for key, value in group.options.items() if key in self.optimizer.defaults}
            add_group(
                self.optimizer,
                self.lr_schedulers,
                [(name, self._parameters[name]) for name in group.names],
                lr=group.lr,
                overrides=options,
                apply_lambdas=self._apply_lambdas,
            )
            self.group_names.append(list(group.names))
            self._overrides.append(group.options)

    def _replace_optimizer(
        self, planned: PlannedPhase, spec: OptimizerSpec, *, scheduler_stays: bool
    ) -> tuple[str, str]:
        old = self.optimizer
        self._replaced[self._installer] = _emptied(old)
        self._installer = planned.index
        in_use = scheduler_stays and any(map(reads_initial_lr, self.lr_schedulers))
        self.optimizer = build_optimizer(spec, old, self._overrides, keep_initial_lr=in_use)
        for scheduler in self.lr_schedulers:
            retarget(scheduler, self.optimizer)
        self.warmup.attach(self.optimizer)
        return f"optimizer {_name(self.optimizer)} replaces {_name(old)}", repr(self.optimizer)

    def _replace_scheduler(self, spec: LRSchedulerSpec) -> tuple[str, str]:
        old = ", ".join(_name(scheduler) for scheduler in self.lr_schedulers) or "none"
        scheduler = build_lr_scheduler(spec, self.optimizer)
        self.lr_schedulers = [scheduler]
        self.scheduler_settings = SchedulerSettings.of(spec)
        return f"LR scheduler {_name(scheduler)} replaces {old}", f"{spec.model_dump()}: {scheduler.state_dict()}"


def _emptied(optimizer: Optimizer) -> Optimizer:
    other = copy.copy(optimizer)  # without hooks, and without what a class of the user's own keeps in attributes
    vars(other).update({key: value for key, value in vars(optimizer).items() if key not in (*vars(other), "step")})
    other.param_groups, other.state = [], defaultdict(dict)
    return other


def _name(thing: object) -> str:
    return type(thing).__name__
