"""What lives for one fit: made in ``setup``, let go of in ``teardown``; it answers until the next one begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from ._checks import endless_phases
from ._entry import Entry, Owner
from ._lightning import (
    LightningModule,
    Trainer,
    answered,
    at_end_of_epoch,
    begins_epoch_again,
    goes_on_in_epoch,
    install_lr_scheduler,
    install_optimizer,
    installer,
    optimizer_states,
    step_plateau_schedulers,
)
from ._restoring import BestState, FrozenWeights
from ._trainer import visible_messages
from .callbacks.saved_states import RESTORE, SavedScheduling
from .callbacks.wiring import Wiring
from .core.session import Session
from .core.signals import signals_wait
from .core.transitions import Decision, Listener, Moment, Reason
from .strategy_adapters import StrategyAdapter

log = logging.getLogger("finetuning_scheduler")

_INSIDE_AN_EPOCH = (
    "To end phases inside an epoch, set `intra_epoch_transitions=True` and validate there, or give them a "
    "`max_transition_step`."
)


class Fit(Listener):
    """One fit of one module: the session, and what the hooks have to remember while it trains.

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
        self.trainer = trainer
        self.wiring = wiring
        self.entry = Entry(owner, given, trainer, module, wiring, continued, listener=self)
        self.best = BestState(owner, trainer, self.entry, wiring.checkpoint)
        self.frozen = FrozenWeights(trainer, self.entry)
        self._messages = ExitStack()
        self._messages.enter_context(visible_messages())
        self._reuse = ExitStack()  # of what frozen layers compute
        self._reuses = False
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
        # Why the transition was due in the middle of which a checkpoint was written, or an exception raised. Weights
        # may be half restored then, so that it is made again whatever would be decided now.
        self._owed: str | None = None
        self._validated_step = -1  # the optimizer step after which the last validation was made
        # Before the transition that is being made: early stopping's state, and what installs optimizer and schedulers.
        self._scores_before: dict[str, Any] = {}
        self._install_before: Callable[[], None] = installer(trainer)

    @property
    def session(self) -> Session:
        """The session; raises ``MisconfigurationException`` before it has begun."""
        return self.entry.session

    @property
    def adapter(self) -> StrategyAdapter:
        """Adapts the schedule's execution to the strategy."""
        return self.entry.adapter

    def report(self, level: int, message: str) -> None:
        """Log a message on rank zero."""
        self.entry.report(level, message)

    def end(self, *, failed: bool = False) -> None:
        """Leave the model as it came, but for what has been thawed, and no handler of messages.

        Args:
            failed: Whether an exception has ended the fit. A strategy that shards may then yet save what is there.
        """
        entry = self.entry
        entry.release()
        self.frozen.end()
        self._reuse.close()
        self._messages.close()
        if entry.begun:
            entry.session.modes.release()
            entry.gradients.close()
        if not (failed and self.trainer.strategy.restore_checkpoint_after_setup):
            entry.give_back()

    def start_training(self) -> None:
        """Set module modes; give a resumed run its metrics back; end it at once if it had ended before."""
        self.entry.release()
        self.entry.settle()
        self.session.modes.apply()
        self.best.begin()
        self._start_reuse()
        trainer = self.trainer
        if self.entry.loaded is not None:
            metrics = self.entry.loaded.get("metrics", {})
            saved = SavedScheduling(metrics=metrics).metrics
            tensors = {name: each if isinstance(each, torch.Tensor) else each.tensor for name, each in saved.items()}
            trainer.callback_metrics.update(tensors)
            self._owed = self.entry.loaded.get("owed")
            self._catch_up(self.entry.loaded)
        is_over = self.entry.loaded is not None and self.entry.loaded.get("epoch_is_over", False)
        self._owes_plateau_step = trainer.fit_loop.resumed_on_epoch_end and not is_over
        self._endless_phases = endless_phases(self.owner, trainer, self.wiring, self.session.plan)
        if coming := [phase for phase in self._endless_phases if phase >= self.session.phase]:
            message = f"The training data has no length: unless an epoch of it ends, phases {coming} never do."
            self.report(logging.WARNING, f"{message} {_INSIDE_AN_EPOCH}")
        self._steps_seen = trainer.global_step
        early_stopping = self.wiring.early_stopping
        if early_stopping is not None and self.session.phases_remaining:
            early_stopping.end_phase_instead()
        over = self.session.phases_remaining == 0 and self._limit_reached(trainer.current_epoch) is not None
        stopped = early_stopping is not None and early_stopping.has_stopped_session
        if over or (stopped and self.entry.resumed_from is not None):
            message = "The session had ended when its checkpoint was written: nothing is left to train."
            self.report(logging.INFO, message)
            trainer.should_stop = True

    def _start_reuse(self) -> None:
        """Let the steps of the module be made with what is known of their batches."""
        if (prefix := self.entry.prefix) is None or self._reuses:
            return
        self._reuses = True  # a search for a learning rate or a batch size starts training too
        module, trainer = self.entry.module, self.trainer

        def validation_step(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            run = step if trainer.sanity_checking else partial(prefix.validate, step)
            return run(*args, **kwargs)

        def on_after_backward(hook: Callable[[], None]) -> None:
            hook()
            prefix.after_backward()

        if not module.automatic_optimization:
            prefix.leave_out("train", "the module optimizes manually")
        steps: dict[str, Callable[..., Any]] = {"validation_step": validation_step}
        if prefix.reuses("train"):
            steps |= {"training_step": prefix.train, "on_after_backward": on_after_backward}
        self._reuse.callback(prefix.close)
        self._reuse.enter_context(answered(module, steps))

    def _catch_up(self, loaded: Mapping[str, Any]) -> None:
        """Let early stopping and the best checkpoint meet a validation that a run was interrupted right after.

        A checkpoint that is written between a validation and the end of an epoch's last hook makes Lightning go on
        after these hooks. The next transition has to be the one that the uninterrupted run would have made.
        """
        trainer, stopping, saving = self.trainer, self.wiring.early_stopping, self.wiring.checkpoint
        self._validated_step = loaded.get("validated_step", -1)
        step, ended = trainer.global_step, trainer.fit_loop.resumed_on_epoch_end
        if stopping is not None:
            stopping.judged_step = loaded.get("judged_step", -1)
        if self.entry.resumed_from is None or self._validated_step != step:
            return
        with at_end_of_epoch(trainer) if ended else nullcontext():
            may_judge = stopping is not None and (ended or loaded.get("judges_validation", False))
            if stopping is not None and may_judge and stopping.judged_step != step:
                stopping.catch_up(trainer)
            if saving is not None and self.wiring.owes_save:
                saving.on_validation_end(trainer, self.entry.module)
                if ended:
                    saving.on_train_epoch_end(trainer, self.entry.module)

    def note_validation(self) -> None:
        """Note that the present weights have been validated."""
        if self.entry.prefix is not None:
            self.entry.prefix.epoch_end("validation")
        self._validated_step = self.trainer.global_step

    def start_epoch(self) -> None:
        """Note that what is asked next is asked between epochs."""
        if self._owes_plateau_step:
            with signals_wait():
                unknown = step_plateau_schedulers(self.trainer)
                self._owes_plateau_step = False
            for monitor in unknown:
                message = f"{monitor!r} of the epoch before the resume is not known: ReduceLROnPlateau misses a step."
                self.report(logging.WARNING, message)
        self._between_epochs = self._epoch_begun = True

    def start_batch(self, batch_idx: int) -> bool:
        """Tell whether a phase may end here: at the first batch of a gradient accumulation, inside an epoch."""
        if batch_idx == 0 and not self._epoch_begun:
            # Resumed after an epoch's last batch, Lightning begins the next one without calling any hook.
            self.start_epoch()
            return True
        if self._modes_are_stale:
            self.apply_modes()
        if self._owed is not None:
            return True
        if self.entry.searched:
            self.entry.searched = False
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
            self.entry.gradients.step()
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
        if self.entry.prefix is not None:
            self.entry.prefix.epoch_end("train")
        self.entry.gradients.epoch_end(whole=not self.trainer.fit_loop.restarting)
        if self.session.phases_remaining == 0:
            self._stop(self._limit_reached(self.trainer.current_epoch + 1))

    def end_training(self) -> None:
        """Judge a phase that the training has ended in before its first epoch did."""
        self.entry.gradients.judge()

    def apply_modes(self) -> None:
        """Put frozen modules into their mode."""
        self.session.modes.apply()
        self._modes_are_stale = False

    def expect_other_modes(self) -> None:
        """Note that Lightning is about to set the modes of all modules."""
        self._modes_are_stale = True

    def decide(self) -> Decision:
        """Decide whether the next phase is due: the ranks talk about it once; :meth:`take_reason` uses the answer."""
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
        reason, self._decision = self.reason, None
        return reason

    def is_owed(self) -> bool:
        """Whether a transition has to be made again; a restore that has to be is made now."""
        owed, remaining = self._owed, self.session.phases_remaining
        if owed == RESTORE or (owed is not None and remaining == 0):
            with self.transition(RESTORE):
                self.restore_best()
        elif owed is not None:
            self._decision = Decision(True, Reason(owed))
            return True
        return False

    @property
    def reason(self) -> Reason:
        """Why the next phase is due, as decided last; asked for by the user if nothing was decided."""
        return Reason.REQUEST if self._decision is None or self._decision.reason is None else self._decision.reason

    @contextmanager
    def transition(self, owed: str | None = None) -> Iterator[None]:
        """Make a transition of what this block does: all who save, and whenever, save it done or not begun.

        Args:
            owed: The reason of the transition, or :data:`RESTORE`, if the block changes weights, which is not taken
                back: a run that is resumed from the middle of the block does it again.
        """
        if self.session.before is not None:
            yield
            return
        state = self._own_state() | ({} if owed is None else {"owed": owed})
        stopping = self.wiring.early_stopping
        self._scores_before = {} if stopping is None else stopping.state_dict()
        self._install_before = installer(self.trainer)
        with self.session.transition(state) as before:
            before.undo.append(self._install_before)
            before.undo.append(lambda: setattr(self, "_owed", state.get("owed")))
            if stopping is not None:
                before.undo.append(stopping.keeper())
            self._owed = None
            yield

    def enter(self, phase: int, reason: Reason) -> None:
        """Enter a later phase; early stopping's count restarts with it."""
        with self.transition():
            if (early_stopping := self.wiring.early_stopping) is not None:
                early_stopping.enter_phase()
            self.session.enter(phase, Moment(self.trainer.current_epoch, self.trainer.global_step), reason)

    def restore_best(self) -> None:
        """Return to the best state so far, if there is one."""
        self.entry.gradients.judge()  # before what it judges is changed
        self.best.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return the progress that a resumed run continues from."""
        if not self.entry.begun:
            return {}
        state = self.session.state_dict()
        if (checkpoint := self.wiring.checkpoint) is not None:
            state["best_phase"] = checkpoint.best_ckpt_depth
        before, metrics = self.session.before, self.trainer.callback_metrics
        return {
            **state,
            **(self._own_state() if before is None else before.driver),
            "metrics": {name: _plain_metric(value) for name, value in metrics.items()},
        }

    def _own_state(self) -> dict[str, Any]:
        early_stopping = self.wiring.early_stopping
        owed = {} if self._owed is None else {"owed": self._owed}
        state: dict[str, Any] = {"phase_exhausted": False, "validated_step": self._validated_step, **owed}
        if early_stopping is None:
            return state
        return state | {
            "phase_exhausted": early_stopping.phase_exhausted,
            "judged_step": early_stopping.judged_step,
            "judges_validation": early_stopping.checks_after_validation,
        }

    def complete(self, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint that is being written in the middle of a transition hold what was before it.

        Weights may be half restored; a run that is resumed from it restores them again.
        """
        if not self.entry.begun:
            return
        states = checkpoint["callbacks"]
        if begins_epoch_again(checkpoint) and self.owner.state_key in states:
            states[self.owner.state_key]["epoch_is_over"] = not self._owes_plateau_step
        if (before := self.session.before) is None:
            return
        early_stopping, saving = self.wiring.early_stopping, self.wiring.checkpoint
        if early_stopping is not None and early_stopping.state_key in states:
            states[early_stopping.state_key] = self._scores_before
        if saving is not None and saving.state_key in states:
            states[saving.state_key]["current_ckpt_depth"] = before.fields["progress"].phase
        install_present = installer(self.trainer)
        with self.session.as_before():
            self._install_before()
            try:
                checkpoint.update(optimizer_states(self.trainer))
            finally:
                install_present()

    def take_back(self, checkpoint: dict[str, Any]) -> None:
        """Let a search for a learning rate or a batch size go back into the epoch in which it began."""
        if "epoch_is_over" in checkpoint.get("callbacks", {}).get(self.owner.state_key, {}):
            goes_on_in_epoch(checkpoint)

    def before_thaw(self, thawed: Mapping[str, nn.Parameter]) -> None:
        """Hold what a best checkpoint of an earlier phase may leave out."""
        self.frozen.begin()
        self.best.before_thaw(thawed)

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

    def _out_of_patience(self) -> bool:
        """Whether any rank has run out of patience; asked when that may have changed, since ranks have to talk."""
        early_stopping = self.wiring.early_stopping
        if early_stopping is None or not (self._between_epochs or self.owner.intra_epoch_transitions):
            return False
        mine = early_stopping.phase_exhausted
        anyone = self.entry.ranks.any(mine)
        if anyone and not self.entry.ranks.every(mine) and not self._told_of_disagreement:
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
        if self.entry.resumed_from is not None and self.trainer.global_step == 0:
            message = (
                f"After a search for a learning rate or a batch size Lightning counts epochs and steps from 0 again, "
                f"not from those of {self.entry.resumed_from}. Leave the search out when you resume."
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


def _plain_metric(metric: torch.Tensor) -> dict[str, Any]:
    """Write a scalar as plain values; its precision decides how it compares with later ones."""
    return {"value": metric.item(), "dtype": str(metric.dtype).removeprefix("torch.")}
