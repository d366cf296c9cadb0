"""What restoring costs where a model has many tensors: a fit of 11 phases with 10 restores, and the same without any.

The model has 8,002 tensors in 4,001 layers side by side, each phase thaws an eleventh of these. Both fits write the
same checkpoints, one an epoch; the fit that restores also makes sure of what it has written. Seconds are those of the
processor.

    python benchmarks/restore_scale.py [--pairs 5]
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from _common import Figure, Options, alternate, main, timed
from _trainer import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from finetuning_scheduler import FinetuningScheduler

PHASES = 11


class ManyLayers(L.LightningModule):
    """Layers side by side, whose outputs are added up."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))

    def loss(self, batch: Tensor) -> Tensor:
        """Run every layer."""
        return torch.stack([layer(batch) for layer in self.layers]).sum(dim=0).square().mean()

    def training_step(self, batch: Tensor) -> Tensor:
        """Return the loss."""
        return self.loss(batch)

    def validation_step(self, batch: Tensor) -> None:
        """Log a score that gets better from epoch to epoch."""
        self.log("val_loss", -float(self.current_epoch), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize what a phase thaws."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        """Load four batches."""
        return DataLoader(torch.ones(4, 2), 1)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Load one."""
        return DataLoader(torch.ones(1, 2), 1)  # type: ignore[arg-type]


def schedule_of(layers: int) -> dict[int, dict[str, Any]]:
    """Thaw the layers from the last to the first, an eleventh of them a phase, an epoch each."""
    schedule: dict[int, dict[str, Any]] = {}
    bounds = [layers * number // PHASES for number in range(PHASES + 1)]
    for phase in range(PHASES):
        part = range(bounds[PHASES - 1 - phase], bounds[PHASES - phase])
        names = [f"layers.{layer}.{kind}" for layer in part for kind in ("weight", "bias")]
        schedule[phase] = {"params": names, "max_transition_epoch": phase + 1}
    return schedule


def fit(layers: int, *, restore_best: bool) -> float:
    """Return the processor's seconds of a fit."""
    scheduler = FinetuningScheduler(schedule_of(layers), restore_best=restore_best, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            folder,
            max_epochs=PHASES,
            callbacks=[scheduler, ModelCheckpoint(folder, monitor="val_loss")],
        )
        model = ManyLayers(layers)
        return timed(lambda: trainer.fit(model))


def figures(options: Options) -> Iterator[Figure]:
    """Compare the fits."""
    layers = 22 if options.tiny else 4001
    kinds = (lambda: fit(layers, restore_best=True), lambda: fit(layers, restore_best=False))
    turns = alternate(*kinds, pairs=options.pairs)
    seconds = sorted(restoring for restoring, _ in turns)[len(turns) // 2]
    ratios = [restoring / without for restoring, without in turns]
    note = f"a fit that restores takes {seconds:.1f} s"
    yield Figure.of("fit of 11 phases with restores, 8,002 tensors", ratios, "<= 1.5", limit=1, note=note)


if __name__ == "__main__":
    main(__doc__, figures)
