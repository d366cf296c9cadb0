"""`fts_history.json` tells what a fit has gone through; a resumed fit goes on with what its checkpoint knows."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from finetuning_scheduler.core.history.document import RunHistory
from finetuning_scheduler.core.history.recorder import FILE_NAME
from tests.core.history.test_recorder import without_times, written
from tests.reference.networks import BATCHES_PER_EPOCH, HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, Recipe, momentum_sgd
from tests.reference.toys import WHEN_SAVED, SaveAt, Session, Toy, ToyResumable, roll_back

pytestmark = pytest.mark.quick

RECIPE = Recipe(
    phases=(PhaseSpec(HEAD, max_epoch=2), PhaseSpec(THIRD, lr=0.05), PhaseSpec(SECOND, lr=0.02)),
    epochs=6,
    optimizer=momentum_sgd,
    patience=1,
    scores=(3.0, 2.0, 2.5, 2.5, 2.5, 2.5),
)


class Logs(Toy):
    """Logs in each hook that may."""

    def training_step(self, batch: Any) -> Any:
        loss = super().training_step(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("late", float(self.current_epoch))


def test_the_whole_of_a_fit(tmp_path: Path) -> None:
    session = Session(RECIPE, tmp_path, module=Logs).fit()
    found = without_times(written(tmp_path))
    assert found == without_times(session.scheduler.history)
    steps = BATCHES_PER_EPOCH
    assert found["transitions"] == [
        {"left": 0, "entered": 1, "reason": "max_transition_epoch", "moment": {"epoch": 2, "step": 2 * steps}},
        {"left": 1, "entered": 2, "reason": "early stopping", "moment": {"epoch": 3, "step": 3 * steps}},
    ]
    assert [(each["epoch"], each["phase"], each["step"]) for each in found["epochs"]] == [
        (epoch, phase, (epoch + 1) * steps) for epoch, phase in enumerate((0, 0, 1, 2))
    ]
    assert found["ended"] == {"reason": "early stopping", "moment": {"epoch": 4, "step": 4 * steps}}
    for epoch, recorded in zip(session.history.epochs, found["epochs"], strict=True):
        rates = tuple(rate for rate, count in recorded["learning_rates"] for _ in range(count))
        assert rates == epoch.lrs
        assert RECIPE.scores is not None
        assert recorded["metrics"]["val_loss"] == RECIPE.scores[recorded["epoch"]]
        assert recorded["metrics"]["late"] == recorded["epoch"]
        assert {"train_loss", "train_loss_step", "train_loss_epoch"} <= recorded["metrics"].keys()
    assert [(each["phase"], each["steps"]) for each in found["phases"]] == [(0, 2 * steps), (1, steps), (2, steps)]
    assert [each["judgement"]["trained"] for each in found["phases"]] == [list(HEAD), list(THIRD), list(SECOND)]


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end", "on_train_batch_end"])
def test_a_resumed_fit_has_the_history_of_one_that_was_not_interrupted(hook: str, tmp_path: Path) -> None:
    saver = SaveAt(hook, tmp_path)
    options: dict[str, Any] = {"module": ToyResumable, "checkpoint": WHEN_SAVED[hook]}
    whole = without_times(Session(RECIPE, tmp_path, extra_callbacks=(saver,), **options).fit().scheduler.history)
    checkpoints = [path for path, steps in saver.steps.items() if steps < whole["epochs"][-1]["step"]]
    if hook == "on_train_batch_end":
        checkpoints = [path for path in checkpoints if saver.steps[path] % BATCHES_PER_EPOCH][::2]
    for checkpoint in checkpoints:
        roll_back(tmp_path, saver.files[checkpoint])
        Session(RECIPE, tmp_path, **options).fit(ckpt_path=checkpoint)
        found = without_times(written(tmp_path))
        assert [each["step"] for each in found["resumed"]] == [saver.steps[checkpoint]]
        for phase in (*found["phases"], *whole["phases"]):
            phase.pop("judgement", None)  # a resumed phase is judged anew, with all that is thawed
        assert {**found, "resumed": []} == whole


class Slow(TorchCheckpointIO):
    """Takes its time with files."""

    def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        time.sleep(0.05)
        super().save_checkpoint(*arguments, **options)


class SlowToy(Toy):
    def training_step(self, batch: Any) -> Any:
        time.sleep(0.01)
        return super().training_step(batch)

    def validation_step(self, batch: Any) -> None:
        time.sleep(0.02)
        super().validation_step(batch)


def test_seconds_stand_with_what_they_were_spent_on(tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=3, patience=None)
    options = {"num_sanity_val_steps": 1, "plugins": [Slow()], "checkpoint": {"save_on_train_epoch_end": False}}
    began = time.perf_counter()
    history = Session(recipe, tmp_path, module=SlowToy, **options).fit().scheduler.history
    passed = time.perf_counter() - began
    first, second = (phase.seconds for phase in history.phases)
    assert first.training >= 2 * BATCHES_PER_EPOCH * 0.01
    assert second.training >= BATCHES_PER_EPOCH * 0.01
    assert first.validation >= 2 * 0.02  # after two epochs; the check before training is no part of it
    assert first.saving >= 2 * 0.05  # inside a validation, of which it is no part
    assert first.restoring > 0.0  # from memory
    assert second.saving < 0.05  # the third epoch is no improvement
    assert second.restoring == 0.0
    assert sum(sum(phase.seconds.model_dump().values()) for phase in history.phases) < passed
    assert sum(epoch.seconds.validation for epoch in history.epochs) == pytest.approx(
        first.validation + second.validation
    )


class Fails(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == BATCHES_PER_EPOCH + 1:
            raise self.error


def test_a_fit_that_fails_leaves_its_history(tmp_path: Path) -> None:
    session = Session(RECIPE, tmp_path, extra_callbacks=(Fails(ZeroDivisionError("here")),))
    with pytest.raises(ZeroDivisionError, match="here"):
        session.fit()
    history = written(tmp_path)
    assert history.ended is not None
    assert (history.ended.reason, history.ended.moment.step) == ("ZeroDivisionError", BATCHES_PER_EPOCH + 1)
    assert [epoch.epoch for epoch in history.epochs] == [0]
    assert "save_checkpoint" not in vars(session.trainer)


def test_a_limit_of_the_trainer_is_told_as_such(tmp_path: Path) -> None:
    Session(replace(RECIPE, patience=None), tmp_path).fit()
    ended = written(tmp_path).ended
    assert ended is not None
    assert (ended.reason, ended.moment.epoch) == ("trainer", RECIPE.epochs)


def test_the_last_phase_s_own_limit_is_told_as_such(tmp_path: Path) -> None:
    phases = (PhaseSpec(HEAD, max_epoch=1), PhaseSpec(THIRD, lr=0.05, max_epoch=2))
    Session(replace(RECIPE, phases=phases), tmp_path).fit()
    ended = written(tmp_path).ended
    assert ended is not None
    assert ended.reason == "max_transition_epoch"


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path: Path) -> None:
    session = Session(replace(RECIPE, epochs=2), tmp_path).fit()
    session.trainer.fit_loop.max_epochs = 4
    session.fit()
    history = written(tmp_path)
    assert [epoch.epoch for epoch in history.epochs] == [0, 1, 2, 3]
    assert [moment.epoch for moment in history.resumed] == [2]


def test_a_fresh_fit_begins_anew(tmp_path: Path) -> None:
    for epochs in (3, 1):
        Session(replace(RECIPE, epochs=epochs), tmp_path).fit()
    assert [epoch.epoch for epoch in written(tmp_path).epochs] == [0]


def test_a_log_dir_of_its_own(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "place"
    Session(replace(RECIPE, epochs=1), tmp_path, scheduler_options={"log_dir": directory}).fit()
    assert len(written(directory).epochs) == 1
    assert not (tmp_path / FILE_NAME).exists()


def test_before_a_fit_there_is_nothing_to_tell() -> None:
    from finetuning_scheduler import FinetuningScheduler

    assert FinetuningScheduler().history == RunHistory()


def test_a_checkpoint_without_a_history_is_resumed(tmp_path: Path) -> None:
    Session(replace(RECIPE, epochs=1), tmp_path).fit()
    (path,) = (tmp_path / "checkpoints").iterdir()
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [state for name, state in checkpoint["callbacks"].items() if "FinetuningScheduler" in name]
    assert state.pop("history")["phases"][0]["phase"] == 0
    torch.save(checkpoint, tmp_path / "older.ckpt")
    resumed = Session(replace(RECIPE, epochs=2), tmp_path / "resumed").fit(ckpt_path=tmp_path / "older.ckpt")
    assert [epoch.epoch for epoch in resumed.scheduler.history.epochs] == [1]
