"""Whole programs as users of the 2.x package of this name have them, run as they stand."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    Timer,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping

QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs write to the present directory."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()

    def rows(self, seed: int) -> DataLoader[tuple[Tensor, ...]]:
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=self.hparams["batch_size"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.rows(0)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.rows(1)

    test_dataloader = predict_dataloader = val_dataloader


class Classifier(L.LightningModule):
    """An encoder of three layers, a pooler and a classifier, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
        self.model = nn.Sequential()
        self.model.add_module("encoder", nn.ModuleDict({"layer": nn.Sequential(*layers)})["layer"])
        self.model.add_module("pooler", nn.Linear(8, 8))
        self.model.add_module("classifier", nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), prog_bar=True)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)


# --- a notebook -------------------------------------------------------------------------------------------------------


class NotebookModule(Classifier):
    """Makes groups of what requires a gradient, and logs the depth it asks of the callback."""

    def __init__(self, optimizer_init: dict[str, Any], lr_scheduler_init: dict[str, Any], name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.no_decay = ["bias", "LayerNorm.weight"]

    @property
    def finetuningscheduler_callback(self) -> FinetuningScheduler | None:
        found = [callback for callback in self.trainer.callbacks if isinstance(callback, FinetuningScheduler)]
        return found[0] if found else None

    def on_train_epoch_start(self) -> None:
        if self.finetuningscheduler_callback:
            self.log("finetuning_schedule_depth", float(self.finetuningscheduler_callback.curr_depth))

    def groups(self) -> list[dict[str, Any]]:
        trainable = [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]
        plain = [each for name, each in trainable if not any(part in name for part in self.no_decay)]
        without = [each for name, each in trainable if any(part in name for part in self.no_decay)]
        decay = self.hparams["optimizer_init"]["weight_decay"]
        return [{"params": plain, "weight_decay": decay}, {"params": without, "weight_decay": 0.0}]

    def configure_optimizers(self) -> Any:
        self.sizes = [len(group["params"]) for group in self.groups()]
        optimizer = AdamW(self.groups(), **self.hparams["optimizer_init"])
        scheduler = CosineAnnealingWarmRestarts(optimizer, **self.hparams["lr_scheduler_init"])
        return [optimizer], [{"scheduler": scheduler, "interval": "epoch", "name": self.hparams["name"]}]


NOTEBOOK = """
0:
  params:
  - model.classifier.bias
  - model.classifier.weight
  - model.pooler.*
  max_transition_epoch: 2
1:
  params:
  - model.encoder.2.*
  max_transition_epoch: 4
2:
  params:
  - model.encoder.(0|1).*
  lr: 1e-06
"""


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_a_notebook() -> None:
    Path("schedule.yaml").write_text(NOTEBOOK, encoding="utf-8")
    seed_everything(42)
    module = NotebookModule({"weight_decay": 1e-5, "eps": 1e-7, "lr": 1e-3}, {"T_0": 1, "T_mult": 2}, "Cosine")
    callbacks: list[Callback] = [
        FinetuningScheduler(ft_schedule="schedule.yaml", max_depth=2, logging_level=logging.DEBUG),
        FTSEarlyStopping(monitor="val_loss", min_delta=0.001, patience=2),
        FTSCheckpoint(monitor="val_loss", verbose=True),
        LearningRateMonitor(logging_interval="epoch"),
        ModelSummary(max_depth=2),
        DeviceStatsMonitor(),
        Timer(),
    ]
    logger = CSVLogger("logs", name="explicit")
    trainer = Trainer(max_epochs=6, precision="bf16-mixed", callbacks=callbacks, logger=logger, **QUIET)
    trainer.fit(module, datamodule=Data())
    scheduler = module.finetuningscheduler_callback
    assert scheduler is not None
    assert module.sizes == [2, 2]  # of phase 0, without and with a weight decay of zero
    assert (scheduler.curr_depth, scheduler.depth_remaining, scheduler.max_depth) == (2, 0, 2)
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["finetuning_schedule_depth"] for row in rows if row["finetuning_schedule_depth"]] == [
        f"{depth}.0" for depth in (0, 0, 1, 1, 2, 2)
    ]
    # Cosines of one epoch, of two and of four, from where the group began; at the start of each epoch.
    of_groups = [[float(row[f"Cosine/phase{n}"] or "nan") for row in rows if row["Cosine/phase0"]] for n in (0, 1, 2)]
    assert of_groups[0] == pytest.approx([1e-3, 1e-3, 5e-4, 1e-3, 8.535534e-4, 5e-4], rel=1e-6)
    assert of_groups[2][-2] == pytest.approx(1e-6, rel=1e-9)
    groups = trainer.optimizers[0].param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [
        (2, 1e-5),
        (2, 0.0),
        (1, 1e-5),
        (1, 0.0),
        (2, 1e-5),
        (2, 0.0),
    ]
    saving = trainer.checkpoint_callback
    assert isinstance(saving, FTSCheckpoint)
    (tested,) = trainer.test(datamodule=Data(), ckpt_path="best")
    assert tested["val_loss"] == pytest.approx(float(saving.best_model_score or 0), rel=1e-3)
    loaded = NotebookModule.load_from_checkpoint(saving.best_model_path)
    assert torch.equal(loaded.model.classifier.weight, module.model.classifier.weight)


# --- a generated schedule, edited, trained, interrupted, resumed ------------------------------------------------------


class WarmingUp(Classifier):
    """A schedule by step, as of transformers: up for four steps, then down to half at the end."""

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(filter(lambda parameter: parameter.requires_grad, self.parameters()), lr=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, lambda step: min((step + 1) / 4, 1 - step / (2 * steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Writer(BasePredictionWriter):
    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        torch.save(predictions, "predictions.pt")


def edited_schedule() -> str:
    """Write the default schedule, join two of its phases, and give the first a limit and the second a rate."""
    generates: list[Callback] = [FinetuningScheduler(gen_ft_sched_only=True)]
    trainer = Trainer(callbacks=generates, max_epochs=1, logger=CSVLogger("."), **QUIET)
    with pytest.raises(SystemExit) as left:
        trainer.fit(WarmingUp(), datamodule=Data())
    assert left.value.code == 0
    (generated,) = Path().rglob("WarmingUp_ft_schedule.yaml")
    phases = yaml.safe_load(generated.read_text(encoding="utf-8"))
    assert list(phases) == [0, 1, 2, 3, 4]
    phases[0]["max_transition_epoch"] = 2
    phases[1] = {"params": phases[1]["params"] + phases.pop(2)["params"], "lr": 1e-3, "max_transition_epoch": 4}
    phases[2] = {"params": phases.pop(3)["params"] + phases.pop(4)["params"]}
    Path("edited.yaml").write_text(yaml.dump(phases), encoding="utf-8")
    return "edited.yaml"


class Interruption(Callback):
    """Ends the program as an epoch begins, if there is one to end it at."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise ConnectionError("the machine is gone")


def fit(schedule: str, dirpath: str, ends: int | None = None, ckpt_path: str | None = None) -> Trainer:
    callbacks: list[Callback] = [
        EarlyStopping("val_loss", patience=5),
        ModelCheckpoint(dirpath, monitor="val_loss", save_last=True, save_top_k=2, filename="{epoch}-{val_loss:.3f}"),
        FinetuningScheduler(schedule, base_max_lr=5e-4),
        LearningRateMonitor(),
        Writer("epoch"),
        Interruption(ends),
    ]
    further: dict[str, Any] = {
        "gradient_clip_val": 1.0,
        "accumulate_grad_batches": 2,
        "enable_model_summary": False,
        "logger": CSVLogger("."),
    }
    trainer = Trainer(max_epochs=6, callbacks=callbacks, **further, **QUIET)
    seed_everything(7)
    trainer.fit(WarmingUp(), datamodule=Data(), ckpt_path=ckpt_path)
    return trainer


def test_a_generated_schedule_is_edited_trained_and_resumed() -> None:
    schedule = edited_schedule()
    through = fit(schedule, "through")
    stopping, saving = through.early_stopping_callback, through.checkpoint_callback
    assert type(stopping) is EarlyStopping
    assert type(saving) is ModelCheckpoint
    assert [len(group["params"]) for group in through.optimizers[0].param_groups] == [2, 4, 4]
    # Half of 1e-2, of the phase's `lr` and of `base_max_lr`, after the last of the twelve steps.
    rates = [group["lr"] for group in through.optimizers[0].param_groups]
    assert rates == pytest.approx([5e-3, 5e-4, 2.5e-4], rel=1e-12)
    with pytest.raises(ConnectionError):
        fit(schedule, "resumed", ends=3)
    resumed = fit(schedule, "resumed", ckpt_path="resumed/last.ckpt")
    weights = through.lightning_module.state_dict()
    for name, weight in resumed.lightning_module.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    (scored,) = through.validate(datamodule=Data(), ckpt_path=saving.best_model_path)
    assert scored["val_loss"] == pytest.approx(float(saving.best_model_score or 0), rel=1e-6)
    through.predict(datamodule=Data(), ckpt_path="through/last.ckpt")
    assert len(torch.load("predictions.pt")) == 4


# --- a command line ---------------------------------------------------------------------------------------------------


class CliModule(Classifier):
    """Makes optimizer and LR scheduler of its arguments."""

    def __init__(
        self,
        optimizer_init: dict[str, Any],
        lr_scheduler_init: dict[str, Any],
        pl_lrs_cfg: dict[str, Any] | None = None,
        experiment_tag: str = "default",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen: list[tuple[int, int, str, list[float]]] = []

    def configure_optimizers(self) -> Any:
        trainable: Any = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer: Optimizer = instantiate_class(args=(trainable,), init=self.hparams["optimizer_init"])
        scheduler = instantiate_class(args=(optimizer,), init=self.hparams["lr_scheduler_init"])
        return [optimizer], [{"scheduler": scheduler, **(self.hparams["pl_lrs_cfg"] or {})}]

    def on_train_epoch_start(self) -> None:
        (scheduler,) = [each for each in self.trainer.callbacks if isinstance(each, FinetuningScheduler)]
        optimizer = self.trainer.optimizers[0]
        trainable = sum(parameter.requires_grad for parameter in self.parameters())
        rates = [group["lr"] for group in optimizer.param_groups]
        self.seen.append((scheduler.curr_depth, trainable, type(optimizer).__name__, rates))


class Cli(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("trainer.logger.init_args.name", "model.init_args.experiment_tag")


DEFAULTS = f"""
seed_everything: 42
data:
  class_path: {__name__}.Data
  init_args: {{batch_size: 8}}
trainer:
  max_epochs: 6
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  log_every_n_steps: 1
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: logs, name: nofts}}
"""
IMPLICIT = f"""
model:
  class_path: {__name__}.CliModule
  init_args:
    optimizer_init: {{class_path: torch.optim.AdamW, init_args: {{weight_decay: 1.0e-05, eps: 1.0e-07, lr: 1.0e-03}}}}
    lr_scheduler_init: {{class_path: torch.optim.lr_scheduler.StepLR, init_args: {{step_size: 1, gamma: 0.5}}}}
    pl_lrs_cfg: {{interval: epoch, frequency: 1, name: Initial}}
trainer:
  callbacks:
  - class_path: finetuning_scheduler.FTSCheckpoint
    init_args: {{save_top_k: 1, monitor: val_loss, verbose: true}}
  - class_path: finetuning_scheduler.FTSEarlyStopping
    init_args: {{monitor: val_loss, min_delta: 10.0, patience: 1, verbose: false, mode: min}}
  - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    init_args: {{logging_interval: epoch}}
  - class_path: finetuning_scheduler.FinetuningScheduler
    init_args:
      max_depth: 1
      restore_best: false
      reinit_optim_cfg:
        optimizer_init: {{class_path: torch.optim.SGD, init_args: {{lr: 2.0e-03, momentum: 0.9}}}}
      reinit_lr_cfg:
        lr_scheduler_init: {{class_path: torch.optim.lr_scheduler.StepLR, init_args: {{step_size: 1, gamma: 0.5}}}}
        pl_lrs_cfg: {{interval: epoch, frequency: 1, name: Implicit_Reinit_LR_Scheduler}}
        use_current_optimizer_pg_lrs: true
"""


def test_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse
    monkeypatch.setattr(sys, "argv", ["program"])
    Path("defaults.yaml").write_text(DEFAULTS, encoding="utf-8")
    Path("implicit.yaml").write_text(IMPLICIT, encoding="utf-8")
    words = ["fit", "--config", "defaults.yaml", "--config", "implicit.yaml"]
    words += ["--trainer.callbacks.max_depth=2", "--trainer.logger.init_args.name=implicit"]
    further: dict[str, Any] = {"subclass_mode_model": True, "subclass_mode_data": True}
    command = Cli(L.LightningModule, L.LightningDataModule, args=words, auto_configure_optimizers=False, **further)
    assert command.model.hparams["experiment_tag"] == "implicit"
    # Nothing gets better by 10, so that each phase ends after its second epoch, or its first once there is a best.
    assert command.model.seen == [
        (0, 2, "AdamW", [1e-3]),
        (0, 2, "AdamW", [5e-4]),
        (1, 4, "SGD", pytest.approx([2.5e-4, 1e-5], rel=1e-12)),
        (2, 6, "SGD", pytest.approx([1.25e-4, 5e-6, 1e-5], rel=1e-12)),
    ]
    (config,) = command.trainer.lr_scheduler_configs
    assert config.name == "Implicit_Reinit_LR_Scheduler"
    assert Path("logs/implicit/version_0/CliModule_ft_schedule.yaml").exists()


# --- no validation, no checkpoints ------------------------------------------------------------------------------------


class Unvalidated(Classifier):
    validation_step = None  # type: ignore[assignment]
    test_step = None  # type: ignore[assignment]

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.1)


class Reporting(FinetuningScheduler):
    """A user's subclass: a rule of its own, and a line at each phase."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.report: list[tuple[int, int, int]] = []

    def should_transition(self, trainer: Trainer) -> bool:
        return trainer.current_epoch == 3 or super().should_transition(trainer)

    def step(self) -> None:
        super().step()
        assert self.pl_module is not None
        trainable = sum(parameter.requires_grad for parameter in self.pl_module.parameters())
        self.report.append((self.curr_depth, self.depth_remaining, trainable))


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_phases_by_epochs_without_validation_and_checkpoints() -> None:
    schedule = {
        0: {"params": ["model.classifier.bias", "model.classifier.weight"], "max_transition_epoch": 1},
        1: {"params": ["model.pooler.*"], "max_transition_epoch": 9},
        2: {"params": ["model.encoder.*"], "max_transition_epoch": 10},
    }
    scheduler = Reporting(schedule, epoch_transitions_only=True, restore_best=False, base_max_lr=None)
    trainer = Trainer(max_epochs=5, callbacks=[scheduler], enable_checkpointing=False, logger=False, **QUIET)
    trainer.fit(Unvalidated(), datamodule=Data())
    assert scheduler.report == [(1, 1, 4), (2, 0, 10)]
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.1, 0.1]
    assert trainer.current_epoch == 5
    assert trainer.early_stopping_callback is None
