"""A checkpoint between a validation and its transition: a run that resumes from it goes back to the same best one.

Lightning goes on after the hooks in which such a checkpoint is written, also where early stopping or the best
checkpoint come later in the same hook.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from finetuning_scheduler import FinetuningScheduler
from tests.reference.history import assert_continues
from tests.reference.networks import BATCHES_PER_EPOCH, HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, Recipe, adamw, schedule_of
from tests.reference.toys import Recorder, Toy, make_trainer

RECIPE = Recipe(
    phases=(PhaseSpec(HEAD), PhaseSpec(THIRD, lr=0.05), PhaseSpec(SECOND, lr=0.02)),
    epochs=5,
    optimizer=adamw,
    patience=1,
    scores=(4.0, 3.0, 5.0, 3.5, 2.0),  # epoch 1 is the best when epoch 2 ends phase 0
)


class RequeuedError(Exception):
    """The job is taken away once it has saved."""


class SaveAndLeave(Callback):
    def __init__(self, hook: str, epoch: int, path: Path) -> None:
        self.epoch, self.path = epoch, path
        setattr(self, hook, self.leave)

    def leave(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
            raise RequeuedError


def fit(root: Path, moments: tuple[bool | None, bool | None], *first: Callback, ckpt_path: Path | None = None) -> Any:
    stops, saves = moments
    scheduler = FinetuningScheduler(schedule_of(RECIPE), base_max_lr=RECIPE.base_max_lr)
    stopping = EarlyStopping("val_loss", patience=1, check_on_train_epoch_end=stops)
    saving = ModelCheckpoint(root / "checkpoints", monitor="val_loss", save_on_train_epoch_end=saves)
    recorder = Recorder(lambda: scheduler.curr_depth)
    trainer = make_trainer(root, callbacks=[*first, scheduler, stopping, recorder, saving], max_epochs=RECIPE.epochs)
    trainer.fit(Toy(RECIPE), ckpt_path=ckpt_path)
    return recorder.history


MOMENTS: dict[str, tuple[bool | None, bool | None]] = {
    "as they come": (None, None),
    "both after validation": (False, False),
    "both at the end of the epoch": (True, True),
    "stopping first": (False, True),
    "saving first": (True, False),
}


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS)
def test_a_requeue_before_early_stopping_and_the_best_checkpoint(
    moments: tuple[bool | None, bool | None], hook: str, tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", moments)
    assert [epoch.phase for epoch in whole.epochs] == [0, 0, 0, 1, 2]
    for epoch in (0, 1, 2):
        root = tmp_path / str(epoch)
        with pytest.raises(RequeuedError):
            fit(root, moments, SaveAndLeave(hook, epoch, root / "requeue.ckpt"))
        resumed = fit(root, moments, ckpt_path=root / "requeue.ckpt")
        assert_continues(resumed, whole, (epoch + 1) * BATCHES_PER_EPOCH)
        shutil.rmtree(root)
