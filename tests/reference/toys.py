"""The toys as LightningModules, what observes them, and a fit of a recipe with the callback under test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer

from .history import Epoch, History, Step, group_names, learning_rates, snapshot
from .networks import SEED, build_network, loader
from .recipe import Recipe, schedule_of, simple_recipe


class Toy(pl.LightningModule):
    """Trains one of the reference networks; ``scores`` replaces the validation loss epoch by epoch."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.recipe = recipe if recipe is not None else simple_recipe()
        self.network = build_network(self.recipe.network)
        if self.recipe.no_decay:
            self.no_decay = list(self.recipe.no_decay)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.recipe.task.loss(self(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        loss, scores = self.loss(batch), self.recipe.scores
        self.log("val_loss", loss if scores is None else torch.tensor(scores[self.current_epoch]), batch_size=8)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("test_loss", self.loss(batch))

    def optimizer_parameters(self) -> Any:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def configure_optimizers(self) -> Any:
        optimizer = self.recipe.optimizer(self.optimizer_parameters())
        if self.recipe.scheduler is None:
            return optimizer
        config = {
            "scheduler": self.recipe.scheduler(optimizer),
            "interval": self.recipe.interval,
            "frequency": self.recipe.frequency,
            "monitor": "val_loss",
        }
        return {"optimizer": optimizer, "lr_scheduler": config}

    def train_dataloader(self) -> Any:
        return train_loader(self.recipe)

    def val_dataloader(self) -> Any:
        return val_loader(self.recipe)

    def test_dataloader(self) -> Any:
        return val_loader(self.recipe)


def train_loader(recipe: Recipe) -> Any:
    return loader(recipe.task.training(), recipe.task.batch_size)


def val_loader(recipe: Recipe) -> Any:
    return loader(recipe.task.validation(), recipe.task.validation_rows)


class ToyOverAll(Toy):
    """The optimizer holds every parameter, as in most user code."""

    def optimizer_parameters(self) -> Any:
        return list(self.parameters())


class ToyData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return train_loader(simple_recipe())

    def val_dataloader(self) -> Any:
        return val_loader(simple_recipe())


class ToyResumable(Toy):
    """Lightning continues inside an epoch."""

    def train_dataloader(self) -> Any:
        return ResumableBatches(train_loader(self.recipe))


class ResumableBatches:
    """An iterable of batches that continues where its state says."""

    def __init__(self, batches: Any) -> None:
        self.batches = list(batches)
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Tensor]]:
        if self.position == len(self.batches):
            self.position = 0
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class Recorder(Callback):
    """Observes what the reference loop records. List it after the callback under test."""

    def __init__(self, phase_of: Callable[[], int] = lambda: 0) -> None:
        self.history = History()
        self.phase_of = phase_of

    def on_train_start(self, *_: Any) -> None:
        torch.manual_seed(SEED)

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        self.history.steps.append(Step(self.phase_of(), learning_rates(arguments[-1])))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        weights = self.weights(trainer, pl_module)
        groups = self.groups(pl_module, optimizer)
        lrs = learning_rates(optimizer)
        self.history.epochs.append(Epoch(trainer.current_epoch, self.phase_of(), weights, groups, lrs))

    def weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        return snapshot(pl_module)

    def groups(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> tuple[tuple[str, ...], ...]:
        return group_names(pl_module, optimizer)


class SaveAt(Checkpoint):
    """Saves at every call of one hook, after all other callbacks; keeps a copy of the checkpoint directory as it was.

    ``files`` maps the checkpoint to that copy, so that a session killed at this very moment can be resumed.
    """

    def __init__(self, hook: str, root: Path) -> None:
        self.root = root
        self.files: dict[Path, Path] = {}
        self.steps: dict[Path, int] = {}
        setattr(self, hook, self.save)

    def save(self, trainer: pl.Trainer, *_: Any) -> None:
        number = len(self.files)
        checkpoint, copied = self.root / "saved" / f"{number}.ckpt", self.root / "copies" / str(number)
        trainer.save_checkpoint(checkpoint)
        copied.mkdir(parents=True)
        if (self.root / "checkpoints").exists():
            shutil.copytree(self.root / "checkpoints", copied, dirs_exist_ok=True)
        self.files[checkpoint] = copied
        self.steps[checkpoint] = trainer.global_step


# Where ModelCheckpoint saves, so that a checkpoint written by a hook knows of the one of the same epoch.
WHEN_SAVED: dict[str, dict[str, Any]] = {
    "on_train_epoch_end": {},
    "on_validation_end": {"save_on_train_epoch_end": False},
    "on_train_batch_end": {},
}


def roll_back(root: Path, copied: Path) -> None:
    """Put the checkpoint directory back to what it was when a checkpoint was saved."""
    shutil.rmtree(root / "checkpoints", ignore_errors=True)
    shutil.copytree(copied, root / "checkpoints")


def make_trainer(root: Path, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "max_epochs": 6,
    }
    return pl.Trainer(**(defaults | options))


class Session:
    """One fit of a recipe with the callback under test, and what was observed of it."""

    def __init__(
        self,
        recipe: Recipe,
        root: Path,
        module: type[Toy] = Toy,
        checkpoint: Mapping[str, Any] | None = None,
        extra_callbacks: tuple[Callback, ...] = (),
        scheduler_options: Mapping[str, Any] | None = None,
        explicit: bool = True,
        scheduler_class: type[Any] | None = None,
        **trainer_options: Any,
    ) -> None:
        from finetuning_scheduler import FinetuningScheduler

        options: dict[str, Any] = {
            "restore_best": recipe.restore_best,
            "base_max_lr": recipe.base_max_lr,
            "apply_lambdas_new_pgs": recipe.apply_lambdas,
            "max_depth": recipe.max_depth,
        }
        if explicit:
            options["ft_schedule"] = schedule_of(recipe)
        self.scheduler = (scheduler_class or FinetuningScheduler)(**(options | dict(scheduler_options or {})))
        self.recorder = Recorder(lambda: self.scheduler.curr_depth)
        patience = 1000 if recipe.patience is None else recipe.patience
        stopping = EarlyStopping("val_loss", patience=patience, min_delta=recipe.min_delta, mode=recipe.mode)
        kept = {"monitor": "val_loss", "mode": recipe.mode, "dirpath": root / "checkpoints"}
        saving = ModelCheckpoint(**(kept | dict(checkpoint or {})))
        limits = {"max_epochs": recipe.epochs, "accumulate_grad_batches": recipe.accumulate}
        self.trainer = make_trainer(
            root,
            callbacks=[self.scheduler, stopping, saving, self.recorder, *extra_callbacks],
            **(limits | trainer_options),
        )
        self.module = module(recipe)

    @property
    def history(self) -> History:
        return self.recorder.history

    def fit(self, **arguments: Any) -> Session:
        self.trainer.fit(self.module, **arguments)
        return self
