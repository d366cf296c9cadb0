"""A plain PyTorch loop that fine-tunes in phases, written from the specification alone.

Nothing here imports Lightning or the package under test: what this loop computes is what every driver of the package
must compute, on one device bit for bit. It is slow, explicit and has no hooks, so that it can be checked by reading.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .growth import grow
from .history import Epoch, History, Step, group_names, learning_rates, snapshot
from .networks import SEED, Wrapped, build_network, loader
from .recipe import PhaseSpec, Recipe


class Clock(Enum):
    """When a driver asks whether a phase is over.

    A trainer asks before an epoch and before a batch, and records an epoch before the next one's transition; its
    checkpoint callback takes any better score for the best. A plain loop asks after a step and after an epoch, and
    takes for the best what patience takes for a gain.
    """

    TRAINER = "trainer"
    PLAIN = "plain"


@dataclass
class Best:
    score: Tensor
    weights: dict[str, Tensor]
    optimizer_state: dict[str, dict[str, Any]]


class ReferenceLoop:
    def __init__(self, recipe: Recipe, clock: Clock = Clock.TRAINER) -> None:
        self.recipe = recipe
        self.clock = clock
        self.sign = -1 if recipe.mode == "max" else 1
        self.model = Wrapped(build_network(recipe.network))
        self.parameters = dict(self.model.named_parameters())
        self.phase = 0
        self.global_step = 0
        self.finished = False
        self.history = History()
        self.best: Best | None = None
        self.best_stopping_score: Tensor | None = None
        self.wait_count = 0
        self.out_of_patience = False

        for parameter in self.parameters.values():
            parameter.requires_grad = False
        self.thaw(self.spec.params)
        decayed, exempt = self.by_decay(self.spec.params)
        groups: list[dict[str, Any]] = [{"params": [self.parameters[name] for name in decayed]}]
        groups.append({"params": [self.parameters[name] for name in exempt], "weight_decay": 0.0})
        self.optimizer = recipe.optimizer([group for group in groups if group["params"]])
        self.initial_lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler = recipe.scheduler(self.optimizer) if recipe.scheduler else None

    def thaw(self, names: Sequence[str]) -> None:
        for name in names:
            self.parameters[name].requires_grad = True

    @property
    def spec(self) -> PhaseSpec:
        return self.recipe.executed[self.phase]

    @property
    def is_final(self) -> bool:
        return self.phase == len(self.recipe.executed) - 1

    def run(self) -> History:
        torch.manual_seed(SEED)
        for epoch in range(self.recipe.epochs):
            if self.clock is Clock.TRAINER:
                self.end_phase_if_due(epoch)
            if not self.finished:
                self.train_epoch(epoch)
            if self.finished:
                break
            score = self.validate(epoch)
            is_gain = self.check_early_stopping(score)
            self.save_if_better(score, is_gain)
            if self.clock is Clock.TRAINER:
                self.record(epoch)
            if isinstance(self.scheduler, ReduceLROnPlateau) and (epoch + 1) % self.recipe.frequency == 0:
                self.scheduler.step(score)
            if self.clock is Clock.PLAIN:
                self.end_phase_if_due(epoch + 1)
                self.record(epoch)
            if self.finished or (self.out_of_patience and self.is_final):
                break
        return self.history

    def end_phase_if_due(self, epochs_done: int) -> None:
        limit_reached = 0 <= self.spec.max_epoch <= epochs_done
        if limit_reached or self.out_of_patience:
            self.end_phase()

    def end_phase_if_step_is_due(self) -> None:
        if 0 <= self.spec.max_step <= self.global_step:
            self.end_phase()

    def end_phase(self) -> None:
        if self.is_final:
            self.finished = True
        else:
            self.transition()

    def train_epoch(self, epoch: int) -> None:
        self.model.train()
        batches = list(loader(self.recipe.task.training(), self.recipe.task.batch_size))
        for index, (x, y) in enumerate(batches):
            if self.clock is Clock.TRAINER:
                self.end_phase_if_step_is_due()
                if self.finished:
                    return
            if index % self.recipe.accumulate == 0:
                self.optimizer.zero_grad()
            self.backward(x, y)
            last = index == len(batches) - 1
            if (index + 1) % self.recipe.accumulate == 0 or last:
                self.step(index)
                if self.clock is Clock.PLAIN:
                    self.end_phase_if_step_is_due()
                    if self.finished:
                        return
        self.step_scheduler("epoch", epoch + 1)

    def backward(self, x: Tensor, y: Tensor) -> None:
        (self.recipe.task.loss(self.model(x), y) / self.recipe.accumulate).backward()

    def step(self, index: int) -> None:
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(held, self.recipe.clip_norm)
        if self.recipe.clip_value is not None:
            nn.utils.clip_grad_value_(held, self.recipe.clip_value)
        self.history.steps.append(Step(self.phase, learning_rates(self.optimizer)))
        self.optimizer.step()
        self.global_step += 1
        self.step_scheduler("step", index + 1)

    def step_scheduler(self, interval: str, count: int) -> None:
        if self.scheduler is None or isinstance(self.scheduler, ReduceLROnPlateau):
            return
        if self.recipe.interval == interval and count % self.recipe.frequency == 0:
            self.scheduler.step()

    def validate(self, epoch: int) -> Tensor:
        if self.recipe.scores is not None:
            return torch.tensor(self.recipe.scores[epoch])
        self.model.eval()
        with torch.no_grad():
            x, y = self.recipe.task.validation().tensors
            loss = self.recipe.task.loss(self.model(x), y)
        self.model.train()
        return loss

    def check_early_stopping(self, score: Tensor) -> bool:
        """Returns whether the score is a gain."""
        best = self.best_stopping_score
        if best is None or self.sign * score + self.recipe.min_delta < self.sign * best:
            self.best_stopping_score = score
            self.wait_count = 0
            return True
        self.wait_count += 1
        self.out_of_patience = self.recipe.patience is not None and self.wait_count >= self.recipe.patience
        return False

    def save_if_better(self, score: Tensor, is_gain: bool) -> None:
        is_better = self.best is None or bool(self.sign * score < self.sign * self.best.score)
        if is_better if self.clock is Clock.TRAINER else is_gain:
            state = self.optimizer.state
            by_name = {name: copy.deepcopy(dict(state[p])) for name, p in self.parameters.items() if p in state}
            self.best = Best(score, snapshot(self.model), by_name)

    def record(self, epoch: int) -> None:
        groups = group_names(self.model, self.optimizer)
        lrs = learning_rates(self.optimizer)
        self.history.epochs.append(Epoch(epoch, self.phase, snapshot(self.model), groups, lrs))

    def transition(self) -> None:
        if self.recipe.restore_best and self.best is not None:
            self.restore(self.best)
        self.phase += 1
        self.wait_count = 0
        self.out_of_patience = False
        self.thaw(self.spec.params)
        lr = self.spec.lr
        if lr is None:
            lr = self.initial_lr if self.recipe.base_max_lr is None else self.recipe.base_max_lr
        decayed, exempt = self.by_decay(self.spec.params)
        if decayed:
            self.add_group(decayed, lr)
        if exempt:
            self.add_group(exempt, lr, weight_decay=0.0)

    def by_decay(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        exempt = [name for name in names if any(part in name for part in self.recipe.no_decay)]
        return [name for name in names if name not in exempt], exempt

    def restore(self, best: Best) -> None:
        """Weights and optimizer state; parameters thawed after the best phase start with fresh optimizer state."""
        self.model.load_state_dict(best.weights)
        self.optimizer.state.clear()
        for name, state in best.optimizer_state.items():
            self.optimizer.state[self.parameters[name]] = copy.deepcopy(state)

    def add_group(self, names: Sequence[str], lr: float, **options: float) -> None:
        parameters = [self.parameters[name] for name in names]
        self.optimizer.add_param_group({"params": parameters, "lr": lr, "initial_lr": lr, **options})
        if self.scheduler is not None:
            grow(self.scheduler, self.optimizer, self.recipe.apply_lambdas)


def train(recipe: Recipe, clock: Clock = Clock.TRAINER) -> History:
    return ReferenceLoop(recipe, clock).run()
