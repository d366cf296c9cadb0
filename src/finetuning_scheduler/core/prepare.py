"""The gate: everything that can be wrong with a schedule is found here, before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import OptimizerError, Problem, ScheduleError, ScheduleFileError, joined
from .optim.checks import check_phases
from .optim.fitting import Groups, Places, check_against_model
from .optim.growth import Step, growth_failure
from .optim.initial import InitialGroups, initial_groups
from .optim.param_groups import mesh_of
from .optim.rates import rate_problems
from .plan import GroupRules, Plan, block_numbers
from .schedule.collapse import collapsed
from .schedule.draft import draft
from .schedule.generate import generate
from .schedule.model import Phase
from .schedule.names import ParameterIndex
from .schedule.resolve import Resolution, resolve_names
from .schedule.schedule import Schedule, ScheduleSource
from .schedule.wording import listed
from .settings import Settings
from .thaw import half_nested_encoders
from .view import ModelView, plain_name, sparse_parameters


@dataclass(frozen=True)
class Prepared:
    """A schedule that can be executed.

    Attributes:
        schedule: The schedule in full parameter names.
        plan: The phases to execute, each as a whole state.
        notices: What the user may want to know, one line each.
        warnings: What the user should look at, one line each.
    """

    schedule: Schedule
    plan: Plan
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def prepare(
    source: ScheduleSource | Resolution | None,
    view: ModelView,
    optimizer: Optimizer | None,
    settings: Settings,
    *,
    lr_schedulers: Sequence[LRScheduler] = (),
    step: Step | None = None,
    problems: Iterable[Problem] = (),
    limits: Callable[[Schedule], Iterable[Problem]] | None = None,
) -> Prepared:
    """Check everything that a schedule's execution depends on; nothing is changed.

    Args:
        source: The schedule, as the user gave it or as ``read_for`` has read it; ``None`` generates one.
        view: The model.
        optimizer: The user's optimizer; ``None`` if there is none that can be used, which is among ``problems`` then.
        settings: How the schedule is executed.
        lr_schedulers: The LR schedulers that act on ``optimizer``.
        step: Makes a step of an LR scheduler, if the training loop does so in a way of its own.
        problems: What the caller has found by itself.
        limits: Tells what keeps the phases to execute, in full names, from being executed where they are to be.

    Raises:
        ScheduleError: With everything that is wrong, of every kind.
    """
    found = source if isinstance(source, Resolution) else read_for(view, source)
    errors = list(found.errors)
    own = [*problems, *settings.problems()]
    plan = None
    if found.phases:
        whole = Schedule(phases=found.phases)
        own += limits(whole.up_to(_depth(settings))) if limits is not None else ()
        if optimizer is not None:
            gate = _Gate(view, optimizer, lr_schedulers, settings)
            plan, initial = gate.plan(whole)
            places = Places(found.source, found.class_lines)
            if wrong := [*gate.problems(plan, places), *gate.growth_problems(step)]:
                errors.append(OptimizerError(wrong))
    if own:
        errors.append(ScheduleError(own))
    if errors:
        raise joined(errors)
    if plan is None:
        raise ValueError("expected a usable optimizer, or the problem that keeps it from being used, got neither")
    notices = found.notices
    if found.frozen:
        notices = (*notices, f"{found.frozen} parameters are in no phase and stay frozen.")
    if initial.foreign:
        notice = f"{initial.foreign} tensors in the optimizer are not the model's: they stay there and go on training."
        notices = (*notices, notice)
    differences = () if initial.differences is None else (initial.differences,)
    modes = _mode_warnings(view, plan) if settings.frozen_modules_mode == "eval" else ()
    return Prepared(found.schedule, plan, notices, (*found.warnings, *differences, *modes))


def _mode_warnings(view: ModelView, plan: Plan) -> Iterator[str]:
    """Tell of modules that PyTorch cannot run while a part of them is in eval mode."""
    names = ((name, state.index) for state in plan.phases for name in state.limits.params)
    phase_of = {id(view.tensors[name]): phase for name, phase in names}
    for name, phase in half_nested_encoders(view.model, phase_of).items():
        yield (
            f"Phase {phase} keeps the first layer of the nn.TransformerEncoder `{plain_name(name)}` in eval mode and"
            " trains a later one. Given a src_key_padding_mask, PyTorch fails there (MultiheadAttention does not"
            " support NestedTensor). Fix: make it with enable_nested_tensor=False, or set its `use_nested_tensor` to"
            " False."
        )


class _Gate:
    """Plans phases for one model and optimizer, and finds what would fail later on."""

    def __init__(
        self, view: ModelView, optimizer: Optimizer, lr_schedulers: Sequence[LRScheduler], settings: Settings
    ) -> None:
        self._view = view
        self._optimizer = optimizer
        self._lr_schedulers = lr_schedulers
        self._settings = settings

    def plan(self, schedule: Schedule) -> tuple[Plan, InitialGroups]:
        view, settings = self._view, self._settings
        merged = view.merged_schedule(schedule)
        # Settings of a wrong kind are reported; planning goes on without them, to find what else is wrong.
        given: Any = settings.no_decay
        are_parts = isinstance(given, (list, tuple, set, frozenset)) and all(isinstance(part, str) for part in given)
        fragments = given if are_parts else ()
        base_lr: Any = settings.base_max_lr
        initial = initial_groups(
            self._optimizer,
            self._lr_schedulers,
            view.trained,
            merged.phases[0].params,
            no_decay=fragments,
            enforce=settings.enforce_phase0_params,
            replaced=any(phase.new_optimizer is not None for phase in merged.phases),
        )
        layer_wise = any(phase.lr_decay is not None for phase in schedule.phases)
        rules = GroupRules(
            default_lr=base_lr if isinstance(base_lr, (int, float)) else initial.lr,
            takes_first_lr=settings.base_max_lr is None,
            no_decay=fragments,
            options=initial.options,
            block_numbers=block_numbers(generate(view.plain, "blocks")) if layer_wise else {},
            held=frozenset(name for group in initial.groups for name in group.names),
            meshes={name: mesh_of(parameter) for name, parameter in view.trained.items()},
        )
        plan = Plan.of(merged, view.sizes, rules, initial=initial.groups, max_depth=_depth(settings))
        return plan, initial

    def problems(self, plan: Plan, places: Places) -> list[Problem]:
        phases: list[Phase] = [state.limits for state in plan.phases]
        groups = [Groups(state.groups_before, len(state.groups) - state.groups_before) for state in plan.phases]
        sparse = sparse_parameters(self._view.plain)
        added = ((state.limits, state.new_groups) for state in plan.phases)
        return [
            *check_against_model(phases, groups, self._optimizer, self._view.trained, sparse, places),
            *rate_problems(added, self._optimizer),
        ]

    def growth_problems(self, step: Step | None) -> Iterator[Problem]:
        for scheduler in self._lr_schedulers:
            if (failure := growth_failure(scheduler, step)) is not None:
                message = f"{type(scheduler).__name__} cannot follow a new parameter group ({failure})"
                yield Problem(message, fix="Use one of PyTorch's LR schedulers.")


def _depth(settings: Settings) -> int:
    depth: Any = settings.max_depth
    return depth if isinstance(depth, int) else -1


def read(source: ScheduleSource, model: nn.Module | ParameterIndex) -> Resolution:
    """Read a schedule, look its names up in a model and try the classes that it installs; nothing is raised."""
    try:
        drafted = draft(source.to_dict() if isinstance(source, Schedule) else source)
    except ScheduleFileError as error:
        return Resolution(errors=(error,))
    index = model if isinstance(model, ParameterIndex) else ParameterIndex.of(model)
    named = resolve_names(drafted, index)
    checked = check_phases(
        drafted.phases,
        source=drafted.source,
        lines=drafted.class_lines,
        device=_device(model),
        may_import=not named.errors,  # of a schedule that is wrong anyway, no foreign code is run
    )
    errors = (*named.errors, OptimizerError(checked.problems)) if checked.problems else named.errors
    phases = tuple(
        phase.model_copy(update=dict.fromkeys(checked.unusable.get(number, ())))
        for number, phase in enumerate(named.phases)
    )
    warnings = (*named.warnings, *checked.warnings)
    return replace(named, phases=phases, errors=errors, warnings=warnings)


def _device(model: nn.Module | ParameterIndex) -> torch.device | None:
    """Where a model is; nowhere yet if it has no data."""
    device = None if isinstance(model, ParameterIndex) else next((p.device for p in model.parameters()), None)
    return None if device is None or device.type == "meta" else device


def read_for(
    view: ModelView, source: ScheduleSource | None, make: Callable[..., ScheduleSource] = generate
) -> Resolution:
    """Read a schedule for a model that has not been touched yet.

    What its author, a quantiser or the user has frozen stays out of a schedule that is generated; one that names it
    thaws it.

    Args:
        view: The model.
        source: The schedule; ``None`` generates one.
        make: Generates a schedule of a module, without the names in ``frozen``.
    """
    frozen = view.frozen
    try:
        found = read(make(view.plain, frozen=frozen) if source is None else source, view.plain)
    except ScheduleError as error:  # there is nothing to generate
        return Resolution(errors=(error,))
    names = [name for phase in found.phases for name in phase.params if name in frozen]
    does = "were frozen before, and the schedule thaws them: {}."
    if source is None:
        names = [name for name in view.tensors if name in frozen]
        does = "were frozen before and are left out of the generated schedule: {}."
        does += " To include them, thaw them before the fit, or name them in a schedule."
    if not names:
        return found
    notice = f"{len(names):,} parameters {does.format(listed(collapsed(names, view.tensors)))}"
    return replace(found, notices=(*found.notices, notice))


def resolve(source: ScheduleSource, model: nn.Module | ParameterIndex) -> Resolution:
    """Replace the selectors of a schedule by full names, in the order the model registers them.

    Raises:
        ScheduleError: With everything that is wrong with the schedule, its selectors and its classes.
    """
    resolution = read(source, model)
    if resolution.errors:
        raise joined(resolution.errors)
    return resolution
