"""Cross-validation with one list of callbacks; the folds to run are the arguments."""

import json
import sys

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from small_classifier import HEAD_THEN_ALL, Classifier, fingerprint, loaders

from finetuning_scheduler import FinetuningScheduler

scheduler = FinetuningScheduler(ft_schedule=HEAD_THEN_ALL)
checkpoint = ModelCheckpoint(monitor="val_loss")
callbacks = [scheduler, EarlyStopping("val_loss", patience=2), checkpoint]

results = {}
for fold in sys.argv[1:]:
    L.seed_everything(int(fold))
    model = Classifier()
    train, val = loaders(seed=int(fold))
    trainer = L.Trainer(
        max_epochs=6, accelerator="cpu", logger=False, default_root_dir=f"fold-{fold}", callbacks=callbacks
    )
    trainer.fit(model, train, val)
    results[fold] = {
        "weights": fingerprint(model),
        "phase": scheduler.curr_depth,
        "score": float(checkpoint.best_model_score),
        "file": checkpoint.best_model_path,
    }
print(json.dumps(results))
