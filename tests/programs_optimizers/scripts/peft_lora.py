"""Fine-tune the adapters of a tiny Llama by the generated schedule; print what trained and what was said.

Argument: a directory to write to.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from finetuning_scheduler import FinetuningScheduler

torch.set_num_threads(1)
torch.manual_seed(0)


class Adapted(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_labels=2,
            pad_token_id=0,
        )
        lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
        self.model = get_peft_model(LlamaForSequenceClassification(config), lora)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[1]).loss
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        # Ever worse: each epoch after the first ends a phase.
        self.log("val_loss", torch.tensor(float(self.current_epoch)))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=0.1)


class Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


ear = Ear()
logging.getLogger("finetuning_scheduler").addHandler(ear)
tokens = torch.randint(1, 20, (8, 5), generator=torch.Generator().manual_seed(1))
data = DataLoader(TensorDataset(tokens, tokens[:, 0] % 2), batch_size=4)
module = Adapted()
came = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
scheduler = FinetuningScheduler(base_max_lr=0.1, restore_best=False)
trainer = pl.Trainer(
    accelerator="cpu",
    default_root_dir=sys.argv[1],
    logger=False,
    max_epochs=9,
    enable_progress_bar=False,
    enable_model_summary=False,
    log_every_n_steps=1,
    callbacks=[scheduler, EarlyStopping("val_loss", patience=1)],
    enable_checkpointing=False,
)
trainer.fit(module, data, data)
schedule: Any = scheduler.ft_schedule
facts = {
    "came": sorted(came),
    "scheduled": sorted(name for phase in schedule.phases for name in phase.params),
    "phases": len(schedule.phases),
    "phase": scheduler.curr_depth,
    "trainable": sorted(name for name, parameter in module.named_parameters() if parameter.requires_grad),
    "changed": sorted(name for name, value in module.named_parameters() if not torch.equal(value, before[name])),
    "frozen": sorted(set(before) - came),
    "said": ear.said,
}
print(json.dumps(facts))
