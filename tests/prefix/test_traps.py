"""What naive caching would get silently wrong ends with the plain run's numbers, or with reuse off and the reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from .models import Case, Data, classes, of_classes
from .runs import ROWS, Run, assert_same, run

WIDTH = 6


def features(generator: torch.Generator) -> Data:
    return {"input_ids": torch.randn(ROWS, WIDTH, generator=generator), "labels": classes(generator)}


class Base(nn.Module):
    """Two frozen layers, one that is thawed in the second phase, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.third(self.below(x))))

    def below(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))


def case(build: Callable[[], nn.Module], loss: Callable[[nn.Module, Data], Tensor] = of_classes) -> Case:
    return Case(build, features, loss, (r"head\..*", r"third\..*"))


# --- the traps


class ReadAfterTheCut(Base):
    """The head reads what the first layer gave, past the cut."""

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.third(torch.tanh(self.second(first)))) + first)


class ReadEveryThirdTime(Base):
    """An output is read only in every third training step."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = 0

    def forward(self, x: Tensor) -> Tensor:
        self.counter += self.training
        first = torch.tanh(self.first(x))
        second = self.second(first)
        third = self.third(second)
        return self.head(third + self.first(x) if self.counter % 3 == 2 else third)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = self.one(x)
        return one, self.other(one)


class ReadOfTwoEveryThirdTime(Base):
    """The second of two outputs of a frozen module is read only in every third training step, by `argmax` too."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.counter = 0

    def forward(self, x: Tensor) -> Tensor:
        self.counter += self.training
        one, other = self.pair(x)
        if self.counter % 3 == 2:
            one = one + other + other.argmax(dim=1, keepdim=True)
        return self.head(self.third(one))


class RowsInfluenceEachOther(Base):
    """A frozen layer centres the batch."""

    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(dim=0))

    def __init__(self) -> None:
        super().__init__()
        self.second = self.Centred(WIDTH, WIDTH)


class BatchStatistics(Base):
    """BatchNorm that keeps no running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)

    def below(self, x: Tensor) -> Tensor:
        return self.norm(super().below(x))


class AlwaysDropout(Base):
    """A frozen layer drops values in eval mode, too."""

    class Dropping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.2)

    def __init__(self) -> None:
        super().__init__()
        self.second = self.Dropping(WIDTH, WIDTH)


class RareDropout(Base):
    """A frozen layer drops a row one time in thirty, by Python's generator."""

    class Dropping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (random.random() > 1 / 30)

    def __init__(self) -> None:
        super().__init__()
        self.second = self.Dropping(WIDTH, WIDTH)


class Augmented(Base):
    """Noise on the inputs of every training step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x) if self.training else x)


class DropoutBetween(Base):
    """Dropout in train mode between frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def below(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(self.drop(torch.tanh(self.first(x)))))


class ByContent(Base):
    """Another frozen layer is called if the rows of the batch say so."""

    def below(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.first(x))
        return torch.tanh(self.second(first)) if bool(x.sum() > 0) else first


class SharedAcross(Base):
    """The head is the first layer, too: nothing is frozen that depends on it."""

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(nn.functional.linear(x, self.head.weight.t()[:, :3].t()[:, :WIDTH]))
        return self.head(torch.tanh(self.third(torch.tanh(self.second(nn.functional.pad(inner, (0, WIDTH - 3)))))))


class ChangedInPlace(Base):
    """What a frozen layer has given is changed in place afterwards, and read by two."""

    def below(self, x: Tensor) -> Tensor:
        first = self.first(x)
        first += 1
        second = self.second(first)
        first.mul_(2)
        return second + first


class InputChangedInPlace(Base):
    """What a frozen layer was given is changed in place afterwards."""

    def below(self, x: Tensor) -> Tensor:
        x = x.clone()
        inner = self.second(self.first(x))
        x.zero_()
        return inner + x


class StatementInPlace(Base):
    """An activation in place is called as a statement."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def below(self, x: Tensor) -> Tensor:
        first = self.first(x)
        self.relu(first)
        second = self.second(first)
        self.relu(second)
        return second + first


class CalledTwice(Base):
    """One frozen layer is called twice, with different inputs."""

    def below(self, x: Tensor) -> Tensor:
        return self.first(torch.tanh(self.first(x))) + self.first(-x)


class CalledAgainAfter(Base):
    """A frozen layer is called once more behind the trained one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(self.third(self.below(x)))))


class Alternating(Base):
    """A frozen layer does something else in every other call."""

    class Switching(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x) * (1 + type(self).calls % 2)

    def __init__(self) -> None:
        super().__init__()
        self.second = self.Switching(WIDTH, WIDTH)
        self.Switching.calls = 0


class Counting(Base):
    """A frozen layer counts its calls and returns more with each."""

    class Counter(nn.Linear):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) / self.calls

    def __init__(self) -> None:
        super().__init__()
        self.second = self.Counter(WIDTH, WIDTH)


class LeftOnTheModule(Base):
    """A frozen layer leaves a tensor on itself, which the head reads."""

    class Leaving(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.left = super().forward(x)
            return self.left * 2

    def __init__(self) -> None:
        super().__init__()
        self.second = self.Leaving(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.third(self.below(x))) + self.second.left)


class ReadFromTheSide(Base):
    """A frozen layer reads a tensor that is not among its arguments."""

    class Reading(nn.Linear):
        side: ClassVar[list[Tensor]] = []

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.side[0]

    def __init__(self) -> None:
        super().__init__()
        self.second = self.Reading(WIDTH, WIDTH)
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.Reading.side[:] = [x.flip(0)]
        return super().forward(x)


class Accumulating(Base):
    """A frozen layer adds to a buffer of its own."""

    class Adding(nn.Linear):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.register_buffer("total", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            self.total += 0.1
            return super().forward(x) + self.total

    def __init__(self) -> None:
        super().__init__()
        self.second = self.Adding(WIDTH, WIDTH)


class Annealed(Base):
    """The model sets a number of a frozen layer anew in each training step."""

    class Scaled(nn.Linear):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.second = self.Scaled(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        if self.training:
            self.second.scale = self.second.scale * 0.9
        return result


class GradientOfTheInput(Base):
    """The gradient of the inputs is read."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)
        return super().forward(x) + gradient.mean()


class PairwiseInputs(Base):
    """Two rows of inputs are combined before the frozen layers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x.flip(0)]))[: len(x)]


@dataclass(frozen=True)
class Trap:
    build: Callable[[], nn.Module]
    reason: str | None = None  # a part of the reason why reuse is off, where it has to be
    hits: bool | None = None


TRAPS = [
    Trap(ReadAfterTheCut, hits=True),
    Trap(ReadEveryThirdTime),
    Trap(ReadOfTwoEveryThirdTime),
    Trap(RowsInfluenceEachOther, "depend on the other rows"),
    Trap(BatchStatistics),
    Trap(AlwaysDropout, "draws random numbers"),
    Trap(RareDropout, "draws random numbers"),
    Trap(Augmented),
    Trap(DropoutBetween),
    Trap(ByContent),
    Trap(SharedAcross),
    Trap(ChangedInPlace),
    Trap(InputChangedInPlace),
    Trap(StatementInPlace),
    Trap(CalledTwice, hits=True),
    Trap(CalledAgainAfter, hits=True),
    Trap(Alternating),
    Trap(Counting, "changes the attribute"),
    Trap(LeftOnTheModule),
    Trap(ReadFromTheSide),
    Trap(Accumulating, "changes a tensor in place"),
    Trap(Annealed),
    Trap(GradientOfTheInput),
    Trap(PairwiseInputs),
]


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.build.__name__)
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
def test_ends_as_without_reuse(trap: Trap, shuffled: bool) -> None:
    plain = run_seeded(trap, "off", shuffled)
    reused = run_seeded(trap, "all", shuffled)
    assert_same(reused, plain)
    reasons = reasons_of(reused)
    if trap.reason is not None:
        assert any(trap.reason in reason for reason in reasons), reasons
    if trap.hits is not None:
        assert (reused.hits("train") > 0) == trap.hits
    assert reused.hits("train") > 0 or reasons


def run_seeded(trap: Trap, mode: str, shuffled: bool) -> Run:
    random.seed(3)
    return run(case(trap.build), mode, shuffled=shuffled, epochs=4)


def reasons_of(reused: Run) -> list[str]:
    said = [account.reason for account in reused.accounts if account.reason is not None]
    left_out = [each for account in reused.accounts for each in account.left_out]
    return [*said, *left_out, *([] if reused.reason is None else [reused.reason])]
