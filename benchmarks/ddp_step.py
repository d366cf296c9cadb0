"""A step under DDP after a thaw: with the schedule, and with ``find_unused_parameters=True``, the head alone training.

Without a schedule, what is thawed later must require a gradient when DDP wraps the model, so that the usual advice is
to freeze afterwards and to let DDP look for what has no gradient. The schedule has DDP made anew at each transition.
Two processes on a CPU, seconds of the wall, 6.3 million frozen parameters and 10 thousand that train.

    python benchmarks/ddp_step.py [--pairs 5]
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from _common import Figure, Options, alternate, main, quiet
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler

SCHEDULE = {
    0: {"params": ["head.bias"], "max_transition_epoch": 1},
    1: {"params": ["head.weight"], "lr": 1e-3, "max_transition_epoch": 2},
}


class Model(L.LightningModule):
    """A deep body of 6.3 million parameters, and a head of 10 thousand."""

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.width = steps, width
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(24)))
        self.head = nn.Linear(width, 20)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize everything; what is frozen has no gradient."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        """Load random rows, 8 a batch and process."""
        draw = torch.Generator().manual_seed(1)
        rows = self.steps * 16
        inputs = torch.randn(rows, self.width, generator=draw)
        return DataLoader(TensorDataset(inputs, torch.randint(0, 20, (rows,), generator=draw)), batch_size=8)


class FreezeAfterwards(Callback):
    """Freeze the body when DDP has wrapped the model."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set ``requires_grad``, and nothing else."""
        pl_module.body.requires_grad_(False)


class Stopwatch(Callback):
    """Times the steps of the last epoch, all but the first."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, number: int) -> None:
        """Begin together with the other process."""
        if number == 1 and trainer.current_epoch == trainer.max_epochs - 1:
            dist.barrier()
            self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """End with the last batch."""
        if trainer.is_last_batch and trainer.current_epoch == trainer.max_epochs - 1:
            self.seconds = (time.perf_counter() - self.begun) / (int(trainer.num_training_batches) - 1)


def step(options: Options, *, scheduled: bool) -> float:
    """Return the seconds of a step after the thaw."""
    watch = Stopwatch()
    if scheduled:
        scheduler = FinetuningScheduler(
            SCHEDULE, epoch_transitions_only=True, restore_best=False, logging_level=logging.ERROR
        )
        extra: Callback = scheduler
    else:
        extra = FreezeAfterwards()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=not scheduled),
            max_epochs=2,
            callbacks=[watch, extra],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Model(steps=4 if options.tiny else 80, width=16 if options.tiny else 512))
    return watch.seconds


def process(rank: int, port: int, folder: str, options: Options) -> None:
    """Measure as one of two processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    quiet()
    torch.set_num_threads(1)
    kinds = (lambda: step(options, scheduled=False), lambda: step(options, scheduled=True))
    turns = alternate(*kinds, pairs=options.pairs)
    if rank == 0:
        torch.save(turns, Path(folder, "turns.pt"))
    dist.destroy_process_group()


def figures(options: Options) -> Iterator[Figure]:
    """Start the processes, and read what the first one has measured."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.start_processes(process, (port, folder, options), nprocs=2, start_method="spawn")
        turns = torch.load(Path(folder, "turns.pt"))
    ratios = [unused / rebuilt for unused, rebuilt in turns]
    note = f"a step takes {1e3 * sorted(rebuilt for _, rebuilt in turns)[len(turns) // 2]:.1f} ms with the schedule"
    yield Figure.of("DDP, head only after a thaw: faster than with find_unused_parameters", ratios, ">= 1.5", note=note)


if __name__ == "__main__":
    main(__doc__, figures)
