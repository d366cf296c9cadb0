"""After a fit the user's own EarlyStopping and ModelCheckpoint answer as they do in plain Lightning."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from .toy_programs import (
    EVERYTHING,
    PATIENT,
    Net,
    Program,
    assert_same_epochs,
    checkpoint_answers,
    files_below,
    program,
    saved,
    scheduler,
    stopping_answers,
)

if TYPE_CHECKING:
    from pathlib import Path

RISING = (2.5, 2.0, 2.5, 2.25, 2.125, 2.75)
"""Best in epoch 1, then never again."""
FALLING = (2.5, 2.0, 1.5, 1.25, 1.125, 1.0)

STOPPINGS: dict[str, dict[str, Any]] = {
    "patience": {"patience": 2},
    "patience-never-exhausted": {"patience": 50},
    "min_delta": {"patience": 2, "min_delta": 0.4},
    "maximum": {"monitor": "val_accuracy", "mode": "max", "patience": 2},
    "threshold": {"stopping_threshold": 2.1},
    "divergence": {"divergence_threshold": 2.6, "patience": 50},
    "after-validation": {"patience": 2, "check_on_train_epoch_end": False},
    "after-the-epoch": {"patience": 2, "check_on_train_epoch_end": True},
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "best": {},
    "best-of-three": {"save_top_k": 3},
    "all": {"save_top_k": -1},
    "last": {"save_last": True},
    "last-link": {"save_last": "link"},
    "named": {"filename": "{epoch:02d}-{val_loss:.3f}"},
    "maximum": {"monitor": "val_accuracy", "mode": "max", "save_top_k": 2},
    "every-two-epochs": {"every_n_epochs": 2},
    "every-three-steps": {"every_n_train_steps": 3, "save_top_k": -1},
    "after-validation": {"save_on_train_epoch_end": False},
    "elsewhere": {"dirpath": "elsewhere"},
}


@dataclass
class Given:
    """A user's program with one object of each kind, with and without a schedule."""

    root: Path
    stopping: dict[str, Any] = field(default_factory=lambda: {"patience": 50})
    checkpoint: dict[str, Any] = field(default_factory=dict)
    scores: tuple[float, ...] = RISING
    schedule: dict[int, Any] | None = None
    more: tuple[Callback, ...] = ()
    model: type[Net] = Net

    def __post_init__(self) -> None:
        self.stop = EarlyStopping(**({"monitor": "val_loss"} | self.stopping))
        saving = {"monitor": "val_loss"} | self.checkpoint
        if "dirpath" in saving:
            saving["dirpath"] = self.root / saving["dirpath"]
        self.save = ModelCheckpoint(**saving)
        ours = [] if self.schedule is None else [scheduler(self.schedule)]
        accuracies = [1 - score / 4 for score in self.scores]
        model = self.model(scores=self.scores, accuracies=accuracies)
        self.program = program(self.root, [*ours, self.stop, self.save, *self.more], model, max_epochs=6)

    def fit(self, **arguments: Any) -> Given:
        self.program.fit(**arguments)
        return self

    def answers(self) -> dict[str, dict[str, Any]]:
        return {"stop": stopping_answers(self.stop), "save": checkpoint_answers(self.save, self.root)}


def pair(tmp_path: Path, **options: Any) -> tuple[Given, Given]:
    """The same program with a schedule that trains everything from the start, and in plain Lightning."""
    return Given(tmp_path / "ours", schedule=EVERYTHING, **options), Given(tmp_path / "plain", **options)


@pytest.mark.parametrize("scores", [RISING, FALLING], ids=["rising", "falling"])
@pytest.mark.parametrize("options", STOPPINGS.values(), ids=STOPPINGS)
def test_early_stopping_answers(options: dict[str, Any], scores: tuple[float, ...], tmp_path: Path) -> None:
    ours, plain = pair(tmp_path, stopping=options, scores=scores)
    assert ours.fit().answers()["stop"] == plain.fit().answers()["stop"]
    assert_same_epochs(ours.program.epochs, plain.program.epochs)


@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_model_checkpoint_answers(options: dict[str, Any], tmp_path: Path) -> None:
    ours, plain = pair(tmp_path, checkpoint=options)
    assert ours.fit().answers()["save"] == plain.fit().answers()["save"]
    assert files_below(ours.root) == files_below(plain.root) != []


def arguments(callback: Callback, base: type[Callback]) -> dict[str, Any]:
    """The value of every argument that the base class keeps under its own name."""
    return {name: getattr(callback, name) for name in inspect.signature(base).parameters if hasattr(callback, name)}


def test_what_the_user_configured_stays_and_so_does_the_class(tmp_path: Path) -> None:
    """Only what plain Lightning itself settles at the start, ``dirpath``, may differ afterwards."""
    options: dict[str, Any] = {
        "stopping": {"patience": 7, "min_delta": 0.25, "stopping_threshold": 0.5, "verbose": True},
        "checkpoint": {"save_top_k": 2, "filename": "{epoch}-mine", "save_last": True},
    }
    ours, untouched = Given(tmp_path / "ours", schedule=EVERYTHING, **options), Given(tmp_path / "other", **options)
    ours.fit()
    assert type(ours.stop) is EarlyStopping
    assert type(ours.save) is ModelCheckpoint
    assert arguments(ours.stop, EarlyStopping) == arguments(untouched.stop, EarlyStopping)
    assert arguments(ours.save, ModelCheckpoint) == arguments(untouched.save, ModelCheckpoint) | {
        "dirpath": str(ours.root / "checkpoints")
    }


def test_a_verbose_callback_speaks_as_often_as_in_plain_lightning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoken = {}
    for given in pair(tmp_path, stopping={"patience": 2, "verbose": True}):
        caplog.clear()
        given.fit()
        lines = [record.getMessage() for record in caplog.records if record.name != "finetuning_scheduler"]
        spoken[given.root.name] = [line for line in lines if "val_loss" in line]
    assert spoken["ours"] == spoken["plain"] != []


class Asks(Callback):
    """Reads the user's objects during the fit, as a progress bar or a reporter would."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, Any]]] = []
        self.given: Given | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.given is not None
        self.heard.append((trainer.current_epoch, self.given.answers()))


def test_they_answer_during_the_fit(tmp_path: Path) -> None:
    heard = {}
    for name, schedule in {"ours": EVERYTHING, "plain": None}.items():
        asks = Asks()
        asks.given = Given(tmp_path / name, schedule=schedule, more=(asks,))
        asks.given.fit()
        heard[name] = asks.heard
    assert heard["ours"] == heard["plain"]
    assert [epoch for epoch, _ in heard["plain"]] == [0, 1, 2, 3, 4, 5]


class PowerCutError(Exception):
    """What ends a session too early."""


class Fails(Net):
    """Breaks in the epoch after the best one."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 3:
            raise PowerCutError


def test_they_answer_after_a_fit_that_failed(tmp_path: Path) -> None:
    ours, plain = pair(tmp_path, model=Fails, checkpoint={"save_top_k": 2, "save_last": True})
    for given in (ours, plain):
        with pytest.raises(PowerCutError):
            given.fit()
    assert ours.answers() == plain.answers()
    assert plain.answers()["save"]["best_model_score"] == 2.0


def test_they_answer_after_a_second_fit_of_the_same_trainer(tmp_path: Path) -> None:
    ours, plain = pair(tmp_path, scores=FALLING, checkpoint={"save_top_k": 2})
    for given in (ours, plain):
        given.program.trainer.fit_loop.max_epochs = 3
        given.fit()
        given.program.trainer.fit_loop.max_epochs = 5
        given.fit()
    assert ours.answers() == plain.answers()
    assert plain.answers()["save"]["best_model_score"] == FALLING[4]


@pytest.mark.parametrize("method", ["validate", "test"])
def test_scoring_the_best_uses_the_file_that_the_callback_names(method: str, tmp_path: Path) -> None:
    results = {}
    for given in pair(tmp_path):
        given.fit()
        trainer = given.program.trainer
        results[given.root.name] = getattr(trainer, method)(given.program.model, ckpt_path="best")
        assert trainer.checkpoint_callback.best_model_path == given.save.best_model_path
        assert trainer.ckpt_path == given.save.best_model_path
    assert results["ours"] == results["plain"]


def test_loading_the_best_after_several_phases(tmp_path: Path) -> None:
    """What nearly every program does after its fit."""
    scores = (5.0, 6.0, 4.0, 3.0, 4.0, 5.0)
    given = Given(tmp_path, scores=scores, stopping={"patience": 1}, checkpoint={"save_top_k": 2}, schedule=PATIENT)
    given.fit()
    assert given.program.phases == [0, 0, 1, 1, 1, 2]
    best = Net()
    best.load_state_dict(saved(given.save.best_model_path)["state_dict"])
    assert saved(given.save.best_model_path)["epoch"] == 3
    assert float(given.save.best_model_score) == 3.0
    assert sorted(float(score) for score in given.save.best_k_models.values()) == [3.0, 4.0]
    assert [f"ROOT/{name}" for name in files_below(tmp_path)] == sorted(given.answers()["save"]["best_k_models"])


PHASES_OF_SCORES: dict[str, dict[str, Any]] = {
    # Patience of the last phase: 4.0 in epoch 5 is no better than 3.0, and neither is the next.
    "stops-in-the-last-phase": {
        "scores": (5.0, 6.0, 7.0, 4.0, 3.0, 4.0),
        "max_depth": 1,
        "phases": [0, 0, 0, 1, 1, 1],
        "best_score": 3.0,
        "wait_count": 1,
        "stopped_epoch": 0,
    },
    "runs-out-in-the-last-phase": {
        "scores": (5.0, 6.0, 7.0, 4.0, 4.5, 4.25),
        "max_depth": 1,
        "phases": [0, 0, 0, 1, 1, 1],
        "best_score": 4.0,
        "wait_count": 2,
        "stopped_epoch": 5,
    },
    "waits-anew-in-each-phase": {
        "scores": (5.0, 6.0, 7.0, 8.0, 9.0, 9.0),
        "max_depth": 2,
        "phases": [0, 0, 0, 1, 1, 2],
        "best_score": 5.0,
        "wait_count": 1,
        "stopped_epoch": 0,
    },
}


@pytest.mark.parametrize("case", PHASES_OF_SCORES.values(), ids=PHASES_OF_SCORES)
def test_early_stopping_answers_after_several_phases(case: dict[str, Any], tmp_path: Path) -> None:
    stop = EarlyStopping("val_loss", patience=2)
    model = Net(scores=case["scores"])
    ours = scheduler(PATIENT, max_depth=case["max_depth"])
    run: Program = program(tmp_path, [stop, ours], model, max_epochs=6).fit()
    answers = stopping_answers(stop)
    assert run.phases == case["phases"]
    assert {name: answers[name] for name in ("best_score", "wait_count", "stopped_epoch")} == {
        name: case[name] for name in ("best_score", "wait_count", "stopped_epoch")
    }


def test_the_state_of_the_objects_is_what_plain_lightning_saves(tmp_path: Path) -> None:
    """``state_dict`` of the user's own objects; a schedule may add to it."""
    ours, plain = pair(tmp_path, stopping={"patience": 2}, checkpoint={"save_top_k": 2})
    ours.fit()
    plain.fit()
    for name in ("stop", "save"):
        mine, theirs = getattr(ours, name).state_dict(), getattr(plain, name).state_dict()
        assert mine.keys() >= theirs.keys()
        assert getattr(ours, name).state_key == getattr(plain, name).state_key
    assert ours.save.state_dict()["best_model_score"] == plain.save.state_dict()["best_model_score"] is not None
