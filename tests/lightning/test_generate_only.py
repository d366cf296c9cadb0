"""`gen_ft_sched_only` writes the default schedule and leaves, whatever else a program lacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from finetuning_scheduler import FinetuningScheduler
from finetuning_scheduler.fts_supporters import ScheduleImplMixin
from tests.reference.toys import Toy, make_trainer

TOY_SCHEDULE = "Toy_ft_schedule.yaml"


class Bare(pl.LightningModule):
    """What Lightning trains, without an optimizer and without data."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Toy().network

    def training_step(self, batch: Any) -> Any:
        raise AssertionError("nothing is to be trained")


class Unwilling(Bare):
    def configure_optimizers(self) -> Any:
        raise AssertionError("no optimizer is to be made")


class Late(Bare):
    """Has its layers from `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.network

    def configure_model(self) -> None:
        self.network = Toy().network


class FromItsData(Late):
    """Has its layers from `setup`, in which it looks at the data."""

    def configure_model(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        assert self.trainer.datamodule is not None
        self.network = Toy().network


@contextmanager
def left() -> Iterator[None]:
    """Expect a block to leave the program as one that has succeeded."""
    with pytest.raises(SystemExit) as leave:
        yield
    assert leave.value.code == 0


def schedule_of(module: nn.Module, root: Path) -> str:
    """The default schedule as it is written without a trainer."""
    return Path(ScheduleImplMixin.gen_ft_schedule(module, root / "expected")).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [Bare, Unwilling, Late, FromItsData, Toy])
def test_no_optimizer_is_needed(kind: type[pl.LightningModule], tmp_path: Path) -> None:
    scheduler = FinetuningScheduler(gen_ft_sched_only=True, log_dir=tmp_path / "generated")
    module = kind()
    data = pl.LightningDataModule() if kind is FromItsData else None
    with left():
        make_trainer(tmp_path, callbacks=[scheduler]).fit(module, datamodule=data)
    (path,) = (tmp_path / "generated").iterdir()
    assert path.name == f"{kind.__name__}_ft_schedule.yaml"
    assert path.read_text(encoding="utf-8") == schedule_of(module, tmp_path)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert vars(module).keys().isdisjoint({"configure_model", "configure_optimizers"})  # what was replaced for a while


@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_to_resume_from_is_not_read(there: bool, tmp_path: Path) -> None:
    path = tmp_path / "to-resume-from.ckpt"
    if there:
        torch.save({"state_dict": {"of": "another model"}}, path)
    with left():
        make_trainer(tmp_path, callbacks=[FinetuningScheduler(gen_ft_sched_only=True)]).fit(Bare(), ckpt_path=path)
    assert (tmp_path / "Bare_ft_schedule.yaml").exists()


def test_a_module_that_lightning_cannot_train_is_refused_as_ever(tmp_path: Path) -> None:
    class Nothing(pl.LightningModule):
        pass

    module = Nothing()
    with pytest.raises(MisconfigurationException, match=r"No `training_step\(\)` method defined"):
        make_trainer(tmp_path, callbacks=[FinetuningScheduler(gen_ft_sched_only=True)]).fit(module)
    assert "configure_optimizers" not in vars(module)


class Told(Callback):
    """Notes which of its hooks are called."""

    def __init__(self) -> None:
        self.hooks: list[str] = []

    def setup(self, *_: Any, **__: Any) -> None:
        self.hooks.append("setup")

    def on_fit_start(self, *_: Any) -> None:
        self.hooks.append("fit")

    def on_exception(self, *_: Any) -> None:
        self.hooks.append("exception")

    def teardown(self, *_: Any, **__: Any) -> None:
        self.hooks.append("teardown")


class TellingModule(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.hooks: list[str] = []

    def setup(self, stage: str) -> None:
        self.hooks.append("setup")

    def teardown(self, stage: str) -> None:
        self.hooks.append("teardown")


class TellingLogger(CSVLogger):
    """Remembers how it was told that the run ended."""

    def finalize(self, status: str) -> None:
        self.status = status


@pytest.mark.filterwarnings(r"ignore:.*fit\(ckpt_path=")  # Lightning's own words, with OnExceptionCheckpoint
@pytest.mark.parametrize("first", [True, False])
def test_it_ends_as_a_run_that_has_succeeded(first: bool, tmp_path: Path) -> None:
    """Nothing is saved, and no logger is told of a failure."""
    told, logger, module = Told(), TellingLogger(tmp_path / "logs"), TellingModule()
    scheduler = FinetuningScheduler(gen_ft_sched_only=True)
    savers = [
        ModelCheckpoint(tmp_path / "saved", save_on_exception=True, save_last=True),
        OnExceptionCheckpoint(tmp_path / "saved"),
    ]
    others = [LearningRateMonitor(), told, *savers]
    callbacks = [scheduler, *others] if first else [*others, scheduler]
    trainer = make_trainer(tmp_path, callbacks=callbacks, logger=logger)
    with left():
        trainer.fit(module)
    assert told.hooks == module.hooks == ["setup", "teardown"]
    assert logger.status == "success"
    assert not (tmp_path / "saved").exists()
    assert (Path(str(logger.log_dir)) / "TellingModule_ft_schedule.yaml").exists()


def test_the_same_trainer_can_train_afterwards(tmp_path: Path) -> None:
    """In a notebook, which catches the exception that ends a program."""
    scheduler, module = FinetuningScheduler(gen_ft_sched_only=True), Toy()
    trainer = make_trainer(tmp_path, callbacks=[scheduler], max_epochs=1)
    with left():
        trainer.fit(module)
    scheduler.gen_ft_sched_only = False
    scheduler.ft_schedule = tmp_path / TOY_SCHEDULE
    trainer.fit(module)
    assert trainer.current_epoch == 1
    assert scheduler.max_depth == 3


def test_what_is_no_fit_goes_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[FinetuningScheduler(gen_ft_sched_only=True)])
    trainer.validate(Toy())
    assert "val_loss" in trainer.callback_metrics
    assert not (tmp_path / TOY_SCHEDULE).exists()


class BareForTheCommandLine(Bare):
    pass


@pytest.mark.parametrize("optimizer", [[], ["--optimizer=torch.optim.Adam", "--optimizer.lr=0.1"]])
def test_the_command_line(optimizer: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse
    options = ["accelerator=cpu", "logger=CSVLogger", f"logger.save_dir={tmp_path}", "max_epochs=1"]
    words = [f"--trainer.{option}" for option in (*options, "enable_progress_bar=false")]
    callback = ["--trainer.callbacks+=finetuning_scheduler.FinetuningScheduler"]
    with left():
        LightningCLI(
            BareForTheCommandLine,
            args=["fit", *words, *callback, "--trainer.callbacks.gen_ft_sched_only=true", *optimizer],
            seed_everything_default=False,
        )
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.yaml", "BareForTheCommandLine_ft_schedule.yaml"} <= names
