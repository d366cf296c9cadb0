"""What phases do to optimizers and LR schedulers, passed on to the trainer; the schedule of implicit mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from .._lightning import Trainer, install_lr_scheduler, install_optimizer
from ..core.generate import generate
from ..core.runner import PhaseRunner
from ..errors import OptimizerError, Problem


def install_optimization(trainer: Trainer, runner: PhaseRunner) -> None:
    """Make the trainer step the optimizer and the LR scheduler that are in force."""
    if trainer.optimizers[0] is not runner.optimizer:
        install_optimizer(trainer, runner.optimizer)
    if runner.scheduler_settings is not None:
        (scheduler,) = runner.lr_schedulers
        if [config.scheduler for config in trainer.lr_scheduler_configs] != [scheduler]:
            install_lr_scheduler(trainer, scheduler, asdict(runner.scheduler_settings))


def implicit_schedule(
    model: nn.Module, reinit_optim_cfg: Mapping[str, Any] | None, reinit_lr_cfg: Mapping[str, Any] | None
) -> dict[int, dict[str, Any]]:
    """Generate a schedule in which every phase after the first installs the given optimizer and LR scheduler.

    Args:
        model: The model to generate the schedule for.
        reinit_optim_cfg: What ``new_optimizer`` of a phase would be.
        reinit_lr_cfg: What ``new_lr_scheduler`` of a phase would be, without lists that depend on the number of groups.

    Raises:
        OptimizerError: A list depends on the number of groups, which differs from phase to phase.
    """
    reinit_optim_cfg, reinit_lr_cfg = plain_configuration(reinit_optim_cfg), plain_configuration(reinit_lr_cfg)
    if problems := _per_group_lists(reinit_lr_cfg or {}):
        raise OptimizerError(problems)
    phases = generate(model).to_dict()
    for number, phase in phases.items():
        if number > 0 and reinit_optim_cfg is not None:
            phase["new_optimizer"] = reinit_optim_cfg
        if number > 0 and reinit_lr_cfg is not None:
            phase["new_lr_scheduler"] = reinit_lr_cfg
    return phases


def plain_configuration(value: Any) -> Any:
    """Copy a configuration, turning the namespaces that LightningCLI makes of ``class_path`` into dictionaries."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        plain = {key: plain_configuration(item) for key, item in value.items()}
        if isinstance(arguments := plain.get("init_args"), dict):
            # LightningCLI lists even the arguments that only a running session can fill in.
            plain["init_args"] = {
                key: item for key, item in arguments.items() if item is not None or key not in ("params", "optimizer")
            }
        return plain
    return [plain_configuration(item) for item in value] if isinstance(value, (list, tuple)) else value


def _per_group_lists(reinit_lr_cfg: Mapping[str, Any]) -> list[Problem]:
    problems = []
    fix = "Leave it out, or give it in the phases of an explicit schedule."
    if reinit_lr_cfg.get("init_pg_lrs") is not None:
        message = "expected `reinit_lr_cfg` to suit any number of parameter groups, got `init_pg_lrs`"
        problems.append(Problem(message, fix=fix))
    init = reinit_lr_cfg.get("lr_scheduler_init")
    arguments = init.get("init_args") if isinstance(init, Mapping) else None
    if isinstance(arguments, Mapping) and isinstance(arguments.get("min_lr"), (list, tuple)):
        message = "expected `reinit_lr_cfg` to suit any number of parameter groups, got a list as `min_lr`"
        problems.append(Problem(message, fix="Give one number."))
    return problems
