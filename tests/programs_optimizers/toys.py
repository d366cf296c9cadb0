"""A small LightningModule, a fit of it in phases, the same loop written out by hand, and what was said meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor, nn
from torch.optim import Optimizer

from finetuning_scheduler import FinetuningScheduler
from tests.core_programs.loops import (
    BATCHES_PER_EPOCH,
    HEAD,
    LOWER,
    LOWER_LR,
    UPPER,
    UPPER_LR,
    Schedule,
    copied,
    momentum_sgd,
    thaw,
)
from tests.reference.toys import make_trainer

from ..core_programs.hearing import Said, listening

LearningRates = tuple[float | None, ...]


class Batches:
    """A data loader that draws no random numbers."""

    def __init__(self, count: int = BATCHES_PER_EPOCH) -> None:
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randn(4, 3, generator=generator) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class Toy(pl.LightningModule):
    """Three linear layers. ``scores`` is what validation reports, epoch by epoch."""

    def __init__(self, scores: Sequence[float] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.lower, self.upper, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)
            self.build()
        self.scores = scores

    def build(self) -> None:
        """Make further layers."""

    def trunk(self, x: Tensor) -> Tensor:
        return torch.tanh(self.upper(torch.tanh(self.lower(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def loss(self, batch: Tensor, batch_index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch), batch.sin().sum(dim=1, keepdim=True))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        score = self.loss(batch, batch_idx) if self.scores is None else torch.tensor(self.scores[self.current_epoch])
        self.log("val_loss", score, batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        return momentum_sgd(self.parameters())

    def train_dataloader(self) -> Any:
        return Batches()

    def val_dataloader(self) -> Any:
        return Batches(1)


def phases(*limits: int, parameters: Sequence[Sequence[str]] = (HEAD, UPPER, LOWER), **keys: Any) -> Schedule:
    """A schedule; phase k ends at epoch ``limits[k]``. ``phase_1={...}`` gives further keys of a phase."""
    rates = (None, UPPER_LR, LOWER_LR, LOWER_LR)
    schedule: Schedule = {}
    for number, names in enumerate(parameters[: len(limits) + 1]):
        schedule[number] = {"params": list(names)}
        if rates[number] is not None:
            schedule[number]["lr"] = rates[number]
        if number < len(limits):
            schedule[number]["max_transition_epoch"] = limits[number]
        schedule[number].update(keys.get(f"phase_{number}", {}))
    return schedule


# --- a fit ------------------------------------------------------------------------------------------------------------


class Recorder(Callback):
    """Notes each optimizer step's phase and learning rates, and the weights after each epoch."""

    def __init__(self, scheduler: FinetuningScheduler | None = None) -> None:
        self.scheduler = scheduler
        self.phases: list[int] = []
        self.rates: list[LearningRates] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.phases.append(0 if self.scheduler is None else self.scheduler.curr_depth)
        self.rates.append(tuple(group["lr"] for group in optimizer.param_groups))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(copied(pl_module))


@dataclass
class Fit:
    """A fit with the callback: what was made for it, what it did and what was said."""

    module: pl.LightningModule
    scheduler: FinetuningScheduler
    trainer: pl.Trainer
    recorder: Recorder
    said: list[Said] = field(default_factory=list)

    @property
    def rates(self) -> list[LearningRates]:
        return self.recorder.rates

    @property
    def phases(self) -> list[int]:
        return self.recorder.phases

    @property
    def optimizer(self) -> Optimizer:
        (optimizer,) = self.trainer.optimizers
        return optimizer

    def run(self, **arguments: Any) -> Fit:
        with listening(lambda: self.trainer.global_step) as said:
            self.said = said
            self.trainer.fit(self.module, **arguments)
        return self


def prepared(
    module: pl.LightningModule,
    root: Path,
    schedule: Any,
    *,
    epochs: int = 6,
    callbacks: Sequence[Callback] = (),
    trainer_options: Mapping[str, Any] | None = None,
    restore_best: bool = False,
    patience: int = 1000,
    **scheduler_options: Any,
) -> Fit:
    """Make the trainer of a fit. Phases end by their limits; nothing is restored unless it is asked for."""
    scheduler = FinetuningScheduler(ft_schedule=schedule, restore_best=restore_best, **scheduler_options)
    recorder = Recorder(scheduler)
    patient = EarlyStopping("val_loss", patience=patience)
    trainer = make_trainer(
        root,
        callbacks=[scheduler, patient, *callbacks, recorder],
        max_epochs=epochs,
        **({"enable_checkpointing": restore_best} | dict(trainer_options or {})),
    )
    return Fit(module, scheduler, trainer, recorder)


def fit(module: pl.LightningModule, root: Path, schedule: Any, **options: Any) -> Fit:
    return prepared(module, root, schedule, **options).run()


def plain_fit(module: pl.LightningModule, root: Path, epochs: int, **options: Any) -> Recorder:
    """Fit without the callback under test."""
    recorder = Recorder()
    make_trainer(root, callbacks=[recorder], max_epochs=epochs, enable_checkpointing=False, **options).fit(module)
    return recorder


# --- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(
    module: Toy,
    optimizer_over: Callable[[list[nn.Parameter]], Optimizer],
    schedule: Schedule,
    *,
    epochs: int = 6,
    group_of: Callable[[list[nn.Parameter], float | None], list[dict[str, Any]]] | None = None,
) -> Optimizer:
    """The loop that a fit without restoring has to equal bit for bit; returns its optimizer.

    Args:
        module: The module to train.
        optimizer_over: Makes the optimizer over phase 0's parameters.
        schedule: A schedule of full names and epoch limits.
        epochs: Number of epochs.
        group_of: The groups that a later phase adds, from its parameters and its ``lr``.
    """
    named = dict(module.named_parameters())
    for parameter in named.values():
        parameter.requires_grad = False
    thawed = [thaw(named, schedule[0]["params"])]
    optimizer = optimizer_over(thawed[0])
    for epoch in range(epochs):
        phase = len(thawed) - 1
        if phase + 1 in schedule and epoch >= schedule[phase]["max_transition_epoch"]:
            entered = schedule[phase + 1]
            thawed.append(thaw(named, entered["params"]))
            groups = [{"params": thawed[-1], "lr": entered.get("lr")}]
            if group_of is not None:
                groups = group_of(thawed[-1], entered.get("lr"))
            for group in groups:
                optimizer.add_param_group(group)
        for index, batch in enumerate(module.train_dataloader()):
            optimizer.zero_grad()
            module.loss(batch, index).backward()
            optimizer.step()
    return optimizer
