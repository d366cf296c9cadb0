"""How long training waits for a transition that restores the best state: from memory, and from the checkpoint's file.

The model has 85 million parameters in 12 blocks. The head and the last block have been trained with AdamW when the best
checkpoint is written; the transition restores it and thaws the next block. The file has just been written, so that it
is read from the system's memory and not from the disk itself. What is timed is the whole transition: in both ways the
file is looked at, in one it is read.

    python benchmarks/transition_restore.py [--pairs 5]
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import patch

from _common import Figure, Options, alternate, main
from _encoder import BLOCKS, Encoder, Sizes
from _trainer import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from finetuning_scheduler import FinetuningScheduler
from finetuning_scheduler.strategy_adapters import StrategyAdapter


class Stopwatch(FinetuningScheduler):
    """Takes the time of its transition."""

    seconds = 0.0

    def step(self) -> None:
        """Go on to the next phase."""
        begun = time.perf_counter()
        super().step()
        self.seconds += time.perf_counter() - begun


def transition(sizes: Sizes, *, from_disk: bool) -> float:
    """Return the seconds of the transition."""
    last, next_to_last = f"blocks.{BLOCKS - 1}", f"blocks.{BLOCKS - 2}"
    schedule = {
        0: {"params": ["head", last], "max_transition_epoch": 1},
        1: {"params": [next_to_last], "lr": 1e-4},
    }
    scheduler = Stopwatch(schedule, logging_level=logging.ERROR)
    way = patch.object(StrategyAdapter, "why_from_disk", lambda self: "it is measured") if from_disk else nullcontext()
    with tempfile.TemporaryDirectory() as folder, way:
        trainer = quiet_trainer(
            folder,
            max_epochs=2,
            limit_train_batches=2,
            callbacks=[scheduler, ModelCheckpoint(folder, monitor="val_loss")],
        )
        trainer.fit(Encoder(sizes))
    return scheduler.seconds


def figures(options: Options) -> Iterator[Figure]:
    """Compare the two ways."""
    sizes = Sizes.of(options, width=768, tokens=8, batch=2, train_batches=2, val_batches=1)
    kinds = (lambda: transition(sizes, from_disk=True), lambda: transition(sizes, from_disk=False))
    turns = alternate(*kinds, pairs=options.pairs)
    disk, memory = (sorted(each)[len(turns) // 2] for each in zip(*turns, strict=True))
    note = f"{disk:.2f} s from the file, {memory * 1e3:.0f} ms from memory"
    yield Figure.of("transition with restore", [disk / memory for disk, memory in turns], ">= 10", note=note)


if __name__ == "__main__":
    main(__doc__, figures)
