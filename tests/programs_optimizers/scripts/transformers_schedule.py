"""Fine-tune a tiny BERT under the warm-up schedule of ``transformers``; print the learning rates of each step.

Argument: a directory to write to.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

from finetuning_scheduler import FinetuningScheduler

torch.set_num_threads(1)
torch.manual_seed(0)
STEPS, WARM_UP = 24, 10


class Classifier(pl.LightningModule):
    no_decay = ("bias", "LayerNorm.weight")

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=2
        )
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[1]).loss
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.01)
        schedule = get_linear_schedule_with_warmup(optimizer, WARM_UP, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


tokens = torch.randint(0, 20, (16, 5), generator=torch.Generator().manual_seed(1))
data = DataLoader(TensorDataset(tokens, tokens[:, 0] % 2), batch_size=4)
schedule = {
    0: {"params": [r"model\.classifier\..*"], "max_transition_epoch": 2},
    1: {"params": [r"model\.bert\.pooler\..*", r"model\.bert\.encoder\.layer\.1\..*"], "lr": 4e-3},
}
rates = Rates()
trainer = pl.Trainer(
    accelerator="cpu",
    default_root_dir=sys.argv[1],
    logger=False,
    max_steps=STEPS,
    enable_progress_bar=False,
    enable_model_summary=False,
    log_every_n_steps=1,
    callbacks=[FinetuningScheduler(schedule, restore_best=False), EarlyStopping("val_loss", patience=100), rates],
    enable_checkpointing=False,
)
module = Classifier()
trainer.fit(module, data, data)
(optimizer,) = trainer.optimizers
print(json.dumps({"rates": rates.seen, "decay": [group["weight_decay"] for group in optimizer.param_groups]}))
