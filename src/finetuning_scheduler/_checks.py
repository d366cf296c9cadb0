"""What, in a trainer's and a callback's configuration, does not fit together; found before the first batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from os import PathLike
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from ._lightning import (
    LightningModule,
    ModelPruning,
    StochasticWeightAveraging,
    Trainer,
    callbacks_of,
    loads_in_its_own_way,
)
from .callbacks.checkpoint import FTSCheckpoint
from .callbacks.wiring import Wiring
from .core.optim.schedulers import SUPPORTED_LR_SCHEDULERS, is_supported
from .core.plan import Plan
from .core.schedule.schedule import Schedule
from .core.schedule.values import plain
from .core.settings import FrozenPrefixMode, Settings, flag_problems
from .core.thaw import FrozenModulesMode
from .errors import Problem
from .strategy_adapters import StrategyAdapter, has_custom_adapter, untested_strategy
from .strategy_adapters.registry import unused_adapters


class Configuration(Protocol):
    """What a user has asked of the callback."""

    base_max_lr: float | None
    restore_best: bool
    gen_ft_sched_only: bool
    epoch_transitions_only: bool
    reinit_optim_cfg: dict[str, Any] | None
    reinit_lr_cfg: dict[str, Any] | None
    strategy_adapter_cfg: dict[str, Any] | None
    custom_strategy_adapters: dict[str, str | type[StrategyAdapter]] | None
    allow_untested: bool
    apply_lambdas_new_pgs: bool
    enforce_phase0_params: bool
    frozen_bn_track_running_stats: bool
    frozen_modules_mode: FrozenModulesMode
    intra_epoch_transitions: bool
    frozen_prefix: FrozenPrefixMode
    prefix_budget: int | None
    prefix_dir: str | PathLike[str] | None
    prefix_dtype: torch.dtype | None
    logging_level: int


def settings_of(configuration: Configuration, max_depth: int, module: LightningModule) -> Settings:
    """Take the settings that a session needs from the callback and the module."""
    return Settings(
        max_depth=max_depth,
        base_max_lr=configuration.base_max_lr,
        no_decay=getattr(module, "no_decay", None) or (),
        restore_best=configuration.restore_best,
        enforce_phase0_params=configuration.enforce_phase0_params,
        apply_lambdas_new_pgs=configuration.apply_lambdas_new_pgs,
        frozen_bn_track_running_stats=configuration.frozen_bn_track_running_stats,
        frozen_modules_mode=configuration.frozen_modules_mode,
        frozen_prefix=configuration.frozen_prefix,
        prefix_budget=configuration.prefix_budget,
        prefix_dir=configuration.prefix_dir,
        prefix_dtype=configuration.prefix_dtype,
    )


def configuration_problems(
    configuration: Configuration, trainer: Trainer, wiring: Wiring, *, implicit: bool
) -> list[Problem]:
    """List what is wrong with the arguments, the strategy, the optimizer and the checkpoint callback.

    Args:
        configuration: What the user has asked of the callback.
        trainer: The trainer.
        wiring: The callbacks that drive the phases.
        implicit: Whether the schedule is generated.
    """
    problems = [problem for name in _FLAGS for problem in flag_problems(name, getattr(configuration, name))]
    if level_of(configuration.logging_level) is None:
        message = f"expected `logging_level` to be a level of logging, got {configuration.logging_level!r}"
        problems.append(Problem(message, fix="Use a number such as logging.INFO, or a name such as 'INFO'."))
    problems += _callback_problems(trainer, restore_best=configuration.restore_best)
    problems += slim_problems(trainer)
    for name in ("reinit_optim_cfg", "reinit_lr_cfg"):
        if not implicit and getattr(configuration, name) is not None:
            fix = "Use `new_optimizer` and `new_lr_scheduler` in the schedule's phases."
            problems.append(Problem(f"expected `{name}` without `ft_schedule` only, got both", fix=fix))
    if configuration.restore_best and wiring.checkpoint is not None:
        problems += _checkpoint_problems(wiring.checkpoint)
    problems += unused_adapters(trainer, configuration.custom_strategy_adapters)
    problems += _optimizer_problems(trainer)
    return problems if configuration.allow_untested else [*problems, *_untested(configuration, trainer)]


def usable_optimizer(trainer: Trainer) -> Optimizer | None:
    """Return the trainer's optimizer if a schedule can be executed with it."""
    return None if any(_optimizer_problems(trainer)) else trainer.optimizers[0]


def untested_warnings(configuration: Configuration, trainer: Trainer) -> list[str]:
    """List what ``allow_untested`` lets pass."""
    untested = _untested(configuration, trainer)
    return [f"{problem.message}; going on since `allow_untested` is set." for problem in untested]


def limit_problems(configuration: Configuration, schedule: Schedule) -> list[Problem]:
    """List the phases that could never end because only limits count and they have none."""
    if not configuration.epoch_transitions_only:
        return []
    fix = "Give the phase a `max_transition_epoch` or a `max_transition_step`, or drop `epoch_transitions_only`."
    return [
        Problem("expected a limit, since `epoch_transitions_only` is set, got none", fix=fix, phase=index)
        for index, phase in enumerate(schedule.phases)
        if max(phase.max_transition_epoch, phase.max_transition_step) < 0
    ]


def limit_warnings(trainer: Trainer, plan: Plan) -> list[str]:
    """List limits that are overdue when their phase begins, and phases beyond the trainer's own limits."""
    messages = []
    if overdue := plan.overdue_phases():
        messages.append(
            f"`max_transition_epoch` of phases {overdue} is not larger than an earlier phase's: each lasts one epoch."
        )
    if beyond := plan.unreachable_phases(max_epochs=trainer.max_epochs, max_steps=trainer.max_steps):
        messages.append(
            f"Phases {beyond} cannot be reached: the trainer stops at max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}, before the transitions that lead to them."
        )
    return messages


def endless_phases(configuration: Configuration, trainer: Trainer, wiring: Wiring, plan: Plan) -> list[int]:
    """List the phases before the last that end between epochs only, if nothing tells that an epoch has an end."""
    if not math.isinf(trainer.num_training_batches):
        return []
    patience_counts = wiring.early_stopping is not None and not configuration.epoch_transitions_only
    if configuration.intra_epoch_transitions and patience_counts:
        return []
    return [index for index, phase in enumerate(plan.phases[:-1]) if phase.limits.max_transition_step < 0]


def level_of(given: object) -> int | None:
    """Return a logging level by its number or name, the usual one for ``None``; ``None`` if there is no such level."""
    level = logging.INFO if given is None else plain(given)
    level = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    return level if isinstance(level, int) and not isinstance(level, bool) else None


_FLAGS = ("gen_ft_sched_only", "epoch_transitions_only", "allow_untested", "intra_epoch_transitions")


def _callback_problems(trainer: Trainer, *, restore_best: bool) -> Iterator[Problem]:
    for callback in callbacks_of(trainer):
        kind = type(callback).__name__
        if isinstance(callback, StochasticWeightAveraging):
            message = f"expected no StochasticWeightAveraging, which installs an LR scheduler of its own, got {kind}"
            fix = "Use WeightAveraging, or torch.optim.swa_utils.SWALR as the `new_lr_scheduler` of a phase."
            yield Problem(message, fix=fix)
        if restore_best and isinstance(callback, ModelPruning):
            message = (
                "expected no ModelPruning, which saves parameters under other names than it trains them, with "
                f"restore_best=True, got {kind}"
            )
            yield Problem(message, fix="Use FinetuningScheduler(restore_best=False), or prune after the session.")


def slim_problems(trainer: Trainer) -> Iterator[Problem]:
    """Find checkpoints that would leave out frozen weights under a strategy that cannot fill them in."""
    strategy = trainer.strategy
    if not (strategy.restore_checkpoint_after_setup or loads_in_its_own_way(strategy)):
        return
    if any(isinstance(each, FTSCheckpoint) and not each.save_frozen_weights for each in callbacks_of(trainer)):
        name = type(strategy).__name__
        message = f"expected save_frozen_weights=True with {name}, which loads checkpoints whole, got False"
        yield Problem(message, fix="Drop `save_frozen_weights`, or use DDP.")


def _checkpoint_problems(checkpoint: FTSCheckpoint) -> Iterator[Problem]:
    if checkpoint.save_top_k == 0:
        fix = "Use save_top_k=1 or more, or FinetuningScheduler(restore_best=False)."
        yield Problem("expected the checkpoint callback to keep a best checkpoint, got save_top_k=0", fix=fix)
    if checkpoint.monitor is None:
        fix = "Name the metric to monitor, or use FinetuningScheduler(restore_best=False)."
        yield Problem("expected the checkpoint callback to monitor a metric, got monitor=None", fix=fix)
    if checkpoint.save_weights_only:
        fix = "Use save_weights_only=False, or FinetuningScheduler(restore_best=False)."
        yield Problem("expected checkpoints with optimizer state to restore, got save_weights_only=True", fix=fix)


def _optimizer_problems(trainer: Trainer) -> Iterator[Problem]:
    optimizers = trainer.optimizers
    if len(optimizers) != 1:
        fix = "Return one optimizer from `configure_optimizers`."
        yield Problem(f"expected one optimizer, got {len(optimizers)}", fix=fix)
        return
    optimizer = optimizers[0]
    if "lr" not in optimizer.defaults:
        fix = "Return an optimizer of torch.optim from `configure_optimizers`."
        yield Problem(f"expected an optimizer with a learning rate, got {type(optimizer).__name__}", fix=fix)
    if getattr(optimizer, "_overlap_with_ddp", False):
        fix = "Make the optimizer without `overlap_with_ddp`."
        yield Problem("expected the optimizer to step by itself, got overlap_with_ddp=True", fix=fix)


def _untested(configuration: Configuration, trainer: Trainer) -> Iterator[Problem]:
    fix = "Set `allow_untested=True` to try it."
    reason = untested_strategy(trainer.strategy)
    if reason is not None and not has_custom_adapter(trainer, configuration.custom_strategy_adapters):
        yield Problem(reason, fix=fix)
    for config in trainer.lr_scheduler_configs:
        if not is_supported(config.scheduler):
            names = ", ".join(kind.__name__ for kind in SUPPORTED_LR_SCHEDULERS)
            message = f"expected a supported LR scheduler ({names}), got {type(config.scheduler).__name__}"
            yield Problem(message, fix=fix)
