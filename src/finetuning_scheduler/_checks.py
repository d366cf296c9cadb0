"""What, in a trainer's and a callback's configuration, does not fit together; found before the first batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

from ._lightning import LightningModule, Trainer, callbacks_of
from .callbacks.checkpoint import FTSCheckpoint
from .callbacks.wiring import find
from .core.optim.schedulers import SUPPORTED_LR_SCHEDULERS, is_supported
from .core.plan import Plan
from .core.schedule.schedule import Schedule
from .core.thaw import FrozenModulesMode
from .errors import Problem


class Configuration(Protocol):
    """The constructor arguments that are checked here."""

    base_max_lr: float | None
    restore_best: bool
    reinit_optim_cfg: dict[str, Any] | None
    reinit_lr_cfg: dict[str, Any] | None
    epoch_transitions_only: bool
    allow_untested: bool
    frozen_modules_mode: FrozenModulesMode


def configuration_problems(
    configuration: Configuration, max_depth: int, trainer: Trainer, *, implicit: bool
) -> list[Problem]:
    """List what is wrong with the arguments, the strategy, the optimizer and the checkpoint callback."""
    problems = [*_argument_problems(configuration, max_depth), *_module_problems(trainer)]
    for name in ("reinit_optim_cfg", "reinit_lr_cfg"):
        if not implicit and getattr(configuration, name) is not None:
            fix = "Use `new_optimizer` and `new_lr_scheduler` in the schedule's phases."
            problems.append(Problem(f"expected `{name}` without `ft_schedule` only, got both", fix=fix))
    if configuration.restore_best:
        problems += _checkpoint_problems(trainer)
    problems += _optimizer_problems(trainer)
    if not configuration.allow_untested:
        problems += _untested(trainer)
    return problems


def untested_warnings(trainer: Trainer) -> list[str]:
    """List what ``allow_untested`` lets pass."""
    return [f"{problem.message}; going on since `allow_untested` is set." for problem in _untested(trainer)]


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


def no_decay_fragments(pl_module: LightningModule) -> tuple[str, ...]:
    """Return the module's ``no_decay`` list: fragments of names whose parameters get no weight decay."""
    return tuple(getattr(pl_module, "no_decay", None) or ())


_FLAGS = (
    "restore_best",
    "gen_ft_sched_only",
    "epoch_transitions_only",
    "allow_untested",
    "apply_lambdas_new_pgs",
    "enforce_phase0_params",
    "frozen_bn_track_running_stats",
    "intra_epoch_transitions",
)


def _argument_problems(configuration: Configuration, max_depth: Any) -> Iterator[Problem]:
    if not isinstance(max_depth, int) or isinstance(max_depth, bool) or max_depth < -1:
        yield Problem(f"expected `max_depth` to be -1 or a phase, got {max_depth!r}", fix="Use -1 for all phases.")
    lr: Any = configuration.base_max_lr
    if lr is not None and not (isinstance(lr, (int, float)) and not isinstance(lr, bool) and 0 < lr < math.inf):
        fix = "Use a learning rate above 0, or None for that of phase 0."
        yield Problem(f"expected `base_max_lr` to be a number above 0, got {lr!r}", fix=fix)
    for name in _FLAGS:
        if not isinstance(value := getattr(configuration, name), bool):
            yield Problem(f"expected `{name}` to be True or False, got {value!r}", fix="Use True or False.")
    if configuration.frozen_modules_mode not in ("train", "eval"):
        message = f"expected `frozen_modules_mode` to be 'train' or 'eval', got {configuration.frozen_modules_mode!r}"
        yield Problem(message, fix="Use 'train' to leave module modes alone.")


def _module_problems(trainer: Trainer) -> Iterator[Problem]:
    fragments = getattr(trainer.lightning_module, "no_decay", None)
    is_list = isinstance(fragments, (list, tuple, set, frozenset))
    if fragments is not None and not (is_list and all(isinstance(part, str) and part for part in fragments)):
        fix = 'Make it a list, such as ["bias", "LayerNorm.weight"].'
        yield Problem(f"expected the module's `no_decay` to be a list of name fragments, got {fragments!r}", fix=fix)
    if any(type(callback).__name__ == "StochasticWeightAveraging" for callback in callbacks_of(trainer)):
        message = "expected no StochasticWeightAveraging callback, which installs an LR scheduler of its own, got one"
        yield Problem(message, fix="Install torch.optim.swa_utils.SWALR as the `new_lr_scheduler` of a phase.")


def _checkpoint_problems(trainer: Trainer) -> Iterator[Problem]:
    checkpoint = find(trainer, FTSCheckpoint)
    if checkpoint is None:
        return
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


def _untested(trainer: Trainer) -> Iterator[Problem]:
    fix = "Set `allow_untested=True` to try it."
    for config in trainer.lr_scheduler_configs:
        if not is_supported(config.scheduler):
            names = ", ".join(kind.__name__ for kind in SUPPORTED_LR_SCHEDULERS)
            message = f"expected a supported LR scheduler ({names}), got {type(config.scheduler).__name__}"
            yield Problem(message, fix=fix)
