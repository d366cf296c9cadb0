"""Make the optimizer and the LR scheduler that a phase installs, over the groups there are."""

from __future__ import annotations

import copy
import importlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from ..schedule.model import LRSchedulerSpec, OptimizerSpec
from .param_groups import LABEL, like
from .schedulers import KEYS_IN_GROUPS, restart

# In a group: the learning rate of its optimizer, until the scheduler that still reads `initial_lr` is replaced.
_NEXT_INITIAL_LR = "next_initial_lr"


@dataclass(frozen=True)
class SchedulerSettings:
    """How often an LR scheduler steps and what it waits for: the keys of ``pl_lrs_cfg``, named as Lightning's."""

    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True

    @classmethod
    def of(cls, spec: LRSchedulerSpec) -> SchedulerSettings:
        """Read the settings of a valid specification; a scheduler that waits for a metric is marked as such."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in spec.pl_lrs_cfg.items() if key in known}
        on_plateau = issubclass(import_class(spec.lr_scheduler_init.class_path), ReduceLROnPlateau)
        return cls(**{**values, "reduce_on_plateau": on_plateau})


def build_optimizer(
    spec: OptimizerSpec,
    old: Optimizer,
    overrides: Sequence[Mapping[str, Any]],
    *,
    initial_groups: int,
    keep_initial_lr: bool = False,
) -> Optimizer:
    """Make a phase's optimizer over the groups of the one before, without its state.

    Each group keeps its present learning rate; the new optimizer's own learning rate, if it names one, becomes the
    ``initial_lr`` of phase 0's groups, from which an LR scheduler made in this or a later phase starts. Groups of later
    phases keep the one that their phase gave them.

    Args:
        spec: The class and its arguments.
        old: The optimizer to replace.
        overrides: For each group, the options in which it differs from the other groups, such as ``weight_decay``.
        initial_groups: How many groups, the first ones, are phase 0's.
        keep_initial_lr: Leave ``initial_lr`` alone, since a scheduler that stays in force reads it at each step.
    """
    arguments = spec.optimizer_init.init_args
    with_names = "param_names" in old.param_groups[0]
    groups = [
        {"params": list(zip(g["param_names"], g["params"], strict=True)) if with_names else g["params"]}
        for g in old.param_groups
    ]
    new: Optimizer = import_class(spec.optimizer_init.class_path)(groups, **arguments)
    for index, (group, old_group, override) in enumerate(
        zip(new.param_groups, old.param_groups, overrides, strict=True)
    ):
        group.update({key: value for key, value in override.items() if key in new.defaults})
        # The scheduler in force goes on with the new groups.
        group.update({key: old_group[key] for key in (*KEYS_IN_GROUPS, LABEL) if key in old_group})
        if old_group["lr"] is not None:  # else the one before has set its steps itself
            group["lr"] = like(group["lr"], old_group["lr"])
        group["initial_lr"] = like(group["lr"], old_group.get("initial_lr", group["lr"]))
        if "lr" in arguments and index < initial_groups:
            group[_NEXT_INITIAL_LR if keep_initial_lr else "initial_lr"] = like(group["lr"], arguments["lr"])
        elif _NEXT_INITIAL_LR in old_group:
            group[_NEXT_INITIAL_LR] = like(group["lr"], old_group[_NEXT_INITIAL_LR])
    return new


def empty_optimizer(spec: OptimizerSpec) -> Optimizer:
    """Make a phase's optimizer without groups and state."""
    stand_in = [nn.Parameter(torch.zeros(2, 2))]
    optimizer: Optimizer = import_class(spec.optimizer_init.class_path)(stand_in, **spec.optimizer_init.init_args)
    optimizer.param_groups.clear()
    optimizer.state.clear()
    return optimizer


def emptied(optimizer: Optimizer) -> Optimizer:
    """Copy an optimizer without groups, state and hooks; a wrapper, whose copy would have the same, is returned."""
    if "param_groups" not in vars(optimizer):
        return optimizer
    other = copy.copy(optimizer)  # it leaves out what a class of the user's own keeps in attributes, too
    vars(other).update({key: value for key, value in vars(optimizer).items() if key not in (*vars(other), "step")})
    other.param_groups, other.state = [], defaultdict(dict)
    return other


def steps_by_lr(spec: OptimizerSpec) -> bool:
    """Whether the optimizer has learning rates, and does not set its steps itself."""
    return empty_optimizer(spec).defaults.get("lr", 0.0) is not None


def build_lr_scheduler(
    spec: LRSchedulerSpec,
    optimizer: Optimizer,
    *,
    groups_before: int,
    apply_lambdas: bool = False,
    optimizer_is_later: bool = False,
) -> LRScheduler:
    """Make a phase's LR scheduler over all groups, which first get the learning rates it starts from.

    For those that existed before the phase these are ``init_pg_lrs``, else the present ones if
    ``use_current_optimizer_pg_lrs``, else the groups' ``initial_lr``, else the present ones. The phase's own start at
    exactly the learning rate that they were added with, whatever the scheduler does at first.

    Args:
        spec: The class and its arguments.
        optimizer: The optimizer in force.
        groups_before: How many groups, the first ones, existed before the phase.
        apply_lambdas: Let the phase's groups start at their learning rate times the present value of their
            ``lr_lambda``.
        optimizer_is_later: Whether a later phase has installed it, so that the scheduler was made over another one: it
            has then stopped to cycle a momentum that this one does not have.
    """
    for index, group in enumerate(optimizer.param_groups[:groups_before]):
        if spec.init_pg_lrs is not None:
            lr = spec.init_pg_lrs[index]
        elif spec.use_current_optimizer_pg_lrs:
            lr = group["lr"]
        else:
            lr = group.get(_NEXT_INITIAL_LR, group.get("initial_lr", group["lr"]))
        group.pop(_NEXT_INITIAL_LR, None)
        group["initial_lr"] = like(group["lr"], lr)
        group["lr"] = like(group["lr"], lr)
    arguments = {key: value for key, value in spec.lr_scheduler_init.init_args.items() if key != "optimizer"}
    kind = import_class(spec.lr_scheduler_init.class_path)
    has_momentum = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    if optimizer_is_later and issubclass(kind, (OneCycleLR, CyclicLR)) and not has_momentum:
        arguments["cycle_momentum"] = False
    rates = [like(group["lr"], group["lr"]) for group in optimizer.param_groups[groups_before:]]
    scheduler: LRScheduler = kind(optimizer, **arguments)
    restart(scheduler, groups_before, rates, apply_lambdas=apply_lambdas)
    return scheduler


def import_class(class_path: str) -> Any:
    """Import a class by its path.

    Raises:
        ImportError: There is no such module, or nothing of that name in it, or importing it fails.
    """
    module_name, _, name = class_path.rpartition(".")
    with importing():
        return getattr(importlib.import_module(module_name), name)


@contextmanager
def importing() -> Iterator[None]:
    """Turn whatever the block raises into an ImportError: a module can raise anything when it is imported.

    Raises:
        ImportError: With what the module has raised; it may even have tried to leave the program.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = f"it calls sys.exit({error.code!r})" if isinstance(error, SystemExit) else str(error)
        raise ImportError(text or type(error).__name__) from error


def is_imported(class_path: str) -> bool:
    """Whether a class can be looked up without running the code of a module."""
    return class_path.rpartition(".")[0] in sys.modules
