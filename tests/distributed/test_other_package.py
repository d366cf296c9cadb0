"""On several ranks, too, checkpoints in the form of the 2.x package of this name resume and are restored."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference import cases, harness
from tests.reference.cases import AN_EPOCH_EACH, Recorder
from tests.reference.history import Epoch, assert_same_epochs
from tests.reference.other_package import convert
from tests.reference.recipe import adamw

NAME = "{epoch}"


def fit(root: Path, strategy: Any, module: Any, resume_from: Path | None = None) -> list[Epoch]:
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping

    scheduler = FinetuningScheduler(AN_EPOCH_EACH)
    recorder = Recorder(lambda: scheduler.curr_depth)
    saving = FTSCheckpoint(root / "saved", monitor="val_loss", save_top_k=-1, filename=NAME)
    callbacks = [scheduler, FTSEarlyStopping("val_loss"), saving, recorder]
    trainer = cases.make_trainer(root, 2, strategy(), callbacks=callbacks, enable_checkpointing=True, max_epochs=3)
    trainer.fit(module(adamw), ckpt_path=resume_from)
    return recorder.epochs


def resumed_from_each(root: Path, strategy: Any, module: Any, epochs: Iterable[int]) -> tuple[Any, Any]:
    """Train, then rewrite what was saved and resume from it; the best checkpoint is that of epoch 0."""
    whole = fit(root, strategy, module)
    if harness.rank() == 0:
        for epoch in epochs:
            convert(root / "saved" / f"epoch={epoch}.ckpt")
    torch.distributed.barrier()
    resumed = {epoch: fit(root, strategy, module, root / "saved" / f"epoch={epoch}.ckpt") for epoch in epochs}
    return whole, resumed


STRATEGIES = {
    "ddp": (cases.ddp, cases.Worsening),
    "fsdp": (cases.fsdp, cases.Worsening),
    "fsdp use_orig_params=False": (
        partial(cases.fsdp, use_orig_params=False, state_dict_type="sharded"),
        cases.Worsening,
    ),
    "fsdp2": (cases.fsdp2, cases.WorseningSharded),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resume_ends_with_the_weights_of_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    for whole, resumed in harness.run_ranks(resumed_from_each, 2, tmp_path, *STRATEGIES[name], (0, 1)):
        assert [epoch.phase for epoch in whole] == [0, 1, 2]
        for epoch, epochs in resumed.items():
            assert_same_epochs(epochs, whole[epoch + 1 :])


def refused(root: Path, strategy: Any, module: Any) -> str:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    fit(root, strategy, module)
    path = root / "saved" / "epoch=1.ckpt"
    if harness.rank() == 0:
        file = convert(path) / "meta.pt" if path.is_dir() else convert(path)
        content = torch.load(file, weights_only=True)
        del content["callbacks"]["FinetuningScheduler"]["fts_metadata"]["current_ckpt_depth"]
        torch.save(content, file)
    torch.distributed.barrier()
    try:
        fit(root, strategy, module, path)
    except MisconfigurationException as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_what_is_damaged_is_told_by_the_files_name_on_every_rank(name: str, tmp_path: Path) -> None:
    for message in harness.run_ranks(refused, 2, tmp_path, *STRATEGIES[name]):
        assert message.startswith(f"{tmp_path / 'saved' / 'epoch=1.ckpt'}: state of the 2.x FinetuningScheduler: ")
        assert "`fts_metadata.current_ckpt_depth`: Field required" in message
