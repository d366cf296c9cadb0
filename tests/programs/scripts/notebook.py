"""A notebook whose cells are run again and again."""

import json

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from small_classifier import HEAD_THEN_ALL, Classifier, fingerprint, loaders

from finetuning_scheduler import FinetuningScheduler

# In [1]
scheduler = FinetuningScheduler(ft_schedule=HEAD_THEN_ALL)
phases = []


class Watch(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        phases.append(scheduler.curr_depth)


callbacks = [scheduler, EarlyStopping("val_loss", patience=5), ModelCheckpoint(monitor="val_loss"), Watch()]
train, val = loaders()


# In [2], [3], ...
def new_model():
    L.seed_everything(1)
    return Classifier()


def new_trainer(epochs):
    return L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks)


def fit(trainer, model):
    phases.clear()
    trainer.fit(model, train, val)
    return {"phases": list(phases), "weights": fingerprint(model)}


outcome = {}
model = new_model()
outcome["first"] = fit(new_trainer(5), model)
outcome["the cell again, on the same model"] = fit(new_trainer(5), model)

model = new_model()
trainer = new_trainer(5)
outcome["validated"] = len(trainer.validate(model, val))
outcome["all cells again"] = fit(trainer, model)

trainer.fit_loop.max_epochs = 7
outcome["a little longer"] = fit(trainer, model)
outcome["predicted"] = len(trainer.validate(model, val, ckpt_path="best"))

model = new_model()
outcome["interrupted before its end"] = fit(new_trainer(2), model)
model = new_model()
outcome["all cells once more"] = fit(new_trainer(5), model)
print(json.dumps(outcome))
