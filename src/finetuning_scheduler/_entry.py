"""The way into a session: the schedule is read, everything is checked, and the first phase entered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

from torch.optim.lr_scheduler import LRScheduler

from ._checks import (
    Configuration,
    configuration_problems,
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
    after_configure_model,
    around_setup,
    callbacks_of,
    is_search_checkpoint,
    leave,
    loading_with,
    remember,
    scheduler_step_of,
    without_logging,
)
from ._overrides import override_problems, unknown_hooks
from ._reading import Reading
from ._resuming import refuse_foreign, refuse_other_optimizer
from ._source import Implicit
from ._trainer import TrainerRanks, adapted, as_misconfiguration
from .callbacks.wiring import Wiring
from .core.compiling import RecompileLimits
from .core.gradients import GradientWatch
from .core.history.recorder import Recorder
from .core.optim.growth import Step, growth_failure
from .core.optim.schedulers import is_supported
from .core.prefix.accounts import PrefixAccount
from .core.prefix.inside import Inside
from .core.prefix.reuse import FrozenPrefix
from .core.prepare import Prepared, prepare
from .core.ranks import OneProcess
from .core.session import Session
from .core.state import SavedProgress
from .core.transitions import Listener, Moment
from .errors import in_file, joined
from .strategy_adapters import saved_progress

log = logging.getLogger("finetuning_scheduler")
NOT_BEGUN = "FinetuningScheduler runs inside Trainer.fit; no fit has started."


class Owner(Configuration, Implicit, Protocol):
    """The callback whose fit this is."""

    @property
    def state_key(self) -> str:
        """Key of its state in a checkpoint."""
        ...


class Entry:
    """Leads one fit into its session, while Lightning and the strategy set up the module.

    Args:
        owner: The callback.
        given: What the user has asked for as ``ft_schedule``, ``max_depth`` and ``log_dir``.
        trainer: The trainer.
        module: The module.
        wiring: The callbacks that drive the phases.
        continued: The state in which an earlier fit of the same trainer and module has ended.
        listener: Told of every change of what is trained.

    Attributes:
        adapter: Adapts the schedule's execution to the strategy.
        ranks: The processes that train together.
        loaded: The progress that the session goes on from, if there is any.
        resumed_from: The checkpoint that the run is resumed from, if it is.
        carried_on: Whether it is settled where the session goes on from.
        searched: Whether a search has tried rates or sizes since this was last asked.
        prefix: Reuses what frozen layers compute, if the user has asked for it and the session has begun.
    """

    def __init__(
        self,
        owner: Owner,
        given: dict[str, Any],
        trainer: Trainer,
        module: LightningModule,
        wiring: Wiring,
        continued: Mapping[str, Any] | None,
        listener: Listener,
    ) -> None:
        self.owner = owner
        self.given = given
        self.trainer = trainer
        self.module = module
        self.loaded = continued
        self.resumed_from: object = None
        self.carried_on = self.searched = False
        self._wiring = wiring
        self._listener = listener
        self._session: Session | None = None
        self._gradients: GradientWatch | None = None
        self._recorder: Recorder | None = None
        self.compiling = RecompileLimits()
        self.prefix: FrozenPrefix | None = None
        self._hooked = ExitStack()  # what of Lightning's is hooked into at the moment
        self.adapter = adapted(owner, trainer, module, self._hooked)
        self.ranks = TrainerRanks(trainer, self.adapter)
        self._reading = Reading(owner, given, trainer, module, self.adapter, self.ranks)
        self._hooked.enter_context(
            after_configure_model(module, self._generate_and_leave)
            if owner.gen_ft_sched_only
            else around_setup(trainer, module, make_optimizers=self.make_optimizers, after=self.begin)
        )

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
            raise MisconfigurationException(NOT_BEGUN)
        return self._session

    @property
    def gradients(self) -> GradientWatch:
        """Tells, in a warning and as values, which parameters were thawed and are not trained.

        Raises:
            MisconfigurationException: The session has not begun.
        """
        if self._gradients is None:
            raise MisconfigurationException(NOT_BEGUN)
        return self._gradients

    @property
    def recorder(self) -> Recorder:
        """Keeps the history of the run.

        Raises:
            MisconfigurationException: The session has not begun.
        """
        if self._recorder is None:
            raise MisconfigurationException(NOT_BEGUN)
        return self._recorder

    def report(self, level: int, message: str) -> None:
        """Log a message on rank zero."""
        if self.trainer.is_global_zero:
            log.log(level, message)

    def resolved(self, name: str, given: Any) -> Any:
        """Tell what the fit has made of an argument."""
        return self._reading.resolved.get(name, given)

    def forget(self, name: str) -> None:
        """Let the user's new value of an argument answer; it counts in the next fit."""
        self._reading.resolved.pop(name, None)

    def release(self) -> None:
        """Let go of what is hooked into."""
        self._hooked.close()

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Keep a checkpoint's progress for the session that is about to begin.

        A search for a learning rate or a batch size goes back to where it began: it is no resume.
        """
        if is_search_checkpoint(self.trainer.ckpt_path):
            self.searched = True
        else:
            self.loaded = state

    def make_optimizers(self, configure: Callable[[], Any]) -> Any:
        """Read the schedule, and let the user's ``configure_optimizers`` meet the model in the state of phase 0.

        What is wrong with the schedule is told with everything else when the optimizers are there; at once if it keeps
        them from being made, since the user's method has not met what it expects.
        """
        self._reading.thaw_first_phase()
        self.resumed_from = self.trainer.ckpt_path
        try:
            return configure()
        except Exception as error:
            if not (errors := self._reading.found.errors):
                raise
            with as_misconfiguration():
                raise joined(errors) from error

    def begin(self) -> None:
        """Check everything, then enter the first phase: that of a checkpoint or of an earlier fit, else phase 0."""
        self.release()
        try:
            with as_misconfiguration():
                if not self._reading.found.errors:
                    self.adapter.on_before_fts_fit_start()
                prepared = self._prepared()
                self._enter_first_phase()
        except BaseException:
            self.give_back()
            raise
        remember(self.trainer, self._listener)  # one that is refused is nothing to go on from
        self.report(logging.INFO, f"The schedule in force is saved as {self._reading.save()}.")
        warnings = [*limit_warnings(self.trainer, prepared.plan), *untested_warnings(self.owner, self.trainer)]
        for message in [*warnings, *unknown_hooks(self.owner, self.adapter)]:
            self.report(logging.WARNING, message)

    def _prepared(self) -> Prepared:
        """Find everything that is wrong; make the session."""
        trainer, owner, view = self.trainer, self.owner, self._reading.view
        settings = settings_of(owner, self.given["max_depth"], self.module)
        lr_schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        implicit_mode = self.given["ft_schedule"] is None
        step = scheduler_step_of(self.module)
        prepared = prepare(
            self._reading.found,
            view,
            usable_optimizer(trainer),
            settings,
            lr_schedulers=[each for each in lr_schedulers if self._is_tried(each, step)],
            step=step,
            problems=[
                *configuration_problems(owner, trainer, self._wiring, implicit=implicit_mode),
                *override_problems(owner, self.adapter),
                *self._reading.problems,
            ],
            limits=lambda schedule: [*limit_problems(owner, schedule), *self.adapter.problems(view, schedule)],
        )
        self._session = Session(
            view,
            trainer.optimizers[0],
            prepared,
            settings,
            lr_schedulers=lr_schedulers,
            listeners=[self._listener],
            report=self.report,
        )
        ranks = self.ranks if trainer.world_size > 1 else OneProcess()
        self._gradients = GradientWatch(self._session, ranks=ranks, report=self.report)
        self._recorder = Recorder(self._session, self._gradients, accounts=self._accounts, report=self.report)
        self._session.listeners = [self._recorder, self.compiling, *self._session.listeners, self._gradients]
        if settings.frozen_prefix != "off":
            quiet = partial(_leaving_no_trace, trainer, self.module)
            several = self.ranks if trainer.world_size > 1 else None
            self.prefix = FrozenPrefix(self._session, settings, ranks=several, report=self.report, quiet=quiet)
            self._session.listeners.append(self.prefix)
        for line in self._wiring.lines:
            self.report(logging.INFO, line)
        self._session.announce(prepared)
        self._reading.resolved["max_depth"] = prepared.plan.last_phase
        return prepared

    def _accounts(self) -> Sequence[PrefixAccount]:
        return () if self.prefix is None else self.prefix.accounts

    def _is_tried(self, scheduler: LRScheduler, step: Step | None) -> bool:
        """Whether a scheduler is tried out: not one that is refused anyway.

        With ``allow_untested``, one passes, too, whose steps the module makes with what only training brings about.
        """
        if not self.owner.allow_untested:
            return is_supported(scheduler)
        return step is None or growth_failure(scheduler, step, new_groups=0) is None

    def give_back(self) -> None:
        """Give the parameters that no phase has thawed the ``requires_grad`` with which they came, once."""
        self._reading.give_back(set() if self._session is None else set(self._session.trained_names))

    def _generate_and_leave(self) -> None:
        """Write the default schedule of the module that has just got its layers, then leave the program."""
        self.release()
        with as_misconfiguration():
            path = self._reading.generate()
        self.report(logging.INFO, f"The default schedule was written to {path}.")
        self.trainer.strategy.barrier("finetuning_scheduler.gen_ft_sched_only")
        leave(self.trainer)

    def _enter_first_phase(self) -> None:
        moment = Moment(self.trainer.current_epoch, self.trainer.global_step)
        if self.trainer.strategy.restore_checkpoint_after_setup:
            # The checkpoint is not known yet: the strategy loads it later.
            self.session.begin(moment)
            self._hooked.enter_context(loading_with(self.trainer.strategy, self._resume_late))
            return
        refuse_foreign(self.resumed_from, self.loaded)
        if self.loaded is None:
            self.session.begin(moment)
        else:
            with in_file(self.resumed_from):
                self.session.resume(_session_state(self.loaded))
                if self.resumed_from is not None:
                    refuse_other_optimizer(self.trainer, self.session)
        self.carried_on = True

    def _resume_late(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        """Enter the phase of a checkpoint that the strategy is about to load, so that its state finds its groups."""
        with as_misconfiguration():
            path = self.adapter.from_rank_zero(path)
            self.resumed_from = path
            self.loaded = saved_progress(path, self.owner.state_key, weights_only=weights_only)
            refuse_foreign(path, self.loaded)
            with in_file(path):
                self.session.resume(_session_state(self.loaded or {}))
            self.carried_on = True
            return self.adapter.resume(path, self.session, weights_only=weights_only)

    def settle(self) -> None:
        """Resume at last, if nothing has been loaded by the time that training starts."""
        if self.carried_on:
            return
        with as_misconfiguration():
            refuse_foreign(self.resumed_from, self.loaded)
            if self.loaded is not None:
                with in_file(self.resumed_from):
                    self.session.resume(_session_state(self.loaded))


def _session_state(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Take the session's own state out of the callback's, to which a fit adds, and a user's subclass may."""
    return {key: loaded[key] for key in SavedProgress.model_fields if key in loaded}


@contextmanager
def _leaving_no_trace(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let what a step logs go nowhere, and bring back what it changes of what it reaches through the trainer."""
    reached = Inside([*callbacks_of(trainer), getattr(trainer, "datamodule", None)])
    try:
        with without_logging(module):
            yield
    finally:
        reached.restore()
