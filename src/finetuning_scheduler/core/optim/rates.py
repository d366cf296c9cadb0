"""Does the optimizer in force take the learning rates that the phases give it?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.optim import Optimizer

from ...errors import Problem
from ..schedule.model import Phase
from .param_groups import PlannedGroup, like
from .stand_ins import OptimizerFactory, copies_of, factory_of


def rate_problems(phases: Iterable[tuple[Phase, Sequence[PlannedGroup]]], optimizer: Optimizer) -> Iterator[Problem]:
    """Find learning rates that the optimizer in force does not take.

    One that sets its steps itself has none; one that demands the same of all groups refuses others, which a stand-in
    tells. It is tried once, when two rates differ.

    Args:
        phases: Each phase with the groups that it adds; those of phase 0 are the user's.
        optimizer: The optimizer of phase 0.
    """
    make, tried = copies_of(optimizer), False
    rates: dict[float, None] = {}  # in the order in which they come up
    for number, (phase, groups) in enumerate(phases):
        if phase.new_optimizer is not None:
            make, tried = factory_of(phase.new_optimizer), False
        new = [group.lr for group in groups]
        rates.update(dict.fromkeys(rate for rate in new if rate is not None))
        if number == 0:
            continue
        keys = [key for key in ("lr", "lr_decay") if getattr(phase, key) is not None]
        keys += ["lr_warmup_steps"] if phase.lr_warmup_steps else []
        if keys and None in new:
            message = f"{_name(make)} sets its steps itself (lr=None), so that `{'`, `'.join(keys)}` cannot be used"
            yield Problem(message, fix="Leave it out, or give the optimizer a learning rate.", phase=number)
        warming = [0.0] if phase.lr_warmup_steps and rates else []
        if None in new or tried or len({*rates, *warming}) < 2:
            continue
        tried = True
        if refusal := _refusal(make, [*rates, *warming][:2]):
            message = f"{_name(make)} does not take groups with different learning rates ({refusal})"
            fix = "Give all phases the learning rate of phase 0: base_max_lr=None and no `lr`."
            yield Problem(message, fix=fix, phase=number)


def _name(make: OptimizerFactory) -> str:
    return type(make(1)).__name__


def _refusal(make: OptimizerFactory, rates: Sequence[float]) -> str | None:
    """Say why an optimizer does not step groups at these rates, though it steps them at the first of them."""

    def failure(rates: Sequence[float]) -> str | None:
        optimizer = make(len(rates))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = like(group["lr"], rate)
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        except Exception as error:  # noqa: BLE001  # whatever a foreign class raises is the reason
            return f"{type(error).__name__}: {error}"
        return None

    distinct = list(dict.fromkeys(rates))
    return failure(distinct) if failure(distinct[:1] * len(distinct)) is None else None
