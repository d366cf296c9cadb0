"""Strategies that load late refuse a checkpoint of the 2.x package of this name on every rank, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from tests.reference import cases, harness
from tests.reference.cases import AN_EPOCH_EACH, Classifier
from tests.reference.recipe import adamw

STATE: dict[str, Any] = {
    "fts_metadata": {"current_ckpt_depth": 0, "best_ckpt_depth": 0, "best_ckpt_pgs": {}},
    "internal_optimizer_metadata": {0: []},
}


def refused(root: Path, path: Path) -> str:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from finetuning_scheduler import FinetuningScheduler

    plan = {"fsdp_plan": {"network.(first|norm|second|third|head)": None, "network": None}}
    scheduler = FinetuningScheduler(AN_EPOCH_EACH, restore_best=False, strategy_adapter_cfg=plan)
    trainer = cases.make_trainer(root, 2, cases.fsdp2(), callbacks=[scheduler], max_epochs=2)
    try:
        trainer.fit(Classifier(adamw), ckpt_path=path)
    except MisconfigurationException as error:
        return str(error)
    return "not refused"


def test_a_resume_under_fsdp2_is_refused_by_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "older.ckpt"
    content = {"epoch": 0, "global_step": 1, "state_dict": Classifier(adamw).state_dict(), "loops": {}}
    callbacks = {"FinetuningScheduler": STATE}
    torch.save({**content, "callbacks": callbacks, "pytorch-lightning_version": pl.__version__}, path)
    for message in harness.run_ranks(refused, 2, tmp_path, path):
        assert f"got {path}, which the 2.x package of its name has. Fix: Load its weights" in message
