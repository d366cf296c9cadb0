"""A hand-written loop with `PhaseRunner`: what a recipe is to a user without a trainer."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from finetuning_scheduler.core import PhaseRunner, Transition

from .history import snapshot
from .networks import SEED, Wrapped, build_network
from .recipe import Recipe, schedule_of


@dataclass
class Outcome:
    """What a session leaves behind; `lines` describes the model and the optimizer after each epoch."""

    weights: dict[str, Tensor]
    optimizer_state: dict[str, dict[str, Any]]
    lines: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer, lines: list[str]) -> Outcome:
        states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
        return cls(snapshot(model), copy.deepcopy(states), lines)


def describe(phase: int, model: nn.Module, optimizer: Optimizer) -> str:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [(sorted(names[p] for p in group["params"]), group["lr"]) for group in optimizer.param_groups]
    decay = [group["weight_decay"] for group in optimizer.param_groups]
    trainable = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return f"phase {phase}, groups {groups}, decay {decay}, trainable {trainable}"


def assert_same_outcome(actual: Outcome, expected: Outcome) -> None:
    assert actual.lines == expected.lines
    assert actual.weights.keys() == expected.weights.keys()
    differing = [name for name, value in expected.weights.items() if not torch.equal(actual.weights[name], value)]
    assert differing == []
    assert actual.optimizer_state.keys() == expected.optimizer_state.keys()
    for name, state in expected.optimizer_state.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(actual.optimizer_state[name][key]), torch.as_tensor(value)), (name, key)


def train_batch(model: nn.Module, optimizer: Optimizer, recipe: Recipe, batch: tuple[Tensor, Tensor]) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    recipe.task.loss(model(batch[0]), batch[1]).backward()
    optimizer.step()


def batches_of(recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    x, y = recipe.task.training().tensors
    return list(zip(x.split(recipe.task.batch_size), y.split(recipe.task.batch_size), strict=True))


class PlainSession:
    """One run of a recipe; `checkpoints` holds what `torch.save` wrote after each epoch."""

    def __init__(self, recipe: Recipe, *, seed: int = SEED, **options: Any) -> None:
        self.recipe = recipe
        self.model = Wrapped(build_network(recipe.network, seed))
        self.optimizer = recipe.optimizer(list(self.model.parameters()))
        self.scheduler: LRScheduler | None = None if recipe.scheduler is None else recipe.scheduler(self.optimizer)
        self.transitions: list[Transition] = []
        self.checkpoints: list[bytes] = []
        arguments: dict[str, Any] = {
            "lr_schedulers": [] if self.scheduler is None else [self.scheduler],
            "base_max_lr": recipe.base_max_lr,
            "patience": recipe.patience,
            "mode": recipe.mode,
            "min_delta": recipe.min_delta,
            "restore_best": recipe.restore_best,
            "no_decay": recipe.no_decay,
            "apply_lambdas_new_pgs": recipe.apply_lambdas,
            "max_depth": recipe.max_depth,
        }
        self.runner = PhaseRunner(self.model, self.optimizer, schedule_of(recipe), **(arguments | options))

    def execute(self, scores: Iterable[float] | None = None) -> Outcome:
        lines: list[str] = []
        for score in (self.recipe.scores or ()) if scores is None else scores:
            if self.runner.finished:
                break
            for batch in batches_of(self.recipe):
                train_batch(self.model, self.optimizer, self.recipe, batch)
                self.note(self.runner.step())
                if self.runner.finished:
                    return Outcome.of(self.model, self.optimizer, lines)
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(score)
            elif self.scheduler is not None:
                self.scheduler.step()
            self.note(self.runner.epoch_end(score))
            lines.append(describe(self.runner.phase, self.model, self.optimizer))
            self.checkpoints.append(self.save())
        return Outcome.of(self.model, self.optimizer, lines)

    def note(self, transition: Transition | None) -> None:
        if transition is not None:
            self.transitions.append(transition)

    def parts(self) -> dict[str, Any]:
        """In the order in which a resumed run loads them."""
        parts = {"model": self.model, "runner": self.runner, "optimizer": self.optimizer}
        return parts if self.scheduler is None else parts | {"scheduler": self.scheduler}

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> None:
        states = torch.load(io.BytesIO(checkpoint), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(states[name])
