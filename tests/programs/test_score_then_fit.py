"""A program that scores a model, or fits it without a schedule, and then fits it with one, in the same trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from finetuning_scheduler import FTSCheckpoint

from .toy_programs import (
    TWO_PHASES,
    Net,
    Program,
    assert_same_epochs,
    different_weights,
    files_below,
    patient,
    phase_of,
    program,
    saved,
    scheduler,
    weights_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import lightning.pytorch as pl

SCORINGS: dict[str, tuple[str, ...]] = {
    "validate": ("validate",),
    "test": ("test",),
    "predict": ("predict",),
    "validate-twice": ("validate", "validate"),
    "all-of-them": ("validate", "test", "predict"),
}


def score(trainer: pl.Trainer, model: pl.LightningModule, methods: tuple[str, ...]) -> None:
    for method in methods:
        assert getattr(trainer, method)(model), f"{method} returned nothing"


@pytest.mark.parametrize("methods", SCORINGS.values(), ids=SCORINGS)
def test_a_fit_after_scoring_is_the_fit_of_a_fresh_trainer(methods: tuple[str, ...], tmp_path: Path) -> None:
    fresh = program(tmp_path / "fresh", [scheduler(), patient()]).fit()
    scored = program(tmp_path / "scored", [scheduler(), patient()])
    score(scored.trainer, scored.model, methods)
    scored.fit()
    assert scored.phases == [0, 0, 1, 1, 1]
    assert_same_epochs(scored.epochs, fresh.epochs)
    assert files_below(scored.root) == files_below(fresh.root) != []


@pytest.mark.parametrize("logger", [False, True], ids=["without-logger", "csv-logger"])
def test_scoring_between_two_fits_changes_nothing(logger: bool, tmp_path: Path) -> None:
    runs = {}
    for name, methods in {"fits": (), "fit-score-fit": ("validate", "test")}.items():
        root = tmp_path / name
        options = {"logger": CSVLogger(root) if logger else False, "max_epochs": 3}
        runs[name] = program(root, [scheduler(), patient()], **options).fit()
        score(runs[name].trainer, runs[name].model, methods)
        runs[name].trainer.fit_loop.max_epochs = 5
        runs[name].fit()
    assert runs["fit-score-fit"].phases == [0, 0, 1, 1, 1]
    assert_same_epochs(runs["fit-score-fit"].epochs, runs["fits"].epochs)


# By Lightning, of a default checkpoint callback that the file was not written with.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_scoring_with_a_checkpoint_of_the_fit_before(tmp_path: Path) -> None:
    """``ckpt_path="best"`` after a fit, then a fit of another trainer that was scored with that file."""
    first = program(tmp_path / "first", [scheduler(), patient()]).fit()
    scores = first.trainer.validate(first.model, ckpt_path="best")
    best = first.trainer.checkpoint_callback.best_model_path
    second = program(tmp_path / "second", [scheduler(), patient()])
    assert second.trainer.validate(second.model, ckpt_path=best) == scores
    second.fit()
    assert second.phases == [0, 0, 1, 1, 1]
    # It goes on from the weights of that file: phase 0 leaves what it has not thawed as they are.
    from_file = saved(best)["state_dict"]
    assert different_weights(second.epochs[0].weights, from_file) == {"head.weight", "head.bias"}


def fit_without_schedule(root: Path, **options: Any) -> Program:
    plain = program(root, max_epochs=1, **options).fit()
    assert phase_of(plain.trainer) == 0
    assert plain.trainer.checkpoint_callback.best_model_path
    return plain


def test_a_schedule_after_a_fit_without_one_in_the_same_trainer(tmp_path: Path) -> None:
    """It equals the fit of a fresh trainer that starts from those weights, an epoch later."""
    later = fit_without_schedule(tmp_path / "later")
    start = weights_of(later.model)
    later.trainer.callbacks[:0] = [scheduler(), patient()]
    later.trainer.fit_loop.max_epochs = 5
    later.fit()

    fresh_model = Net()
    fresh_model.load_state_dict(start)
    sooner = {**TWO_PHASES, 0: TWO_PHASES[0] | {"max_transition_epoch": 1}}
    fresh = program(tmp_path / "fresh", [scheduler(sooner), patient()], fresh_model, max_epochs=4).fit()

    with_schedule = later.epochs[1:]
    assert [epoch.phase for epoch in with_schedule] == [0, 1, 1, 1]
    for mine, theirs in zip(with_schedule, fresh.epochs, strict=True):
        assert (mine.phase, mine.learning_rates) == (theirs.phase, theirs.learning_rates)
        assert different_weights(mine.weights, theirs.weights) == set(), f"weights in epoch {mine.number}"


def test_a_schedule_in_a_new_trainer_after_a_fit_without_one(tmp_path: Path) -> None:
    plain = fit_without_schedule(tmp_path / "plain")
    copied = Net()
    copied.load_state_dict(weights_of(plain.model))
    used = program(tmp_path / "used", [scheduler(), patient()], plain.model).fit()
    fresh = program(tmp_path / "fresh", [scheduler(), patient()], copied).fit()
    assert_same_epochs(used.epochs, fresh.epochs)


CHECKPOINTS: dict[str, Callable[[], ModelCheckpoint]] = {
    "as-the-trainer-makes-it": ModelCheckpoint,
    "keeps-every-file": lambda: ModelCheckpoint(save_top_k=-1),
    "every-two-epochs": lambda: ModelCheckpoint(every_n_epochs=2),
    "named": lambda: ModelCheckpoint(filename="{epoch}-mine"),
    "monitors-loss": lambda: ModelCheckpoint(monitor="val_loss"),
    "monitors-accuracy": lambda: ModelCheckpoint(monitor="val_accuracy", mode="max"),
    "multi-phase": lambda: FTSCheckpoint(monitor="val_loss"),
}


@pytest.mark.parametrize("make", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_callback_is_treated_as_before_it_was_used(
    make: Callable[[], ModelCheckpoint], tmp_path: Path
) -> None:
    """Trained or refused: scoring decides neither."""

    def outcome(name: str, methods: tuple[str, ...]) -> dict[str, Any]:
        run = program(tmp_path / name, [scheduler(), patient(), make()])
        score(run.trainer, run.model, methods)
        try:
            run.fit()
        except MisconfigurationException as refusal:
            return {"refusal": str(refusal), "epochs": len(run.epochs)}
        last = run.epochs[-1]
        weights = {key: tensor.tolist() for key, tensor in last.weights.items()}
        return {"phases": run.phases, "weights": weights, "files": files_below(run.root)}

    assert outcome("scored", ("validate", "test")) == outcome("fresh", ())
