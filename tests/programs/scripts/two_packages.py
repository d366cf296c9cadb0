"""Train with one of the two Lightning packages while the program imports both; print what came of it.

Arguments: what is imported, in order, among ``lightning.pytorch``, ``pytorch_lightning`` and ``finetuning_scheduler``;
then, after ``--``, the package of the trainer; after that, ``allow_untested`` allows untested strategies, and a package
is the one that early stopping is taken from.
"""

import importlib
import json
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

separator = sys.argv.index("--")
for imported in sys.argv[1:separator]:
    module = importlib.import_module(imported)
    if imported == "finetuning_scheduler":
        module.FinetuningScheduler  # noqa: B018 - imported lazily: this is when the package is chosen
package, *words = sys.argv[separator + 1 :]
pl = importlib.import_module(package)
stopping = importlib.import_module(next((word for word in words if word != "allow_untested"), package))

torch.set_num_threads(1)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(2, 2)
        self.head = torch.nn.Linear(2, 1)
        self.batches_trained = 0

    def training_step(self, batch, batch_idx):
        self.batches_trained += 1
        return self.head(self.body(batch[0])).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)  # never better than in the first epoch: patience ends the phase after the second

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


outcome = {}
model = Model()
data = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=4)
try:
    from finetuning_scheduler import FinetuningScheduler

    scheduler = FinetuningScheduler(
        ft_schedule={0: {"params": ["head.*"]}, 1: {"params": ["body.*"]}},
        allow_untested="allow_untested" in words,
    )
    trainer = pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        logger=False,
        callbacks=[scheduler, stopping.callbacks.EarlyStopping("val_loss", patience=1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, data)
    outcome["phase"] = scheduler.curr_depth
    outcome["epochs"] = trainer.current_epoch
except Exception as error:  # noqa: BLE001 - the test looks at it
    outcome["error"] = str(error)
outcome["batches"] = model.batches_trained
print(json.dumps(outcome))
