"""What a run depends on, whatever executes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .networks import FIRST, HEAD, REGRESSION, SECOND, THIRD, Task, mlp


@dataclass(frozen=True)
class PhaseSpec:
    params: tuple[str, ...]
    lr: float | None = None
    max_epoch: int = -1
    max_step: int = -1


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on; the reference loop and every driver of the package can execute it."""

    phases: tuple[PhaseSpec, ...]
    epochs: int
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    interval: str = "epoch"
    frequency: int = 1
    network: Callable[[], nn.Module] = mlp
    task: Task = REGRESSION
    scores: tuple[float, ...] | None = None  # validation score of each epoch; None: the real loss
    patience: int | None = None  # None: no early stopping
    min_delta: float = 0.0
    mode: str = "min"
    restore_best: bool = True
    base_max_lr: float | None = 1e-5
    no_decay: tuple[str, ...] = ()
    apply_lambdas: bool = False
    accumulate: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    max_depth: int = -1

    @property
    def executed(self) -> tuple[PhaseSpec, ...]:
        """The phases up to ``max_depth``."""
        return self.phases if self.max_depth < 0 else self.phases[: self.max_depth + 1]


def schedule_of(recipe: Recipe) -> dict[int, dict[str, Any]]:
    """The recipe's phases in the form a user writes."""
    schedule: dict[int, dict[str, Any]] = {}
    for index, phase in enumerate(recipe.phases):
        entry: dict[str, Any] = {"params": list(phase.params)}
        if phase.lr is not None:
            entry["lr"] = phase.lr
        if phase.max_epoch >= 0:
            entry["max_transition_epoch"] = phase.max_epoch
        if phase.max_step >= 0:
            entry["max_transition_step"] = phase.max_step
        schedule[index] = entry
    return schedule


def phases_of(schedule: Mapping[int, Mapping[str, Any]]) -> tuple[PhaseSpec, ...]:
    """The phases of a schedule in the form a user writes, of the keys that a recipe knows."""
    names = {"lr": "lr", "max_transition_epoch": "max_epoch", "max_transition_step": "max_step"}
    return tuple(
        PhaseSpec(tuple(phase["params"]), **{names[key]: value for key, value in phase.items() if key != "params"})
        for phase in schedule.values()
    )


def momentum_sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


def simple_recipe(**changes: Any) -> Recipe:
    """Three phases of the small network, two epochs each."""
    phases = (
        PhaseSpec(HEAD, max_epoch=2),
        PhaseSpec(THIRD, lr=0.05, max_epoch=4),
        PhaseSpec(SECOND, lr=0.02),
    )
    return replace(Recipe(phases=phases, epochs=6, optimizer=momentum_sgd), **changes)


def unscheduled() -> Recipe:
    """One phase that trains everything: what plain training does without any callback."""
    everything = (*HEAD, *THIRD, *SECOND, *FIRST)
    return Recipe(phases=(PhaseSpec(everything),), epochs=3, optimizer=momentum_sgd)
