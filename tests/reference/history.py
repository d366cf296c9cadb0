"""What is observed of a run, and comparisons of two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer


@dataclass(frozen=True)
class Epoch:
    """What is observed at the end of an epoch."""

    number: int
    phase: int
    weights: dict[str, Tensor]
    groups: tuple[tuple[str, ...], ...]  # sorted parameter names of each parameter group
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """What is observed just before an optimizer step."""

    phase: int
    lrs: tuple[float, ...]


@dataclass
class History:
    epochs: list[Epoch] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def since(self, epoch: int) -> list[Epoch]:
        return [record for record in self.epochs if record.number >= epoch]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict().items()
    return {
        name: value.detach().clone()
        for name, value in state
        if isinstance(value, Tensor) and not isinstance(value, UninitializedParameter)
    }


def group_names(module: nn.Module, optimizer: Optimizer) -> tuple[tuple[str, ...], ...]:
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    return tuple(tuple(sorted(name_of[id(p)] for p in group["params"])) for group in optimizer.param_groups)


def learning_rates(optimizer: Optimizer) -> tuple[float, ...]:
    return tuple(float(group["lr"]) for group in optimizer.param_groups)


def assert_same_epochs(actual: Sequence[Epoch], expected: Sequence[Epoch], tolerance: float = 0.0) -> None:
    """Phases, groups and learning rates are the same, and every bit of every weight unless a tolerance is given."""
    assert [(e.number, e.phase) for e in actual] == [(e.number, e.phase) for e in expected]
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.groups == theirs.groups, f"parameter groups in epoch {mine.number}"
        assert mine.lrs == theirs.lrs, f"learning rates in epoch {mine.number}"
        assert_same_weights(mine, theirs, tolerance)


def assert_same_weights(actual: Epoch, expected: Epoch, tolerance: float = 0.0) -> None:
    assert actual.weights.keys() == expected.weights.keys()
    if tolerance:
        message = f"weights in epoch {actual.number}: "
        torch.testing.assert_close(
            actual.weights, expected.weights, rtol=0, atol=tolerance, msg=lambda text: message + text
        )
    else:
        different = [n for n, tensor in expected.weights.items() if not torch.equal(actual.weights[n], tensor)]
        assert not different, f"weights in epoch {actual.number}"


def assert_same_run(actual: History, expected: History) -> None:
    assert actual.steps == expected.steps, "phase and learning rates of each optimizer step"
    assert_same_epochs(actual.epochs, expected.epochs)


def assert_continues(resumed: History, uninterrupted: History, steps_done: int) -> None:
    assert resumed.steps == uninterrupted.steps[steps_done:]
    first = resumed.epochs[0].number
    assert_same_epochs(resumed.epochs, uninterrupted.since(first))
