"""Early stopping and the best checkpoint on a metric of training, judged when and by the value plain Lightning does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from finetuning_scheduler import FTSCheckpoint, FTSEarlyStopping

from .toy_programs import (
    BATCHES_PER_EPOCH,
    EVERYTHING,
    PATIENT,
    Net,
    assert_same_epochs,
    batches,
    checkpoint_answers,
    files_below,
    patient,
    program,
    saved,
    scheduler,
    scripted,
    stopping_answers,
)

# Batch by batch. The mean and the last batch of an epoch never tell the same story.
ONLY_THE_MEAN_IMPROVES = ((9.0, 9.0, 9.0, 1.0), (8.0, 8.0, 8.0, 2.0), (7.0, 7.0, 7.0, 3.0), (6.0, 6.0, 6.0, 4.0))
"""Means 7, 6.5, 6, 5.5; last batches 1, 2, 3, 4."""
ONLY_THE_LAST_IMPROVES = ((1.0, 1.0, 1.0, 9.0), (2.0, 2.0, 2.0, 8.0), (3.0, 3.0, 3.0, 7.0), (4.0, 4.0, 4.0, 6.0))
"""Means 3, 3.5, 4, 4.5; last batches 9, 8, 7, 6."""
BEST_IN_EPOCH_1 = ((4.0, 4.0, 4.0, 1.0), (3.0, 1.0, 1.0, 4.0), (4.0, 4.0, 2.0, 0.0), (4.0, 4.0, 2.0, 0.5))
"""Means 3.25, 2.25, 2.5, 2.625; last batches 1, 4, 0, 0.5."""
STORIES = {
    "only-the-mean-improves": ONLY_THE_MEAN_IMPROVES,
    "only-the-last-improves": ONLY_THE_LAST_IMPROVES,
    "best-in-epoch-1": BEST_IN_EPOCH_1,
}


class LogsTraining(Net):
    """Logs a scripted training loss and, as people do, the real one of validation.

    Args:
        story: Values batch by batch, epoch by epoch.
        log: Arguments of ``self.log``.
    """

    def __init__(self, story: Sequence[Sequence[float]], **log: Any) -> None:
        super().__init__()
        self.story, self.log_arguments = story, log

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        values = self.story[min(self.current_epoch, len(self.story) - 1)]
        self.log("train_loss", scripted(values, batch_idx), **self.log_arguments)
        return super().training_step(batch, batch_idx)


LOGGED: dict[str, tuple[str, dict[str, Any]]] = {
    "step-and-epoch": ("train_loss", {"on_step": True, "on_epoch": True}),
    "step-and-epoch-by-its-epoch-name": ("train_loss_epoch", {"on_step": True, "on_epoch": True}),
    "step-and-epoch-by-its-step-name": ("train_loss_step", {"on_step": True, "on_epoch": True}),
    "step-and-epoch-in-the-progress-bar": ("train_loss", {"on_step": True, "on_epoch": True, "prog_bar": True}),
    "epoch": ("train_loss", {"on_step": False, "on_epoch": True}),
    "step": ("train_loss", {"on_step": True, "on_epoch": False}),
    "by-default": ("train_loss", {}),
    "largest": ("train_loss", {"on_step": True, "on_epoch": True, "reduce_fx": "max"}),
}
CHECKED: dict[str, dict[str, Any]] = {
    "unsaid": {},
    "at-the-epoch's-end": {"check_on_train_epoch_end": True},
    "after-validation": {"check_on_train_epoch_end": False},
}


def stopped(
    root: Path, ours: Sequence[Callback], stop: EarlyStopping, model: LogsTraining, **options: Any
) -> dict[str, Any]:
    run = program(root, [*ours, stop], model, **({"max_epochs": 6} | options)).fit()
    return {"epochs": len(run.epochs), **stopping_answers(stop)}


def outcome(root: Path, ours: Sequence[Callback], stop: EarlyStopping, model: Net, **options: Any) -> dict[str, Any]:
    run = program(root, [*ours, stop], model, **({"max_epochs": 6} | options)).fit()
    return {"epochs": len(run.epochs), **stopping_answers(stop)}


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
@pytest.mark.parametrize(("monitor", "log"), LOGGED.values(), ids=LOGGED)
def test_early_stopping_on_a_training_metric_sees_what_it_sees_in_plain_lightning(
    monitor: str, log: dict[str, Any], story: Sequence[Sequence[float]], tmp_path: Path
) -> None:
    def stopped(kind: type[EarlyStopping], *ours: Callback) -> dict[str, Any]:
        model = LogsTraining(story, **log)
        return outcome(tmp_path / kind.__name__, ours, kind(monitor, patience=2), model)

    assert stopped(FTSEarlyStopping, scheduler(EVERYTHING)) == stopped(EarlyStopping)


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
@pytest.mark.parametrize("options", CHECKED.values(), ids=CHECKED)
def test_when_the_user_says_when_to_check_that_counts(
    options: dict[str, Any], story: Sequence[Sequence[float]], tmp_path: Path
) -> None:
    """After validation there is no mean of the epoch yet: plain Lightning then sees the last batch, and so here."""

    def stopped(kind: type[EarlyStopping], *ours: Callback) -> dict[str, Any]:
        model = LogsTraining(story, on_step=True, on_epoch=True)
        return outcome(tmp_path / kind.__name__, ours, kind("train_loss", patience=2, **options), model)

    assert stopped(FTSEarlyStopping, scheduler(EVERYTHING)) == stopped(EarlyStopping)


TRAINERS: dict[str, dict[str, Any]] = {
    "no-validation": {"limit_val_batches": 0},
    "accumulating": {"accumulate_grad_batches": 2},
    "with-sanity-check": {"num_sanity_val_steps": 2},
    "logging-rarely": {"log_every_n_steps": 50},
}


@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
def test_a_training_metric_in_other_trainers(options: dict[str, Any], tmp_path: Path) -> None:
    def stopped(kind: type[EarlyStopping], *ours: Callback) -> dict[str, Any]:
        model = LogsTraining(ONLY_THE_LAST_IMPROVES, on_step=True, on_epoch=True)
        trainer = {"enable_checkpointing": False, **options}
        return outcome(tmp_path / kind.__name__, ours, kind("train_loss", patience=2), model, **trainer)

    ours, plain = stopped(FTSEarlyStopping, scheduler(EVERYTHING, restore_best=False)), stopped(EarlyStopping)
    assert plain["epochs"] == 3
    assert ours == plain


PHASES: dict[str, tuple[Sequence[Sequence[float]], list[int]]] = {
    # Patience of one epoch never runs out, as each mean is better than the one before.
    "only-the-mean-improves": (ONLY_THE_MEAN_IMPROVES, [0, 0, 0, 0]),
    # Epochs 1, 2 and 3 are no better than epoch 0: a phase ends after each.
    "only-the-last-improves": (ONLY_THE_LAST_IMPROVES, [0, 0, 1, 2]),
    "best-in-epoch-1": (BEST_IN_EPOCH_1, [0, 0, 0, 1]),
}


@pytest.mark.parametrize("kind", [EarlyStopping, FTSEarlyStopping])
@pytest.mark.parametrize(("story", "phases"), PHASES.values(), ids=PHASES)
def test_phases_end_by_the_mean_of_the_epoch(
    story: Sequence[Sequence[float]], phases: list[int], kind: type[EarlyStopping], tmp_path: Path
) -> None:
    stop = kind("train_loss", patience=1)
    model = LogsTraining(story, on_step=True, on_epoch=True)
    run = program(tmp_path, [scheduler(PATIENT), stop], model, max_epochs=4).fit()
    assert run.phases == phases
    assert float(stop.best_score) == min(sum(values) / BATCHES_PER_EPOCH for values in story)


@pytest.mark.parametrize("kind", [ModelCheckpoint, FTSCheckpoint])
@pytest.mark.parametrize("options", [{}, {"save_top_k": 2}, {"save_on_train_epoch_end": False}], ids=str)
@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_the_best_checkpoint_on_a_training_metric_is_that_of_plain_lightning(
    story: Sequence[Sequence[float]], options: dict[str, Any], kind: type[ModelCheckpoint], tmp_path: Path
) -> None:
    outcomes = {}
    for name, ours in {"ours": [scheduler(EVERYTHING)], "plain": []}.items():
        save = kind(monitor="train_loss", filename="{epoch}-{train_loss:.3f}", **options)
        model = LogsTraining(story, on_step=True, on_epoch=True)
        run = program(tmp_path / name, [*ours, patient(), save], model, max_epochs=4).fit()
        outcomes[name] = {"files": files_below(run.root), **checkpoint_answers(save, run.root)}
    assert outcomes["plain"]["files"]
    assert outcomes["ours"] == outcomes["plain"]


def test_both_on_a_training_metric_restore_the_epoch_of_the_best_mean(tmp_path: Path) -> None:
    save = ModelCheckpoint(monitor="train_loss")
    model = LogsTraining(BEST_IN_EPOCH_1, on_step=True, on_epoch=True)
    callbacks = [scheduler(PATIENT), EarlyStopping("train_loss", patience=1), save]
    run = program(tmp_path, callbacks, model, max_epochs=4).fit()
    assert run.phases == [0, 0, 0, 1]
    assert len(files_below(tmp_path)) == 1
    assert saved(save.best_model_path)["epoch"] == 1


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_session_on_a_training_metric_resumes(first: int, tmp_path: Path) -> None:
    """Also between the epoch in which patience ran out and the transition that follows."""

    def session(max_epochs: int) -> Any:
        model = LogsTraining(ONLY_THE_LAST_IMPROVES, on_step=True, on_epoch=True)
        save = ModelCheckpoint(dirpath=tmp_path / f"files-{first}", save_last=True, monitor="train_loss")
        callbacks = [scheduler(PATIENT), EarlyStopping("train_loss", patience=1), save]
        return program(tmp_path, callbacks, model, max_epochs=max_epochs)

    killed = session(first).fit()
    last = tmp_path / "killed.ckpt"
    killed.trainer.save_checkpoint(last)
    resumed = session(4).fit(ckpt_path=last)
    uninterrupted = program(
        tmp_path / "uninterrupted",
        [scheduler(PATIENT), EarlyStopping("train_loss", patience=1), ModelCheckpoint(monitor="train_loss")],
        LogsTraining(ONLY_THE_LAST_IMPROVES, on_step=True, on_epoch=True),
        max_epochs=4,
    ).fit()
    assert uninterrupted.phases == [0, 0, 1, 2]
    assert_same_epochs(killed.epochs + resumed.epochs, uninterrupted.epochs)


class LogsValidationByBatch(Net):
    """Logs two values of validation, with the last worse than the mean."""

    def validation_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", scripted((0.0, 4.0 + self.current_epoch), batch_idx), on_step=True, on_epoch=True)

    def val_dataloader(self) -> Any:
        return batches(self.seed + 1, 8, 4)


@pytest.mark.parametrize("monitor", ["val_loss", "val_loss_epoch"])
def test_a_validation_metric_logged_by_batch_is_judged_by_its_mean(monitor: str, tmp_path: Path) -> None:
    def stopped(kind: type[EarlyStopping], *ours: Callback) -> dict[str, Any]:
        return outcome(tmp_path / kind.__name__, ours, kind(monitor, patience=2), LogsValidationByBatch())

    ours, plain = stopped(FTSEarlyStopping, scheduler(EVERYTHING)), stopped(EarlyStopping)
    assert plain["best_score"] == 2.0
    assert ours == plain
