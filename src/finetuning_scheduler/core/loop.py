"""Hand-written training loops: a thin driver of a session, with a metric to watch."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .before import Before
from .gradients import GradientWatch
from .monitor import Mode, Monitor, Patience, mode_problems
from .optim.build import SchedulerSettings
from .plan import Plan
from .prefix.reuse import FrozenPrefix
from .prepare import prepare
from .ranks import OneProcess, Ranks
from .schedule.schedule import Schedule, ScheduleSource
from .session import Report, Session
from .settings import FrozenPrefixMode, Settings
from .state import read_as
from .steps import StepCounter, when_loaded
from .thaw import FrozenModulesMode
from .transitions import Listener, Moment, Progress, Reason, Transition
from .view import ModelView

log = logging.getLogger("finetuning_scheduler")


class PhaseRunner:
    """Run a fine-tuning schedule over a model and its optimizer.

    Making one freezes the model, thaws phase 0 and makes the optimizer hold exactly phase 0's parameters. Call
    :meth:`step` after each optimizer step and :meth:`epoch_end` after each epoch (and after the LR scheduler's step, if
    it has one an epoch), until ``finished``; inside ``torch.inference_mode()`` too. The arguments that are not
    listed are those of :class:`.Settings`. The best state is held in memory. With frozen modules in eval mode, call
    :meth:`apply_module_modes` after ``model.train()``.

    Args:
        model: The model to fine-tune, or a view of it that tells what wrappers have made of its parameters.
        optimizer: Its only optimizer.
        schedule: A :class:`.Schedule`, a mapping or the path of a YAML file; ``None`` generates one.
        lr_schedulers: The LR schedulers that act on ``optimizer``.
        patience: Epochs without improvement of the metric after which a phase ends; ``None`` for no such limit.
        mode: Whether the metric improves downwards (``"min"``) or upwards (``"max"``).
        min_delta: Smallest change of the metric that counts as an improvement.
        on_thawed: Called after each change of ``requires_grad``.
        listeners: Told of every change of what is trained.
        ranks: The processes that train together, if there are several: they run out of patience, and end, together.
        report: Where messages go: ``report(logging level, text)``; the package's logger if not given.

    Attributes:
        gradients: Tells, in a warning and as values, which parameters were thawed and are not trained.
        prefix: With ``frozen_prefix``: runs the steps of the loop, ``runner.prefix.train(step, batch)`` for
            ``step(batch)``, and ``validate`` alike.

    Raises:
        ScheduleError: The schedule is malformed or does not fit the model, with everything that is wrong; model and
            optimizer are as before.
    """

    def __init__(
        self,
        model: nn.Module | ModelView,
        optimizer: Optimizer,
        schedule: ScheduleSource | None = None,
        *,
        lr_schedulers: Iterable[LRScheduler] = (),
        max_depth: int = -1,
        base_max_lr: float | None = 1e-5,
        no_decay: Collection[str] = (),
        patience: int | None = None,
        mode: Mode = "min",
        min_delta: float = 0.0,
        restore_best: bool = True,
        enforce_phase0_params: bool = True,
        apply_lambdas_new_pgs: bool = False,
        frozen_bn_track_running_stats: bool = True,
        frozen_modules_mode: FrozenModulesMode = "train",
        frozen_prefix: FrozenPrefixMode = "off",
        prefix_budget: int | None = None,
        prefix_dir: str | PathLike[str] | None = None,
        prefix_dtype: torch.dtype | None = None,
        on_thawed: Callable[[], None] | None = None,
        listeners: Iterable[Listener] = (),
        ranks: Ranks | None = None,
        report: Report | None = None,
    ) -> None:
        view = model if isinstance(model, ModelView) else ModelView.of(model)
        settings = Settings(
            max_depth=max_depth,
            base_max_lr=base_max_lr,
            no_decay=no_decay,
            restore_best=restore_best,
            enforce_phase0_params=enforce_phase0_params,
            apply_lambdas_new_pgs=apply_lambdas_new_pgs,
            frozen_bn_track_running_stats=frozen_bn_track_running_stats,
            frozen_modules_mode=frozen_modules_mode,
            frozen_prefix=frozen_prefix,
            prefix_budget=prefix_budget,
            prefix_dir=prefix_dir,
            prefix_dtype=prefix_dtype,
        )
        lr_schedulers = list(lr_schedulers)
        prepared = prepare(
            schedule, view, optimizer, settings, lr_schedulers=lr_schedulers, problems=list(mode_problems(mode))
        )
        self.monitor = Monitor(
            Patience(sys.maxsize if patience is None else patience, mode, min_delta), keeps_best=restore_best
        )
        self._steps = StepCounter()
        self.session = Session(
            view,
            optimizer,
            prepared,
            settings,
            lr_schedulers=lr_schedulers,
            listeners=[
                self.monitor,
                _Calling(self._phase_begun),
                *([] if on_thawed is None else [_Calling(on_thawed)]),
                *listeners,
            ],
            report=report,
        )
        self.session.announce(prepared)
        self._diverged = False
        self._report = report or log.log
        self._ended: Reason | None = None  # why the last phase has
        self._optimizer_is_loaded = True
        self._ranks = ranks or OneProcess()
        self.gradients = GradientWatch(self.session, ranks=self._ranks, report=report)
        self.prefix = FrozenPrefix(self.session, settings, ranks=ranks, report=report)
        self.session.listeners += [self.gradients, self.prefix]
        self._epoch = self._step = 0
        self.session.begin()

    @property
    def finished(self) -> bool:
        """Whether the session has ended.

        One that was saved when it had, and is loaded with a greater ``max_depth``, has not: it enters the next phase
        when this is asked after the states of LR schedulers and optimizer have been loaded. Ask before the first batch.
        """
        if self._optimizer_is_loaded:
            self._go_on()
        return self._diverged or (self._ended is not None and not self.phases_remaining)

    @property
    def phase(self) -> int:
        """The phase being executed."""
        return self.session.phase

    @property
    def phases_remaining(self) -> int:
        """How many phases are still to come; 0 in the last one."""
        return self.session.phases_remaining

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer in force; a phase with ``new_optimizer`` replaces it."""
        return self.session.optimizer

    @property
    def lr_schedulers(self) -> list[LRScheduler]:
        """The LR schedulers in force; a phase with ``new_lr_scheduler`` replaces them by one."""
        return self.session.lr_schedulers

    @property
    def scheduler_settings(self) -> SchedulerSettings | None:
        """When the LR scheduler that a phase installed steps; ``None`` while the initial ones are in force."""
        return self.session.scheduler_settings

    @property
    def view(self) -> ModelView:
        """The parameters that the schedule names, and the tensors that are trained for them."""
        return self.session.view

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The tensors that are trained, each once, by the first of its names."""
        return self.session.parameters

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.session.view.model

    @property
    def plan(self) -> Plan:
        """The phases to execute, each as a whole state."""
        return self.session.plan

    @property
    def schedule(self) -> Schedule:
        """The schedule in full parameter names."""
        return self.session.schedule

    @property
    def progress(self) -> Progress:
        """Where the session is."""
        return self.session.progress

    @torch.inference_mode(mode=False)
    def step(self) -> Transition | None:
        """Count an optimizer step; enter the next phase if the present one's step limit is reached.

        A call counts if the optimizer has made a step since the last one: one that a gradient scaler has left out does
        not, nor does one in the middle of an accumulation.
        """
        self.prefix.after_backward()
        if (transition := self._go_on()) is not None:
            self._steps.taken()
            message = f"Phase {transition.left}, which had ended, has made a step too many: ask `finished` before."
            self._report(logging.WARNING, message)
            return transition
        self.gradients.step()
        if not self._steps.taken():
            return None
        self._step += 1
        return self._follow(Moment(self._epoch, self._step, between_epochs=False))

    @torch.inference_mode(mode=False)
    def epoch_end(self, metric: float | None = None) -> Transition | None:
        """Count an epoch; enter the next phase if this one ran out of patience or reached its limit.

        Args:
            metric: The monitored quantity. The best state is kept for it, and a value that is not finite ends the
                session, as in PyTorch Lightning.
        """
        self._go_on()
        self.gradients.epoch_end()
        self.prefix.epoch_end()
        progress = self.session.progress
        entered_after_last_step = 0 < self._step == progress.entry_step and progress.entry_epoch == self._epoch
        self._epoch += 1
        if entered_after_last_step:
            # The phase has not trained yet: it begins with the coming epoch, as it does under Lightning.
            progress.entry_epoch = self._epoch
        self._diverged |= self._ranks.any(metric is not None and not math.isfinite(metric))
        if metric is not None:
            self.monitor.observe(float(metric), self.session)
        if entered_after_last_step:
            self.monitor.patience.waited = 0
            return None
        exhausted = metric is not None and self.monitor.patience.exhausted
        return self._follow(Moment(self._epoch, self._step, out_of_patience=self._ranks.any(exhausted)))

    @torch.inference_mode(mode=False)
    def thaw_to(self, phase: int) -> None:
        """Enter a later phase at once, without restoring anything.

        Raises:
            ScheduleError: ``phase`` is before the present phase or beyond the last one.
        """
        self._go_on()
        if phase != self.phase:
            with self.session.transition(self._loop_state()) as before:
                self._enter(phase, Moment(self._epoch, self._step), Reason.REQUEST, before)

    def settle(self) -> None:
        """Make learning rates what they are between steps, after an exception inside one."""
        self.session.settle()

    def apply_module_modes(self) -> None:
        """Put frozen modules back into their mode after something else has set the modes of the whole model."""
        self.session.modes.apply()

    def release_module_modes(self) -> None:
        """Put modules switched to eval mode back to train mode, and let paused statistics go on: training is over."""
        self.prefix.close()
        self.session.modes.release()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: plain Python values, and the best state as tensors.

        During a transition it is the state before it, which weights and optimizer may have left by then: a listener
        that saves does so in ``on_transition``. Handlers of signals run before or after a transition.
        """
        before = self.session.before
        return {**self.session.state_dict(), **(self._loop_state() if before is None else before.driver)}

    @torch.inference_mode(mode=False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: enter its phase, with its parameter groups.

        Call it on a new runner, before the optimizer's and the LR schedulers' own states are loaded.

        Raises:
            CheckpointError: The state is of a newer format, or of another schedule or optimizer.
        """
        session = {key: value for key, value in state.items() if key != "loop"}
        loop = read_as(_SavedLoop, state["loop"]) if state.get("loop") is not None else None
        self.session.resume(session)
        if loop is not None:
            self._epoch, self._step = loop.epoch, loop.step
            self._diverged, self._ended = loop.finished and loop.ended is None, loop.ended
            self.monitor.load_state_dict(state["loop"])
            self._optimizer_is_loaded = False
            when_loaded(self.optimizer, partial(setattr, self, "_optimizer_is_loaded", True))

    @property
    def _is_over(self) -> bool:
        return self._diverged or self._ended is not None

    @torch.inference_mode(mode=False)
    def _go_on(self) -> Transition | None:
        """Enter the phase that follows the one with which the session had ended, if there is one by now."""
        if self._ended is None or not self.phases_remaining:
            return None
        return self._advance(Moment(self._epoch, self._step), self._ended)

    def _follow(self, moment: Moment) -> Transition | None:
        decision = self.session.decide(moment)
        if self._is_over or decision.reason is None:
            return None
        self.gradients.judge()
        if self.phases_remaining == 0:
            self._ended = decision.reason
            return None
        return self._advance(moment, decision.reason)

    def _advance(self, moment: Moment, reason: Reason) -> Transition:
        """Restore the best state and enter the next phase."""
        with self.session.transition(self._loop_state()) as before:
            before.undo.append(partial(setattr, self, "_ended", self._ended))
            self._ended = None
            self.monitor.restore(self.session)
            return self._enter(self.phase + 1, moment, reason, before)

    def _enter(self, phase: int, moment: Moment, reason: Reason, before: Before) -> Transition:
        """Enter a phase, in which the count of checks restarts."""
        before.undo.append(partial(setattr, self.monitor.patience, "waited", self.monitor.patience.waited))
        before.undo.append(lambda: self._steps.attach(self.session.optimizer))
        self.monitor.patience.waited = 0
        return self.session.enter(phase, moment, reason)

    def _loop_state(self) -> dict[str, Any]:
        if not self._epoch and not self._step:
            return {}
        ended = None if self._ended is None else self._ended.value
        loop = {"epoch": self._epoch, "step": self._step, "finished": self._is_over, "ended": ended}
        return {"loop": {**loop, **self.monitor.state_dict()}}

    def _phase_begun(self) -> None:
        self.monitor.begin_phase(self.session)
        self._steps.attach(self.session.optimizer)


class _Calling(Listener):
    """Calls a function after each thaw."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def after_thaw(self) -> None:
        self._function()


class _SavedLoop(BaseModel):
    """What a hand-written loop saves of itself; the snapshot holds tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int
    step: int
    finished: bool
    ended: Reason | None = None  # why the last phase has, if that has finished the session
    patience: dict[Literal["best", "waited"], float | None]
    snapshot: dict[Literal["weights", "buffers", "optimizer_states"], Any] | None
