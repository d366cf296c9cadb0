"""Fine-tune a backbone with checkpoints that leave out what is frozen, and with whole ones; print what each restored.

Argument: a directory to write to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler

torch.set_num_threads(1)


class Classifier(pl.LightningModule):
    def __init__(self, *, slim: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.slim = slim
        self.backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.strict_loading = False

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.slim:
            for name, parameter in self.named_parameters():
                if not parameter.requires_grad:
                    del checkpoint["state_dict"][name]


class Witness(Callback):
    """Copies the best weights itself and compares them with those that each phase begins with."""

    def __init__(self, scheduler: FinetuningScheduler) -> None:
        self.scheduler = scheduler
        self.best, self.weights = float("inf"), dict[str, Tensor]()
        self.phase = 0
        self.restored: list[bool] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = float(trainer.callback_metrics["val_loss"])
        if score < self.best:
            self.best = score
            self.weights = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.scheduler.curr_depth != self.phase:
            self.phase = self.scheduler.curr_depth
            same = [torch.equal(value, self.weights[name]) for name, value in pl_module.named_parameters()]
            self.restored.append(all(same))


def loader(count: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(dim=1)), batch_size=16, generator=torch.Generator())


def facts_of(root: Path, *, slim: bool) -> dict[str, Any]:
    module = Classifier(slim=slim)
    scheduler = FinetuningScheduler(base_max_lr=0.02)
    witness = Witness(scheduler)
    checkpoint = ModelCheckpoint(root / "checkpoints", monitor="val_loss", save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        max_epochs=30,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        callbacks=[scheduler, EarlyStopping("val_loss", patience=2), checkpoint, witness],
    )
    trainer.fit(module, loader(64, 1), loader(32, 2))
    first = torch.load(min((root / "checkpoints").glob("epoch=0-*.ckpt")), weights_only=True)
    return {
        "phase": scheduler.curr_depth,
        "restored": witness.restored,
        "first file": sorted(first["state_dict"]),
        "weights": {name: value.double().sum().item() for name, value in module.named_parameters()},
    }


root = Path(sys.argv[1])
facts = {kind: facts_of(root / kind, slim=kind == "slim") for kind in ("slim", "whole")}
print(json.dumps(facts))
