"""Steps that leave traces besides their result: each is there as often as without reuse."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from .models import CASES, Case, Data, Encoder, text
from .runs import assert_same, run

LOSS = CASES["encoder"].loss
PHASES = ("head.*", r"blocks\.3\..*")
SEEN_BY_ALL: list[float] = []


@dataclass
class Meter:
    """A counter as people write them."""

    count: int = 0
    values: list[float] = field(default_factory=list)
    by_kind: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {"loss": {"train": []}})

    def update(self, value: float) -> None:
        self.count += 1
        self.values.append(value)
        self.by_kind["loss"]["train"].append(value)


Loss = Callable[[nn.Module, Data], Tensor]


def by_object() -> tuple[Loss, Callable[[], Any]]:
    meter = Meter()

    def loss(model: nn.Module, data: Data) -> Tensor:
        result = LOSS(model, data)
        meter.update(1.0)
        return result

    return loss, lambda: (meter.count, len(meter.values), len(meter.by_kind["loss"]["train"]))


def by_containers() -> tuple[Loss, Callable[[], Any]]:
    seen: tuple[Any, ...] = ([], Counter(), defaultdict(list), deque(maxlen=1000), torch.zeros(()), numpy.zeros(1))

    def loss(model: nn.Module, data: Data) -> Tensor:
        seen[0].append([1.0])
        seen[1]["steps"] += 1
        seen[2]["steps"].append(1)
        seen[3].append(1)
        seen[4].add_(1)
        seen[5][0] += 1
        return LOSS(model, data)

    return loss, lambda: (len(seen[0]), seen[1], dict(seen[2]), len(seen[3]), seen[4].item(), seen[5].item())


def by_a_variable() -> tuple[Loss, Callable[[], Any]]:
    steps = 0

    def loss(model: nn.Module, data: Data) -> Tensor:
        nonlocal steps
        steps += 1
        return LOSS(model, data)

    return loss, lambda: steps


def by_a_global_list() -> tuple[Loss, Callable[[], Any]]:
    SEEN_BY_ALL.clear()

    def loss(model: nn.Module, data: Data) -> Tensor:
        SEEN_BY_ALL.append(1.0)
        return LOSS(model, data)

    return loss, lambda: len(SEEN_BY_ALL)


def by_generators() -> tuple[Loss, Callable[[], Any]]:
    own = torch.Generator().manual_seed(0), numpy.random.default_rng(0), random.Random(0), numpy.random.RandomState(0)

    def loss(model: nn.Module, data: Data) -> Tensor:
        scale = float(torch.rand((), generator=own[0])) + own[1].random() + own[2].random() + own[3].random()
        return LOSS(model, data) * scale

    return loss, lambda: own[2].getstate()


def on_the_module() -> tuple[Loss, Callable[[], Any]]:
    found: dict[str, Meter] = {}

    def loss(model: nn.Module, data: Data) -> Tensor:
        found["meter"] = model.__dict__.setdefault("meter", Meter())
        found["meter"].update(1.0)
        return LOSS(model, data)

    return loss, lambda: found["meter"].values


def by_an_iterator() -> tuple[Loss, Callable[[], Any]]:
    numbers: Iterator[int] = itertools.cycle([1, 2, 3])

    def loss(model: nn.Module, data: Data) -> Tensor:
        return LOSS(model, data) * next(numbers)

    return loss, lambda: next(numbers)


KINDS = [
    by_object, by_containers, by_a_variable, by_a_global_list, by_generators, on_the_module, by_an_iterator,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_trace_is_left_once_a_step(kind: Callable[[], tuple[Loss, Callable[[], Any]]]) -> None:
    def outcome(mode: str) -> tuple[Any, Any]:
        loss, left = kind()
        case = Case(lambda: Encoder(blocks=4), text, loss, PHASES)
        return run(case, mode), left()

    (plain, left_plain), (reused, left) = outcome("off"), outcome("all")
    assert_same(reused, plain)
    assert left == left_plain
    if kind in (by_object, by_containers, by_a_variable, by_a_global_list, on_the_module):
        assert reused.hits("train") > 0


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Encoder(blocks=4), Encoder(blocks=4)
        self.teacher.requires_grad_(False)


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_that_a_step_changes_are_changed_once(through_data: bool) -> None:
    def loss(model: nn.Module, data: Data) -> Tensor:
        with torch.no_grad():
            for own, other in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                (own.data if through_data else own).mul_(0.9).add_(other, alpha=0.1)
            taught = model.teacher(data["input_ids"])
        return LOSS(model.student, data) + (model.student(data["input_ids"]) - taught).square().mean()

    case = Case(Pair, text, loss, (r"student\.head.*", r"student\.blocks\.3\..*"))
    plain, reused = run(case, "off"), run(case, "all")
    assert_same(reused, plain)
    assert reused.hits("train") == 0
    assert any("the step changes" in (account.reason or "") for account in reused.accounts)
