"""What lives for one fit: made in ``setup``, let go of in ``teardown``; it answers until the next one begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from os import PathLike
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ._checks import (
    Configuration,
    configuration_problems,
    endless_phases,
    limit_problems,
    limit_warnings,
    settings_of,
    untested_warnings,
    usable_optimizer,
)
from ._lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    around_setup,
    install_lr_scheduler,
    install_optimizer,
    is_search_checkpoint,
    loading_with,
    remember,
    scheduler_step_of,
    step_plateau_schedulers,
)
from ._source import read_source, save
from ._trainer import TrainerRanks, adapted, as_misconfiguration, visible_messages
from .callbacks.best import restore_best
from .callbacks.wiring import Wiring
from .core.gradients import GradientWatch
from .core.optim.schedulers import Step, growth_failure, is_supported
from .core.prepare import Prepared, prepare
from .core.ranks import OneProcess
from .core.schedule.generate import generate
from .core.schedule.resolve import Resolution
from .core.session import Session
from .core.thaw import set_trainable
from .core.transitions import Decision, Listener, Moment, Reason, Transition
from .core.view import ModelView
from .errors import CheckpointError, Problem, joined
from .strategy_adapters import saved_progress

log = logging.getLogger("finetuning_scheduler")
_NOT_BEGUN = "FinetuningScheduler runs inside Trainer.fit; no fit has started."

_INSIDE_AN_EPOCH = (
    "To end phases inside an epoch, set `intra_epoch_transitions=True` and validate there, or give them a "
    "`max_transition_step`."
)


class Owner(Configuration, Protocol):
    """The callback whose fit this is."""

    @property
    def state_key(self) -> str:
        """Key of its state in a checkpoint."""
        ...


class Fit(Listener):
    """One fit of one module: the session, the strategy's adapter, and what the hooks have to remember.

    Args:
        owner: The callback.
        given: What the user has asked for as ``ft_schedule``, ``max_depth`` and ``log_dir``.
        trainer: The trainer.
        module: The module.
        wiring: The callbacks that drive the phases.
        continued: The state in which an earlier fit of the same trainer and module has ended.
    """

    def __init__(
        self,
        owner: Owner,
        given: dict[str, Any],
        trainer: Trainer,
        module: LightningModule,
        wiring: Wiring,
        continued: Mapping[str, Any] | None,
    ) -> None:
        self.owner = owner
        self.given = given
        self.trainer = trainer
        self.module = module
        self.loaded = continued  # the progress to go on from
        self._session: Session | None = None
        self._gradients: GradientWatch | None = None
        self._resolved: dict[str, Any] = {}
        self.wiring = wiring
        self._hooked = ExitStack()  # what of Lightning's is hooked into at the moment
        self.adapter = adapted(owner, trainer, module, self._hooked)
        self.ranks = TrainerRanks(trainer, self.adapter)
        self.resumed_from: object = None
        self._found = Resolution()
        self._view = ModelView.of(module)
        self._came_with: dict[str, bool] = {}
        self._searched = False
        self._messages = ExitStack()
        self._messages.enter_context(visible_messages())
        self._hooked.enter_context(
            around_setup(trainer, module, before_optimizers=self.before_optimizers, after=self.begin)
        )
        remember(trainer, self)
        self._carried_on = False
        self._decision: Decision | None = None
        # Lightning's own counters do not tell it in checkpoints that are saved as an epoch starts.
        self._between_epochs = True
        self._epoch_begun = False
        self._modes_are_stale = False
        self._owes_plateau_step = False
        self._told_of_disagreement = False
        self._endless_phases: list[int] = []  # those that end between epochs only, of which none may come
        self._unchecked_replicas = False
        self._steps_seen = 0
        self._told_of_end = False

    @property
    def begun(self) -> bool:
        """Whether the session is there: schedule and model have been checked, and the first phase entered."""
        return self._session is not None

    @property
    def session(self) -> Session:
        """The session.

        Raises:
            MisconfigurationException: It has not begun.
        """
        if self._session is None:
            raise MisconfigurationException(_NOT_BEGUN)
        return self._session

    @property
    def gradients(self) -> GradientWatch:
        """Tells, in a warning and as values, which parameters were thawed and are not trained.

        Raises:
            MisconfigurationException: The session has not begun.
        """
        if self._gradients is None:
            raise MisconfigurationException(_NOT_BEGUN)
        return self._gradients

    def report(self, level: int, message: str) -> None:
        """Log a message on rank zero."""
        if self.trainer.is_global_zero:
            log.log(level, message)

    def resolved(self, name: str, given: Any) -> Any:
        """Tell what the fit has made of an argument."""
        return self._resolved.get(name, given)

    def forget(self, name: str) -> None:
        """Let the user's new value of an argument answer; it counts in the next fit."""
        self._resolved.pop(name, None)

    def _resolve_log_dir(self) -> str:
        """Settle where artifacts go; to be called by every rank, since the trainer lets rank zero decide."""
        given = self.given["log_dir"] or self.trainer.log_dir or self.trainer.default_root_dir
        self._resolved["log_dir"] = given
        return str(given)

    def release(self) -> None:
        """Let go of what is hooked into."""
        self._hooked.close()

    def end(self, *, failed: bool = False) -> None:
        """Leave the model as it came, but for what has been thawed, and no handler of messages.

        Args:
            failed: Whether an exception has ended the fit. A strategy that shards may then yet save what is there.
        """
        self.release()
        self._messages.close()
        if self._session is not None:
            self._session.modes.release()
        if self._gradients is not None:
            self._gradients.close()
        if not (failed and self.trainer.strategy.restore_checkpoint_after_setup):
            self._give_back()

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Keep a checkpoint's progress for the session that is about to begin.

        A search for a learning rate or a batch size goes back to where it began: it is no resume.
        """
        if is_search_checkpoint(self.trainer.ckpt_path):
            self._searched = True
        else:
            self.loaded = state

    # --- the way into a session --------------------------------------------------------------------------------------

    def before_optimizers(self) -> None:
        """Read the schedule, and let the user's ``configure_optimizers`` meet the model in the state of phase 0."""
        if self.owner.gen_ft_sched_only:
            self._generate_and_exit()
        view, directory = self.adapter.view(self.module), self._resolve_log_dir()
        source, owner = self.given["ft_schedule"], self.owner
        with as_misconfiguration():
            self._found = self.ranks.from_zero(lambda: read_source(source, owner, view, directory))
        self._view = view
        self._came_with = {name: parameter.requires_grad for name, parameter in view.trained.items()}
        self.resumed_from = self.trainer.ckpt_path
        # What is wrong with the schedule is told with everything else, when the optimizers are there.
        for first in self._found.phases[:1]:
            set_trainable(view.trained.values(), trainable=False)
            set_trainable((view.tensors[name] for name in first.params), trainable=True)
        if self._found.errors and not any(parameter.requires_grad for parameter in view.trained.values()):
            # An optimizer of what can be trained could not be made, and would hide the reason.
            with as_misconfiguration():
                raise joined(self._found.errors)

    def begin(self) -> None:
        """Check everything, then enter the first phase: that of a checkpoint or of an earlier fit, else phase 0."""
        self.release()
        try:
            with as_misconfiguration():
                prepared = self._prepared()
                self._enter_first_phase()
        except BaseException:
            self._give_back()
            raise
        source = self.given["ft_schedule"]
        file = source if isinstance(source, (str, PathLike)) else None
        path = save(self.ranks, lambda: self.session.schedule, self._view.plain, self._resolve_log_dir(), file)
        self.report(logging.INFO, f"The schedule in force is saved as {path}.")
        for message in [*limit_warnings(self.trainer, prepared.plan), *untested_warnings(self.owner, self.trainer)]:
            self.report(logging.WARNING, message)

    def _prepared(self) -> Prepared:
        """Find everything that is wrong; make the session."""
        trainer, owner, view = self.trainer, self.owner, self._view
        settings = settings_of(owner, self.given["max_depth"], self.module)
        lr_schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        implicit_mode = self.given["ft_schedule"] is None
        step = scheduler_step_of(self.module)
        prepared = prepare(
            self._found,
            view,
            usable_optimizer(trainer),
            settings,
            lr_schedulers=[each for each in lr_schedulers if self._is_tried(each, step)],
            step=step,
            problems=configuration_problems(owner, trainer, self.wiring, implicit=implicit_mode),
            limits=lambda schedule: [*limit_problems(owner, schedule), *self.adapter.problems(view, schedule)],
        )
        self._session = Session(
            view,
            trainer.optimizers[0],
            prepared,
            settings,
            lr_schedulers=lr_schedulers,
            listeners=[self],
            report=self.report,
        )
        ranks = self.ranks if trainer.world_size > 1 else OneProcess()
        self._gradients = GradientWatch(self._session, ranks=ranks, report=self.report)
        self._session.listeners.append(self._gradients)
        for line in self.wiring.lines:
            self.report(logging.INFO, line)
        self._session.announce(prepared)
        self._resolved |= {"ft_schedule": prepared.schedule, "max_depth": prepared.plan.last_phase}
        return prepared

    def _is_tried(self, scheduler: LRScheduler, step: Step | None) -> bool:
        """Whether a scheduler is tried out: not one that is refused anyway.

        With ``allow_untested``, one passes, too, whose steps the module makes with what only training brings about.
        """
        if not self.owner.allow_untested:
            return is_supported(scheduler)
        return step is None or growth_failure(scheduler, step, new_groups=0) is None

    def _give_back(self) -> None:
        """Give the parameters that no phase has thawed the ``requires_grad`` with which they came."""
        thawed = set() if self._session is None else set(self._session.trained_names)
        for name, trainable in self._came_with.items():
            if name not in thawed:
                self._view.trained[name].requires_grad = trainable

    def _generate_and_exit(self) -> None:
        """Write the default schedule, then leave the program."""
        view, directory = self.adapter.view(self.module), self._resolve_log_dir()
        with as_misconfiguration():
            path = save(self.ranks, lambda: generate(view.plain, frozen=view.frozen), view.plain, directory)
        self.report(logging.INFO, f"The default schedule was written to {path}.")
        self.trainer.strategy.barrier("finetuning_scheduler.gen_ft_sched_only")
        raise SystemExit(0)

    def _enter_first_phase(self) -> None:
        moment = Moment(self.trainer.current_epoch, self.trainer.global_step)
        if self.trainer.strategy.restore_checkpoint_after_setup:
            # The checkpoint is not known yet: the strategy loads it later.
            self.session.begin(moment)
            self._hooked.enter_context(loading_with(self.trainer.strategy, self._resume_late))
        elif self.loaded is None:
            self._refuse_foreign_checkpoint(self.resumed_from)
            self.session.begin(moment)
            self._carried_on = True
        else:
            self.session.resume(session_state(self.loaded))
            self._carried_on = True

    def _resume_late(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        """Enter the phase of a checkpoint that the strategy is about to load, so that its state finds its groups."""
        with as_misconfiguration():
            path = self.adapter.from_rank_zero(path)
            self.loaded = saved_progress(path, self.owner.state_key, weights_only=weights_only)
            self.resumed_from = path
            self._refuse_foreign_checkpoint(path)
            self.session.resume(session_state(self.loaded or {}))
            self._carried_on = True
            return self.adapter.resume(path, self.session, weights_only=weights_only)

    def _refuse_foreign_checkpoint(self, path: object) -> None:
        if self.loaded is None and path is not None:
            message = f"expected a checkpoint written with FinetuningScheduler, got {path}"
            fix = "Load its weights into the module and fit without `ckpt_path`, or resume without this callback."
            raise CheckpointError(Problem(message, fix=fix))

    # --- while it trains ---------------------------------------------------------------------------------------------

    def start_training(self) -> None:
        """Set module modes; give a resumed run its metrics back; end it at once if it had ended before."""
        if not self._carried_on:
            with as_misconfiguration():
                if self.loaded is not None:
                    self.session.resume(session_state(self.loaded))
                self._refuse_foreign_checkpoint(self.resumed_from)
        self.session.modes.apply()
        trainer = self.trainer
        if self.loaded is not None:
            metrics = self.loaded.get("metrics", {})
            trainer.callback_metrics.update({name: read_metric(value) for name, value in metrics.items()})
        self._owes_plateau_step = trainer.fit_loop.resumed_on_epoch_end
        self._endless_phases = endless_phases(self.owner, trainer, self.wiring, self.session.plan)
        if coming := [phase for phase in self._endless_phases if phase >= self.session.phase]:
            message = f"The training data has no length: unless an epoch of it ends, phases {coming} never do."
            self.report(logging.WARNING, f"{message} {_INSIDE_AN_EPOCH}")
        self._steps_seen = trainer.global_step
        early_stopping = self.wiring.early_stopping
        over = self.session.phases_remaining == 0 and self._limit_reached(trainer.current_epoch) is not None
        stopped = early_stopping is not None and early_stopping.has_stopped_session and self.resumed_from is not None
        if over or stopped:
            message = "The session had ended when its checkpoint was written: nothing is left to train."
            self.report(logging.INFO, message)
            trainer.should_stop = True

    def start_epoch(self) -> None:
        """Note that what is asked next is asked between epochs."""
        if self._owes_plateau_step:
            step_plateau_schedulers(self.trainer)
        self._owes_plateau_step = False
        self._between_epochs = self._epoch_begun = True

    def start_batch(self, batch_idx: int) -> bool:
        """Tell whether a phase may end here: at the first batch of a gradient accumulation, inside an epoch."""
        if batch_idx == 0 and not self._epoch_begun:
            # Resumed after an epoch's last batch, Lightning begins the next one without calling any hook.
            self.start_epoch()
            return True
        if self._modes_are_stale:
            self.apply_modes()
        if self._searched:
            self._searched = False
            self.session.follow_first_lr()
            self._tell_of_lost_counters()
        self._tell_of_unheard_patience()
        limits = self.session.plan.phases[self.session.phase].limits
        watched = limits.max_transition_step >= 0 or self.owner.intra_epoch_transitions
        if not watched or batch_idx % self.trainer.accumulate_grad_batches:
            return False
        self._between_epochs = False
        return True

    def end_batch(self) -> None:
        """Check that ranks agree after a phase's first step; end the session at the last phase's step limit."""
        session, step = self.session, self.trainer.global_step
        if step > self._steps_seen:
            self.gradients.step()
        self._steps_seen = step
        if self._unchecked_replicas and step > session.progress.entry_step:
            self._unchecked_replicas = False
            self.adapter.check_replicas(p for p in session.parameters.values() if p.requires_grad)
        limits = session.plan.phases[session.phase].limits
        if session.phases_remaining or limits.max_transition_step < 0:
            return
        self._stop(session.decide(Moment(self.trainer.current_epoch, step, between_epochs=False)).reason)

    def end_epoch(self) -> None:
        """End the session at the last phase's epoch limit."""
        self._endless_phases = []  # epochs do end
        self._epoch_begun = False
        # In the epoch in which a run is resumed Lightning does not step schedulers that wait for a metric.
        self._owes_plateau_step = self.trainer.fit_loop.restarting
        self.gradients.epoch_end(whole=not self.trainer.fit_loop.restarting)
        if self.session.phases_remaining == 0:
            self._stop(self._limit_reached(self.trainer.current_epoch + 1))

    def end_training(self) -> None:
        """Judge a phase that the training has ended in before its first epoch did."""
        self.gradients.judge()

    def apply_modes(self) -> None:
        """Put frozen modules into their mode."""
        self.session.modes.apply()
        self._modes_are_stale = False

    def expect_other_modes(self) -> None:
        """Note that Lightning is about to set the modes of all modules."""
        self._modes_are_stale = True

    def decide(self) -> Decision:
        """Decide whether the next phase is due; the ranks talk about it once, and :meth:`advance` uses the answer."""
        if self.session.phases_remaining == 0:
            return Decision(advance=False)
        self._decision = self.session.decide(
            Moment(
                self.trainer.current_epoch,
                self.trainer.global_step,
                between_epochs=self._between_epochs,
                out_of_patience=self._out_of_patience(),
            )
        )
        return self._decision

    def take_reason(self) -> Reason:
        """Return why the next phase is due, as decided last; asked for by the user if nothing was decided."""
        decision, self._decision = self._decision, None
        return Reason.REQUEST if decision is None or decision.reason is None else decision.reason

    def enter(self, phase: int, reason: Reason) -> None:
        """Enter a later phase."""
        self.session.enter(phase, Moment(self.trainer.current_epoch, self.trainer.global_step), reason)

    def restore_best(self) -> None:
        """Load the best checkpoint so far, if there is one."""
        self.gradients.judge()  # before what it judges is changed
        checkpoint = self.wiring.checkpoint
        if checkpoint is not None:
            checkpoint.best_model_path = self.adapter.from_rank_zero(checkpoint.best_model_path)
        if checkpoint is None or not checkpoint.best_model_path:
            message = "No checkpoint has been saved yet: the next phase starts from present weights."
            self.report(logging.INFO, message)
            return

        def load(path: str, weights_only: bool) -> None:
            self.adapter.restore(path, self.session, self.owner.state_key, weights_only=weights_only)

        with as_misconfiguration():
            restore_best(checkpoint, load)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress that a resumed run continues from."""
        if self._session is None:
            return {}
        state = self._session.state_dict()
        if (checkpoint := self.wiring.checkpoint) is not None:
            state["best_phase"] = checkpoint.best_ckpt_depth
        metrics = self.trainer.callback_metrics
        early_stopping = self.wiring.early_stopping
        return {
            **state,
            "phase_exhausted": early_stopping is not None and early_stopping.phase_exhausted,
            "metrics": {name: _plain_metric(value) for name, value in metrics.items()},
        }

    def before_thaw(self, thawed: Mapping[str, nn.Parameter]) -> None:
        """Hold what a best checkpoint of an earlier phase may leave out."""
        checkpoint = self.wiring.checkpoint
        late = self.trainer.strategy.restore_checkpoint_after_setup
        if self._carried_on and self.owner.restore_best and not late and checkpoint and checkpoint.best_model_path:
            self.session.hold(thawed)

    def after_thaw(self) -> None:
        """Let strategy and trainer follow; replicas are compared after the next step."""
        self.adapter.on_phase_thawed()
        self._unchecked_replicas = True
        trainer, session = self.trainer, self.session
        if trainer.optimizers[0] is not session.optimizer:
            install_optimizer(trainer, session.optimizer)
        if session.scheduler_settings is not None:
            (scheduler,) = session.lr_schedulers
            if [config.scheduler for config in trainer.lr_scheduler_configs] != [scheduler]:
                install_lr_scheduler(trainer, scheduler, asdict(session.scheduler_settings))

    def on_transition(self, transition: Transition) -> None:
        """Restart early stopping's count."""
        if (early_stopping := self.wiring.early_stopping) is not None:
            early_stopping.enter_phase()

    def _out_of_patience(self) -> bool:
        """Whether any rank has run out of patience; asked when that may have changed, since ranks have to talk."""
        early_stopping = self.wiring.early_stopping
        if early_stopping is None or not (self._between_epochs or self.owner.intra_epoch_transitions):
            return False
        mine = early_stopping.phase_exhausted
        anyone = self.ranks.any(mine)
        if anyone and not self.ranks.every(mine) and not self._told_of_disagreement:
            self._told_of_disagreement = True
            message = (
                f"The ranks disagree on whether {early_stopping.monitor!r} has stopped improving; all of them go on to "
                "the next phase together. Log it with sync_dist=True."
            )
            self.report(logging.WARNING, message)
        return anyone

    def _tell_of_unheard_patience(self) -> None:
        """Say, once, that patience has run out inside an epoch that may have no end."""
        early_stopping, phase = self.wiring.early_stopping, self.session.phase
        if early_stopping is not None and early_stopping.phase_exhausted and phase in self._endless_phases:
            self._endless_phases = []
            message = f"Phase {phase} has run out of patience, but goes on until the epoch ends, which it may never do."
            self.report(logging.WARNING, f"{message} {_INSIDE_AN_EPOCH}")

    def _tell_of_lost_counters(self) -> None:
        """Say what Lightning loses of a resumed run by a search before it."""
        if self.resumed_from is not None and self.trainer.global_step == 0:
            message = (
                f"After a search for a learning rate or a batch size Lightning counts epochs and steps from 0 again, "
                f"not from those of {self.resumed_from}. Leave the search out when you resume."
            )
            self.report(logging.WARNING, message)

    def _limit_reached(self, epoch: int) -> Reason | None:
        return self.session.decide(Moment(epoch, self.trainer.global_step)).reason

    def _stop(self, reason: Reason | None) -> None:
        """End the session if there is a reason; the trainer may go on, up to its ``min_epochs``."""
        if reason is None:
            return
        self.trainer.should_stop = True
        if not self._told_of_end:
            self._told_of_end = True
            self.report(logging.INFO, f"Phase {self.session.phase}, the last, ended ({reason.value}).")


def session_state(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Take the session's own state out of the callback's."""
    return {key: value for key, value in loaded.items() if key not in ("metrics", "phase_exhausted")}


def _plain_metric(metric: torch.Tensor) -> dict[str, Any]:
    """Write a scalar as plain values; its precision decides how it compares with later ones."""
    return {"value": metric.item(), "dtype": str(metric.dtype).removeprefix("torch.")}


def read_metric(plain: Mapping[str, Any]) -> torch.Tensor:
    return torch.tensor(plain["value"], dtype=getattr(torch, plain["dtype"]))
