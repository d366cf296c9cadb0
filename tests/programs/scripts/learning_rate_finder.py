"""Let Lightning find a learning rate, then fine-tune; or fine-tune with the rate that is given as argument."""

import json
import sys

import lightning as L
from lightning.pytorch.callbacks import LearningRateFinder
from small_classifier import HEAD_THEN_ALL, Classifier, fingerprint, loaders

from finetuning_scheduler import FinetuningScheduler

L.seed_everything(1)
model = Classifier()
finders = [LearningRateFinder(num_training_steps=20, min_lr=1e-4)]
if sys.argv[1:]:
    model.lr = float(sys.argv[1])
    finders = []
train, val = loaders()
scheduler = FinetuningScheduler(ft_schedule=HEAD_THEN_ALL)
trainer = L.Trainer(max_epochs=6, accelerator="cpu", logger=False, callbacks=[scheduler, *finders])
trainer.fit(model, train, val)
print(json.dumps({"lr": model.lr, "phase": scheduler.curr_depth, "weights": fingerprint(model)}))
