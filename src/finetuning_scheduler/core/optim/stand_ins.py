"""Optimizers over small matrices, to try things on before anything real is touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adam, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR, ReduceLROnPlateau, StepLR

from ..schedule.model import OptimizerSpec
from .build import emptied, import_class
from .schedulers import nested

_MOST_PATIENT = 100
OptimizerFactory = Callable[[int], Optimizer]  # takes the number of groups


def stand_in_groups(count: int, device: torch.device | None = None) -> list[dict[str, Any]]:
    """Make groups of one small matrix each."""
    return [{"params": [nn.Parameter(torch.zeros(2, 2, device=device))]} for _ in range(count)]


def adam(count: int) -> Optimizer:
    """Make an optimizer of so many groups."""
    return Adam(stand_in_groups(count), lr=0.1)


def factory_of(spec: OptimizerSpec, device: torch.device | None = None) -> OptimizerFactory:
    """Make stand-ins of an optimizer that a phase installs."""

    def make(count: int) -> Optimizer:
        optimizer: Optimizer = import_class(spec.optimizer_init.class_path)(
            stand_in_groups(count, device), **spec.optimizer_init.init_args
        )
        return optimizer

    return make


def factory_like(optimizer: Optimizer) -> OptimizerFactory:
    """Stand in for a user's optimizer, of which a scheduler only asks whether it has momentum or betas."""
    if "betas" in optimizer.defaults:
        return adam
    kind = SGD if "momentum" in optimizer.defaults else Adadelta
    return lambda count: kind(stand_in_groups(count), lr=0.1)


def copies_of(optimizer: Optimizer) -> OptimizerFactory:
    """Make stand-ins of a user's optimizer, whose constructor is not known, by copying it."""

    def make(count: int) -> Optimizer:
        other = emptied(optimizer)
        if other is optimizer:
            return factory_like(optimizer)(count)
        options = {
            key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "param_names")
        }
        other.param_groups = [{**options, **group} for group in stand_in_groups(count)]
        return other

    return make


def step_stand_in(optimizer: Optimizer) -> None:
    """Let a stand-in make a step with gradients, sparse ones where it takes no others.

    It gets a closure if it takes one, since some need it: Lightning always gives one.
    """

    def closure() -> Any:  # PyTorch says that it is a float, everybody returns a tensor
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = torch.ones_like(parameter)
                parameter.grad = gradient.to_sparse() if isinstance(optimizer, SparseAdam) else gradient
        return torch.ones(())

    closure()
    if "closure" in inspect.signature(optimizer.step).parameters:
        optimizer.step(closure)
    else:
        optimizer.step()


def step_scheduler(scheduler: LRScheduler, times: int = 4) -> None:
    """Let a scheduler of a stand-in step, each time after its optimizer; no further than it is made for.

    One that waits for a metric gets one that does not improve, until it acts; one that waits for a number of steps
    begins just before it acts.
    """
    for each in nested(scheduler):
        if isinstance(each, OneCycleLR):
            times = min(times, each.total_steps - 1)
        elif isinstance(each, StepLR):
            each.last_epoch = max(each.last_epoch, each.step_size - 2)
        elif isinstance(each, MultiStepLR) and each.milestones:
            each.last_epoch = max(each.last_epoch, min(each.milestones) - 2)
    if not type(scheduler).__module__.startswith("torch."):
        times = 1  # how far a class of the user's goes is not known
    if isinstance(scheduler, ReduceLROnPlateau):
        times += min(scheduler.patience, _MOST_PATIENT)
    for _ in range(times):
        step_stand_in(scheduler.optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
