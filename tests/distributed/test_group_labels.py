"""Sharded checkpoints whose groups have no names, of an earlier release, resume; the groups are named then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.reference import cases, harness

STRATEGIES = {
    "fsdp2, sharded": (cases.fsdp2, cases.Sharded),
    "fsdp, sharded": (lambda: cases.fsdp(state_dict_type="sharded"), cases.Classifier),
    "ddp": (cases.ddp, cases.Classifier),
}


class SaveBetweenEpochs(cases.pl.Callback):
    """Saves as each epoch ends."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.root / f"{trainer.current_epoch}.ckpt")


class Labels(cases.pl.Callback):
    def __init__(self) -> None:
        self.seen: list[list[str | None]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append([group.get("name") for group in trainer.optimizers[0].param_groups])


def saved_without_names(root: Path, name: str) -> Any:
    """Fit as an earlier release did: groups have no names."""
    from finetuning_scheduler.core import plan

    class NoLabels:
        def of(self, groups: Any, phase: int) -> Any:
            return groups

    original, plan.Labels = plan.Labels, NoLabels  # type: ignore[misc]
    try:
        return fitted(root, name, None)
    finally:
        plan.Labels = original  # type: ignore[misc]


def fitted(root: Path, name: str, resume_from: str | None) -> tuple[list[Any], list[list[str | None]]]:
    from finetuning_scheduler import FinetuningScheduler

    strategy, module = STRATEGIES[name]
    labels, saving = Labels(), [SaveBetweenEpochs(root)] if resume_from is None else []
    scheduler = FinetuningScheduler(cases.AN_EPOCH_EACH, restore_best=False)
    recorder = cases.Recorder(lambda: scheduler.curr_depth)
    trainer = cases.make_trainer(root, 2, strategy(), callbacks=[scheduler, recorder, labels, *saving])
    trainer.fit(module(cases.adamw), ckpt_path=resume_from)
    return recorder.epochs, labels.seen


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_without_names_resumes(name: str, tmp_path: Path) -> None:
    whole, unnamed = harness.run_ranks(saved_without_names, 2, tmp_path, name)[0]
    assert unnamed[-1] == [None, None, None]
    for epochs, labels in harness.run_ranks(fitted, 2, tmp_path, name, str(tmp_path / "1.ckpt")):
        assert labels[-1] == ["phase0", "phase1", "phase2"]
        cases.assert_same_epochs(epochs, whole[2:], tolerance=0)
