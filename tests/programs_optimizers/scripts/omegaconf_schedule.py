"""Fine-tune with a schedule that OmegaConf has put together; print what became of it.

Argument: a directory to write to.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler

torch.set_num_threads(1)
torch.manual_seed(0)

BASE = OmegaConf.create(
    """
    lr: 0.02
    layers: [body, head]
    schedule:
      0:
        params: ["${layers[1]}.*"]
        max_transition_epoch: 1
      1:
        params: ["${layers[0]}.0.*"]
        lr: ${lr}
        max_transition_epoch: 2
        new_optimizer:
          optimizer_init:
            class_path: torch.optim.AdamW
            init_args: {lr: "${lr}", betas: [0.8, 0.9]}
      2:
        params: ["${layers[0]}.2.weight"]
        lr: 1e-03
    """
)
config = OmegaConf.merge(BASE, OmegaConf.from_dotlist(["lr=0.03"]))
before = OmegaConf.to_yaml(config)


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.head(self.body(batch[0])), batch[0].sum(dim=1, keepdim=True))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


data = DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4)
scheduler = FinetuningScheduler(ft_schedule=config.schedule)
trainer = pl.Trainer(
    accelerator="cpu",
    default_root_dir=sys.argv[1],
    logger=False,
    max_epochs=3,
    enable_progress_bar=False,
    enable_model_summary=False,
    log_every_n_steps=1,
    callbacks=[scheduler, EarlyStopping("val_loss", patience=100)],
)
module = Model()
trainer.fit(module, data, data)
(optimizer,) = trainer.optimizers
names = {parameter: name for name, parameter in module.named_parameters()}
facts = {
    "phase": scheduler.curr_depth,
    "optimizer": type(optimizer).__name__,
    "betas": list(optimizer.param_groups[0]["betas"]),
    "rates": [group["lr"] for group in optimizer.param_groups],
    "groups": [sorted(names[parameter] for parameter in group["params"]) for group in optimizer.param_groups],
    "config untouched": OmegaConf.to_yaml(config) == before,
}
print(json.dumps(facts))
