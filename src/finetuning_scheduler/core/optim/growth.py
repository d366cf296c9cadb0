"""Can an LR scheduler follow new parameter groups? Tried on a copy, before anything is trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .schedulers import SUPPORTED_LR_SCHEDULERS, grow, nested

Step = Callable[[LRScheduler], None]


def growth_failure(scheduler: LRScheduler, step: Step | None = None, *, new_groups: int = 1) -> str | None:
    """Try on a copy whether a scheduler can follow a new group; return why not.

    Works on stand-in parameters, so that a scheduler that would fail at its first step fails before training. The
    classes known here need no trial; a subclass may keep lists of its own.

    Args:
        scheduler: The scheduler.
        step: Makes a step of it, if the training loop does so in a way of its own.
        new_groups: How many groups are new; with none, the answer is why it cannot be tried at all.
    """
    if all(type(each) in SUPPORTED_LR_SCHEDULERS for each in nested(scheduler)):
        return None
    groups = scheduler.optimizer.param_groups
    groups = [*groups, *[groups[0]] * new_groups]
    stand_in = SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in groups], lr=0.1)
    for substitute, group in zip(stand_in.param_groups, groups, strict=True):
        substitute.update(
            {key: copy.copy(value) for key, value in group.items() if key not in ("params", "param_names")}
        )
        substitute.setdefault("initial_lr", substitute["lr"])
    trial = _trial_copy(scheduler, stand_in)
    added = stand_in.param_groups[len(groups) - new_groups :]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grow(trial, added, stand_in.param_groups[0], apply_lambdas=False)
            (step or _step)(trial)
    except Exception as error:  # noqa: BLE001  # whatever a foreign class raises is the reason to refuse it
        return f"{type(error).__name__}: {error}"
    return None


def _step(scheduler: LRScheduler) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def _trial_copy(scheduler: LRScheduler, optimizer: Optimizer) -> LRScheduler:
    trial = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, (list, dict)):
            setattr(trial, name, copy.copy(value))
        elif getattr(value, "optimizer", None) is scheduler.optimizer:  # a scheduler inside a foreign one
            setattr(trial, name, _trial_copy(value, optimizer))
    trial.optimizer = optimizer
    if hasattr(trial, "_schedulers"):
        trial._schedulers = [_trial_copy(inner, optimizer) for inner in trial._schedulers]
    return trial
