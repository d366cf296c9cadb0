"""Learning rates under every supported scheduler: at every optimizer step those of a scheduler built by hand.

Here the matrix is run in full, with `PhaseRunner`; a part of it is run in Lightning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from finetuning_scheduler.core import PhaseRunner
from finetuning_scheduler.core.optim.schedulers import SUPPORTED_LR_SCHEDULERS
from tests.reference.networks import BATCHES_PER_EPOCH, Wrapped, build_network, mlp
from tests.reference.scheduler_matrix import (
    EPOCHS,
    MATRIX,
    METRICS,
    NESTED,
    NUMBERS,
    PHASE_LRS,
    ROWS,
    Case,
    Row,
    Seen,
    by_hand,
    factor,
    one,
    user_optimizer,
)


def by_runner(case: Case) -> list[Seen]:
    model = Wrapped(build_network(mlp))
    optimizer = user_optimizer(list(model.parameters()))
    runner = PhaseRunner(
        model,
        optimizer,
        case.schedule(),
        lr_schedulers=[case.row.make(optimizer)],
        restore_best=case.restore_best,
        apply_lambdas_new_pgs=case.apply_lambdas,
    )
    seen = []
    for epoch in range(EPOCHS):
        for _ in range(BATCHES_PER_EPOCH):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
            seen.append(Seen.of(runner.optimizer))
            runner.optimizer.step()
            if case.interval == "step":
                step(runner, epoch)
            runner.step()
        if case.interval == "epoch":
            step(runner, epoch)
        runner.epoch_end(METRICS[epoch])
    return seen


def step(runner: PhaseRunner, epoch: int) -> None:
    (scheduler,) = runner.lr_schedulers
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(METRICS[epoch])
    else:
        scheduler.step()


def test_every_supported_scheduler_has_a_row() -> None:
    assert ROWS.keys() == {kind.__name__ for kind in SUPPORTED_LR_SCHEDULERS}


@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX.keys())
def test_learning_rates_are_those_of_a_scheduler_built_by_hand(case: Case) -> None:
    assert by_runner(case) == by_hand(case)


@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX.keys())
def test_a_new_group_starts_at_exactly_the_learning_rate_of_its_phase(case: Case) -> None:
    seen = by_runner(case)
    starts = {len(step.lrs): step.lrs[-1] for step in reversed(seen)}
    assert starts[3] == PHASE_LRS[1]
    assert starts[4] == PHASE_LRS[2]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_among_the_arguments_holds_for_the_new_group_too(name: str, interval: str) -> None:
    case = Case(NUMBERS[name], interval, reinitialised=True)
    user = replace(case, row=replace(NUMBERS[name], factory=ROWS[name].make))
    assert by_runner(user) == by_hand(user)


@pytest.mark.parametrize("kind", [schedulers.LambdaLR, schedulers.MultiplicativeLR])
def test_a_group_under_a_new_scheduler_starts_at_its_own_lambda_if_asked(kind: type[LRScheduler]) -> None:
    case = Case(ROWS[kind.__name__], "step", reinitialised=True, apply_lambdas=True)
    case = replace(case, row=replace(case.row, reinit={"lr_lambda": [one, one, factor]}))
    seen = by_runner(case)
    assert seen == by_hand(case)
    assert next(step.lrs[2] for step in seen if len(step.lrs) == 3) == PHASE_LRS[1] * factor(0) != PHASE_LRS[1]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ROWS)
def test_a_new_optimizer_alone_changes_no_learning_rate(name: str, interval: str) -> None:
    case = Case(ROWS[name], interval, new_optimizer={"momentum": 0.9})
    assert [seen.lrs for seen in by_runner(case)] == [seen.lrs for seen in by_hand(case)]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ROWS)
def test_a_new_optimizer_with_a_learning_rate_leaves_those_of_existing_groups(name: str, interval: str) -> None:
    case = Case(ROWS[name], interval, new_optimizer={"momentum": 0.9, "lr": 0.7})
    assert [seen.lrs[:2] for seen in by_runner(case)] == [seen.lrs[:2] for seen in by_hand(case)]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ROWS)
def test_the_matrix_is_no_constant(name: str, interval: str) -> None:
    """A check of the test's own teeth: the scheduler acts on groups of each phase."""
    seen = by_hand(Case(ROWS[name], interval))
    assert len({step.lrs[0] for step in seen}) > 1
    constant = (schedulers.LambdaLR, schedulers.MultiplicativeLR, schedulers.ConstantLR, schedulers.SequentialLR)
    assert ROWS[name].kind in constant or len({step.lrs[2] for step in seen if len(step.lrs) > 2}) > 1


# PyTorch itself warns where a SequentialLR makes its first scheduler, a chain, start anew.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_nested_composition(interval: str) -> None:
    assert by_runner(Case(NESTED, interval)) == by_hand(Case(NESTED, interval))


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("kind", [schedulers.LambdaLR, schedulers.MultiplicativeLR])
def test_new_groups_take_the_last_lambda_if_asked(kind: type[LRScheduler], interval: str) -> None:
    row = Row(kind, {"lr_lambda": [one, one, factor]})
    case = Case(row, interval, apply_lambdas=True)
    assert by_runner(case) == by_hand(case)


FACTORIES: dict[str, dict[str, Any]] = {
    "get_constant_schedule": {},
    "get_constant_schedule_with_warmup": {"num_warmup_steps": 6},
    "get_linear_schedule_with_warmup": {"num_warmup_steps": 6, "num_training_steps": 20},
    "get_cosine_schedule_with_warmup": {"num_warmup_steps": 6, "num_training_steps": 20},
    "get_cosine_with_hard_restarts_schedule_with_warmup": {
        "num_warmup_steps": 6,
        "num_training_steps": 20,
        "num_cycles": 2,
    },
    "get_polynomial_decay_schedule_with_warmup": {"num_warmup_steps": 6, "num_training_steps": 20, "power": 2.0},
    "get_inverse_sqrt_schedule": {"num_warmup_steps": 6},
    "get_wsd_schedule": {"num_warmup_steps": 6, "num_stable_steps": 6, "num_decay_steps": 8},
    "get_cosine_with_min_lr_schedule_with_warmup": {"num_warmup_steps": 6, "num_training_steps": 20, "min_lr": 0.01},
}


@pytest.mark.parametrize("apply_lambdas", [True, False])
@pytest.mark.parametrize("name", FACTORIES)
def test_schedule_factories_of_transformers(name: str, apply_lambdas: bool) -> None:
    """They return a LambdaLR; a new group's entry is the last lambda if asked, else the constant 1."""
    transformers = pytest.importorskip("transformers")

    def make(optimizer: Optimizer) -> LRScheduler:
        return getattr(transformers.optimization, name)(optimizer, **FACTORIES[name])

    case = Case(Row(schedulers.LambdaLR, factory=make), "step", apply_lambdas=apply_lambdas)
    assert by_runner(case) == by_hand(case)
