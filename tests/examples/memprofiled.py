"""A small network with decorated methods, whose bytes can be counted by hand, and fits of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fts_examples.profiling import MemProfiler, MemProfilerCfg

ROWS, INPUTS, HIDDEN, FLOAT = 4, 3, 5, 4
BATCH_BYTES = ROWS * INPUTS * FLOAT  # kept for the gradient of the first layer's weight
HIDDEN_BYTES = ROWS * HIDDEN * FLOAT  # kept for the gradients of ReLU and of the head's weight: one storage
SNAPSHOT = dict[str, Any]


class Measured(pl.LightningModule):
    """Two linear layers; the sum as loss, for which nothing is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, 2)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))

    @MemProfiler.memprofilable
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches += 1
        return self.part(batch)

    @MemProfiler.memprofilable
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.batches += 1
        self.log("val_loss", self.part(batch))

    @MemProfiler.memprofilable
    def part(self, batch: Tensor) -> Tensor:
        return self(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(2 * ROWS, INPUTS), batch_size=ROWS)

    val_dataloader = train_dataloader


def trainer(root: Path, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "callbacks": list(callbacks),
            "default_root_dir": root,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            **arguments,
        }
    )


def fit(root: Path, cfg: MemProfilerCfg | None = None, module: pl.LightningModule | None = None, **kw: Any) -> SNAPSHOT:
    """Fit a module with a profiler; return its snapshots."""
    profiler = MemProfiler(cfg)
    trainer(root, profiler, **kw).fit(Measured() if module is None else module)
    return profiler.snapshots


def saved(snapshots: SNAPSHOT) -> dict[str, int]:
    """The bytes kept for the backward pass, without the rank in the keys."""
    field = "saved_for_backward_bytes"
    return {key.partition(".")[2]: record[field] for key, record in snapshots.items() if field in record}


def read(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
