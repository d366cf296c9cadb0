"""The callback: PyTorch Lightning's hooks, each a few lines that call the fit in progress."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Any

import torch

from ._checks import level_of
from ._entry import NOT_BEGUN
from ._fit import Fit
from ._lightning import (
    AttachableCallback,
    LightningDataModule,
    LightningModule,
    MisconfigurationException,
    Trainer,
    TrainerFn,
    around_loads,
    around_weights,
    has_left,
    is_search_checkpoint,
    loads_in_its_own_way,
    needs_no_optimizers,
    refuse_other_package,
    remembered,
)
from ._plan import plan_of
from ._restoring import filled
from ._resuming import refuse_damaged
from ._trainer import adapted, as_misconfiguration
from .callbacks.files import complete_checkpoints
from .callbacks.saved_states import RESTORE
from .callbacks.wiring import Wiring, wire
from .core.gradients import Judgement
from .core.history.document import RunHistory
from .core.prefix.accounts import PrefixAccount
from .core.schedule.files import ScheduleImplMixin
from .core.schedule.schedule import ScheduleSource
from .core.settings import FrozenPrefixMode
from .core.thaw import FrozenModulesMode
from .core.translation import translate
from .core.weights import loading_linearly
from .errors import in_file
from .report.plan import ReadablePlan
from .strategy_adapters import StrategyAdapter

log = logging.getLogger("finetuning_scheduler")


class _Argument:
    """An argument that answers as the user gave it, or as the fit has resolved it."""

    def __set_name__(self, owner: type[FinetuningScheduler], name: str) -> None:
        self._name = name

    def __get__(self, instance: FinetuningScheduler | None, owner: type[FinetuningScheduler]) -> Any:
        if instance is None:
            return self
        given = instance._given[self._name]
        return given if instance._fit is None else instance._fit.entry.resolved(self._name, given)

    def __set__(self, instance: FinetuningScheduler, value: Any) -> None:
        instance._given[self._name] = value
        if instance._fit is not None:
            instance._fit.entry.forget(self._name)


class FinetuningScheduler(ScheduleImplMixin, AttachableCallback):
    """Fine-tune a pre-trained model in phases that thaw it step by step.

    The arguments that are not listed are those that a loop without Lightning takes too: see :class:`.Settings`. While a
    fit is running, and after it until the next one begins, ``ft_schedule``, ``max_depth`` and ``log_dir`` tell what the
    fit has made of them. Its hooks are called before those of the other callbacks during a fit, wherever it is listed.

    Args:
        ft_schedule: Path of a YAML schedule, a mapping, or a :class:`.Schedule`; ``None`` generates a schedule of two
            parameter tensors a phase, from the model's last to its first.
        gen_ft_sched_only: Write the default schedule to ``log_dir``, then exit with ``SystemExit(0)``; no optimizer is
            made, and no data loader asked for.
        epoch_transitions_only: Ignore running out of patience; every phase needs an epoch or step limit.
        reinit_optim_cfg: Optimizer to install at every transition of a generated schedule.
        reinit_lr_cfg: LR scheduler to install at every transition of a generated schedule.
        strategy_adapter_cfg: Keyword arguments for the strategy adapter.
        custom_strategy_adapters: Adapters by strategy flag: an entry-point name, ``"pkg.mod:Class"``,
            ``"pkg.mod.Class"`` or the class itself. One has to be for the strategy in use.
        allow_untested: Permit strategies and LR schedulers outside the supported lists, with a warning.
        logging_level: Level of this package's logger, ``finetuning_scheduler``.
        intra_epoch_transitions: With several validations an epoch, let running out of patience end a phase inside the
            epoch.
        log_dir: Directory for artifacts; the trainer's ``log_dir`` or ``default_root_dir`` if not given.

    Raises:
        MisconfigurationException: Before the first batch, with everything that is wrong.
    """

    ft_schedule = _Argument()
    max_depth = _Argument()
    log_dir = _Argument()

    def __init__(
        self,
        ft_schedule: ScheduleSource | None = None,
        max_depth: int = -1,
        base_max_lr: float | None = 1e-5,
        restore_best: bool = True,
        gen_ft_sched_only: bool = False,
        epoch_transitions_only: bool = False,
        reinit_optim_cfg: dict[str, Any] | None = None,
        reinit_lr_cfg: dict[str, Any] | None = None,
        strategy_adapter_cfg: dict[str, Any] | None = None,
        custom_strategy_adapters: dict[str, str | type[StrategyAdapter]] | None = None,
        allow_untested: bool = False,
        apply_lambdas_new_pgs: bool = False,
        logging_level: int = logging.INFO,
        enforce_phase0_params: bool = True,
        frozen_bn_track_running_stats: bool = True,
        log_dir: str | PathLike[str] | None = None,
        frozen_modules_mode: FrozenModulesMode = "train",
        intra_epoch_transitions: bool = False,
        frozen_prefix: FrozenPrefixMode = "off",
        prefix_budget: int | None = None,
        prefix_dir: str | PathLike[str] | None = None,
        prefix_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._given: dict[str, Any] = {}
        self._fit: Fit | None = None
        self.ft_schedule = ft_schedule
        self.max_depth = max_depth
        self.base_max_lr = base_max_lr
        self.restore_best = restore_best
        self.gen_ft_sched_only = gen_ft_sched_only
        self.epoch_transitions_only = epoch_transitions_only
        self.reinit_optim_cfg = reinit_optim_cfg
        self.reinit_lr_cfg = reinit_lr_cfg
        self.strategy_adapter_cfg = strategy_adapter_cfg
        self.custom_strategy_adapters = custom_strategy_adapters
        self.allow_untested = allow_untested
        self.apply_lambdas_new_pgs = apply_lambdas_new_pgs
        self.logging_level = logging_level
        self.enforce_phase0_params = enforce_phase0_params
        self.frozen_bn_track_running_stats = frozen_bn_track_running_stats
        self.frozen_modules_mode: FrozenModulesMode = frozen_modules_mode
        self.intra_epoch_transitions = intra_epoch_transitions
        self.frozen_prefix: FrozenPrefixMode = frozen_prefix
        self.prefix_budget = prefix_budget
        self.prefix_dir = prefix_dir
        self.prefix_dtype = prefix_dtype
        self.log_dir = log_dir
        self._wiring = Wiring()
        self._adapted = ExitStack()  # what is lent before a fit, or for a validation, test or prediction
        self._files = ExitStack()  # how the strategy writes checkpoints

    @property
    def curr_depth(self) -> int:
        """The phase being executed."""
        return 0 if self._fit is None or not self._fit.entry.begun else self._fit.session.phase

    @property
    def depth_remaining(self) -> int:
        """How many phases are still to come; 0 in the last one."""
        return 0 if self._fit is None or not self._fit.entry.begun else self._fit.session.phases_remaining

    @property
    def strategy_adapter(self) -> StrategyAdapter:
        """What adapts the schedule's execution to the trainer's strategy."""
        return StrategyAdapter() if self._fit is None else self._fit.adapter

    @property
    def trainer(self) -> Trainer | None:
        """The trainer that fits, or has fitted last."""
        return None if self._fit is None else self._fit.trainer

    @property
    def pl_module(self) -> LightningModule | None:
        """The module that is fitted, or has been last."""
        return None if self._fit is None else self._fit.entry.module

    @property
    def history(self) -> RunHistory:
        """What the run has gone through up to now, as ``fts_history.json`` in ``log_dir`` tells it."""
        fit = self._fit
        return RunHistory() if fit is None or not fit.history.begun else fit.history.recorder.history

    @property
    def judgements(self) -> Sequence[Judgement]:
        """Of each phase so far, which parameters a gradient has reached; see :class:`.Judgement`."""
        return self._fit.entry.gradients.judgements if self._fit is not None and self._fit.entry.begun else ()

    def plan(
        self, trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None = None
    ) -> ReadablePlan:
        """Tell what a fit would do, without fitting: print it, or show it in a notebook.

        The model makes its optimizer, and the data its first batch, for which floating point operations are counted;
        nothing of the model changes.

        Args:
            trainer: The trainer of the fit.
            model: The model.
            datamodule: The data; the model's own if not given. Without any, costs are estimates.

        Raises:
            MisconfigurationException: With everything that is wrong, as before a fit.
        """
        return plan_of(self, self._given, trainer, model, datamodule)

    @property
    def prefix_accounts(self) -> Sequence[PrefixAccount]:
        """What frozen-prefix reuse has done, phase by phase; see :class:`.PrefixAccount`."""
        prefix = self._fit.entry.prefix if self._fit is not None and self._fit.entry.begun else None
        return () if prefix is None else prefix.accounts

    def should_transition(self, trainer: Trainer) -> bool:
        """Tell whether the next phase is due. Called at the start of each epoch and, if need be, of each batch.

        Override it for a criterion of your own; all ranks of a distributed run must agree on the answer. In the last
        phase the answer does not count.
        """
        return self._fitting().decide().advance

    def step(self) -> None:
        """Go on to the next phase: restore the best checkpoint so far, then thaw and extend the optimizer."""
        fit = self._fitting()
        if fit.session.phases_remaining == 0:
            raise MisconfigurationException(f"Phase {self.curr_depth} is the last one: there is no phase to go on to.")
        with fit.transition(fit.reason.value):
            if self.restore_best:
                self.restore_best_ckpt()
            self.thaw_to_depth(fit.session.phase + 1)

    def thaw_to_depth(self, depth: int | None = None) -> None:
        """Enter a later phase at once, without restoring a checkpoint; :meth:`step` enters the next one with it.

        Args:
            depth: The phase; ``None`` for the present one, of which what was frozen by hand is thawed again.

        Raises:
            MisconfigurationException: ``depth`` lies behind the present phase or beyond ``max_depth``.
        """
        fit = self._fitting()
        if depth is None or depth == fit.session.phase:
            fit.session.thaw()
            return
        with as_misconfiguration():
            fit.enter(depth, fit.take_reason())

    def restore_best_ckpt(self) -> None:
        """Load the weights, optimizer state and precision state of the best checkpoint so far.

        Learning rates, loops and other callbacks go on as they are, but for callbacks that keep or rewrite weights,
        such as averages: these return to the same moment. With no checkpoint yet, the present weights stay.

        Raises:
            MisconfigurationException: The file is gone or cannot be read.
        """
        fit = self._fitting()
        with fit.transition(RESTORE):
            fit.restore_best()

    def on_attach(self, trainer: Trainer) -> None:
        """Put the multi-phase callbacks in place while the user's own are still as the user made them."""
        refuse_other_package(trainer)
        self._wiring.undo(trainer)
        self._files.close()
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self.gen_ft_sched_only:
            self._adapted.enter_context(needs_no_optimizers(trainer.lightning_module))
            return
        self._wiring = wire(trainer, early_stopping=not self.epoch_transitions_only, checkpoint=self.restore_best)
        continues = self._earlier_fit(trainer, trainer.lightning_module) is not None
        ends_phases = not self.epoch_transitions_only
        restores = self.restore_best
        self._wiring.begin(self, trainer, ends_phases=ends_phases, restores_best=restores, forget=not continues)
        self._wiring.put_first(self, trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a fit from the beginning, unless the same trainer goes on with the same module.

        When the strategy sets up the module, the schedule is read before ``configure_optimizers`` is called, and the
        first phase entered after it: the optimizers exist by then, and the optimizer state of a checkpoint has not been
        loaded yet, so that it finds the parameter groups it belongs to.
        """
        if stage != "fit":
            # What an adapter shards has to be sharded to be validated or tested, too.
            if trainer.strategy.restore_checkpoint_after_setup:
                adapter = adapted(self, trainer, pl_module, self._adapted)
                with as_misconfiguration():
                    adapter.connect(self)
            whole = around_loads(trainer.strategy, lambda: None, partial(filled, pl_module))
            self._adapted.enter_context(whole)
            return
        self._adapted.close()
        earlier = self._earlier_fit(trainer, pl_module)
        continued = None if earlier is None else earlier.state_dict() or None
        if (level := level_of(self.logging_level)) is not None:  # else it is among the problems
            log.setLevel(level)
        self._files.enter_context(complete_checkpoints(trainer.strategy))
        self._fit = fit = Fit(self, dict(self._given), trainer, pl_module, self._wiring, continued)
        if earlier is not None:
            fit.frozen.go_on_from(earlier.frozen)
        self._files.enter_context(around_loads(trainer.strategy, fit.frozen.begin, fit.frozen.fill_in))
        if not (trainer.strategy.restore_checkpoint_after_setup or loads_in_its_own_way(trainer.strategy)):
            self._files.enter_context(around_weights(trainer.strategy, partial(loading_linearly, pl_module)))
        with as_misconfiguration():
            fit.adapter.connect(self)
            fit.adapter.on_before_init_fts()
        fit.entry.given.update(self._given)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set module modes; give a resumed run its metrics back; end it at once if it had ended before."""
        fit = self._running()
        fit.start_training()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on to the next phase if it is due."""
        fit = self._running()
        fit.start_epoch()
        self._follow(trainer)
        fit.apply_modes()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Go on to the next phase if it is due inside the epoch."""
        if self._running().start_batch(batch_idx):
            self._follow(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Check that ranks agree after a phase's first step; end the session at the last phase's step limit."""
        self._running().end_batch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that a validation begins."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._running().history.begin_validation()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the present weights have been validated."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._running().note_validation()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that a validation has ended, and that Lightning is about to set the modes of all modules."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._running().history.end_validation()
        if trainer.state.fn == TrainerFn.FITTING and self.frozen_modules_mode == "eval":
            self._running().expect_other_modes()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the session at the last phase's epoch limit."""
        self._running().end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what has been thawed and was not trained, if that has not been told yet."""
        self._running().end_training()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave modules, logger and Lightning as after a fit that ends by itself."""
        if has_left(exception):
            raise SystemExit(0)
        self._adapted.close()
        if self._fit is not None:
            self._fit.history.note_reason(type(exception).__name__)
            self._fit.end(failed=True)
        self._wiring.put_back(trainer)  # the other objects stay: they may yet save what is there

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no module in eval mode that was in train mode before, and nothing hooked into."""
        self._adapted.close()
        if self._fit is not None and stage == "fit":
            self._fit.end()
            self._wiring.undo(trainer)
            self._files.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the progress that a resumed run continues from."""
        return {} if self._fit is None else self._fit.state_dict()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint that is written in the middle of a transition hold what was before it."""
        if self._fit is not None and self._fit.trainer is trainer:
            self._fit.complete(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget what an earlier fit of the same trainer left: a checkpoint's progress takes its place."""
        if self._fit is not None and trainer.state.fn == TrainerFn.FITTING:
            self._fit.entry.load(None)
            if is_search_checkpoint(trainer.ckpt_path):
                self._fit.take_back(checkpoint)
            with as_misconfiguration(), in_file(trainer.ckpt_path):
                refuse_damaged(trainer.ckpt_path, self._fit.entry.ranks)
                translate(checkpoint, self.state_key, trainer.ckpt_path)
                self._wiring.complete(checkpoint, checkpoint.get("callbacks", {}).get(self.state_key))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's progress for the fit that is about to start."""
        if self._fit is not None and self._fit.trainer.state.fn == TrainerFn.FITTING:
            self._fit.entry.load(state_dict)

    def _follow(self, trainer: Trainer) -> None:
        """Go on to the next phase if it is due, or if a transition to it was interrupted."""
        fit = self._running()
        if fit.is_owed() or (self.should_transition(trainer) and fit.session.phases_remaining):
            with fit.transition(fit.reason.value):  # of all that an override of `step` does
                self.step()

    def _earlier_fit(self, trainer: Trainer, module: LightningModule | None) -> Fit | None:
        """Return the fit that this one continues, which another callback object may have carried out."""
        earlier: Fit | None = remembered(trainer)
        if earlier is None or earlier.entry.module is not module:
            return None
        return earlier if earlier.entry.given["ft_schedule"] == self._given["ft_schedule"] else None

    def _running(self) -> Fit:
        if self._fit is None:
            raise MisconfigurationException(NOT_BEGUN)
        return self._fit

    def _fitting(self) -> Fit:
        fit = self._running()
        _ = fit.session  # raises if it has not begun
        return fit
