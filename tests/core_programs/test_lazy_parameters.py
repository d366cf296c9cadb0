"""Parameters that get their shape in the first forward pass are frozen, thawed and counted like others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from .hearing import listening, warnings_in
from .loops import (
    BATCHES,
    HEAD,
    LOWER,
    OPTIMIZERS,
    UPPER,
    Loop,
    Model,
    by_hand,
    copied,
    differing,
    loop_of,
    phases,
    trainable,
)

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")

EPOCHS = 6


class LazyHead(Model):
    def build(self) -> None:
        self.head = nn.LazyLinear(1)  # type: ignore[assignment]


class LazyLower(Model):
    def build(self) -> None:
        self.lower = nn.LazyLinear(4)  # type: ignore[assignment]


class LazyThroughout(Model):
    def build(self) -> None:
        self.lower, self.upper, self.head = nn.LazyLinear(4), nn.LazyLinear(4), nn.LazyLinear(1)  # type: ignore[assignment]


class LazyNorm(Model):
    """A lazy normalisation has lazy buffers, too."""

    def build(self) -> None:
        self.norm = nn.LazyBatchNorm1d()

    def trunk(self, x: Tensor) -> Tensor:
        return self.norm(super().trunk(x))


KINDS = (LazyHead, LazyLower, LazyThroughout, LazyNorm)
kinds = pytest.mark.parametrize("kind", KINDS)
SCHEDULE = phases(2, 4)
WITH_NORM = phases(2, 4, parameters=(HEAD, (*UPPER, "norm.weight", "norm.bias"), LOWER))


def schedule_for(kind: type[Model]) -> Any:
    return WITH_NORM if kind is LazyNorm else SCHEDULE


def start(kind: type[Model], optimizer_over: Callable[..., Optimizer] = OPTIMIZERS["SGD"], **options: Any) -> Loop:
    model = kind()
    torch.manual_seed(5)  # what is lazy draws its values in the first forward pass
    return loop_of(model, optimizer_over(list(model.parameters())), schedule_for(kind), **options)


def count(model: nn.Module, names: set[str]) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)


@kinds
def test_lazy_parameters_are_frozen_and_thawed_before_they_have_a_shape(kind: type[Model]) -> None:
    loop = start(kind)
    assert any(isinstance(parameter, UninitializedParameter) for parameter in loop.model.parameters())
    assert trainable(loop.model) == set(HEAD)
    loop.runner.thaw_to(1)
    assert trainable(loop.model) == {*HEAD, *schedule_for(kind)[1]["params"]}


@pytest.mark.parametrize("optimizer_over", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@kinds
def test_a_loop_over_lazy_parameters_trains_as_by_hand(
    kind: type[Model], optimizer_over: Callable[..., Optimizer]
) -> None:
    hand = kind()
    torch.manual_seed(5)
    by_hand(hand, optimizer_over, schedule_for(kind), epochs=EPOCHS)
    loop = start(kind, optimizer_over)
    for _ in range(EPOCHS):
        loop.epoch()
    assert differing(copied(loop.model), copied(hand)) == set()


@kinds
def test_they_are_counted_when_they_have_a_shape(kind: type[Model]) -> None:
    with listening() as said:
        loop = start(kind)
        for _ in range(EPOCHS):
            loop.epoch()
    model, schedule = loop.model, schedule_for(kind)
    total = sum(parameter.numel() for parameter in model.parameters())
    thawed = set(schedule[0]["params"])
    for number, transition in enumerate(loop.transitions, start=1):
        thawed |= set(schedule[number]["params"])
        assert transition.trainable == count(model, thawed)
        assert transition.share == pytest.approx(count(model, thawed) / total)
        (line,) = [each.text for each in said if f"Phase {number - 1} -> {number}" in each.text]
        assert re.search(rf"\b{count(model, thawed)} parameters trainable", line), line
    assert len(loop.transitions) == 2
    assert [each.text for each in warnings_in(said)] == []


@pytest.mark.parametrize("best", [0, 1, 2], ids=["first epoch", "last of phase 0", "phase 1"])
@kinds
def test_the_best_state_comes_back(kind: type[Model], best: int) -> None:
    loop = start(kind)
    kept = []
    for epoch in range(4):
        for index, batch in enumerate(BATCHES):
            loop.batch(batch, index)
        kept.append(copied(loop.model))
        loop.runner.epoch_end(0.0 if epoch == best else 1.0 + epoch)
    assert loop.runner.phase == 2
    assert differing(copied(loop.model), kept[best]) == set()


@kinds
def test_a_generated_schedule_holds_them(kind: type[Model]) -> None:
    model = kind()
    loop = loop_of(model, OPTIMIZERS["SGD"](model.parameters()), None)
    names = [name for phase in loop.runner.schedule.phases for name in phase.params]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_lazy_parameters_that_came_frozen_stay_out_of_a_generated_schedule() -> None:
    model = LazyLower()
    for parameter in model.lower.parameters():
        parameter.requires_grad = False
    loop = loop_of(model, OPTIMIZERS["SGD"](model.parameters()), None)
    assert {name for phase in loop.runner.schedule.phases for name in phase.params} == {*HEAD, *UPPER}
