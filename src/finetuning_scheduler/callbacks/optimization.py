"""What phases do to optimizers and LR schedulers, passed on to the trainer."""

from __future__ import annotations

from dataclasses import asdict

from .._lightning import Trainer, install_lr_scheduler, install_optimizer
from ..core.runner import PhaseRunner


def install_optimization(trainer: Trainer, runner: PhaseRunner) -> None:
    """Make the trainer step the optimizer and the LR scheduler that are in force."""
    if trainer.optimizers[0] is not runner.optimizer:
        install_optimizer(trainer, runner.optimizer)
    if runner.scheduler_settings is not None:
        (scheduler,) = runner.lr_schedulers
        if [config.scheduler for config in trainer.lr_scheduler_configs] != [scheduler]:
            install_lr_scheduler(trainer, scheduler, asdict(runner.scheduler_settings))
