"""A small model, loops that drive it with `PhaseRunner`, and the same loop written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from finetuning_scheduler.core.loop import PhaseRunner, Transition

BATCHES_PER_EPOCH = 4
HEAD, UPPER, LOWER = (
    ("head.weight", "head.bias"),
    ("upper.weight", "upper.bias"),
    ("lower.weight", "lower.bias"),
)
UPPER_LR, LOWER_LR = 0.05, 0.02
BATCHES = torch.randn(BATCHES_PER_EPOCH, 5, 3, generator=torch.Generator().manual_seed(1)).unbind()

Schedule = dict[int, dict[str, Any]]


class Model(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.lower, self.upper, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)
            self.build()

    def build(self) -> None:
        """Make further layers."""

    def trunk(self, x: Tensor) -> Tensor:
        return torch.tanh(self.upper(torch.tanh(self.lower(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def loss(self, batch: Tensor, batch_index: int) -> Tensor:
        return (self(batch) - batch.sum(dim=1, keepdim=True)).square().mean()


def momentum_sgd(parameters: Iterable[Any]) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Iterable[Any]) -> Optimizer:
    return AdamW(parameters, lr=0.1, weight_decay=0.1)


OPTIMIZERS: dict[str, Callable[[Iterable[Any]], Optimizer]] = {"SGD": momentum_sgd, "AdamW": adamw}


def phases(*limits: int, by: str = "epoch", parameters: Sequence[Sequence[str]] = (HEAD, UPPER, LOWER)) -> Schedule:
    """A schedule; phase k ends at epoch or step ``limits[k]``."""
    rates = (None, UPPER_LR, LOWER_LR, LOWER_LR)
    schedule: Schedule = {}
    for number, names in enumerate(parameters[: len(limits) + 1]):
        schedule[number] = {"params": list(names)}
        if rates[number] is not None:
            schedule[number]["lr"] = rates[number]
        if number < len(limits):
            schedule[number][f"max_transition_{by}"] = limits[number]
    return schedule


@dataclass
class Loop:
    """A hand-written loop that calls a runner where its documentation says."""

    model: Model
    runner: PhaseRunner
    transitions: list[Transition] = field(default_factory=list)
    rates: list[tuple[Any, ...]] = field(default_factory=list)  # what each optimizer step sees

    def epoch(self, metric: float | None = None, batches: Sequence[Tensor] = BATCHES) -> Loop:
        for index, batch in enumerate(batches):
            self.batch(batch, index)
        self.note(self.runner.epoch_end(metric))
        return self

    def batch(self, batch: Tensor, index: int = 0) -> None:
        optimizer = self.runner.optimizer
        optimizer.zero_grad()
        self.model.loss(batch, index).backward()
        self.rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        self.note(self.runner.step())

    def note(self, transition: Transition | None) -> None:
        if transition is not None:
            self.transitions.append(transition)


def loop_of(model: Model, optimizer: Optimizer, schedule: Any, **options: Any) -> Loop:
    return Loop(model, PhaseRunner(model, optimizer, schedule, **options))


def by_hand(
    model: Model,
    optimizer_over: Callable[[list[nn.Parameter]], Optimizer],
    schedule: Schedule,
    *,
    epochs: int,
    group_of: Callable[[list[nn.Parameter], float | None], dict[str, Any]] | None = None,
    others: Sequence[nn.Parameter] = (),
) -> Optimizer:
    """The loop that one driven by a runner without restoring has to equal bit for bit; returns its optimizer.

    Args:
        model: The model to train.
        optimizer_over: Makes the optimizer over phase 0's parameters and ``others``.
        schedule: A schedule of full names and epoch limits.
        epochs: Number of epochs.
        group_of: The group that a later phase adds, from its parameters and its ``lr``.
        others: Tensors of the optimizer that are not the model's.
    """
    named = dict(model.named_parameters())
    for parameter in named.values():
        parameter.requires_grad = False
    phase = 0
    optimizer = optimizer_over([*thaw(named, schedule[0]["params"]), *others])
    for epoch in range(epochs):
        if phase + 1 in schedule and epoch >= schedule[phase]["max_transition_epoch"]:
            phase += 1
            parameters, lr = thaw(named, schedule[phase]["params"]), schedule[phase].get("lr")
            optimizer.add_param_group(
                {"params": parameters, "lr": lr} if group_of is None else group_of(parameters, lr)
            )
        for index, batch in enumerate(BATCHES):
            optimizer.zero_grad()
            model.loss(batch, index).backward()
            optimizer.step()
    return optimizer


def thaw(named: Mapping[str, nn.Parameter], names: Iterable[str]) -> list[nn.Parameter]:
    parameters = [named[name] for name in names]
    for parameter in parameters:
        parameter.requires_grad = True
    return parameters


def copied(module: nn.Module) -> dict[str, Tensor]:
    """A copy of what a module's state dictionary holds."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> set[str]:
    """The names of the tensors that are not equal bit for bit, or that only one side has."""
    shared = actual.keys() & expected.keys()
    return {name for name in shared if not torch.equal(actual[name], expected[name])} | (
        actual.keys() ^ expected.keys()
    )


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
