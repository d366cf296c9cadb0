"""Modules that get their shape in the first forward pass are fine-tuned like others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.core_programs.loops import HEAD, LOWER, UPPER, copied, differing, momentum_sgd, trainable

from ..core_programs.hearing import warnings_in
from .toys import Fit, Toy, by_hand, fit, phases

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")

SEED = 5


class Lazy(Toy):
    """What is lazy draws its values in the first forward pass: the seed is set when training starts."""

    def configure_optimizers(self) -> Any:
        torch.manual_seed(SEED)
        return super().configure_optimizers()


class LazyHead(Lazy):
    def build(self) -> None:
        self.head = nn.LazyLinear(1)  # type: ignore[assignment]


class LazyLower(Lazy):
    def build(self) -> None:
        self.lower = nn.LazyLinear(4)  # type: ignore[assignment]


class LazyThroughout(Lazy):
    def build(self) -> None:
        self.lower, self.upper, self.head = nn.LazyLinear(4), nn.LazyLinear(4), nn.LazyLinear(1)  # type: ignore[assignment]


class LazyNorm(Lazy):
    """A lazy normalisation has lazy buffers, too."""

    def build(self) -> None:
        self.norm = nn.LazyBatchNorm1d()

    def trunk(self, x: Tensor) -> Tensor:
        return self.norm(super().trunk(x))


class DryRun(LazyThroughout):
    """The user makes a forward pass before the fit, as PyTorch recommends."""

    def __init__(self, scores: Any = None) -> None:
        super().__init__(scores)
        torch.manual_seed(SEED)
        self(torch.zeros(2, 3))


kinds = pytest.mark.parametrize("kind", [LazyHead, LazyLower, LazyThroughout, LazyNorm, DryRun])


def schedule_for(kind: type[Lazy]) -> Any:
    upper = (*UPPER, "norm.weight", "norm.bias") if kind is LazyNorm else UPPER
    return phases(2, 4, parameters=(HEAD, upper, LOWER))


@kinds
def test_a_fit_trains_as_by_hand(kind: type[Lazy], tmp_path: Path) -> None:
    hand = kind()
    torch.manual_seed(SEED)
    by_hand(hand, momentum_sgd, schedule_for(kind))
    done = fit(kind(), tmp_path, schedule_for(kind))
    assert differing(done.recorder.weights[-1], copied(hand)) == set()
    assert [each.text for each in warnings_in(done.said)] == []


@kinds
def test_transitions_count_what_has_a_shape_by_then(kind: type[Lazy], tmp_path: Path) -> None:
    schedule = schedule_for(kind)
    done = fit(kind(), tmp_path, schedule)
    thawed = set(schedule[0]["params"])
    for number in (1, 2):
        thawed |= set(schedule[number]["params"])
        size = sum(parameter.numel() for name, parameter in done.module.named_parameters() if name in thawed)
        (line,) = [each.text for each in done.said if f"Phase {number - 1} -> {number}" in each.text]
        assert re.search(rf"\b{size} parameters trainable", line), line


class LooksAtPhase1:
    """Keeps the weights with which phase 1 begins."""

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.current_epoch == 2 and batch_idx == 0:
            self.at_phase_1 = copied(self)


@kinds
def test_the_best_checkpoint_comes_back(kind: type[Lazy], tmp_path: Path) -> None:
    looking = type(f"Looking{kind.__name__}", (LooksAtPhase1, kind), {})
    module = looking(scores=(1.0, 2.0, 3.0))
    done = fit(module, tmp_path, schedule_for(kind), epochs=3, restore_best=True)
    best, last = done.recorder.weights[:2]
    assert set(HEAD) <= differing(best, last)
    assert differing(module.at_phase_1, best) == set()


@kinds
def test_after_a_fit_of_phase_0_all_is_trainable_as_it_came(kind: type[Lazy], tmp_path: Path) -> None:
    done: Fit = fit(kind(), tmp_path, {0: {"params": list(HEAD)}}, epochs=1)
    assert trainable(done.module) == {name for name, _ in done.module.named_parameters()}


@kinds
def test_the_optimizer_steps_lazy_parameters_from_the_first_batch(kind: type[Lazy], tmp_path: Path) -> None:
    done = fit(kind(), tmp_path, schedule_for(kind), epochs=1)
    parameters = dict(done.module.named_parameters())
    assert all(parameters[name] in done.optimizer.state for name in HEAD)
