"""Which of the two Lightning packages is used, and when it is imported; each case is a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import finetuning_scheduler

SOURCES = Path(finetuning_scheduler.__file__).parents[1]

TRAIN = """
import sys
import torch
{imports}
from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)


class Model({pl}.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(2, 2)
        self.head = torch.nn.Linear(2, 1)

    def on_train_start(self):
        self.kinds = {{type(callback) for callback in self.trainer.callbacks}}

    def training_step(self, batch):
        return self.head(self.body(batch[0])).square().mean()

    def validation_step(self, batch):
        self.log("val_loss", self.training_step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


data = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=4)
schedule = {{0: {{"params": ["head.*"], "max_transition_epoch": 1}}, 1: {{"params": ["body.*"]}}}}
scheduler = FinetuningScheduler(ft_schedule=schedule)
stopping = {pl}.callbacks.EarlyStopping("val_loss")
trainer = {pl}.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, callbacks=[scheduler, stopping], enable_progress_bar=False,
    enable_model_summary=False, default_root_dir=sys.argv[1],
)
model = Model()
trainer.fit(model, data, data)
assert scheduler.curr_depth == 1
assert isinstance(scheduler, {pl}.Callback)
assert {{FTSCheckpoint, FTSEarlyStopping}} <= model.kinds
assert issubclass(FTSCheckpoint, {pl}.callbacks.ModelCheckpoint)
assert issubclass(FTSEarlyStopping, {pl}.callbacks.EarlyStopping)
print("lightning.pytorch" in sys.modules, "pytorch_lightning" in sys.modules)
"""


def run(program: str, *words: str) -> str:
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    finished = subprocess.run(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize(
    ("imports", "name", "imported"),
    [
        ("import lightning.pytorch", "lightning.pytorch", "True False"),
        ("import pytorch_lightning", "pytorch_lightning", "False True"),
    ],
)
def test_the_package_the_program_has_imported(imports: str, name: str, imported: str, tmp_path: Path) -> None:
    printed = run(TRAIN.format(imports=imports, pl=name), str(tmp_path))
    assert printed.splitlines()[-1] == imported


def test_lightning_is_the_default() -> None:
    program = """
import sys
from finetuning_scheduler import FinetuningScheduler
import lightning.pytorch
assert issubclass(FinetuningScheduler, lightning.pytorch.Callback)
print("pytorch_lightning" in sys.modules)
"""
    assert run(program).split() == ["False"]


def test_stand_alone_pytorch_lightning_is_used_where_lightning_is_not_installed() -> None:
    program = """
import sys
sys.modules["lightning"] = None
from finetuning_scheduler import FinetuningScheduler
import pytorch_lightning
print(issubclass(FinetuningScheduler, pytorch_lightning.Callback))
"""
    assert run(program).split() == ["True"]
