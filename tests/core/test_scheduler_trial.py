"""LR schedulers of other makes are tried out on copies; what is tried stays as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from finetuning_scheduler.core.optim.growth import growth_failure


class AroundAnother:
    """Leaves the work to a scheduler of PyTorch's inside, as timm's plateau scheduler does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.inside = ReduceLROnPlateau(optimizer, patience=0, factor=0.1)

    def step(self, epoch: int, metric: float) -> None:
        self.inside.step(metric)


def worsen_twice(scheduler: Any) -> None:
    scheduler.step(0, 1.0)
    scheduler.step(1, 2.0)


def test_a_scheduler_inside_a_foreign_one_is_tried_on_a_copy_too() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler: Any = AroundAnother(optimizer)
    before = scheduler.inside.state_dict()
    assert growth_failure(scheduler, worsen_twice) is None
    assert scheduler.inside.state_dict() == before
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    worsen_twice(scheduler)
    assert optimizer.param_groups[0]["lr"] < 0.5, "the steps that were tried change the rate"


def test_without_new_groups_the_answer_is_why_a_scheduler_cannot_be_tried() -> None:
    scheduler: Any = AroundAnother(SGD([nn.Parameter(torch.zeros(1))], lr=0.5))
    assert growth_failure(scheduler, worsen_twice, new_groups=0) is None
    failure = growth_failure(scheduler, lambda each: each.step(), new_groups=0)
    assert failure is not None
    assert failure.startswith("TypeError")
