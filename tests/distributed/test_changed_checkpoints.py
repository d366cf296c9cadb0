"""Checkpoints on several ranks that are no longer what was written, or hold the user's own objects."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.faults.hostile import RunsInAShell
from tests.reference import cases, harness


class SavesAPath(cases.Worsening):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.save_hyperparameters({"path": Path("x")})


class SavesAPathSharded(SavesAPath, cases.Sharded):
    pass


STRATEGIES: dict[str, tuple[Callable[..., Any], type[cases.Classifier]]] = {
    "ddp": (cases.ddp, SavesAPath),
    "fsdp, full checkpoints": (cases.fsdp, SavesAPath),
    "fsdp, sharded checkpoints": (partial(cases.fsdp, state_dict_type="sharded"), SavesAPath),
    "fsdp2": (cases.fsdp2, SavesAPathSharded),
    "fsdp2, full checkpoints": (partial(cases.fsdp2, save_distributed_checkpoint=False), SavesAPathSharded),
}


class Change(Callback):
    """Rank zero changes files of the best checkpoint at the end of the first epoch after it."""

    def __init__(self, change: Callable[[Path], None]) -> None:
        self.change = change

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1 and trainer.is_global_zero:
            self.change(Path(trainer.checkpoint_callback.best_model_path))
        trainer.strategy.barrier()


def nothing(path: Path) -> None:
    pass


def flip(path: Path) -> None:
    file = max((each for each in path.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def put_code(path: Path) -> None:
    """Into each file of the directory, as a pickle that runs."""
    for file in [each for each in path.rglob("*") if each.is_file()]:
        file.write_bytes(pickle.dumps(RunsInAShell(path.parents[1] / "it ran")))


def outcome(
    root: Path, ranks: int, strategy: Callable[[], Any], module: type[cases.Classifier], change: Callable[[Path], None]
) -> str:
    """How the fit ends: `fitted`, or what the error says."""
    from finetuning_scheduler import FinetuningScheduler

    schedule = {0: {"params": [*cases.HEAD], "max_transition_epoch": 2}, 1: {"params": [*cases.THIRD], "lr": 0.01}}
    saving = ModelCheckpoint(root / "checkpoints", monitor="val_loss")
    callbacks = [FinetuningScheduler(schedule), saving, Change(change)]
    trainer = cases.make_trainer(root, ranks, strategy(), callbacks=callbacks, max_epochs=3, enable_checkpointing=True)
    try:
        trainer.fit(module(cases.adamw))
    except MisconfigurationException as error:
        return str(error)
    return "fitted"


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_users_own_objects_do_not_keep_a_best_checkpoint_from_being_restored(name: str, tmp_path: Path) -> None:
    """But under FSDP with full checkpoints, which Lightning would unpickle in full."""
    expected = "got pathlib." if name == "fsdp, full checkpoints" else "fitted"
    for message in harness.run_ranks(outcome, 2, tmp_path, 2, *STRATEGIES[name], nothing):
        assert expected in message


@pytest.mark.parametrize("change", [flip, put_code])
@pytest.mark.parametrize("name", ["fsdp, sharded checkpoints", "fsdp2"])
def test_a_changed_directory_of_shards_is_refused_by_every_rank(
    name: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    for message in harness.run_ranks(outcome, 2, tmp_path, 2, *STRATEGIES[name], change):
        assert "is no longer what was written" in message
    assert not (tmp_path / "it ran").exists()
