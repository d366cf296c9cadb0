"""By hand: what each LR scheduler of PyTorch needs for another parameter group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    LambdaLR,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import SWALR

Group = dict[str, Any]


def grow(scheduler: Any, optimizer: Optimizer, apply_lambdas: bool = False) -> None:
    """Give a scheduler's per-group entries one for the optimizer's last group, which was just added.

    The group follows the last lambda from the next step on; with ``apply_lambdas``, it takes its present value at once.
    """
    first, group = optimizer.param_groups[0], optimizer.param_groups[-1]
    _extend(scheduler, group, first)
    if apply_lambdas and hasattr(scheduler, "lr_lambdas"):
        group["lr"] = group["lr"] * scheduler.lr_lambdas[-1](scheduler.last_epoch)
    scheduler._last_lr.append(group["lr"])


def _extend(scheduler: Any, group: Group, first: Group) -> None:
    if isinstance(scheduler, (SequentialLR, ChainedScheduler)):
        for part in scheduler._schedulers:
            _extend(part, group, first)
    elif isinstance(scheduler, (LambdaLR, MultiplicativeLR)):
        scheduler.base_lrs.append(group["initial_lr"])
        scheduler.lr_lambdas.append(scheduler.lr_lambdas[-1])
    else:
        extend = _EXTENSIONS.get(type(scheduler), _extend_base_lrs)
        extend(scheduler, group, first)


def _extend_base_lrs(scheduler: Any, group: Group, first: Group) -> None:
    scheduler.base_lrs.append(group["initial_lr"])


def _extend_plateau(scheduler: Any, group: Group, first: Group) -> None:
    scheduler.min_lrs.append(scheduler.min_lrs[-1])


def _extend_one_cycle(scheduler: Any, group: Group, first: Group) -> None:
    scheduler.base_lrs.append(group["initial_lr"])
    ratio = group["initial_lr"] / first["initial_lr"]
    group.update(max_lr=first["max_lr"] * ratio, min_lr=first["min_lr"] * ratio)
    group.update({key: first[key] for key in ("max_momentum", "base_momentum", "momentum")})


def _extend_cyclic(scheduler: Any, group: Group, first: Group) -> None:
    ratio = group["initial_lr"] / scheduler.base_lrs[0]
    scheduler.base_lrs.append(group["initial_lr"])
    scheduler.max_lrs.append(scheduler.max_lrs[0] * ratio)
    scheduler.base_momentums.append(scheduler.base_momentums[0])
    scheduler.max_momentums.append(scheduler.max_momentums[0])
    group["momentum"] = first["momentum"]


def _extend_averaging(scheduler: Any, group: Group, first: Group) -> None:
    scheduler.base_lrs.append(group["initial_lr"])
    group["swa_lr"] = first["swa_lr"] * (group["initial_lr"] / first["initial_lr"])


_EXTENSIONS: dict[type, Callable[[Any, Group, Group], None]] = {
    ReduceLROnPlateau: _extend_plateau,
    OneCycleLR: _extend_one_cycle,
    CyclicLR: _extend_cyclic,
    SWALR: _extend_averaging,
}
