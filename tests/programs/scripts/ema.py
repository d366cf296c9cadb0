"""Fine-tune with an average of the weights: ``run`` to the end, be ``killed`` on the way, or ``resume``."""

import json
import os
import sys

import lightning as L
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from small_classifier import HEAD_THEN_ALL, Classifier, fingerprint, loaders

from finetuning_scheduler import FinetuningScheduler

mode = sys.argv[1]


class PowerCut(Callback):
    """Takes the process away inside epoch 4."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if mode == "killed" and trainer.current_epoch == 4 and batch_idx == 2:
            os._exit(9)


L.seed_everything(1)
model = Classifier()
train, val = loaders()
scheduler = FinetuningScheduler(ft_schedule=HEAD_THEN_ALL)
callbacks = [
    scheduler,
    EMAWeightAveraging(decay=0.8),
    ModelCheckpoint(dirpath="checkpoints", monitor="val_loss", save_last=True, save_top_k=-1),
    PowerCut(),
]
trainer = L.Trainer(max_epochs=7, accelerator="cpu", logger=False, callbacks=callbacks)
trainer.fit(model, train, val, ckpt_path="last" if mode == "resume" else None)
print(json.dumps({"phase": scheduler.curr_depth, "step": trainer.global_step, "average": fingerprint(model)}))
