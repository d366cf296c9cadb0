"""Planned bytes are those of the tensors that a step leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop

from finetuning_scheduler.core import ModelView, PhaseRunner, Settings, prepare
from finetuning_scheduler.report.costs import from_parameters
from finetuning_scheduler.report.plan import plan_report
from finetuning_scheduler.report.shapes import MemoryPlan, PlanReport

SCHEDULE: dict[int, dict[str, Any]] = {
    0: {"params": ["head.*"]},
    1: {"params": ["body.1.*"], "lr": 0.01},
    2: {"params": ["body.0.*", "table.*"], "lr": 0.01},
}
NEW_SGD = {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}}
MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.1),
    "SGD with momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: Adam(parameters, lr=0.1),
    "AdamW with amsgrad": lambda parameters: AdamW(parameters, lr=0.1, amsgrad=True),
    "fused AdamW": lambda parameters: AdamW(parameters, lr=0.1, fused=True),
    "a rate in a tensor": lambda parameters: Adam(parameters, lr=torch.tensor(0.1), foreach=False),
    "NAdam": lambda parameters: NAdam(parameters, lr=0.1),
    "RMSprop": lambda parameters: RMSprop(parameters, lr=0.1, momentum=0.5, centered=True),
    "Adagrad": lambda parameters: Adagrad(parameters, lr=0.1),
    "Adafactor": lambda parameters: Adafactor(parameters, lr=0.1),
    "options of a group": lambda parameters: SGD(
        [
            {"params": [p for p in parameters if p.dim() > 1], "momentum": 0.9},
            {"params": [p for p in parameters if p.dim() < 2]},
        ],
        lr=0.1,
    ),
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(self.table(tokens)))
        return result


def planned(model: nn.Module, optimizer: Optimizer, schedule: Any, precision: str = "32-true") -> PlanReport:
    view, settings = ModelView.of(model), Settings()
    prepared = prepare(schedule, view, optimizer, settings)
    costs = from_parameters(prepared.plan, view)
    return plan_report(prepared, view, optimizer, settings, costs, precision=precision, buffers=model.buffers())


def measured(model: nn.Module, optimizer: Optimizer) -> MemoryPlan:
    """Make a step, then count what there is."""
    model(torch.arange(8)).float().square().mean().backward()
    optimizer.step()
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    state = sum(
        value.nbytes for held in optimizer.state.values() for value in held.values() if isinstance(value, torch.Tensor)
    )
    return MemoryPlan(weights=weights, gradients=gradients, optimizer_state=state, total=weights + gradients + state)


@pytest.mark.parametrize("name", MAKERS)
def test_bytes_of_every_phase(name: str) -> None:
    assert_measured(Network(), MAKERS[name], SCHEDULE)


def test_bytes_of_a_new_optimizer() -> None:
    assert_measured(Network(), MAKERS["Adam"], SCHEDULE | {1: {**SCHEDULE[1], "new_optimizer": NEW_SGD}})


def test_bytes_of_matrices() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
    schedule = {0: {"params": ["2.*"]}, 1: {"params": ["1.*", "0.*"], "lr": 0.1}}
    assert_measured(model, lambda parameters: Muon(parameters, lr=0.1), schedule)


def assert_measured(
    model: nn.Module, make: Callable[[Any], Optimizer], schedule: Any, precision: str = "32-true"
) -> None:
    report = planned(model, make(list(model.parameters())), schedule, precision)
    runner = PhaseRunner(model, make(list(model.parameters())), schedule, restore_best=False)
    for phase in report.phases:
        runner.thaw_to(phase.phase)
        assert phase.memory == measured(model, runner.optimizer)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
        ("bf16-mixed", torch.float32),
        ("16-mixed", torch.float32),
    ],
)
def test_bytes_in_a_precision(precision: str, dtype: torch.dtype) -> None:
    """True precisions convert weights, as Lightning does; mixed ones leave them."""
    model = Network()
    report = planned(model, Adam(model.parameters(), lr=0.1), SCHEDULE, precision)
    converted = model.to(dtype)
    runner = PhaseRunner(converted, Adam(converted.parameters(), lr=0.1), SCHEDULE, restore_best=False)
    for phase in report.phases:
        runner.thaw_to(phase.phase)
        assert phase.memory == measured(converted, runner.optimizer)


def test_full_fine_tuning_is_told_for_comparison() -> None:
    model = Network()
    report = planned(model, Adam(model.parameters(), lr=0.1), SCHEDULE)
    assert report.full_memory == measured(model, Adam(model.parameters(), lr=0.1))


class Looking(SGD):
    """Looks at values, and keeps one of them."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and float(parameter.grad.sum()) < 1e30:
                    self.state[parameter]["seen"] = torch.zeros(3)
        return super().step(closure)


class Failing(SGD):
    def step(self, closure: Any = None) -> Any:
        raise ZeroDivisionError


def test_an_optimizer_that_looks_at_values_gets_some() -> None:
    assert_measured(Network(), lambda parameters: Looking(parameters, lr=0.1), SCHEDULE)


def test_what_cannot_be_told_is_said_to_be_unknown() -> None:
    model = Network()
    report = planned(model, Failing(model.parameters(), lr=0.1), SCHEDULE)
    assert [phase.memory.optimizer_state for phase in report.phases] == [None, None, None]
    assert "optimizer state unknown" in str(report)


def test_models_of_any_size_take_no_memory() -> None:
    """A layer of 400 GB."""
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(320_000, 320_000, device="meta"))
    report = planned(model, AdamW(model.parameters(), lr=0.1), {0: {"params": ["1.*"]}})
    assert report.phases[0].memory.gradients == 4 * (320_000**2 + 320_000)
    assert report.phases[0].memory.optimizer_state == pytest.approx(2 * report.phases[0].memory.gradients)
