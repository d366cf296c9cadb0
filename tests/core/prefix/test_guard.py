"""Frozen weights that move all the same are noticed, whatever moves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from finetuning_scheduler.core import PhaseRunner
from finetuning_scheduler.core.prefix.guard import Guard


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name}


def frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Conv1d(5, 2, 1), nn.Embedding(4, 3).double())
    return model.requires_grad_(False).eval()


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "in place": lambda model: model[0].weight.mul_(2),
    "through .data": lambda model: model[0].weight.data.mul_(2),
    "through .data, doubles": lambda model: model[3].weight.data.mul_(2),
    "a buffer through .data": lambda model: model[1].running_mean.data.add_(1),
    "a buffer replaced": lambda model: setattr(model[1], "running_mean", torch.ones(5)),
    "other memory": lambda model: setattr(model[0].weight, "data", model[0].weight * 2),
    "another parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(5, 3))),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_is_seen_at_once_and_named(how: str) -> None:
    model = frozen()
    guard = Guard(modules_of(model))
    assert guard.same()
    with torch.no_grad():
        CHANGES[how](model)
    assert not guard.same()
    assert "has changed" in str(guard.difference()) or "changes" in str(guard.difference())


def test_values_that_are_no_numbers_are_the_same_as_before() -> None:
    model = frozen()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    guard = Guard(modules_of(model))
    assert guard.same()
    assert guard.moved() is None


def test_a_change_of_a_single_value_is_seen_when_all_are_read() -> None:
    model = frozen()
    guard = Guard(modules_of(model))
    model[0].weight.data[0, 0] += 1
    assert guard.same()
    assert guard.moved() == "`0.weight` has changed although it is frozen"


class Distilled(nn.Module):
    """A student that follows a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval()
        self.student = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.student(x) - self.teacher(x)).square().mean()


Moves = Callable[[Distilled], None]


def averages(model: Distilled) -> None:
    """Follow the student, as many programs write it."""
    for theirs, ours in zip(model.teacher[0].parameters(), model.student.parameters(), strict=True):
        theirs.data.mul_(0.9).add_(ours.data, alpha=0.1)


def one_value(model: Distilled) -> None:
    model.teacher[0].weight.data[0, 0] += 0.5


def trained(
    mode: Literal["off", "all"], moves: Moves, at: Callable[[int, int], bool]
) -> tuple[list[Tensor], list[str]]:
    """Train for six epochs of four batches; return the weights and the warnings."""
    torch.manual_seed(0)
    model, said = Distilled(), list[str]()
    runner = PhaseRunner(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        {0: {"params": ["student.*"]}},
        restore_best=False,
        frozen_prefix=mode,
        frozen_modules_mode="eval",
        report=lambda level, text: said.append(text) if level >= 30 else None,
    )
    for epoch in range(6):
        for number, batch in enumerate(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).split(4)):
            runner.optimizer.zero_grad()
            runner.prefix.train(model, batch).backward()
            runner.optimizer.step()
            runner.step()
            if at(epoch, number):
                moves(model)
        runner.epoch_end()
    runner.release_module_modes()
    return list(model.state_dict().values()), said


@pytest.mark.parametrize("begins", [0, 1, 2, 3])
def test_a_teacher_that_begins_to_move_at_any_time_is_followed(begins: int) -> None:
    plain, _ = trained("off", averages, lambda epoch, _: epoch >= begins)
    reused, said = trained("all", averages, lambda epoch, _: epoch >= begins)
    assert all(torch.equal(one, other) for one, other in zip(plain, reused, strict=True))
    assert len(said) == 1
    assert "reuse is off from now on" in said[0]


def test_what_only_a_look_at_everything_can_tell_is_said() -> None:
    _, said = trained("all", one_value, lambda epoch, number: (epoch, number) == (3, 1))
    assert len(said) == 1
    assert "`teacher.0.weight` has changed although it is frozen, through `.data` or the like" in said[0]
    assert "up to an epoch was trained on outputs of before" in said[0]
