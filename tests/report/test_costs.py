"""Step costs: close to what steps take, right by hand where that is easy, and honest where they are not counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from finetuning_scheduler.core import ModelView, Plan, Settings, prepare
from finetuning_scheduler.core.thaw import set_trainable
from finetuning_scheduler.report.costs import Costs, between, from_parameters, measured_at
from finetuning_scheduler.report.operations import costs_of

LAYERS = 12
SCHEDULE: dict[int, dict[str, Any]] = {
    0: {"params": ["head.*"]},
    1: {"params": [r"blocks\.11\..*"]},
    2: {"params": [r"blocks\.(8|9|10)\..*"]},
    3: {"params": [r"blocks\.[4-7]\..*"]},
    4: {"params": [r"blocks\.[0-3]\..*"]},
    5: {"params": ["table.*"]},
}
TOKENS = torch.randint(0, 500, (16, 64), generator=torch.Generator().manual_seed(1))


class Encoder(nn.Module):
    """Like BERT: a table, twelve blocks, a head."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.table = nn.Embedding(500, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(LAYERS)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        result: torch.Tensor = self.head(hidden.mean(1))
        return result


def plan_of(model: nn.Module, schedule: Any) -> tuple[Plan, ModelView]:
    view = ModelView.of(model)
    return prepare(schedule, view, SGD(model.parameters(), lr=0.1), Settings()).plan, view


def seconds(model: nn.Module) -> float:
    """Of a forward and backward pass, on this thread's clock."""
    model.zero_grad()
    began = time.thread_time()
    model(TOKENS).square().mean().backward()
    return time.thread_time() - began


def measured(model: nn.Module, plan: Plan, rounds: int = 6) -> list[float]:
    """The least of several passes of each phase, which take turns, relative to those that train everything."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parameters = dict(model.named_parameters())
    states: list[Sequence[str]] = [tuple(parameters), *(tuple(phase.trainable) for phase in plan.phases)]
    least = [float("inf")] * len(states)
    try:
        for _ in range(rounds):
            for place, trainable in enumerate(states):
                set_trainable(parameters.values(), trainable=False)
                set_trainable((parameters[name] for name in trainable), trainable=True)
                least[place] = min(least[place], seconds(model))
    finally:
        torch.set_num_threads(threads)
    return [each / least[0] for each in least[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("counted", [True, False], ids=["operations", "parameters"])
def test_costs_of_a_twelve_layer_encoder_are_close_to_those_measured(counted: bool) -> None:
    torch.manual_seed(0)
    model = Encoder()
    plan, view = plan_of(model, SCHEDULE)
    costs = costs_of(plan, view, (TOKENS,)) if counted else from_parameters(plan, view)
    assert costs.basis == ("flops" if counted else "parameters")
    found = measured(model, plan)
    print([round(each, 3) for each in found], [round(each, 3) for each in costs.steps])
    assert list(costs.steps) == pytest.approx(found, rel=0.25)
    assert list(costs.steps) == sorted(costs.steps)
    assert costs.steps[-1] == pytest.approx(1, rel=0.01)
    # With all of the prefix's outputs at hand the forward pass of the trained blocks is left.
    assert costs.saved[0] > 0.99
    assert costs.saved[1] == pytest.approx(
        11 / 13.75, abs=0.01
    )  # 12 forward, 1.75 backward: the input needs no gradient
    assert costs.saved[-1] == 0


def by_hand(*layers: tuple[int, int], rows: int) -> int:
    """A matrix product takes two operations for each row and weight."""
    return sum(2 * rows * into * out for into, out in layers)


def test_operations_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    plan, view = plan_of(model, {0: {"params": ["4.*"]}, 1: {"params": ["2.weight"]}, 2: {"params": ["0.*", "2.bias"]}})
    first, second, third = (by_hand(shape, rows=5) for shape in ((4, 6), (6, 8), (8, 2)))
    forward = first + second + third
    full = forward + (second + third) + forward  # gradients of inputs but the first, gradients of weights
    costs = costs_of(plan, view, torch.zeros(5, 4))
    expected = [forward + third, forward + third + (third + second), full]
    assert list(costs.steps) == pytest.approx([each / full for each in expected])
    assert list(costs.saved) == pytest.approx([(first + second) / expected[0], first / expected[1], 0])


class Skipping(nn.Module):
    """The head reads what the frozen part computes, and a frozen part behind what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(4, 4)
        self.trained = nn.Linear(4, 4)
        self.above = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        low = self.low(x)
        return {"loss": self.above(self.trained(low) + low).sum(), "other": low}


def test_what_is_frozen_behind_what_is_trained_is_not_reusable() -> None:
    model = Skipping()
    plan, view = plan_of(model, {0: {"params": ["trained.*"]}})
    costs = costs_of(plan, view, {"x": torch.zeros(3, 4)})
    each = by_hand((4, 4), rows=3)
    assert costs.saved[0] == pytest.approx(each / (3 * each + 2 * each))  # backward: inputs of above, trained's weights


class Training(nn.Module):
    """As a LightningModule: its training step takes the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layer(x), y)


class Deciding(Training):
    """Looks at values, which are not there."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) if batch[0].sum() > 0 else batch[0].sum()


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


BATCH = (torch.ones(3, 4), torch.ones(3, 1))
REFUSED = {
    "values": (Deciding(), BATCH, "meta tensors"),
    "no operations": (Adding(), torch.ones(3, 4), "none of the model's operations is one that PyTorch counts"),
    "another batch": (Training(), torch.ones(3, 7), "could not be used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_counted_is_estimated_and_the_reason_said(name: str) -> None:
    model, batch, reason = REFUSED[name]
    plan, view = plan_of(model, {0: {"params": [".*"]}})
    costs = costs_of(plan, view, batch)
    assert costs.basis == "parameters"
    assert reason in costs.notes[0]
    assert "estimates from shares of parameters" in costs.notes[1]


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).eval()
    model[3].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    plan, view = plan_of(model, {0: {"params": ["3.*"]}, 1: {"params": ["0.*"]}})
    assert costs_of(plan, view, torch.ones(3, 4)).basis == "flops"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, False, False]
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_tables_cost_nothing_unless_they_are_the_last_layer_too() -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.wte = nn.Embedding(100, 4)
            self.layer = nn.Linear(4, 4, bias=False)
            self.out = nn.Linear(4, 100, bias=False)
            if tied:
                self.out.weight = self.wte.weight

    def cost(tied: bool) -> Costs:
        plan, view = plan_of(Tied(tied), {0: {"params": ["layer.weight"]}})
        return from_parameters(plan, view)

    assert cost(False).steps[0] == pytest.approx((416 + 400 + 16) / (3 * 416))
    assert cost(True).steps[0] == pytest.approx((416 + 16) / (3 * 416 - 400))


def test_of_many_phases_some_are_counted() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(120)))
    plan, view = plan_of(model, {number: {"params": [f"{119 - number}.weight"]} for number in range(120)})
    costs = costs_of(plan, view, torch.ones(3, 4))
    assert "counted in 48 of 120 phases" in costs.notes[1]
    exact = [(120 + 2 * (number + 1) - 1) / (360 - 1) for number in range(120)]
    assert list(costs.steps) == pytest.approx(exact, rel=1e-6)


def test_phases_between_those_measured() -> None:
    assert measured_at(3, 5) == [0, 1, 2]
    assert measured_at(100, 4) == [0, 33, 66, 99]
    assert list(between({0: 1.0, 2: 3.0, 3: 3.0}, [10, 11, 20, 20])) == pytest.approx([1.0, 1.2, 3.0, 3.0])
