"""The engine: the only thing that changes what is trained, and the optimizer that trains it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import CheckpointError, Problem, ScheduleError
from .before import Before
from .held import on_host
from .optim.build import SchedulerSettings, build_lr_scheduler, build_optimizer, emptied, empty_optimizer
from .optim.loading import load_linearly
from .optim.param_groups import PlannedGroup, add_groups, arrange, group_names, learning_rates, put_labels
from .optim.schedulers import reads_initial_lr, retarget
from .optim.states import reorder_groups, state_by_name, with_state
from .optim.warmup import Warmup
from .plan import PhaseState, difference
from .prepare import Prepared
from .schedule.model import LRSchedulerSpec, OptimizerSpec
from .schedule.wording import listed
from .settings import Settings
from .signals import signals_wait
from .state import check, saved
from .steps import when_loaded
from .thaw import FrozenModulePolicy, set_trainable
from .transitions import Decision, Listener, Moment, Progress, Reason, Transition, decide
from .view import ModelView

Report = Callable[[int, str], None]
# What entering a phase assigns, or changes in place if it is a list, a mapping or the progress.
_CHANGING = (
    "optimizer",
    "lr_schedulers",
    "scheduler_settings",
    "group_names",
    "progress",
    "plan",
    "frozen_values",
    "saved_names",
    "_first_optimizer",
    "_lazy",
    "_state",
)


class Session:
    """Execute a plan. Each phase is a whole state: entering one applies the difference to the present one.

    Making a session changes nothing; :meth:`begin` or :meth:`resume` enters the first phase.

    Args:
        view: The model.
        optimizer: The user's optimizer.
        prepared: What :func:`.prepare` has returned for them.
        settings: How the schedule is executed.
        lr_schedulers: The LR schedulers that act on ``optimizer``.
        listeners: Told of every change, in this order.
        report: Where messages go: ``report(logging level, text)``; the package's logger if not given.

    Attributes:
        optimizer: The optimizer in force; a phase with ``new_optimizer`` replaces it.
        lr_schedulers: The LR schedulers in force; a phase with ``new_lr_scheduler`` replaces them by one.
        scheduler_settings: When the LR scheduler that a phase installed steps; ``None`` while the user's are in force.
        group_names: The names of each group's parameters, in the optimizer's order.
        progress: Where the session is.
        before: What the session was before the transition that is being made, if one is.
    """

    def __init__(
        self,
        view: ModelView,
        optimizer: Optimizer,
        prepared: Prepared,
        settings: Settings,
        *,
        lr_schedulers: Iterable[LRScheduler] = (),
        listeners: Iterable[Listener] = (),
        report: Report | None = None,
    ) -> None:
        self.view = view
        self.parameters = view.trained
        self.schedule, self.plan = prepared.schedule, prepared.plan
        self.optimizer = self._first_optimizer = optimizer
        self.lr_schedulers = list(lr_schedulers)
        self.scheduler_settings: SchedulerSettings | None = None
        self.group_names = group_names(optimizer, self.parameters)
        self.progress = Progress()
        self.modes = FrozenModulePolicy(
            view.model, track_running_stats=settings.frozen_bn_track_running_stats, mode=settings.frozen_modules_mode
        )
        self.listeners: list[Listener] = [self.modes, *listeners]
        self._settings = settings
        self._report = report or logging.getLogger("finetuning_scheduler").log
        self._state: PhaseState | None = None
        self._warmup = Warmup(optimizer)
        self._lazy = view.has_lazy
        self.before: Before | None = None
        # Values from before their phase thawed them, of parameters that the best checkpoint leaves out.
        self.frozen_values: dict[str, torch.Tensor] = {}
        self.saved_names: frozenset[str] = frozenset()  # what the checkpoint restored last has
        self._first_lr: float | None = None  # of phase 0's first group, if it is no longer the planned one

    @property
    def phase(self) -> int:
        """The phase being executed."""
        return self.progress.phase

    @property
    def phases_remaining(self) -> int:
        """How many phases are still to come; 0 in the last one."""
        return self.plan.last_phase - self.progress.phase

    def decide(self, moment: Moment) -> Decision:
        """Decide whether the present phase ends; nothing is changed."""
        return decide(self.plan.phases[self.phase].limits, self.progress, moment)

    @property
    def trained_names(self) -> Sequence[str]:
        """The parameters that have been thawed so far; none before the first phase has begun."""
        return () if self._state is None else self._state.trainable

    def follow_first_lr(self) -> None:
        """Let phases that take the learning rate of phase 0's first group take the one it has now."""
        if self._settings.base_max_lr is None:
            self._first_lr = learning_rates(self.optimizer)[0]

    def begin(self, moment: Moment | None = None) -> None:
        """Freeze the model, thaw phase 0 and make the optimizer hold exactly phase 0's parameters."""
        self._move(self.plan.phases[0])
        if moment is not None:
            self.progress.entry_epoch, self.progress.entry_step = moment.epoch, moment.step

    def enter(self, phase: int, moment: Moment, reason: Reason) -> Transition:
        """Enter a later phase. Nothing is restored.

        Raises:
            ScheduleError: ``phase`` is before the present phase or beyond the last one.
        """
        self._check_order(phase)
        with self.transition():
            if self._lazy:
                self._lazy, self.plan = self.view.has_lazy, self.plan.recounted(self.view.counted())
            left, state, groups_before = self.phase, self.plan.phases[phase], len(self.group_names)
            replaced = self._move(state)
            self.progress.entry_epoch, self.progress.entry_step = moment.epoch, moment.step
            self.before = None  # it is done, for all who save and for what fails from here on
            for line, details in replaced:
                self._report(logging.INFO, f"Phase {phase}: {line}")
                self._report(logging.DEBUG, f"Phase {phase}: {details}")
            share = state.trainable_count / max(self.plan.model_parameter_count, 1)
            rates = tuple(learning_rates(self.optimizer))
            count, added = state.trainable_count, len(rates) - groups_before
            transition = Transition(left, phase, reason, moment.epoch, moment.step, count, share, rates, added)
            self._report(logging.INFO, str(transition))
            for listener in self.listeners:
                listener.on_transition(transition)
        return transition

    def thaw(self) -> None:
        """Thaw what of the present phase something else than the session has frozen."""
        present = (self.parameters[name] for name in self.trained_names)
        if frozen := [parameter for parameter in present if not parameter.requires_grad]:
            set_trainable(frozen, trainable=True)
            for listener in self.listeners:
                listener.after_thaw()

    @contextmanager
    def transition(self, driver: Mapping[str, Any] | None = None) -> Iterator[Before]:
        """Make a transition of what this block does: it is done, or it has not begun.

        It is done when a phase has been entered, just before listeners are told. What fails earlier is taken back, and
        until then :meth:`state_dict` returns what it was before. Handlers of signals, which may save, run after the
        block. Inside another such block it changes nothing.

        Args:
            driver: What the driver of the session adds to its saved state at this moment.
        """
        if self.before is not None:
            yield self.before
            return
        with signals_wait():
            before = Before(self, driver or {})
            try:
                self.before = before
                yield before
            except BaseException:
                if self.before is before:
                    self._abandon(before)
                raise
            finally:
                self.before = None

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Bring back for a while, in the middle of a transition, what was before it, without the weights."""
        if (before := self.before) is None:
            yield
            return
        present = Before(self, {})
        present.note(before.frozen, before.thawed)
        before.restore()
        try:
            yield
        finally:
            present.restore()

    def changing_fields(self) -> dict[str, Any]:
        """Copy what entering a phase changes of the session itself, for :meth:`take_back`."""
        copied = {name: getattr(self, name) for name in _CHANGING}
        for name in ("lr_schedulers", "group_names", "progress", "frozen_values"):
            copied[name] = copy.copy(copied[name])
        return copied | {"ramps": self._warmup.ramps}

    def take_back(self, fields: Mapping[str, Any]) -> None:
        """Be again what :meth:`changing_fields` has copied."""
        for name in _CHANGING:
            setattr(self, name, copy.copy(fields[name]) if name == "progress" else fields[name])
        self._warmup.go_on(self.optimizer, fields["ramps"])
        self.modes.update()

    def _abandon(self, before: Before) -> None:
        before.restore()
        for undo in reversed(before.undo):
            undo()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: the groups of its phase are made at once.

        Call it before the optimizer's and the LR schedulers' own states are loaded.

        Raises:
            CheckpointError: The state is of a newer format, or of another schedule or optimizer; nothing is changed.
        """
        progress = check(state, self.plan, self.view)
        self._check_order(progress.phase)
        self._move(self.plan.phases[progress.phase])
        stored = [self.view.merged(names) for names in progress.parameter_groups]
        reorder_groups(self.optimizer, self.parameters, stored)
        self.group_names = stored
        # What a checkpoint of an earlier release says of groups has no names.
        when_loaded(self.optimizer, lambda: put_labels(self.optimizer, self.plan.phases[self.phase].groups))
        self._warmup.load_state_dict(progress.warmup)
        self.progress = progress.progress

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain Python values; during a transition, what was before it."""
        fields = self.changing_fields() if self.before is None else self.before.fields
        groups = [self.view.expanded(names) for names in fields["group_names"]]
        return saved(fields["progress"], groups, {phase: ramp.done for phase, ramp in fields["ramps"].items()})

    def optimizer_state_from(self, states: Mapping[str, Mapping[str, Any]], phase: int) -> dict[str, Any]:
        """Build the optimizer's ``state_dict`` for a return to an earlier moment.

        Groups and learning rates stay as they are. Parameters without state there, and all parameters if another
        optimizer was in force, start without state.

        Args:
            states: Per-parameter optimizer state of that moment, by name.
            phase: The phase of that moment.
        """
        if not self._takes(states, phase):
            text = f"The best state, of phase {phase}, belongs to another optimizer: {{}} starts without state."
            self._report(logging.WARNING, text.format(type(self.optimizer).__name__))
            states = {}
        return with_state(self.optimizer, self.parameters, states)

    def emptied_optimizer(self, phase: int) -> Optimizer:
        """Copy the optimizer in force in a phase up to the present one, without groups, state and hooks."""
        state = self.plan.phases[phase]
        if state.optimizer_since == self.plan.phases[self.phase].optimizer_since:
            return emptied(self.optimizer)
        if state.optimizer is None:
            return emptied(self._first_optimizer)
        return empty_optimizer(state.optimizer)

    def settle(self) -> None:
        """Make learning rates what they are between steps, after an exception inside one."""
        self._warmup.settle()

    def hold(self, thawed: Mapping[str, nn.Parameter]) -> None:
        """Remember the values of parameters about to be thawed that a checkpoint of an earlier phase leaves out."""
        for name, parameter in thawed.items():
            if name not in self.saved_names:
                self.frozen_values[name] = on_host(parameter)

    def forget_frozen(self, saved: Collection[str]) -> None:
        """Let go of such values, now that the best checkpoint has all parameters."""
        if all(name in saved for name in self.view.tensors):
            for name in self.trained_names:
                self.frozen_values.pop(name, None)

    def left_out(self, saved: Collection[str], phase: int) -> dict[str, torch.Tensor]:
        """Find the values of thawed parameters that a checkpoint leaves out.

        Args:
            saved: The names of what it has.
            phase: The phase in which it was written.

        Raises:
            CheckpointError: With every parameter that neither the checkpoint nor the memory has a value of.
        """
        self.saved_names = frozenset(saved)
        missing = [name for name in self.trained_names if name not in self.saved_names]
        trained_then = set(self.plan.phases[phase].trainable) if missing else set()
        lost = [name for name in missing if name in trained_then or name not in self.frozen_values]
        if lost:
            message = f"expected values of all parameters that have been thawed, got none of {listed(lost)}"
            raise CheckpointError(Problem(message, fix="Save them too, or use restore_best=False."))
        return {name: self.frozen_values[name] for name in missing}

    def announce(self, prepared: Prepared) -> None:
        """Tell the user what was found while the session was prepared."""
        for level, messages in ((logging.INFO, prepared.notices), (logging.WARNING, prepared.warnings)):
            for message in messages:
                self._report(level, message)

    def _check_order(self, phase: int) -> None:
        if not self.phase <= phase <= self.plan.last_phase:
            expected = f"expected a phase from {self.phase} (the present one) to {self.plan.last_phase}, got {phase}"
            raise ScheduleError(Problem(expected, fix="Phases can only be entered in order."))

    def _takes(self, states: Mapping[str, Mapping[str, Any]], phase: int) -> bool:
        """Whether state of a phase suits the optimizer in force: the same one, or one that keeps the same things."""
        if self.plan.phases[phase].optimizer_since == self.plan.phases[self.phase].optimizer_since:
            return True
        now = state_by_name(self.optimizer.state_dict(), self.group_names)
        shared = now.keys() & states.keys()
        same_class = type(self.emptied_optimizer(phase)) is type(self.optimizer)
        return bool(shared) and same_class and all(now[name].keys() == states[name].keys() for name in shared)

    def _move(self, target: PhaseState) -> list[tuple[str, str]]:
        """Apply the difference between the present state and another; return what was replaced."""
        present = self._state
        if present is None:
            set_trainable(self.parameters.values(), trainable=False)
        thawed, frozen = difference(() if present is None else present.trainable, target.trainable)
        named = {name: self.parameters[name] for name in thawed}
        for listener in self.listeners:
            listener.before_thaw(named)
        if self.before is not None:
            self.before.note(named.values(), (self.parameters[name] for name in frozen))
        set_trainable((self.parameters[name] for name in frozen), trainable=False)
        set_trainable(named.values(), trainable=True)
        if not target.keeps_frozen_state:
            for name in frozen:
                self.optimizer.state.pop(self.parameters[name], None)
        replaced = self._follow(present, target)
        self._state, self.progress = target, replace(self.progress, phase=target.index)
        for listener in self.listeners:
            listener.after_thaw()
        return replaced

    def _follow(self, present: PhaseState | None, target: PhaseState) -> list[tuple[str, str]]:
        """Bring optimizer and schedulers into a state: a new optimizer over the groups there are, then new groups."""
        initial = self.plan.phases[0]
        if present is None and self._settings.enforce_phase0_params:
            arrange(self.optimizer, self.lr_schedulers, self.parameters, initial.groups)
        if present is None:
            put_labels(self.optimizer, initial.groups)
        self.group_names = self.group_names if present else [list(group.names) for group in initial.groups]
        since = present or initial
        replaced = []
        if target.optimizer is not None and target.optimizer_since > since.optimizer_since:
            stays = target.lr_scheduler_since == since.lr_scheduler_since
            replaced.append(self._replace_optimizer(target.optimizer, since.groups, scheduler_stays=stays))
        held = len(since.groups)
        if target.lr_scheduler is not None and target.lr_scheduler_since > since.lr_scheduler_since:
            # The scheduler before it follows the groups of the phases before, the new one is made over all.
            installing = self.plan.phases[target.lr_scheduler_since]
            before, after = installing.groups_before, len(installing.groups)
            self._add_groups(target.groups[held:before], self.lr_schedulers)
            self._add_groups(target.groups[before:after], ())
            later = target.optimizer_since > target.lr_scheduler_since
            replaced.append(self._replace_scheduler(target.lr_scheduler, before, optimizer_is_later=later))
            held = after
        self._add_groups(target.groups[held:], self.lr_schedulers)
        for state in self.plan.phases[0 if present is None else present.index + 1 : target.index + 1]:
            if state.limits.lr_warmup_steps > 0:
                groups = range(state.groups_before, len(state.groups))
                self._warmup.start(state.index, groups, state.limits.lr_warmup_steps)
        return replaced

    def _add_groups(self, groups: Sequence[PlannedGroup], lr_schedulers: Iterable[LRScheduler]) -> None:
        apply_lambdas = self._settings.apply_lambdas_new_pgs
        if self._first_lr is not None:
            groups = [replace(group, lr=self._first_lr) if group.takes_first_lr else group for group in groups]
        add_groups(self.optimizer, lr_schedulers, self.parameters, groups, apply_lambdas=apply_lambdas)
        self.group_names += [list(group.names) for group in groups]
        load_linearly(self.optimizer)

    def _replace_optimizer(
        self, spec: OptimizerSpec, groups: Sequence[PlannedGroup], *, scheduler_stays: bool
    ) -> tuple[str, str]:
        old = self.optimizer
        in_use = scheduler_stays and any(map(reads_initial_lr, self.lr_schedulers))
        options = [group.options for group in groups]
        initial = len(self.plan.phases[0].groups)
        self.optimizer = build_optimizer(spec, old, options, initial_groups=initial, keep_initial_lr=in_use)
        for scheduler in self.lr_schedulers:
            retarget(scheduler, self.optimizer)
        self._warmup.attach(self.optimizer)
        if old is self._first_optimizer:
            self._first_optimizer = emptied(old)
        return f"optimizer {_name(self.optimizer)} replaces {_name(old)}", repr(self.optimizer)

    def _replace_scheduler(
        self, spec: LRSchedulerSpec, groups_before: int, *, optimizer_is_later: bool
    ) -> tuple[str, str]:
        old = ", ".join(_name(scheduler) for scheduler in self.lr_schedulers) or "none"
        scheduler = build_lr_scheduler(
            spec,
            self.optimizer,
            groups_before=groups_before,
            apply_lambdas=self._settings.apply_lambdas_new_pgs,
            optimizer_is_later=optimizer_is_later,
        )
        self.lr_schedulers = [scheduler]
        self.scheduler_settings = SchedulerSettings.of(spec)
        return f"LR scheduler {_name(scheduler)} replaces {old}", f"{spec.model_dump()}: {scheduler.state_dict()}"


def _name(thing: object) -> str:
    return type(thing).__name__
