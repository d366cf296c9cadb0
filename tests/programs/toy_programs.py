"""Small models, trainers and records for programs that use Lightning as people in a hurry do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler
from tests.reference.history import learning_rates
from tests.reference.toys import make_trainer

BATCHES_PER_EPOCH = 4
HEAD = frozenset({"head.weight", "head.bias"})

EVERYTHING = {0: {"params": [".*"]}}
"""One phase that trains all: what plain Lightning does."""

TWO_PHASES = {
    0: {"params": ["head.*"], "max_transition_epoch": 2},
    1: {"params": ["body.*", "neck.*"], "lr": 0.05},
}
"""The head for two epochs, then all."""

PATIENT = {0: {"params": ["head.*"]}, 1: {"params": ["neck.*"], "lr": 0.05}, 2: {"params": ["body.*"], "lr": 0.05}}
"""Three phases that end when patience runs out."""


class Net(pl.LightningModule):
    """Three linear layers on a few random numbers.

    Args:
        seed: Of the first weights and of the data; another seed is another fold.
        lr: Learning rate of plain SGD with momentum.
        batch_size: Of the training data.
        scores: Value of ``val_loss`` epoch by epoch, the last one for all epochs after; ``None``: the real loss.
        accuracies: Value of ``val_accuracy`` epoch by epoch.
    """

    def __init__(
        self,
        seed: int = 7,
        lr: float = 0.1,
        batch_size: int = 4,
        scores: Sequence[float] | None = None,
        accuracies: Sequence[float] = (0.5,),
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.seed, self.lr, self.batch_size, self.momentum = seed, lr, batch_size, momentum
        self.scores, self.accuracies = scores, accuracies
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.neck, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.neck(torch.tanh(self.body(x)))))

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("val_loss", loss if self.scores is None else scripted(self.scores, self.current_epoch))
        self.log("val_accuracy", scripted(self.accuracies, self.current_epoch))

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return batches(self.seed, 4 * BATCHES_PER_EPOCH, self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return batches(self.seed + 1, 8, 8)

    test_dataloader = predict_dataloader = val_dataloader


def scripted(values: Sequence[float], position: int) -> Tensor:
    return torch.tensor(float(values[min(position, len(values) - 1)]))


def batches(seed: int, size: int, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """In order, and with a generator of its own: iterating draws no global random numbers."""
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
    data = TensorDataset(x, x.sin().sum(dim=1, keepdim=True))
    return DataLoader(data, batch_size=batch_size, generator=torch.Generator())


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@dataclass(frozen=True)
class Epoch:
    """What is seen at the end of a training epoch."""

    number: int
    phase: int
    learning_rates: tuple[float, ...]
    weights: dict[str, Tensor]


class Record(Callback):
    """Writes down each epoch; works with and without a scheduler in the trainer."""

    def __init__(self) -> None:
        self.epochs: list[Epoch] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        weights = weights_of(pl_module)
        self.epochs.append(Epoch(trainer.current_epoch, phase_of(trainer), learning_rates(optimizer), weights))


class Starts(Callback):
    """Keeps the weights with which each epoch begins, after a transition if there is one."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self.weights.setdefault(trainer.current_epoch, weights_of(pl_module))


def phase_of(trainer: pl.Trainer) -> int:
    """The phase of the trainer's scheduler; 0 without one."""
    schedulers = [callback for callback in trainer.callbacks if isinstance(callback, FinetuningScheduler)]
    return schedulers[0].curr_depth if schedulers else 0


@dataclass
class Program:
    """A trainer in a directory of its own, the module that it fits, and what was seen."""

    root: Path
    trainer: pl.Trainer
    model: pl.LightningModule
    record: Record = field(repr=False)

    def fit(self, **arguments: Any) -> Program:
        self.trainer.fit(self.model, **arguments)
        return self

    @property
    def epochs(self) -> list[Epoch]:
        return self.record.epochs

    @property
    def phases(self) -> list[int]:
        return [epoch.phase for epoch in self.epochs]


def program(
    root: Path, callbacks: Iterable[Callback] = (), model: pl.LightningModule | None = None, **options: Any
) -> Program:
    """Make a quiet trainer of one process on the CPU; options go to Lightning's ``Trainer``."""
    record = Record()
    trainer = quiet_trainer(root, callbacks=[*callbacks, record], **options)
    return Program(root, trainer, Net() if model is None else model, record)


def quiet_trainer(root: Path, **options: Any) -> pl.Trainer:
    return make_trainer(root, **({"max_epochs": 5} | options))


def scheduler(schedule: Mapping[int, Any] = TWO_PHASES, **options: Any) -> FinetuningScheduler:
    return FinetuningScheduler(ft_schedule=dict(schedule), **options)


def patient() -> EarlyStopping:
    """Early stopping that these few epochs never trigger."""
    return EarlyStopping("val_loss", patience=1000)


def different_weights(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that differ in any bit; the two must have the same names."""
    assert actual.keys() == expected.keys()
    return {name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)}


def assert_same_epochs(actual: Sequence[Epoch], expected: Sequence[Epoch], *, phases: bool = True) -> None:
    """Exact: epochs, learning rates, every bit of every weight, and phases unless the other run has none."""
    assert [epoch.number for epoch in actual] == [epoch.number for epoch in expected]
    if phases:
        assert [epoch.phase for epoch in actual] == [epoch.phase for epoch in expected]
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.learning_rates == theirs.learning_rates, f"learning rates in epoch {mine.number}"
        assert different_weights(mine.weights, theirs.weights) == set(), f"weights in epoch {mine.number}"


def stopping_answers(callback: EarlyStopping) -> dict[str, Any]:
    """What people read of an ``EarlyStopping`` after a fit."""
    return {
        "best_score": float(callback.best_score),
        "stopped_epoch": callback.stopped_epoch,
        "wait_count": callback.wait_count,
        "stopping_reason": callback.stopping_reason.name,
        "stopping_reason_message": callback.stopping_reason_message,
    }


def checkpoint_answers(callback: ModelCheckpoint, root: Path) -> dict[str, Any]:
    """What people read of a ``ModelCheckpoint`` after a fit; paths relative to ``root``."""
    ranked = {relative(path, root): float(score) for path, score in callback.best_k_models.items()}
    return {
        "dirpath": relative(callback.dirpath, root),
        "best_model_path": relative(callback.best_model_path, root),
        "best_model_score": number(callback.best_model_score),
        "best_k_models": ranked,
        "kth_best_model_path": relative(callback.kth_best_model_path, root),
        "kth_value": number(callback.kth_value),
        "last_model_path": relative(callback.last_model_path, root),
        "current_score": number(callback.current_score),
    }


def relative(path: str | Path | None, root: Path) -> str:
    """A path below ``root``; a path elsewhere stays as it is, so that it is seen."""
    return str(path or "").replace(str(root.resolve()), "ROOT").replace(str(root), "ROOT")


def number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


def files_below(root: Path, pattern: str = "*.ckpt") -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob(pattern))


def saved(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


class ResumableBatches:
    """Batches that go on where their state says, so that Lightning continues inside an epoch."""

    def __init__(self, seed: int) -> None:
        self.given = list(batches(seed, 4 * BATCHES_PER_EPOCH, 4))
        self.position = 0

    def __len__(self) -> int:
        return len(self.given)

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.position %= len(self.given)
        while self.position < len(self.given):
            self.position += 1
            yield self.given[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class EndlessBatches:
    """Batches without end and without length."""

    def __init__(self, seed: int) -> None:
        self.given = list(batches(seed, 4 * BATCHES_PER_EPOCH, 4))

    def __iter__(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.given
