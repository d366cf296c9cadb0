"""How much smaller a checkpoint is without the weights that no phase has thawed yet.

The model has 85 million parameters in 12 blocks, of which the head and the last block are trained. The files hold the
optimizer's state of these, too: two numbers a parameter under AdamW, none under plain SGD. That state is needed, so
that the limit is what trained weights and state leave.

    python benchmarks/checkpoint_size.py
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import Figure, Options, main
from _encoder import BLOCKS, Encoder, Sizes
from _trainer import quiet_trainer

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

STATE = {"SGD": 0, "AdamW": 2}  # numbers that an optimizer keeps for each parameter


class Trained(Encoder):
    """The encoder, with a choice of optimizer."""

    def __init__(self, sizes: Sizes, optimizer: str) -> None:
        super().__init__(sizes)
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize what a phase thaws."""
        kind: Any = getattr(torch.optim, self.optimizer)
        made: torch.optim.Optimizer = kind(self.parameters(), lr=1e-3)
        return made


def size(sizes: Sizes, optimizer: str, *, whole: bool) -> int:
    """Return the bytes of a checkpoint."""
    schedule = {0: {"params": ["head", f"blocks.{BLOCKS - 1}"]}}
    with tempfile.TemporaryDirectory() as folder:
        saving = FTSCheckpoint(folder, monitor="val_loss", save_frozen_weights=whole)
        trainer = quiet_trainer(
            folder,
            max_epochs=1,
            limit_train_batches=1,
            callbacks=[FinetuningScheduler(schedule, logging_level=logging.ERROR), saving],
        )
        trainer.fit(Trained(sizes, optimizer))
        return Path(saving.best_model_path).stat().st_size


def figures(options: Options) -> Iterator[Figure]:
    """Compare the files under both optimizers."""
    sizes = Sizes.of(options, width=768, tokens=8, batch=2, train_batches=2, val_batches=1)
    model = Encoder(sizes)
    everything = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for part in (model.head, model.blocks[-1]) for parameter in part.parameters())
    for optimizer, numbers in STATE.items():
        whole, slim = (size(sizes, optimizer, whole=each) for each in (True, False))
        limit = (everything + numbers * trained) / ((1 + numbers) * trained)
        note = f"{whole / 1e6:.0f} MB and {slim / 1e6:.0f} MB"
        claim = f"checkpoint without frozen weights, {optimizer}"
        yield Figure.of(claim, [whole / slim], ">= 8", limit=limit, note=note)


if __name__ == "__main__":
    main(__doc__, figures)
