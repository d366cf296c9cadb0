"""A plain PyTorch loop that fine-tunes in phases, written from the specification alone.

Nothing here imports Lightning or the package under test: what this loop computes is what the callback must compute,
bit for bit. It is slow, explicit and has no hooks, so that it can be checked by reading.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 4
BATCHES_PER_EPOCH = 4
SEED = 7


def mlp() -> nn.Sequential:
    """Four linear layers, eight parameters: two to each phase of the default schedule."""
    layers = nn.Sequential()
    layers.add_module("first", nn.Linear(4, 5))
    layers.add_module("tanh1", nn.Tanh())
    layers.add_module("second", nn.Linear(5, 5))
    layers.add_module("tanh2", nn.Tanh())
    layers.add_module("third", nn.Linear(5, 5))
    layers.add_module("tanh3", nn.Tanh())
    layers.add_module("head", nn.Linear(5, 1))
    return layers


def normalised() -> nn.Sequential:
    """BatchNorm and Dropout between linear layers: buffers and random numbers take part in training."""
    layers = nn.Sequential()
    layers.add_module("first", nn.Linear(4, 6))
    layers.add_module("norm", nn.BatchNorm1d(6))
    layers.add_module("drop", nn.Dropout(0.5))
    layers.add_module("second", nn.Linear(6, 6))
    layers.add_module("head", nn.Linear(6, 1))
    return layers


class Tied(nn.Module):
    """``out.weight`` is another name of ``embed.weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(torch.tanh(self.embed(x))))).sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class PhaseSpec:
    params: tuple[str, ...]
    lr: float | None = None
    max_epoch: int = -1
    max_step: int = -1


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on; both the reference loop and the callback can execute it."""

    phases: tuple[PhaseSpec, ...]
    epochs: int
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    interval: str = "epoch"
    frequency: int = 1
    network: Callable[[], nn.Module] = mlp
    scores: tuple[float, ...] | None = None  # validation score of each epoch; None: the real loss
    patience: int | None = None  # None: no early stopping
    min_delta: float = 0.0
    restore_best: bool = True
    base_max_lr: float | None = 1e-5
    no_decay: tuple[str, ...] = ()
    apply_lambdas: bool = False
    accumulate: int = 1


@dataclass(frozen=True)
class Epoch:
    """What is observed at the end of an epoch, after validation and before anything the next epoch brings."""

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


class Wrapped(nn.Module):
    """Gives the network the same parameter names that it has inside a LightningModule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def build_network(factory: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return factory()


def train_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH_SIZE * BATCHES_PER_EPOCH, 4, generator=generator)
    return TensorDataset(x, x.sin().sum(dim=1, keepdim=True))


def val_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 4, generator=generator)
    return TensorDataset(x, x.sin().sum(dim=1, keepdim=True))


def loader(data: TensorDataset, batch_size: int = BATCH_SIZE) -> DataLoader[tuple[Tensor, ...]]:
    """Its own generator, so that iterating draws no global random numbers."""
    return DataLoader(data, batch_size=batch_size, shuffle=False, generator=torch.Generator())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def group_names(module: nn.Module, optimizer: Optimizer) -> tuple[tuple[str, ...], ...]:
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    return tuple(tuple(sorted(name_of[id(p)] for p in group["params"])) for group in optimizer.param_groups)


def learning_rates(optimizer: Optimizer) -> tuple[float, ...]:
    return tuple(float(group["lr"]) for group in optimizer.param_groups)


@dataclass
class Best:
    score: Tensor
    weights: dict[str, Tensor]
    optimizer_state: dict[str, dict[str, Any]]
    phase: int


class ReferenceRun:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = Wrapped(build_network(recipe.network))
        self.parameters = dict(self.model.named_parameters())
        self.phase = 0
        self.global_step = 0
        self.history = History()
        self.best: Best | None = None
        self.best_stopping_score = torch.tensor(torch.inf)
        self.wait_count = 0
        self.out_of_patience = False

        for parameter in self.parameters.values():
            parameter.requires_grad = False
        self.thaw(recipe.phases[0].params)
        self.optimizer = recipe.optimizer([self.parameters[name] for name in recipe.phases[0].params])
        self.initial_lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler = recipe.scheduler(self.optimizer) if recipe.scheduler else None

    def thaw(self, names: Sequence[str]) -> None:
        for name in names:
            self.parameters[name].requires_grad = True

    @property
    def spec(self) -> PhaseSpec:
        return self.recipe.phases[self.phase]

    @property
    def is_final(self) -> bool:
        return self.phase == len(self.recipe.phases) - 1

    def run(self) -> History:
        torch.manual_seed(SEED)
        for epoch in range(self.recipe.epochs):
            limit_reached = self.spec.max_epoch >= 0 and epoch >= self.spec.max_epoch
            if limit_reached and self.is_final:
                break
            if (limit_reached or self.out_of_patience) and not self.is_final:
                self.transition()
            if self.train_epoch(epoch):
                break
            score = self.validate(epoch)
            stop = self.check_early_stopping(score)
            self.save_if_better(score)
            self.record(epoch)
            if isinstance(self.scheduler, ReduceLROnPlateau) and (epoch + 1) % self.recipe.frequency == 0:
                self.scheduler.step(score)
            if stop:
                break
        return self.history

    def train_epoch(self, epoch: int) -> bool:
        """Returns whether the final phase reached its step limit."""
        self.model.train()
        batches = list(loader(train_data()))
        for index, (x, y) in enumerate(batches):
            if self.spec.max_step >= 0 and self.global_step >= self.spec.max_step:
                if self.is_final:
                    return True
                self.transition()
            if index % self.recipe.accumulate == 0:
                self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(x), y)
            (loss / self.recipe.accumulate).backward()
            last = index == len(batches) - 1
            if (index + 1) % self.recipe.accumulate == 0 or last:
                self.history.steps.append(Step(self.phase, learning_rates(self.optimizer)))
                self.optimizer.step()
                self.global_step += 1
                self.step_scheduler("step", index + 1)
        self.step_scheduler("epoch", epoch + 1)
        return False

    def step_scheduler(self, interval: str, count: int) -> None:
        if self.scheduler is None or isinstance(self.scheduler, ReduceLROnPlateau):
            return
        if self.recipe.interval == interval and count % self.recipe.frequency == 0:
            self.scheduler.step()

    def validate(self, epoch: int) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            losses = [nn.functional.mse_loss(self.model(x), y) for x, y in loader(val_data(), 8)]
        self.model.train()
        return losses[0] if self.recipe.scores is None else torch.tensor(self.recipe.scores[epoch])

    def check_early_stopping(self, score: Tensor) -> bool:
        """Returns whether the session ends."""
        if self.recipe.patience is None:
            return False
        if score + self.recipe.min_delta < self.best_stopping_score:
            self.best_stopping_score = score
            self.wait_count = 0
            return False
        self.wait_count += 1
        if self.wait_count < self.recipe.patience:
            return False
        self.out_of_patience = True
        return self.is_final

    def save_if_better(self, score: Tensor) -> None:
        if self.best is not None and not score < self.best.score:
            return
        state = self.optimizer.state
        by_name = {name: copy.deepcopy(dict(state[p])) for name, p in self.parameters.items() if p in state}
        self.best = Best(score, snapshot(self.model), by_name, self.phase)

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
        exempt = [name for name in self.spec.params if any(part in name for part in self.recipe.no_decay)]
        decayed = [name for name in self.spec.params if name not in exempt]
        self.add_group(decayed, lr)
        if exempt:
            self.add_group(exempt, lr, weight_decay=0.0)

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
            grow(self.scheduler, self.optimizer.param_groups[-1], self.recipe.apply_lambdas)


def grow(scheduler: Any, group: dict[str, Any], apply_lambdas: bool) -> None:
    """Give a scheduler's per-group lists an entry for a group that was just added."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.min_lrs.append(scheduler.min_lrs[-1])
    else:
        scheduler.base_lrs.append(group["lr"])
    if hasattr(scheduler, "lr_lambdas"):
        function = scheduler.lr_lambdas[-1] if apply_lambdas else lambda _: 1
        scheduler.lr_lambdas.append(function)
        group["lr"] = group["lr"] * function(scheduler.last_epoch)
    scheduler._last_lr.append(group["lr"])


def train(recipe: Recipe) -> History:
    return ReferenceRun(recipe).run()


def assert_same_epochs(actual: Sequence[Epoch], expected: Sequence[Epoch]) -> None:
    """Exact: phases, groups, learning rates and every bit of every weight."""
    assert [(e.number, e.phase) for e in actual] == [(e.number, e.phase) for e in expected]
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.groups == theirs.groups, f"parameter groups in epoch {mine.number}"
        assert mine.lrs == theirs.lrs, f"learning rates in epoch {mine.number}"
        assert mine.weights.keys() == theirs.weights.keys()
        different = [name for name, tensor in theirs.weights.items() if not torch.equal(mine.weights[name], tensor)]
        assert not different, f"weights in epoch {mine.number}"


def assert_same_run(actual: History, expected: History) -> None:
    assert actual.steps == expected.steps, "phase and learning rates of each optimizer step"
    assert_same_epochs(actual.epochs, expected.epochs)


def assert_continues(resumed: History, uninterrupted: History, steps_done: int) -> None:
    assert resumed.steps == uninterrupted.steps[steps_done:]
    first = resumed.epochs[0].number
    assert_same_epochs(resumed.epochs, uninterrupted.since(first))
