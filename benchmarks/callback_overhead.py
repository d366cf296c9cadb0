"""What the callback costs in a step: the last phase of a schedule, against the same tensors trained without it.

Both fits have early stopping and checkpoints of their own, so that what differs is the schedule. The time is that from
the first batch of an epoch to its last, without validation; the first epoch of the phase, in which the gradients of
what was thawed are watched, is one of those.

    python benchmarks/callback_overhead.py [--pairs 5]
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from _common import Figure, Options, alternate, main
from _encoder import Encoder, Sizes, Stage, schedule_of
from _trainer import quiet_trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from finetuning_scheduler import FinetuningScheduler

STAGES = (Stage(0, 1), Stage(4, 4))


class Stopwatch(Callback):
    """Adds up the processor's seconds between the first batch of an epoch and its last."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.seconds = 0.0
        self.steps = 0
        self.begun = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, number: int) -> None:
        """Begin with an epoch's second batch: the first one waits for the loader."""
        if number == 1:
            self.begun = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """End with its last batch."""
        if trainer.current_epoch >= self.first and trainer.is_last_batch:
            self.seconds += time.process_time() - self.begun
            self.steps += int(trainer.num_training_batches) - 1


class Plain(Encoder):
    """What the last phase trains requires a gradient from the beginning."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize it in two groups, as there are with the schedule."""
        self.requires_grad_(False)
        for module in (self.head, *self.blocks[-4:]):
            module.requires_grad_(True)
        groups = [{"params": self.head.parameters()}, {"params": self.blocks[-4:].parameters(), "lr": 1e-4}]
        return torch.optim.AdamW(groups, lr=1e-3, fused=True)


def step(sizes: Sizes, *, scheduled: bool) -> float:
    """Return the seconds of a step."""
    watch = Stopwatch(first=STAGES[0].until)
    callbacks: list[Callback] = [watch, EarlyStopping("val_loss", patience=100), ModelCheckpoint(monitor="val_loss")]
    if scheduled:
        schedule = schedule_of(STAGES)
        scheduler = FinetuningScheduler(schedule, epoch_transitions_only=True, logging_level=logging.ERROR)
        callbacks.append(scheduler)
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            folder,
            max_epochs=STAGES[-1].until,
            callbacks=callbacks,
        )
        torch.manual_seed(1)
        trainer.fit(Encoder(sizes) if scheduled else Plain(sizes))
    return watch.seconds / watch.steps


def figures(options: Options) -> Iterator[Figure]:
    """Compare steps with the callback and without."""
    sizes = Sizes.of(options, width=64, tokens=32, batch=8, train_batches=60, val_batches=1)
    kinds = (lambda: step(sizes, scheduled=True), lambda: step(sizes, scheduled=False))
    turns = alternate(*kinds, pairs=2 * options.pairs)
    milliseconds = Figure.of("", [without * 1e3 for _, without in turns], ">= 0").value
    ratios = [with_it / without for with_it, without in turns]
    note = f"a step takes {milliseconds:.1f} ms"
    yield Figure.of("a step with the callback against one without", ratios, "<= 1.01", limit=1, note=note)


if __name__ == "__main__":
    main(__doc__, figures)
