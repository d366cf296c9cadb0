"""LR schedulers whose optimizer gains and loses parameter groups: every list with an entry a group follows."""

from __future__ import annotations

import copy
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

ParameterGroup = dict[str, Any]
Grow = Callable[[Any, ParameterGroup, ParameterGroup], None]
Step = Callable[[LRScheduler], None]


def _nothing(scheduler: Any, group: ParameterGroup, reference: ParameterGroup) -> None:
    """Most classes keep nothing but base learning rates, which all share."""


def _minimum(scheduler: ReduceLROnPlateau, group: ParameterGroup, reference: ParameterGroup) -> None:
    # A list of per-group minima has no entry for a new group; the last one is the best guess.
    default = scheduler.default_min_lr
    scheduler.min_lrs.append(scheduler.min_lrs[-1] if default is None else default)


def _one_cycle(scheduler: OneCycleLR, group: ParameterGroup, reference: ParameterGroup) -> None:
    _scale(("max_lr", "min_lr"), group, reference, reference["initial_lr"])
    _follow_momentum(scheduler, group, reference)


def _cyclic(scheduler: CyclicLR, group: ParameterGroup, reference: ParameterGroup) -> None:
    ratio = _ratio(group, scheduler.base_lrs[0])
    scheduler.max_lrs.append(scheduler.max_lrs[0] * ratio)
    _scale(("max_lr", "min_lr"), group, reference, scheduler.base_lrs[0])
    if scheduler.cycle_momentum:
        scheduler.max_momentums.append(scheduler.max_momentums[0])
        scheduler.base_momentums.append(scheduler.base_momentums[0])
    _follow_momentum(scheduler, group, reference)


def _averaging(scheduler: SWALR, group: ParameterGroup, reference: ParameterGroup) -> None:
    _scale(("swa_lr",), group, reference, reference["initial_lr"])


@dataclass(frozen=True)
class Row:
    """What a class of LR schedulers keeps for each parameter group, besides base learning rates.

    Attributes:
        kind: The class; its subclasses follow it.
        lists: Attributes with one entry a group.
        keys: What it keeps in the groups themselves.
        grow: Gives a new group its entries, in proportion to those of a reference group where they are learning rates.
    """

    kind: type[LRScheduler]
    lists: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    grow: Grow = _nothing


_CYCLE_KEYS = ("max_lr", "min_lr", "max_momentum", "base_momentum")
ROWS = (
    Row(StepLR),
    Row(MultiStepLR),
    Row(CosineAnnealingWarmRestarts),
    Row(ReduceLROnPlateau, lists=("min_lrs",), grow=_minimum),
    Row(LambdaLR, lists=("lr_lambdas",)),  # their functions are added by `grow`, which is asked whether to apply them
    Row(ConstantLR),
    Row(LinearLR),
    Row(ExponentialLR),
    Row(CosineAnnealingLR),
    Row(MultiplicativeLR, lists=("lr_lambdas",)),
    Row(PolynomialLR),
    Row(OneCycleLR, keys=_CYCLE_KEYS, grow=_one_cycle),
    Row(CyclicLR, lists=("max_lrs", "base_momentums", "max_momentums"), keys=_CYCLE_KEYS, grow=_cyclic),
    Row(SequentialLR),
    Row(ChainedScheduler),
    Row(SWALR, keys=("swa_lr",), grow=_averaging),
)
SUPPORTED_LR_SCHEDULERS: tuple[type[LRScheduler], ...] = tuple(row.kind for row in ROWS)
KEYS_IN_GROUPS = tuple(dict.fromkeys(key for row in ROWS for key in row.keys))
_PER_GROUP_LISTS = ("base_lrs", "_last_lr", *dict.fromkeys(name for row in ROWS for name in row.lists))


def nested(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """Yield a scheduler and, depth first, those it is composed of."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from nested(inner)


def active(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """Yield those of a scheduler's parts that set learning rates at its present step."""
    if isinstance(scheduler, SequentialLR):
        index = bisect_right(scheduler._milestones, scheduler.last_epoch)
        yield from active(scheduler._schedulers[index])
    elif isinstance(scheduler, ChainedScheduler):
        for inner in scheduler._schedulers:
            yield from active(inner)
    else:
        yield scheduler


def is_supported(scheduler: LRScheduler) -> bool:
    """Whether a scheduler and all it is composed of are of the supported classes."""
    return all(isinstance(each, SUPPORTED_LR_SCHEDULERS) for each in nested(scheduler))


def cycles_momentum(scheduler: LRScheduler) -> bool:
    """Whether a scheduler, or one it is composed of, writes momenta into the groups."""
    return any(isinstance(each, (OneCycleLR, CyclicLR)) and each.cycle_momentum for each in nested(scheduler))


def reads_initial_lr(scheduler: LRScheduler) -> bool:
    """Whether a scheduler, or one it is composed of, reads the groups' ``initial_lr`` at each step."""
    return any(isinstance(each, OneCycleLR) for each in nested(scheduler))


def constant_one(_: int) -> float:
    """Leave a group's learning rate alone: the ``lr_lambda`` of groups that take none."""
    return 1.0


def grow(
    scheduler: LRScheduler, groups: Sequence[ParameterGroup], reference: ParameterGroup, *, apply_lambdas: bool
) -> None:
    """Let a scheduler act, from its next step on, on groups that were just added at their ``lr`` and ``initial_lr``.

    Args:
        scheduler: The scheduler, with all it is composed of.
        groups: The new groups. What the scheduler keeps in the groups themselves is added to them.
        reference: A group the scheduler already acts on. Where the scheduler needs more learning rates than one (the
            peak of a cycle, the end of an averaging run), a new group's are in proportion to the reference's.
        apply_lambdas: Where a scheduler has functions, of which a new group follows the last: start at ``lr`` times
            its present value.
    """
    at_work = list(active(scheduler))
    for each in nested(scheduler):
        row = next((row for row in ROWS if isinstance(each, row.kind)), Row(type(each)))
        for group in groups:
            if isinstance(each, (LambdaLR, MultiplicativeLR)):
                each.lr_lambdas.append(each.lr_lambdas[-1])
                if apply_lambdas and each in at_work:
                    group["lr"] = group["lr"] * each.lr_lambdas[-1](each.last_epoch)
            row.grow(each, group, reference)
            if hasattr(each, "base_lrs"):
                each.base_lrs.append(_detached(group["initial_lr"]))
    for each in nested(scheduler):
        if hasattr(each, "_last_lr"):
            # a new list, since a scheduler shares it with those it is composed of
            each._last_lr = [*each._last_lr, *(_detached(group["lr"]) for group in groups)]


def select(scheduler: LRScheduler, indices: Sequence[int], group_count: int) -> None:
    """Keep the entries of the given groups in each of a scheduler's per-group lists.

    Args:
        scheduler: The scheduler, with all it is composed of.
        indices: Positions of the groups that stay.
        group_count: How many groups there were.
    """
    for each in nested(scheduler):
        for name in _PER_GROUP_LISTS:
            entries = getattr(each, name, None)
            if isinstance(entries, list) and len(entries) == group_count:
                setattr(each, name, [entries[index] for index in indices])


def retarget(scheduler: LRScheduler, optimizer: Optimizer) -> None:
    """Let a scheduler go on with another optimizer that has the same groups."""
    _watch_steps(optimizer)
    for each in nested(scheduler):
        each.optimizer = optimizer
        if isinstance(each, (OneCycleLR, CyclicLR)) and each.cycle_momentum:
            each.use_beta1 = "betas" in optimizer.defaults
            each.cycle_momentum = each.use_beta1 or "momentum" in optimizer.defaults


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


def _ratio(group: ParameterGroup, start: Any) -> float:
    return float(group["initial_lr"]) / float(start) if float(start) else 1.0


def _scale(keys: Sequence[str], group: ParameterGroup, reference: ParameterGroup, start: Any) -> None:
    ratio = _ratio(group, start)
    group.update({key: reference[key] * ratio for key in keys if key in reference})


def _follow_momentum(scheduler: OneCycleLR | CyclicLR, group: ParameterGroup, reference: ParameterGroup) -> None:
    if not scheduler.cycle_momentum:
        return
    group.update({key: reference[key] for key in ("max_momentum", "base_momentum")})
    if scheduler.use_beta1:
        group["betas"] = (reference["betas"][0], *group["betas"][1:])
    else:
        group["momentum"] = reference["momentum"]


def _watch_steps(optimizer: Optimizer) -> None:
    """Make an optimizer note its steps, which schedulers ask about; making a scheduler is the public way to do it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    initial = ["initial_lr" in group for group in optimizer.param_groups]
    LambdaLR(optimizer, constant_one)
    for group, lr, had_initial in zip(optimizer.param_groups, rates, initial, strict=True):
        group["lr"] = lr
        if not had_initial:
            del group["initial_lr"]


def _detached(lr: float | torch.Tensor) -> Any:
    return lr.clone() if isinstance(lr, torch.Tensor) else lr
