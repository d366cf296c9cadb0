"""Keep the best and, beside it, every other epoch; log to CSV. ``scheduled`` or ``plain``."""

import json
import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small_classifier import Classifier, fingerprint, loaders

from finetuning_scheduler import FinetuningScheduler

L.seed_everything(1)
model = Classifier()
train, val = loaders()
best = ModelCheckpoint(monitor="val_accuracy", mode="max", save_top_k=2, filename="{epoch}-{val_accuracy:.3f}")
regular = ModelCheckpoint(dirpath="regular", every_n_epochs=2, save_top_k=-1, save_last=True)
callbacks = [EarlyStopping("val_loss", patience=20), best, regular]
if sys.argv[1] == "scheduled":
    callbacks.append(FinetuningScheduler(ft_schedule={0: {"params": [".*"]}}))
trainer = L.Trainer(max_epochs=5, accelerator="cpu", logger=CSVLogger("logs"), log_every_n_steps=2, callbacks=callbacks)
trainer.fit(model, train, val)
outcome = {
    "weights": fingerprint(model),
    "files": sorted(str(path) for path in Path().rglob("*.ckpt")),
    "best": str(Path(best.best_model_path).resolve().relative_to(Path.cwd())),
    "score": float(best.best_model_score),
    "last": str(Path(regular.last_model_path).resolve().relative_to(Path.cwd())),
    "metrics": Path(trainer.log_dir, "metrics.csv").read_text(),
}
print(json.dumps(outcome))
