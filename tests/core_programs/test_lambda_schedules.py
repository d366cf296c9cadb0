"""Under `PhaseRunner` too LambdaLR and MultiplicativeLR act on the groups that phases add."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiplicativeLR

from .loops import BATCHES, HEAD, LOWER, OPTIMIZERS, UPPER, UPPER_LR, Model, loop_of, phases

FACTORS = (1.0, 0.9, 0.5, 1.25, 0.8, 1.1, 0.7)
PHASE_1_EPOCH, EPOCHS = 2, 6


def factor(count: int) -> float:
    return FACTORS[count]


def at_once(lr: float, count: int) -> float:
    """LambdaLR: the rate is the group's own times the lambda."""
    return lr * factor(count)


def step_by_step(lr: float, count: int) -> float:
    """MultiplicativeLR: each step since the group entered has multiplied its rate."""
    for each in range(PHASE_1_EPOCH + 1, count + 1):
        lr = lr * factor(each)
    return lr


@pytest.mark.parametrize("apply_lambdas", [False, True], ids=["enters at its rate", "enters scaled"])
@pytest.mark.parametrize("optimizer_over", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize(
    ("kind", "rate"), [(LambdaLR, at_once), (MultiplicativeLR, step_by_step)], ids=["LambdaLR", "MultiplicativeLR"]
)
def test_a_new_group_follows_the_lambda_from_the_next_scheduler_step_on(
    kind: Callable[..., LRScheduler],
    rate: Callable[[float, int], float],
    optimizer_over: Callable[..., Optimizer],
    apply_lambdas: bool,
) -> None:
    model = Model()
    optimizer = optimizer_over(model.parameters())
    scheduler = kind(optimizer, factor)
    schedule = phases(PHASE_1_EPOCH, parameters=(HEAD, UPPER + LOWER))
    loop = loop_of(model, optimizer, schedule, lr_schedulers=[scheduler], apply_lambdas_new_pgs=apply_lambdas)
    seen: dict[int, float] = {}
    for epoch in range(EPOCHS):
        if epoch >= PHASE_1_EPOCH:
            seen[epoch] = optimizer.param_groups[1]["lr"]
        for batch in BATCHES:
            loop.batch(batch)
        scheduler.step()
        loop.runner.epoch_end()
    entry = UPPER_LR * factor(PHASE_1_EPOCH) if apply_lambdas else UPPER_LR
    scaled = entry if kind is MultiplicativeLR else UPPER_LR
    assert seen == {PHASE_1_EPOCH: entry} | {count: rate(scaled, count) for count in range(PHASE_1_EPOCH + 1, EPOCHS)}
