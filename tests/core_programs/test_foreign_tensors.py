"""Under `PhaseRunner` too tensors in the optimizer that are not the model's go on training there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from .hearing import listening, the_only
from .loops import BATCHES, Loop, Model, by_hand, copied, differing, loop_of, phases

EPOCHS = 6


class WithTemperature(Model):
    """Its loss has a weight of its own, which a list hides from the model."""

    def build(self) -> None:
        self.hidden = [nn.Parameter(torch.ones(1))]

    @property
    def temperature(self) -> nn.Parameter:
        return self.hidden[0]

    def loss(self, batch: Tensor, batch_index: int) -> Tensor:
        return (self(batch) * self.temperature - batch.sum(dim=1, keepdim=True)).square().mean()


Layout = Callable[[list[Any], nn.Parameter], Optimizer]


def in_one_group(parameters: list[Any], foreign: nn.Parameter) -> Optimizer:
    return SGD([*parameters, foreign], lr=0.05, momentum=0.9)


def in_a_group_of_its_own(parameters: list[Any], foreign: nn.Parameter) -> Optimizer:
    return SGD([{"params": parameters}, {"params": [foreign], "lr": 0.01}], lr=0.05, momentum=0.9)


def in_a_group_in_front(parameters: list[Any], foreign: nn.Parameter) -> Optimizer:
    return AdamW([{"params": [foreign], "lr": 0.01}, {"params": parameters}], lr=0.05)


LAYOUTS = {
    layout.__name__.replace("_", " "): layout for layout in (in_one_group, in_a_group_of_its_own, in_a_group_in_front)
}


def values(model: WithTemperature) -> dict[str, Tensor]:
    return copied(model) | {"temperature": model.temperature.detach().clone()}


def start(layout: Layout, **options: Any) -> Loop:
    model = WithTemperature()
    return loop_of(model, layout(list(model.parameters()), model.temperature), phases(2, 4), **options)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_tensor_that_is_not_the_models_trains_in_every_phase_as_by_hand(layout: Layout) -> None:
    hand = WithTemperature()
    by_hand(hand, lambda parameters: layout(parameters, hand.temperature), phases(2, 4), epochs=EPOCHS)
    loop = start(layout)
    for _ in range(EPOCHS):
        loop.epoch()
    assert isinstance(loop.model, WithTemperature)
    assert differing(values(loop.model), values(hand)) == set()
    assert float(hand.temperature.detach()) != 1.0


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_one_notice_counts_it(layout: Layout) -> None:
    with listening() as said:
        start(layout)
    assert "1 " in the_only(each for each in said if "optimizer" in each.text).text


@pytest.mark.parametrize("best", [0, 2], ids=["best in phase 0", "best in phase 1"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_it_trains_on_after_the_best_state_is_restored(layout: Layout, best: int) -> None:
    loop = start(layout)
    model = loop.model
    assert isinstance(model, WithTemperature)
    kept = []
    for epoch in range(EPOCHS):
        for index, batch in enumerate(BATCHES):
            loop.batch(batch, index)
        kept.append(float(model.temperature.detach()))
        loop.runner.epoch_end(0.0 if epoch == best else 1.0 + epoch)
    assert loop.runner.phase == 2
    assert len(set(kept)) == EPOCHS


@pytest.mark.parametrize("epochs", [1, 3, 5], ids=["in phase 0", "in phase 1", "in phase 2"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(layout: Layout, epochs: int) -> None:
    whole, first, resumed = start(layout), start(layout), start(layout)
    for _ in range(EPOCHS):
        whole.epoch(1.0)
    for _ in range(epochs):
        first.epoch(1.0)
    assert isinstance(first.model, WithTemperature)
    assert isinstance(resumed.model, WithTemperature)
    assert isinstance(whole.model, WithTemperature)
    with torch.no_grad():
        resumed.model.temperature.copy_(first.model.temperature)
    saved = [copy.deepcopy(part.state_dict()) for part in (first.model, first.runner, first.runner.optimizer)]
    for part, state in zip((resumed.model, resumed.runner, resumed.runner.optimizer), saved, strict=True):
        part.load_state_dict(state)
    for _ in range(EPOCHS - epochs):
        resumed.epoch(1.0)
    assert differing(values(resumed.model), values(whole.model)) == set()
    assert "temperature" in differing(values(whole.model), values(WithTemperature()))
