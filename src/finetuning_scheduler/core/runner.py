"""Execute a schedule: the object that drives a training loop, hand-written or PyTorch Lightning's."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import CheckpointError, OptimizerError, Problem, ScheduleError
from .monitor import Patience
from .optim.build import SchedulerSettings
from .optim.checks import check_against_model
from .optim.param_groups import learning_rates, mesh_of
from .optim.schedulers import growth_failure
from .optim.states import reorder_groups, with_state
from .optimization import Optimization
from .plan import GroupRules, Plan, block_numbers
from .prepare import resolve
from .schedule.generate import generate
from .schedule.schedule import Schedule
from .snapshot import Snapshot
from .thaw import FrozenModulePolicy, FrozenModulesMode, set_trainable
from .transitions import Decision, Progress, Reason, decide
from .view import ModelView, sparse_parameters

STATE_VERSION = 1

Report = Callable[[int, str], None]


@dataclass(frozen=True)
class Transition:
    """A phase entered: what ended the one before and what is trainable now."""

    left: int
    entered: int
    reason: Reason
    epoch: int
    step: int
    trainable: int
    share: float
    learning_rates: tuple[float, ...]

    def __str__(self) -> str:
        rates = ", ".join(f"{lr:g}" for lr in self.learning_rates)
        return (
            f"Phase {self.left} -> {self.entered} ({self.reason.value}) at epoch {self.epoch}, step {self.step}: "
            f"{self.trainable:,} parameters trainable ({self.share:.2%}), learning rates [{rates}]"
        )


class PhaseRunner:
    """Run a fine-tuning schedule over a model and its optimizer.

    Making one freezes the model, thaws phase 0 and makes the optimizer hold exactly phase 0's parameters. In a
    hand-written loop, call :meth:`step` after each optimizer step and :meth:`epoch_end` after each epoch (and after
    the LR scheduler's step, if it has one an epoch), until :attr:`finished`. The PyTorch Lightning callback drives the
    same object with :meth:`decide` and :meth:`advance`.

    Args:
        model: The model to fine-tune, or a view of it that tells what wrappers have made of its parameters.
        optimizer: Its only optimizer.
        schedule: A :class:`Schedule`, a mapping or the path of a YAML file; ``None`` generates one.
        lr_schedulers: The LR schedulers that act on ``optimizer``.
        max_depth: Deepest phase to execute; -1 for all.
        base_max_lr: Learning rate of a phase after the first that names none; ``None`` for the initial learning rate
            of the first parameter group.
        no_decay: Fragments of names whose parameters get a group with ``weight_decay=0`` in each phase.
        patience: Epochs without improvement of the metric after which a phase ends; ``None`` for no such limit.
        mode: Whether the metric improves downwards (``"min"``) or upwards (``"max"``).
        min_delta: Smallest change of the metric that counts as an improvement.
        restore_best: Restore the best state so far, held in memory, before each transition.
        enforce_phase0_params: Make the optimizer hold exactly phase 0's parameters.
        apply_lambdas_new_pgs: New parameter groups take a scheduler's last ``lr_lambda``.
        frozen_bn_track_running_stats: Frozen BatchNorm layers keep tracking their statistics.
        frozen_modules_mode: ``"eval"`` keeps modules whose parameters are all frozen in eval mode; call
            :meth:`apply_module_modes` after ``model.train()`` then.
        on_thawed: Called after each change of ``requires_grad``.
        report: Where messages go: ``report(logging level, text)``; the package's logger if not given.

    Raises:
        ScheduleError: The schedule is malformed or does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module | ModelView,
        optimizer: Optimizer,
        schedule: Schedule | Mapping[Any, Any] | str | PathLike[str] | None = None,
        *,
        lr_schedulers: Iterable[LRScheduler] = (),
        max_depth: int = -1,
        base_max_lr: float | None = 1e-5,
        no_decay: Collection[str] = (),
        patience: int | None = None,
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
        restore_best: bool = True,
        enforce_phase0_params: bool = True,
        apply_lambdas_new_pgs: bool = False,
        frozen_bn_track_running_stats: bool = True,
        frozen_modules_mode: FrozenModulesMode = "train",
        on_thawed: Callable[[], None] | None = None,
        report: Report | None = None,
    ) -> None:
        self.view = model if isinstance(model, ModelView) else ModelView.of(model)
        self.model = self.view.model
        self.parameters = self.view.trained
        self.progress = Progress()
        self.finished = False
        self._report = report or logging.getLogger("finetuning_scheduler").log
        self._on_thawed = on_thawed
        self._policy = FrozenModulePolicy(
            self.model, track_running_stats=frozen_bn_track_running_stats, mode=frozen_modules_mode
        )
        self._restore_best = restore_best
        self._patience = Patience(sys.maxsize if patience is None else patience, mode, min_delta)
        self._snapshot: Snapshot | None = None
        self._epoch = self._step = 0

        self.schedule = self._resolved(schedule)
        self._merged = self.view.merged_schedule(self.schedule)
        set_trainable(self.parameters.values(), trainable=False)
        set_trainable(self._named(0).values(), trainable=True)
        self._optimization = Optimization(
            optimizer, lr_schedulers, self.parameters, apply_lambdas=apply_lambdas_new_pgs
        )
        difference = self._optimization.match_phase0(
            self._merged.phases[0], no_decay=tuple(no_decay), enforce=enforce_phase0_params
        )
        if difference is not None:
            self._report(logging.WARNING, difference)
        self.plan = self._planned(base_max_lr, tuple(no_decay), max_depth)
        self._check()
        self._optimization.warm_up(self.plan.phases[0])
        self._after_thaw()

    # --- what callers read -------------------------------------------------------------------------------------------

    @property
    def phase(self) -> int:
        """The phase being executed."""
        return self.progress.phase

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer in force; a phase with ``new_optimizer`` replaces it."""
        return self._optimization.optimizer

    @property
    def lr_schedulers(self) -> list[LRScheduler]:
        """The LR schedulers in force; a phase with ``new_lr_scheduler`` replaces them by one."""
        return self._optimization.lr_schedulers

    @property
    def scheduler_settings(self) -> SchedulerSettings | None:
        """When the LR scheduler that a phase installed steps; ``None`` while the initial ones are in force."""
        return self._optimization.scheduler_settings

    @property
    def phases_remaining(self) -> int:
        """How many phases are still to come; 0 in the last one."""
        return self.plan.last_phase - self.progress.phase

    # --- driven by a hand-written loop -------------------------------------------------------------------------------

    def step(self) -> Transition | None:
        """Count an optimizer step; enter the next phase if the present one's step limit is reached."""
        self._step += 1
        return self._follow(self.decide(epoch=self._epoch, step=self._step, epoch_boundary=False))

    def epoch_end(self, metric: float | None = None) -> Transition | None:
        """Count an epoch; enter the next phase if this one ran out of patience or reached its limit.

        Args:
            metric: The monitored quantity. The best state is kept for it, and a value that is not finite ends the
                session, as in PyTorch Lightning.
        """
        entered_after_last_step = (
            0 < self._step == self.progress.entry_step and self.progress.entry_epoch == self._epoch
        )
        self._epoch += 1
        if entered_after_last_step:
            # The phase has not trained yet: it begins with the coming epoch, as it does under Lightning.
            self.progress.entry_epoch = self._epoch
        exhausted = False
        if metric is not None:
            self.finished = self.finished or not math.isfinite(metric)
            if self._patience.update(float(metric)) and self._restore_best:
                self._snapshot = Snapshot.take(self.view, self.optimizer, self._optimization.group_names)
                self.progress.best_phase = self.phase
            exhausted = self._patience.exhausted
        if entered_after_last_step:
            self._patience.waited = 0
            return None
        return self._follow(
            self.decide(epoch=self._epoch, step=self._step, epoch_boundary=True, patience_exhausted=exhausted)
        )

    def _follow(self, decision: Decision) -> Transition | None:
        if self.finished or decision.reason is None:
            return None
        if self.phases_remaining == 0:
            self.finished = True
            return None
        if self._snapshot is not None:
            self._snapshot.restore(self.view)
            state = self.optimizer_state_from(self._snapshot.copied_optimizer_states(), self.progress.best_phase)
            self.optimizer.load_state_dict(state)
        self._patience.waited = 0
        return self.advance(decision.reason, epoch=self._epoch, step=self._step)

    # --- driven by any loop ------------------------------------------------------------------------------------------

    def decide(self, *, epoch: int, step: int, epoch_boundary: bool, patience_exhausted: bool = False) -> Decision:
        """Decide whether the present phase ends; see :func:`.transitions.decide`."""
        return decide(
            self.schedule.phases[self.phase],
            self.progress,
            epoch=epoch,
            step=step,
            epoch_boundary=epoch_boundary,
            patience_exhausted=patience_exhausted,
        )

    def advance(self, reason: Reason, *, epoch: int, step: int) -> Transition:
        """Enter the next phase: thaw its parameters and give them parameter groups."""
        left = self.phase
        self.thaw_to(left + 1)
        self.progress.entry_epoch, self.progress.entry_step = epoch, step
        trainable = self.plan.trainable_count(self.phase)
        transition = Transition(
            left=left,
            entered=self.phase,
            reason=reason,
            epoch=epoch,
            step=step,
            trainable=trainable,
            share=trainable / max(self.plan.model_parameter_count, 1),
            learning_rates=tuple(learning_rates(self.optimizer)),
        )
        self._report(logging.INFO, str(transition))
        return transition

    def thaw_to(self, phase: int) -> None:
        """Enter every phase after the present one up to ``phase``, without restoring anything.

        Raises:
            ScheduleError: ``phase`` is before the present phase or beyond the last one.
        """
        if not self.phase <= phase <= self.plan.last_phase:
            expected = f"expected a phase from {self.phase} (the present one) to {self.plan.last_phase}, got {phase}"
            raise ScheduleError(Problem(expected, fix="Phases can only be entered in order."))
        for index in range(self.phase + 1, phase + 1):
            self._enter(index)
        self._after_thaw()

    def optimizer_state_from(self, states: Mapping[str, Mapping[str, Any]], phase: int) -> dict[str, Any]:
        """Build the optimizer's ``state_dict`` for a return to an earlier moment.

        Groups and learning rates stay as they are. Parameters without state there, and all parameters if another
        optimizer was in force, start without state.

        Args:
            states: Per-parameter optimizer state of that moment, by name.
            phase: The phase of that moment.
        """
        state = self._optimization.state_with(states, self.plan, saved_in=phase, present=self.phase)
        if state is None:
            text = f"The best state, of phase {phase}, belongs to another optimizer: {{}} starts without state."
            self._report(logging.WARNING, text.format(type(self.optimizer).__name__))
            state = with_state(self.optimizer, self.parameters, {})
        return state

    def emptied_optimizer(self, phase: int) -> Optimizer:
        """Copy the optimizer in force in a phase up to the present one, without groups, state and hooks."""
        return self._optimization.emptied(self.plan, phase)

    def settle(self) -> None:
        """Make learning rates what they are between steps, after an exception inside one."""
        self._optimization.warmup.settle()

    def apply_module_modes(self) -> None:
        """Put frozen modules back into their mode after something else has set the modes of the whole model."""
        self._policy.apply()

    def release_module_modes(self) -> None:
        """Put the modules switched to eval mode back to train mode, at the end of training."""
        self._policy.release()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in tensors and plain Python values."""
        self.settle()
        self.progress.parameter_groups = [self.view.expanded(names) for names in self._optimization.group_names]
        state: dict[str, Any] = {"version": STATE_VERSION, **asdict(self.progress)}
        state["warmup"] = self._optimization.warmup.state_dict()
        if self._epoch or self._step:
            snapshot = None if self._snapshot is None else vars(self._snapshot)
            patience = {"best": self._patience.best, "waited": self._patience.waited}
            state["loop"] = {
                "epoch": self._epoch,
                "step": self._step,
                "finished": self.finished,
                "patience": patience,
                "snapshot": snapshot,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: thaw up to its phase and rebuild its parameter groups.

        Call it on a new runner, before the optimizer's and the LR schedulers' own states are loaded.

        Raises:
            CheckpointError: The state is of a newer format, or of another schedule or optimizer.
        """
        check_state(state, self.plan.last_phase)
        self.thaw_to(state["phase"])
        stored = [self.view.merged(names) for names in state["parameter_groups"]]
        reorder_groups(self.optimizer, self.parameters, stored)
        self._optimization.group_names[:] = stored
        self._optimization.warmup.load_state_dict(state.get("warmup", {}))
        self.progress = progress_of(state)
        if "loop" in state:
            loop = state["loop"]
            self._epoch, self._step = loop["epoch"], loop["step"]
            self._patience.best, self._patience.waited = loop["patience"]["best"], loop["patience"]["waited"]
            self.finished = loop["finished"]
            # The snapshot grows with the phases; the caller's state stays as it is.
            saved = loop["snapshot"]
            self._snapshot = None if saved is None else Snapshot(**{key: dict(part) for key, part in saved.items()})

    # --- inside ------------------------------------------------------------------------------------------------------

    def _resolved(self, schedule: Schedule | Mapping[Any, Any] | str | PathLike[str] | None) -> Schedule:
        plain = self.view.plain
        resolution = resolve(generate(plain) if schedule is None else schedule, plain)
        for message in resolution.notices:
            self._report(logging.INFO, message)
        for message in resolution.warnings:
            self._report(logging.WARNING, message)
        if resolution.frozen:
            self._report(logging.INFO, f"{resolution.frozen} parameters are in no phase and stay frozen.")
        return resolution.schedule

    def _named(self, phase: int) -> dict[str, nn.Parameter]:
        return {name: self.parameters[name] for name in self._merged.phases[phase].params}

    def _planned(self, base_max_lr: float | None, no_decay: Sequence[str], max_depth: int) -> Plan:
        layer_wise = any(phase.lr_decay is not None for phase in self.schedule.phases)
        rules = GroupRules(
            default_lr=self._optimization.initial_lr if base_max_lr is None else base_max_lr,
            no_decay=no_decay,
            options=self._optimization.options,
            block_numbers=block_numbers(generate(self.view.plain, "blocks")) if layer_wise else {},
            held={name for names in self._optimization.group_names for name in names},
            meshes={name: mesh_of(parameter) for name, parameter in self.parameters.items()},
        )
        return Plan.of(self._merged, self.view.sizes, rules, max_depth=max_depth)

    def _check(self) -> None:
        """Refuse optimizers and schedulers that would fail later on."""
        problems = check_against_model(
            [planned.limits for planned in self.plan.phases],
            self.plan.group_counts(len(self._optimization.group_names)),
            self.optimizer,
            self.parameters,
            sparse_parameters(self.view.plain),
        )
        for scheduler in self.lr_schedulers:
            if (failure := growth_failure(scheduler)) is not None:
                message = f"{type(scheduler).__name__} cannot follow a new parameter group ({failure})"
                problems.append(Problem(message, fix="Use one of PyTorch's LR schedulers."))
        if problems:
            raise OptimizerError(problems)

    def _enter(self, phase: int) -> None:
        planned, named = self.plan.phases[phase], self._named(phase)
        if self._snapshot is not None:
            self._snapshot.add(list(named.items()))
        set_trainable(named.values(), trainable=True)
        for line, details in self._optimization.enter(planned):
            self._report(logging.INFO, f"Phase {phase}: {line}")
            self._report(logging.DEBUG, f"Phase {phase}: {details}")
        self._optimization.warm_up(planned)
        self.progress.phase = phase

    def _after_thaw(self) -> None:
        self._policy.update()
        if self._on_thawed is not None:
            self._on_thawed()


def progress_of(state: Mapping[str, Any]) -> Progress:
    """Read the progress out of a saved state."""
    return Progress(
        phase=state["phase"],
        best_phase=state["best_phase"],
        entry_epoch=state["entry_epoch"],
        entry_step=state["entry_step"],
        parameter_groups=[list(names) for names in state["parameter_groups"]],
    )


def check_state(state: Mapping[str, Any], last_phase: int) -> None:
    """Refuse a state that cannot be continued.

    Raises:
        CheckpointError: It is of a newer format, or its phase is beyond the last one to execute.
    """
    if state["version"] > STATE_VERSION:
        message = f"expected checkpoint state of format {STATE_VERSION} or older, got format {state['version']}"
        raise CheckpointError(Problem(message, fix="Resume with the newer release that wrote the checkpoint."))
    if state["phase"] > last_phase:
        message = f"expected a checkpoint of a phase up to {last_phase}, got one of phase {state['phase']}"
        raise CheckpointError(Problem(message, fix="Resume with a schedule and `max_depth` that reach that phase."))
