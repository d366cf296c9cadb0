"""Checkpoints of the package of this name before this one (2.x): a resume is refused by name, weights load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping
from finetuning_scheduler.errors import CheckpointError
from tests.programs.toy_programs import TWO_PHASES, Net
from tests.reference.toys import make_trainer

STOPPING = "FTSEarlyStopping{'monitor': 'val_loss', 'mode': 'min'}"
SAVING = (
    "FTSCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None}"
)
CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "multi-phase forms": lambda: [FTSEarlyStopping("val_loss"), FTSCheckpoint(monitor="val_loss")],
    "Lightning's own": lambda: [EarlyStopping("val_loss"), ModelCheckpoint(monitor="val_loss")],
    "none": list,
}
PHASES = {0: [["head.weight", "head.bias"]], 1: [["head.weight", "head.bias"], ["body.weight", "body.bias"]]}


def checkpoint_of_the_other_package(path: Path, module: Net, phase: int) -> Path:
    """Write a file with the parts that its checkpoints have."""
    options = {"lr": 0.1, "initial_lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    groups = [{**options, "params": names} for names in PHASES[phase]]
    counts = iter(range(8))
    stored = [{**options, "params": [next(counts) for _ in names]} for names in PHASES[phase]]
    score = torch.tensor(0.5)
    saving = {
        "monitor": "val_loss",
        "best_model_score": score,
        "best_model_path": "elsewhere/epoch=0.ckpt",
        "current_score": score,
        "dirpath": "elsewhere",
        "best_k_models": {"elsewhere/epoch=0.ckpt": score},
        "kth_best_model_path": "elsewhere/epoch=0.ckpt",
        "kth_value": score,
        "last_model_path": "",
        "current_ckpt_depth": phase,
        "best_ckpt_depth": phase,
    }
    callbacks: dict[str, Any] = {
        "FinetuningScheduler": {
            "internal_optimizer_metadata": {0: groups},
            "fts_metadata": {"current_ckpt_depth": phase, "best_ckpt_depth": phase, "best_ckpt_pgs": {0: groups}},
        },
        STOPPING: {"wait_count": 0, "stopped_epoch": 0, "best_score": score, "patience": 3},
        SAVING: saving,
    }
    content = {
        "epoch": 0,
        "global_step": 4,
        "pytorch-lightning_version": pl.__version__,
        "state_dict": module.state_dict(),
        "loops": {},
        "callbacks": callbacks,
        "optimizer_states": [{"state": {}, "param_groups": stored}],
        "lr_schedulers": [],
    }
    torch.save(content, path)
    return path


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_resume_is_refused_by_the_files_name_with_what_to_do(kind: str, phase: int, tmp_path: Path) -> None:
    path = checkpoint_of_the_other_package(tmp_path / "older.ckpt", Net(seed=3), phase)
    trainer = make_trainer(tmp_path, callbacks=[FinetuningScheduler(TWO_PHASES), *CALLBACKS[kind]()])
    module = Net()
    with pytest.raises(MisconfigurationException) as refused:
        trainer.fit(module, ckpt_path=path)
    assert str(refused.value) == (
        f"expected a checkpoint that this package has written, got {path}, which the 2.x package of its name has. "
        "Fix: Load its weights with `load_from_checkpoint` and start a new fit, without `ckpt_path`."
    )
    assert isinstance(refused.value.__cause__, CheckpointError)
    assert trainer.global_step == 0
    assert all(parameter.requires_grad for parameter in module.parameters())  # as it came


def test_its_weights_load_and_a_new_fit_starts_from_them(tmp_path: Path) -> None:
    written = Net(seed=3)
    path = checkpoint_of_the_other_package(tmp_path / "older.ckpt", written, phase=1)
    module = Net.load_from_checkpoint(path)
    expected = nn.utils.parameters_to_vector(written.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(module.parameters()), expected)
    scheduler = FinetuningScheduler(TWO_PHASES)
    make_trainer(tmp_path, callbacks=[scheduler], max_epochs=3).fit(module)
    assert scheduler.curr_depth == 1
    assert not torch.equal(nn.utils.parameters_to_vector(module.parameters()), expected)
