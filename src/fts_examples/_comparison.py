"""Fine-tune the same model in several ways under the same settings, and print what came of each."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from rich.console import Console
from rich.table import Table
from torch import nn

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping


@dataclass(frozen=True)
class Settings:
    """What all ways have in common."""

    max_epochs: int
    patience: int
    seed: int
    output: Path
    accelerator: str = "cpu"


@dataclass
class PhaseRecord:
    """A phase as it was trained; epochs count from 0 and both ends are included."""

    depth: int
    first_epoch: int
    last_epoch: int
    trainable: int
    ended_by: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one way came to."""

    way: str
    accuracy: float
    epochs: int
    seconds: float
    phases: Sequence[PhaseRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """A session that is over; ``processor_seconds`` is the time of this process on any processor."""

    trainer: L.Trainer
    epochs: int
    seconds: float
    processor_seconds: float
    phases: Sequence[PhaseRecord]


class PhaseLog(Callback):
    """Keep a record of each phase that is trained; without a schedule the whole session is phase 0.

    It goes before ``scheduler`` in the trainer's callbacks: it looks at early stopping before a transition resets it.
    """

    def __init__(self, early_stopping: EarlyStopping, scheduler: FinetuningScheduler | None = None) -> None:
        self.records: list[PhaseRecord] = []
        self._early_stopping = early_stopping
        self._scheduler = scheduler
        self._out_of_patience = False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note whether early stopping would end the phase here."""
        self._out_of_patience = self._early_stopping.wait_count >= self._early_stopping.patience

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Extend the present phase's record, or start the next one."""
        depth = 0 if self._scheduler is None else self._scheduler.curr_depth
        epoch = trainer.current_epoch
        if not self.records or self.records[-1].depth != depth:
            self._end_last_record("max_transition_epoch")
            self.records.append(PhaseRecord(depth, epoch, epoch, trainable_parameters(pl_module)))
        self.records[-1].last_epoch = epoch

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what ended the last phase."""
        self.on_train_epoch_start(trainer, pl_module)
        self._end_last_record("max_epochs")

    def _end_last_record(self, limit: str) -> None:
        if self.records:
            self.records[-1].ended_by = "early stopping" if self._out_of_patience else limit


def trainable_parameters(module: nn.Module) -> int:
    """Count the elements of the parameters that require a gradient."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def train_and_test(
    way: str,
    module: L.LightningModule,
    data: L.LightningDataModule,
    settings: Settings,
    scheduler: FinetuningScheduler | None = None,
) -> Outcome:
    """Train ``module``, with ``scheduler`` if there is one, and test its best checkpoint.

    ``module`` logs ``val_loss`` in validation and ``test_accuracy`` in testing.
    """
    with without_advice():
        trained = train(way, module, data, settings, scheduler)
        [metrics] = trained.trainer.test(module, datamodule=data, ckpt_path="best", verbose=False)
    return Outcome(way, metrics["test_accuracy"], trained.epochs, trained.seconds, trained.phases)


def train(
    way: str,
    module: L.LightningModule,
    data: L.LightningDataModule,
    settings: Settings,
    scheduler: FinetuningScheduler | None = None,
) -> Trained:
    """Train ``module``, with ``scheduler`` if there is one; ``module`` logs ``val_loss`` in validation."""
    L.seed_everything(settings.seed, verbose=False)
    early_stopping, checkpoint = best_and_stop(settings, scheduled=scheduler is not None)
    phases = PhaseLog(early_stopping, scheduler)
    callbacks = [phases, early_stopping, checkpoint] + ([] if scheduler is None else [scheduler])
    trainer = make_trainer(settings, way, callbacks)
    start, processor_start = time.perf_counter(), time.process_time()
    trainer.fit(module, datamodule=data)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    return Trained(trainer, trainer.current_epoch, seconds, processor_seconds, phases.records)


def best_and_stop(settings: Settings, *, scheduled: bool) -> tuple[EarlyStopping, ModelCheckpoint]:
    """Early stopping and best checkpoint on the validation loss, in the form that the way needs."""
    if scheduled:
        return FTSEarlyStopping("val_loss", patience=settings.patience), FTSCheckpoint(monitor="val_loss")
    return EarlyStopping("val_loss", patience=settings.patience), ModelCheckpoint(monitor="val_loss")


def make_trainer(settings: Settings, way: str, callbacks: list[Callback]) -> L.Trainer:
    """Make a trainer that writes below ``settings.output`` and shows a progress bar on a terminal."""
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        callbacks=callbacks,
        default_root_dir=settings.output / way.replace(" ", "_"),
        enable_model_summary=False,
        enable_progress_bar=Console().is_terminal,
        logger=False,
        max_epochs=settings.max_epochs,
    )


@contextmanager
def without_advice() -> Iterator[None]:
    """Hide Lightning's advice that does not apply to data held in memory, its notes on devices and a deprecation."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)


def print_outcomes(title: str, outcomes: Sequence[Outcome], *, held_out: str, console: Console | None = None) -> None:
    """Print one row for each way and, below, one for each phase it went through.

    ``held_out`` names the data that accuracy was measured on.
    """
    console = console or Console()
    ways = Table("way", title=title, title_justify="left", caption_justify="left")
    ways.caption = f"accuracy: of the best checkpoint, on {held_out}"
    for heading in ("accuracy", "epochs", "seconds"):
        ways.add_column(heading, justify="right")
    for outcome in outcomes:
        ways.add_row(outcome.way, f"{outcome.accuracy:.1%}", str(outcome.epochs), f"{outcome.seconds:.1f}")
    console.print(ways, "", _phase_table(outcomes))


def _phase_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("way", "phase", "epochs", "ended by", title="Phases", title_justify="left")
    table.add_column("trainable", justify="right")
    for outcome in outcomes:
        for record in outcome.phases:
            epochs = f"{record.first_epoch} to {record.last_epoch}"
            table.add_row(outcome.way, str(record.depth), epochs, record.ended_by, f"{record.trainable:,}")
        table.add_section()
    return table
