"""The callback: PyTorch Lightning's hooks, each a few lines that call the engine in ``finetuning_scheduler.core``.

The class is longer than others: documenting and keeping two dozen constructor arguments takes a hundred lines, and the
order of the hooks is the story.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any, Literal

from ._checks import (
    configuration_problems,
    limit_problems,
    limit_warnings,
    no_decay_fragments,
    untested_warnings,
)
from ._lightning import (
    AttachableCallback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    TrainerFn,
    after_configure_model,
    loading_with,
    step_plateau_schedulers,
)
from .callbacks.best import restore_best
from .callbacks.checkpoint import FTSCheckpoint
from .callbacks.early_stopping import FTSEarlyStopping
from .callbacks.optimization import install_optimization
from .callbacks.source import on_rank_zero, resolve_source, save_on_rank_zero
from .callbacks.wiring import find, install
from .core.runner import PhaseRunner
from .core.schedule.generate import generate
from .core.schedule.schedule import Schedule
from .core.transitions import Decision, Reason
from .core.view import ModelView
from .errors import CheckpointError, Problem, ScheduleError
from .strategy_adapters import StrategyAdapter, has_custom_adapter, make_adapter, saved_progress, untested_strategy

log = logging.getLogger("finetuning_scheduler")


class FinetuningScheduler(AttachableCallback):
    """Fine-tune a pre-trained model in phases that thaw it step by step.

    Args:
        ft_schedule: Path of a YAML schedule, a mapping, or a :class:`Schedule`; ``None`` generates a schedule of two
            parameter tensors a phase, from the model's last to its first.
        max_depth: Deepest phase to execute; -1, or more than the schedule has, executes all of it.
        base_max_lr: Learning rate of a phase after the first that names none; ``None`` takes the initial learning rate
            of phase 0's first parameter group.
        restore_best: Restore the best checkpoint before each transition.
        gen_ft_sched_only: Write the default schedule to ``log_dir``, then exit with ``SystemExit(0)``.
        epoch_transitions_only: Ignore running out of patience; every phase needs an epoch or step limit.
        reinit_optim_cfg: Optimizer to install at every transition of a generated schedule.
        reinit_lr_cfg: LR scheduler to install at every transition of a generated schedule.
        strategy_adapter_cfg: Keyword arguments for the strategy adapter.
        custom_strategy_adapters: Adapters by strategy flag: an entry-point name, ``"pkg.mod:Class"`` or
            ``"pkg.mod.Class"``.
        allow_untested: Permit strategies and LR schedulers outside the supported lists, with a warning.
        apply_lambdas_new_pgs: New parameter groups take a scheduler's last ``lr_lambda`` and start at their learning
            rate times its present value; else their ``lr_lambda`` is the constant 1.
        logging_level: Level of this package's logger, ``finetuning_scheduler``.
        enforce_phase0_params: Make the optimizer hold exactly phase 0's parameters.
        frozen_bn_track_running_stats: Frozen BatchNorm layers go on tracking their running statistics.
        frozen_modules_mode: ``"train"`` leaves module modes alone; ``"eval"`` keeps modules whose parameters are all
            frozen in eval mode during training.
        intra_epoch_transitions: With several validations an epoch, let running out of patience end a phase inside the
            epoch.
        log_dir: Directory for artifacts; the trainer's ``log_dir`` or ``default_root_dir`` if not given.

    Raises:
        MisconfigurationException: Before the first batch, with everything that is wrong.
    """

    def __init__(
        self,
        ft_schedule: Schedule | dict[Any, Any] | str | PathLike[str] | None = None,
        max_depth: int = -1,
        base_max_lr: float | None = 1e-5,
        restore_best: bool = True,
        gen_ft_sched_only: bool = False,
        epoch_transitions_only: bool = False,
        reinit_optim_cfg: dict[str, Any] | None = None,
        reinit_lr_cfg: dict[str, Any] | None = None,
        strategy_adapter_cfg: dict[str, Any] | None = None,
        custom_strategy_adapters: dict[str, str] | None = None,
        allow_untested: bool = False,
        apply_lambdas_new_pgs: bool = False,
        logging_level: int = logging.INFO,
        enforce_phase0_params: bool = True,
        frozen_bn_track_running_stats: bool = True,
        log_dir: str | PathLike[str] | None = None,
        frozen_modules_mode: Literal["train", "eval"] = "train",
        intra_epoch_transitions: bool = False,
    ) -> None:
        super().__init__()
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
        self.frozen_modules_mode: Literal["train", "eval"] = frozen_modules_mode
        self.intra_epoch_transitions = intra_epoch_transitions
        self.log_dir = log_dir
        self.strategy_adapter = StrategyAdapter()
        self.trainer: Trainer | None = None
        self.pl_module: LightningModule | None = None
        self._runner: PhaseRunner | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._epoch_boundary = True
        self._modes_are_stale = False
        self._owes_plateau_step = False
        self._told_of_disagreement = False
        self._unchecked_replicas = False
        self._carried_on = False
        self._problems: list[Problem] = []
        self._hooked = ExitStack()  # what of Lightning's is hooked into at the moment
        # What the user asked for, and what a fit has made of it.
        self._requests: dict[str, tuple[Any, Any]] = {
            "ft_schedule": (ft_schedule, ft_schedule),
            "max_depth": (max_depth, max_depth),
            "log_dir": (log_dir, log_dir),
        }

    # --- what users read and call ------------------------------------------------------------------------------------

    @property
    def curr_depth(self) -> int:
        """The phase being executed."""
        return 0 if self._runner is None else self._runner.phase

    @property
    def depth_remaining(self) -> int:
        """How many phases are still to come; 0 in the last one."""
        return 0 if self._runner is None else self._runner.phases_remaining

    def should_transition(self, trainer: Trainer) -> bool:
        """Tell whether the next phase is due. Called at the start of each epoch and, if need be, of each batch.

        Override it for a criterion of your own; all ranks of a distributed run must agree on the answer.
        """
        return self.depth_remaining > 0 and self._decide(trainer).advance

    def step(self) -> None:
        """Go on to the next phase: restore the best checkpoint so far, then thaw and extend the optimizer."""
        trainer, runner = self._fitting()
        if runner.phases_remaining == 0:
            raise MisconfigurationException(f"Phase {runner.phase} is the last one: there is no phase to go on to.")
        reason = self._decide(trainer).reason or Reason.REQUEST
        if self.restore_best:
            self.restore_best_ckpt()
        runner.advance(reason, epoch=trainer.current_epoch, step=trainer.global_step)
        install_optimization(trainer, runner)
        self._unchecked_replicas = True
        if (early_stopping := find(trainer, FTSEarlyStopping)) is not None:
            early_stopping.enter_phase()

    def thaw_to_depth(self, depth: int) -> None:
        """Enter every phase up to ``depth`` at once, without restoring a checkpoint.

        Raises:
            MisconfigurationException: ``depth`` lies behind the present phase or beyond ``max_depth``.
        """
        trainer, runner = self._fitting()
        with _as_misconfiguration():
            runner.thaw_to(depth)
        install_optimization(trainer, runner)
        runner.progress.entry_epoch, runner.progress.entry_step = trainer.current_epoch, trainer.global_step

    def restore_best_ckpt(self) -> None:
        """Load the weights, optimizer state and precision state of the best checkpoint so far.

        Learning rates, loops and other callbacks go on as they are. With no checkpoint yet, the present weights stay.

        Raises:
            MisconfigurationException: The file is gone or cannot be read.
        """
        trainer, runner = self._fitting()
        checkpoint = find(trainer, FTSCheckpoint)
        if checkpoint is not None:
            checkpoint.best_model_path = self.strategy_adapter.from_rank_zero(checkpoint.best_model_path)
        if checkpoint is None or not checkpoint.best_model_path:
            self._report(logging.INFO, "No checkpoint has been saved yet: the next phase starts from present weights.")
            return
        with _as_misconfiguration():
            restore_best(
                checkpoint,
                lambda path, weights_only: self.strategy_adapter.restore(
                    path, runner, self.state_key, weights_only=weights_only
                ),
            )

    # --- Lightning's hooks -------------------------------------------------------------------------------------------

    def on_attach(self, trainer: Trainer) -> None:
        """Put the multi-phase callbacks in place while the user's own are still as the user made them."""
        if trainer.state.fn != TrainerFn.FITTING or self.gen_ft_sched_only:
            return
        self._problems = install(
            trainer,
            early_stopping=not self.epoch_transitions_only,
            checkpoint=self.restore_best,
        )
        if (early_stopping := find(trainer, FTSEarlyStopping)) is not None:
            early_stopping.begin(self, ends_phases=not self.epoch_transitions_only)
        if (checkpoint := find(trainer, FTSCheckpoint)) is not None:
            checkpoint.begin(self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a fit from the beginning, unless the same trainer goes on with the same module."""
        if stage != "fit":
            # What an adapter shards has to be sharded to be validated or tested, too.
            if trainer.strategy.restore_checkpoint_after_setup:
                self._adapt(trainer, pl_module)
            return
        continues = self.trainer is trainer and self.pl_module is pl_module
        self._loaded = self._runner.state_dict() if continues and self._runner is not None else None
        if self.trainer is trainer and self.pl_module is not pl_module:
            for callback in (find(trainer, FTSCheckpoint), find(trainer, FTSEarlyStopping)):
                if callback is not None:
                    callback.forget()
        self._runner = None
        self.trainer, self.pl_module = trainer, pl_module
        # A user may have set these since the callback was made; what a fit has resolved is no request.
        for name, (_, resolved) in self._requests.items():
            if (value := getattr(self, name)) is not resolved:
                self._requests[name] = (value, value)
        log.setLevel(self.logging_level)
        if not log.hasHandlers():
            log.addHandler(_LastResort())
        self._adapt(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything, freeze, thaw, and in a resumed run thaw up to the checkpoint's phase.

        The optimizers exist by now and the optimizer state of a checkpoint has not been loaded yet, so that it finds
        the parameter groups it belongs to.
        """
        self._hooked.close()
        self._resolve("log_dir", self._requests["log_dir"][0] or trainer.log_dir or trainer.default_root_dir)
        if self.gen_ft_sched_only:
            self._generate_and_exit(trainer, pl_module)
        view = self.strategy_adapter.view(pl_module)
        with _as_misconfiguration():
            schedule = self._checked_schedule(trainer, view)
            self._runner = self._make_runner(trainer, view, schedule)
            self._resolve("ft_schedule", self._runner.schedule)
            self._resolve("max_depth", self._runner.plan.last_phase)
            self._runner.progress.entry_epoch = trainer.current_epoch
            self._runner.progress.entry_step = trainer.global_step
            # A strategy that loads checkpoints later may yet load one of an earlier phase.
            self._carried_on = not trainer.strategy.restore_checkpoint_after_setup
            if self._carried_on:
                self._carry_on(trainer, self._runner)
        source = self._schedule_source if isinstance(self._schedule_source, (str, PathLike)) else None
        share = self.strategy_adapter.from_rank_zero
        path = save_on_rank_zero(trainer, share, self._runner.schedule, view.plain, str(self.log_dir), source)
        self._report(logging.INFO, f"The schedule in force is saved as {path}.")
        self._announce(trainer, self._runner)
        self._unchecked_replicas = True
        if trainer.strategy.restore_checkpoint_after_setup:
            self._hooked.enter_context(loading_with(trainer.strategy, self._resume_late))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set module modes; give a resumed run its metrics back; end it at once if it had ended before."""
        self._hooked.close()
        _, runner = self._fitting()
        if not self._carried_on:
            with _as_misconfiguration():
                self._carry_on(trainer, runner)
        runner.apply_module_modes()
        if self._loaded is not None:
            trainer.callback_metrics.update(self._loaded.get("metrics", {}))
        self._owes_plateau_step = trainer.fit_loop.resumed_on_epoch_end
        early_stopping = find(trainer, FTSEarlyStopping)
        over = self.depth_remaining == 0 and self._limit_reached(trainer, trainer.current_epoch)
        stopped = early_stopping is not None and early_stopping.has_stopped_session and trainer.ckpt_path is not None
        if over or stopped:
            self._report(
                logging.INFO, "The session had ended when its checkpoint was written: nothing is left to train."
            )
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on to the next phase if it is due."""
        if self._owes_plateau_step:
            step_plateau_schedulers(trainer)
        self._owes_plateau_step = False
        self._epoch_boundary = True
        if self.should_transition(trainer):
            self.step()
        self._fitting()[1].apply_module_modes()
        self._modes_are_stale = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Go on to the next phase if it is due inside the epoch, at the first batch of a gradient accumulation."""
        runner = self._runner
        if runner is None:
            return
        if self._modes_are_stale:
            runner.apply_module_modes()
            self._modes_are_stale = False
        limited = runner.schedule.phases[runner.phase].max_transition_step >= 0
        if not (limited or self.intra_epoch_transitions) or batch_idx % trainer.accumulate_grad_batches:
            return
        self._epoch_boundary = False
        if self.should_transition(trainer):
            self.step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Check that ranks agree after a phase's first step; end the session at the last phase's step limit."""
        runner = self._runner
        if self._unchecked_replicas and runner is not None and trainer.global_step > runner.progress.entry_step:
            self._unchecked_replicas = False
            self.strategy_adapter.check_replicas(p for p in runner.parameters.values() if p.requires_grad)
        if runner is None or runner.phases_remaining or runner.schedule.phases[runner.phase].max_transition_step < 0:
            return
        if runner.decide(epoch=trainer.current_epoch, step=trainer.global_step, epoch_boundary=False).advance:
            self._stop(trainer, Reason.STEP)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that Lightning is about to set the modes of all modules."""
        self._modes_are_stale = self.frozen_modules_mode == "eval"

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the session at the last phase's epoch limit."""
        # In the epoch in which a run is resumed Lightning does not step schedulers that wait for a metric.
        self._owes_plateau_step = trainer.fit_loop.restarting
        if self.depth_remaining == 0 and self._limit_reached(trainer, trainer.current_epoch + 1):
            self._stop(trainer, Reason.EPOCH)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of what is hooked into."""
        self._hooked.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no module in eval mode that was in train mode before, and nothing hooked into."""
        self._hooked.close()
        if self._runner is not None and stage == "fit":
            self._runner.release_module_modes()

    def state_dict(self) -> dict[str, Any]:
        """Return the progress that a resumed run continues from."""
        if self._runner is None or self.trainer is None:
            return {}
        checkpoint = find(self.trainer, FTSCheckpoint)
        if checkpoint is not None:
            self._runner.progress.best_phase = checkpoint.best_ckpt_depth
        metrics = {name: value.detach().cpu().clone() for name, value in self.trainer.callback_metrics.items()}
        return {**self._runner.state_dict(), "metrics": metrics}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget what an earlier fit of the same trainer left: a checkpoint's progress takes its place."""
        self._loaded = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's progress for the fit that is about to start."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._loaded = state_dict

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _schedule_source(self) -> Any:
        return self._requests["ft_schedule"][0]

    @property
    def _requested_max_depth(self) -> Any:
        return self._requests["max_depth"][0]

    def _resolve(self, name: str, value: Any) -> None:
        self._requests[name] = (self._requests[name][0], value)
        setattr(self, name, value)

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the strategy's adapter, for as long as the module and the strategy are being set up."""
        with _as_misconfiguration():
            adapter = make_adapter(trainer, self.custom_strategy_adapters, self.strategy_adapter_cfg)
        adapter.connect(trainer)
        self.strategy_adapter = adapter
        self._hooked.callback(adapter.on_set_up)
        if type(adapter).on_model_configured is not StrategyAdapter.on_model_configured:
            self._hooked.enter_context(after_configure_model(pl_module, self._on_model_configured))

    def _on_model_configured(self) -> None:
        with _as_misconfiguration():
            self.strategy_adapter.on_model_configured()

    def _carry_on(self, trainer: Trainer, runner: PhaseRunner) -> None:
        """Enter the phase in which a checkpoint, or an earlier fit of the same trainer, has ended."""
        if self._loaded is not None:
            runner.load_state_dict(self._loaded)
            install_optimization(trainer, runner)
        elif trainer.ckpt_path is not None:
            raise _foreign_checkpoint(trainer)

    def _resume_late(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        """Enter the phase of a checkpoint that the strategy is about to load, so that its state finds its groups."""
        trainer, runner = self._fitting()
        with _as_misconfiguration():
            path = self.strategy_adapter.from_rank_zero(path)
            progress = saved_progress(path, self.state_key, weights_only=weights_only)
            if progress is None:
                raise _foreign_checkpoint(trainer)
            runner.load_state_dict(progress)
            install_optimization(trainer, runner)
            self._carried_on = True
            return self.strategy_adapter.resume(path, runner, weights_only=weights_only)

    def _decide(self, trainer: Trainer) -> Decision:
        _, runner = self._fitting()
        return runner.decide(
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            epoch_boundary=self._epoch_boundary,
            patience_exhausted=self._patience_exhausted(trainer),
        )

    def _patience_exhausted(self, trainer: Trainer) -> bool:
        """Whether any rank has run out of patience; asked when that may have changed, since ranks have to talk."""
        early_stopping = find(trainer, FTSEarlyStopping)
        if early_stopping is None or not (self._epoch_boundary or self.intra_epoch_transitions):
            return False
        mine = early_stopping.phase_exhausted
        anyone = self.strategy_adapter.any_rank(mine)
        if anyone and not self.strategy_adapter.every_rank(mine) and not self._told_of_disagreement:
            self._told_of_disagreement = True
            self._report(
                logging.WARNING,
                f"The ranks disagree on whether {early_stopping.monitor!r} has stopped improving; all of them go on to "
                "the next phase together. Log it with sync_dist=True.",
            )
        return anyone

    def _limit_reached(self, trainer: Trainer, epoch: int) -> bool:
        _, runner = self._fitting()
        return runner.decide(epoch=epoch, step=trainer.global_step, epoch_boundary=True).advance

    def _stop(self, trainer: Trainer, reason: Reason) -> None:
        trainer.should_stop = True
        self._report(logging.INFO, f"Phase {self.curr_depth}, the last, ended ({reason.value}).")

    def _fitting(self) -> tuple[Trainer, PhaseRunner]:
        if self.trainer is None or self._runner is None:
            raise MisconfigurationException("FinetuningScheduler runs inside Trainer.fit; no fit has started.")
        return self.trainer, self._runner

    def _report(self, level: int, message: str) -> None:
        if self.trainer is None or self.trainer.is_global_zero:
            log.log(level, message)

    def _checked_schedule(self, trainer: Trainer, view: ModelView) -> Schedule:
        """Check the configuration and resolve the schedule, so that all problems are reported together."""
        problems = [
            *self._problems,
            *configuration_problems(self, self._requested_max_depth, trainer, implicit=self._schedule_source is None),
        ]
        unsupported = untested_strategy(trainer.strategy)
        if unsupported and not has_custom_adapter(trainer, self.custom_strategy_adapters):
            if self.allow_untested:
                self._report(logging.WARNING, f"{unsupported}; going on since `allow_untested` is set.")
            else:
                problems.append(Problem(unsupported, fix="Set `allow_untested=True` to try it."))
        # Rank zero alone reads files and draws up the schedule.
        arguments = (str(self.log_dir), self.reinit_optim_cfg, self.reinit_lr_cfg)
        try:
            outcome = on_rank_zero(
                trainer,
                self.strategy_adapter.from_rank_zero,
                lambda: resolve_source(self._schedule_source, view.plain, *arguments),
            )
        except ScheduleError as error:
            if problems:
                raise ScheduleError([*error.problems, *problems]) from error
            raise
        depth = self._requested_max_depth
        executed = outcome.schedule.up_to(depth) if isinstance(depth, int) else outcome.schedule
        problems += [*limit_problems(self, executed), *self.strategy_adapter.problems(view, executed)]
        if problems:
            raise ScheduleError(problems)
        for message in outcome.notices:
            self._report(logging.INFO, message)
        for message in outcome.warnings:
            self._report(logging.WARNING, message)
        return outcome.schedule

    def _make_runner(self, trainer: Trainer, view: ModelView, schedule: Schedule) -> PhaseRunner:
        return PhaseRunner(
            view,
            trainer.optimizers[0],
            schedule,
            lr_schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
            max_depth=self._requested_max_depth,
            base_max_lr=self.base_max_lr,
            no_decay=no_decay_fragments(trainer.lightning_module),
            enforce_phase0_params=self.enforce_phase0_params,
            apply_lambdas_new_pgs=self.apply_lambdas_new_pgs,
            frozen_bn_track_running_stats=self.frozen_bn_track_running_stats,
            frozen_modules_mode=self.frozen_modules_mode,
            on_thawed=self.strategy_adapter.on_phase_thawed,
            report=self._report,
        )

    def _announce(self, trainer: Trainer, runner: PhaseRunner) -> None:
        """Say at the start which limits will not mean what they seem to."""
        for message in [*limit_warnings(trainer, runner.plan), *untested_warnings(trainer)]:
            self._report(logging.WARNING, message)

    def _generate_and_exit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plain = self.strategy_adapter.view(pl_module).plain
        with _as_misconfiguration():
            share = self.strategy_adapter.from_rank_zero
            path = save_on_rank_zero(trainer, share, generate(plain), plain, str(self.log_dir))
            self._report(logging.INFO, f"The default schedule was written to {path}.")
        trainer.strategy.barrier("finetuning_scheduler.gen_ft_sched_only")
        raise SystemExit(0)


class _LastResort(logging.StreamHandler):  # type: ignore[type-arg]  # generic in the type stubs only
    """Show messages on the terminal for as long as the program has configured no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record unless the root logger has somebody to do it."""
        if not logging.getLogger().handlers:
            super().emit(record)


def _foreign_checkpoint(trainer: Trainer) -> CheckpointError:
    message = f"expected a checkpoint written with FinetuningScheduler, got {trainer.ckpt_path}"
    fix = "Load its weights into the module and fit without `ckpt_path`, or resume without this callback."
    return CheckpointError(Problem(message, fix=fix))


@contextmanager
def _as_misconfiguration() -> Iterator[None]:
    """Raise the engine's errors as the exception that Lightning's users expect."""
    try:
        yield
    except ScheduleError as error:
        raise MisconfigurationException(str(error)) from error
