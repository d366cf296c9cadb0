"""How good is it before? Then fine-tune, and score the best. With ``--no-score`` the first question is left out."""

import json
import sys

import lightning as L
from small_classifier import HEAD_THEN_ALL, Classifier, fingerprint, loaders

from finetuning_scheduler import FinetuningScheduler

L.seed_everything(1)
model = Classifier()
train, val = loaders()
scheduler = FinetuningScheduler(ft_schedule=HEAD_THEN_ALL)
trainer = L.Trainer(max_epochs=6, accelerator="cpu", callbacks=[scheduler])

before = None
if "--no-score" not in sys.argv:
    before = trainer.validate(model, val)[0]["val_loss"]
trainer.fit(model, train, val)
weights = fingerprint(model)
after = trainer.validate(model, val, ckpt_path="best")[0]["val_loss"]
print(json.dumps({"before": before, "after": after, "phase": scheduler.curr_depth, "weights": weights}))
