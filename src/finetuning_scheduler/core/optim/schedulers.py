"""LR schedulers whose optimizer gains and loses parameter groups: every list with an entry a group follows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
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
        arguments: Arguments of its constructor that can be a list with one entry a group.
        grow: Gives a new group its entries, in proportion to those of a reference group where they are learning rates.
    """

    kind: type[LRScheduler]
    lists: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    grow: Grow = _nothing


_CYCLE_KEYS = ("max_lr", "min_lr", "max_momentum", "base_momentum")
_MOMENTA = ("base_momentum", "max_momentum")
_FUNCTIONS = ("lr_lambda",)
ROWS = (
    Row(StepLR),
    Row(MultiStepLR),
    Row(CosineAnnealingWarmRestarts),
    Row(ReduceLROnPlateau, lists=("min_lrs",), arguments=("min_lr",), grow=_minimum),
    # their functions are added by `grow`, which is asked whether to apply them
    Row(LambdaLR, lists=("lr_lambdas",), arguments=_FUNCTIONS),
    Row(ConstantLR),
    Row(LinearLR),
    Row(ExponentialLR),
    Row(CosineAnnealingLR),
    Row(MultiplicativeLR, lists=("lr_lambdas",), arguments=_FUNCTIONS),
    Row(PolynomialLR),
    Row(OneCycleLR, keys=_CYCLE_KEYS, arguments=("max_lr", *_MOMENTA), grow=_one_cycle),
    Row(
        CyclicLR,
        lists=("max_lrs", "base_momentums", "max_momentums"),
        keys=_CYCLE_KEYS,
        arguments=("base_lr", "max_lr", *_MOMENTA),
        grow=_cyclic,
    ),
    Row(SequentialLR),
    Row(ChainedScheduler),
    Row(SWALR, keys=("swa_lr",), arguments=("swa_lr",), grow=_averaging),
)
SUPPORTED_LR_SCHEDULERS: tuple[type[LRScheduler], ...] = tuple(row.kind for row in ROWS)
KEYS_IN_GROUPS = tuple(dict.fromkeys(key for row in ROWS for key in row.keys))
_PER_GROUP_LISTS = ("base_lrs", "_last_lr", *dict.fromkeys(name for row in ROWS for name in row.lists))


def row_of(kind: type[LRScheduler]) -> Row:
    """Return what is known of a class of LR schedulers."""
    return next((row for row in ROWS if issubclass(kind, row.kind)), Row(kind))


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
        row = row_of(type(each))
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


def restart(scheduler: LRScheduler, first: int, rates: Sequence[Any], *, apply_lambdas: bool) -> None:
    """Let groups that a scheduler was just made over start at their own learning rates; it acts from its next step on.

    A warm-up or a cycle has already set the rates that it begins with. What else the scheduler keeps for these groups
    (the peak of a cycle, a minimum) stays what its arguments say.

    Args:
        scheduler: The scheduler, with all it is composed of.
        first: The position of the first of these groups.
        rates: Their learning rates, which become their ``initial_lr`` too.
        apply_lambdas: Where a scheduler has functions, start at the rate times the function's present value.
    """
    groups = scheduler.optimizer.param_groups
    for position, rate in enumerate(rates, first):
        groups[position].update(lr=_detached(rate), initial_lr=_detached(rate))
        for each in active(scheduler) if apply_lambdas else ():
            if isinstance(each, (LambdaLR, MultiplicativeLR)):
                groups[position]["lr"] = groups[position]["lr"] * each.lr_lambdas[position](each.last_epoch)
    for each in nested(scheduler):
        if hasattr(each, "_last_lr"):
            each._last_lr = [*each._last_lr[:first], *(_detached(group["lr"]) for group in groups[first:])]


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
