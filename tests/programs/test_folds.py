"""One list of callbacks for several trainers and models: each fit that goes on with nothing starts clean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping

from .toy_programs import (
    HEAD,
    PATIENT,
    TWO_PHASES,
    Net,
    Program,
    assert_same_epochs,
    checkpoint_answers,
    different_weights,
    files_below,
    patient,
    program,
    saved,
    scheduler,
    stopping_answers,
    weights_of,
)


class Renames(ModelCheckpoint):
    """A user's own file names."""

    def format_checkpoint_name(self, metrics: dict[str, Any], *arguments: Any, **options: Any) -> str:
        name = Path(super().format_checkpoint_name(metrics, *arguments, **options))
        return str(name.with_name(f"mine-{name.name}"))


LISTS: dict[str, Callable[[], list[Callback]]] = {
    "scheduler-alone": lambda: [scheduler()],
    "scheduler-alone-by-patience": lambda: [scheduler(PATIENT)],
    "implicit": lambda: [FinetuningScheduler(base_max_lr=0.05)],
    "user's-own": lambda: [scheduler(), EarlyStopping("val_loss"), ModelCheckpoint(monitor="val_loss")],
    "user's-own-before-the-scheduler": lambda: [
        EarlyStopping("val_loss", patience=1),
        ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
        scheduler(PATIENT),
    ],
    "multi-phase-forms": lambda: [scheduler(), FTSEarlyStopping("val_loss"), FTSCheckpoint(monitor="val_loss")],
    "multi-phase-forms-by-patience": lambda: [
        scheduler(PATIENT),
        FTSEarlyStopping("val_loss", patience=1),
        FTSCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
    ],
    "maximum": lambda: [
        scheduler(PATIENT),
        EarlyStopping("val_accuracy", mode="max", patience=1),
        ModelCheckpoint(monitor="val_accuracy", mode="max"),
    ],
    "several": lambda: [
        scheduler(PATIENT),
        EarlyStopping("val_loss", patience=1),
        EarlyStopping("val_accuracy", mode="max", patience=4),
        ModelCheckpoint(monitor="val_loss"),
        ModelCheckpoint(filename="every-{epoch}", save_top_k=-1),
    ],
    "a-subclass": lambda: [scheduler(), EarlyStopping("val_loss"), Renames(monitor="val_loss")],
    "max-depth": lambda: [scheduler(PATIENT, max_depth=1), EarlyStopping("val_loss", patience=1)],
}

# A later fold has worse scores than an earlier one, so that none of its epochs looks like a best one to callbacks that
# remember; and its best epoch is another.
SCORES = ((1.0, 2.0, 3.0, 4.0, 0.5, 2.0), (5.0, 4.0, 6.0, 7.0, 4.5, 3.0), (9.0, 8.5, 9.0, 9.0, 9.0, 9.0))


def fold_model(fold: int) -> Net:
    scores = SCORES[fold]
    return Net(seed=10 * fold, scores=scores, accuracies=[1 - score / 10 for score in scores])


def run_fold(fold: int, root: Path, callbacks: Sequence[Callback], **options: Any) -> Program:
    return program(root, callbacks, fold_model(fold), **({"max_epochs": 6} | options)).fit()


def answers(callbacks: Sequence[Callback], root: Path) -> list[dict[str, Any]]:
    """What the user's own callbacks answer after a fold."""
    stopping = [stopping_answers(callback) for callback in callbacks if isinstance(callback, EarlyStopping)]
    saving = [checkpoint_answers(callback, root) for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    return [*stopping, *saving]


def assert_equals_the_fold_alone(fold: Program, alone: Program) -> None:
    assert_same_epochs(fold.epochs, alone.epochs)
    assert different_weights(weights_of(fold.model), weights_of(alone.model)) == set()
    assert files_below(fold.root) == files_below(alone.root) != []
    for name in files_below(alone.root):
        mine, theirs = saved(fold.root / name), saved(alone.root / name)
        assert different_weights(mine["state_dict"], theirs["state_dict"]) == set(), name
        assert mine["epoch"] == theirs["epoch"]
    best = [relative_best(run) for run in (fold, alone)]
    assert best[0] == best[1]


def relative_best(run: Program) -> Path:
    """Raises unless a run's best file lies in its own directory."""
    return Path(run.trainer.checkpoint_callback.best_model_path).resolve().relative_to(run.root.resolve())


@pytest.mark.parametrize("make", LISTS.values(), ids=LISTS)
def test_a_fold_with_used_callbacks_equals_the_same_fold_alone(
    make: Callable[[], list[Callback]], tmp_path: Path
) -> None:
    callbacks = make()
    for fold in range(3):
        used = run_fold(fold, tmp_path / f"fold-{fold}", callbacks)
        fresh = make()
        alone = run_fold(fold, tmp_path / f"alone-{fold}", fresh)
        assert max(used.phases) > 0
        assert_equals_the_fold_alone(used, alone)
        assert answers(callbacks, used.root) == answers(fresh, alone.root)


@pytest.mark.parametrize("kind", [ModelCheckpoint, FTSCheckpoint])
def test_folds_that_share_a_directory_keep_each_its_own_best_file(kind: type[ModelCheckpoint], tmp_path: Path) -> None:
    """The user names one ``dirpath`` for all, and all folds' best files would have one name."""
    save = kind(monitor="val_loss", dirpath=tmp_path / "all")
    callbacks = [scheduler(), patient(), save]
    paths, weights = [], []
    for fold in range(3):
        model, same = (Net(seed=fold, scores=(1.0 + fold, 5.0)) for _ in range(2))
        used = program(tmp_path / f"fold-{fold}", callbacks, model).fit()
        alone = program(tmp_path / f"alone-{fold}", [scheduler(), patient(), kind(monitor="val_loss")], same).fit()
        assert_same_epochs(used.epochs, alone.epochs)
        paths.append(save.best_model_path)
        weights.append(saved(alone.trainer.checkpoint_callback.best_model_path)["state_dict"])
    assert len(set(paths)) == 3
    assert {Path(path).parent for path in paths} == {(tmp_path / "all").resolve()}
    for path, expected in zip(paths, weights, strict=True):
        assert different_weights(saved(path)["state_dict"], expected) == set(), path


FORMS = [(EarlyStopping, ModelCheckpoint), (FTSEarlyStopping, FTSCheckpoint)]
FORM_NAMES = ["user's-own", "multi-phase-forms"]


@pytest.mark.parametrize("forms", FORMS, ids=FORM_NAMES)
def test_callbacks_that_a_plain_fit_has_used_start_clean_with_a_schedule(
    forms: tuple[type[EarlyStopping], type[ModelCheckpoint]], tmp_path: Path
) -> None:
    """``ModelCheckpoint`` keeps the directory of its first fit, so files are not compared."""

    def make() -> tuple[EarlyStopping, ModelCheckpoint]:
        return forms[0]("val_loss", patience=1), forms[1](monitor="val_loss")

    callbacks, fresh = make(), make()
    run_fold(0, tmp_path / "plain", callbacks)
    used = run_fold(1, tmp_path / "used", [scheduler(PATIENT), *callbacks])
    alone = run_fold(1, tmp_path / "alone", [scheduler(PATIENT), *fresh])
    assert_same_epochs(used.epochs, alone.epochs)
    assert stopping_answers(callbacks[0]) == stopping_answers(fresh[0])
    mine, theirs = (saved(pair[1].best_model_path)["state_dict"] for pair in (callbacks, fresh))
    assert different_weights(mine, theirs) == set()


@pytest.mark.parametrize("forms", FORMS, ids=FORM_NAMES)
def test_callbacks_that_a_schedule_has_used_stop_and_save_in_plain_lightning(
    forms: tuple[type[EarlyStopping], type[ModelCheckpoint]], tmp_path: Path
) -> None:
    """The session before has ended in a phase that was not its last; patience now ends the whole fit."""
    stop, save = forms[0]("val_loss", patience=2), forms[1](monitor="val_loss", save_top_k=-1)
    first = program(tmp_path / "first", [scheduler(PATIENT), stop, save], Net(scores=(5.0, 4.0)), max_epochs=2).fit()
    assert first.phases == [0, 0]
    plain = program(tmp_path / "plain", [stop, save], Net(scores=(2.0, 1.0, 3.0, 3.0, 3.0)), max_epochs=6).fit()
    assert [epoch.number for epoch in plain.epochs] == [0, 1, 2, 3]
    assert stop.stopped_epoch == 3
    assert saved(save.best_model_path)["epoch"] == 1
    assert different_weights(saved(save.best_model_path)["state_dict"], plain.epochs[1].weights) == set()


class PowerCutError(Exception):
    """What ends a session too early."""


class Fails(Net):
    """Breaks in the second phase."""

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.current_epoch == 3 and batch_idx == 1:
            raise PowerCutError
        return super().training_step(batch, batch_idx)


WITH_AND_WITHOUT_OWN = {
    name: LISTS[name] for name in ("scheduler-alone", "user's-own", "multi-phase-forms-by-patience")
}


@pytest.mark.parametrize("make", WITH_AND_WITHOUT_OWN.values(), ids=WITH_AND_WITHOUT_OWN)
def test_a_fold_after_one_that_failed_starts_clean(make: Callable[[], list[Callback]], tmp_path: Path) -> None:
    callbacks = make()
    failing = program(tmp_path / "failed", callbacks, Fails(scores=SCORES[0]), max_epochs=6)
    with pytest.raises(PowerCutError):
        failing.fit()
    assert max(failing.phases) > 0
    used = run_fold(1, tmp_path / "used", callbacks)
    alone = run_fold(1, tmp_path / "alone", make())
    assert_equals_the_fold_alone(used, alone)


@pytest.mark.parametrize("make", WITH_AND_WITHOUT_OWN.values(), ids=WITH_AND_WITHOUT_OWN)
def test_a_fold_that_was_killed_resumes_with_used_callbacks(make: Callable[[], list[Callback]], tmp_path: Path) -> None:
    """Fold 0 runs, fold 1 is killed after four epochs and resumed, all with one list."""
    callbacks = make()
    uninterrupted = run_fold(1, tmp_path / "uninterrupted", make())
    run_fold(0, tmp_path / "fold-0", callbacks)
    killed = run_fold(1, tmp_path / "fold-1", callbacks, max_epochs=4)
    killed.trainer.save_checkpoint(tmp_path / "killed.ckpt")
    resumed = program(tmp_path / "fold-1", callbacks, fold_model(1), max_epochs=6)
    resumed.fit(ckpt_path=tmp_path / "killed.ckpt")
    assert_same_epochs(killed.epochs + resumed.epochs, uninterrupted.epochs)


@dataclass(frozen=True)
class Different:
    """How a fold's trainer differs from the one before, so that what a callback has settled there does not fit."""

    first: dict[str, Any]
    second: dict[str, Any]


DIFFERENT: dict[str, Different] = {
    "no-validation-before": Different({"limit_val_batches": 0}, {}),
    "no-validation-after": Different({}, {"limit_val_batches": 0}),
    "two-validations-an-epoch-before": Different({"val_check_interval": 0.5}, {}),
    "two-validations-an-epoch-after": Different({}, {"val_check_interval": 0.5}),
    "every-other-epoch-before": Different({"check_val_every_n_epoch": 2}, {}),
}


class ScoredEverywhere(Net):
    """Logs one metric in training if there is no validation, else there."""

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.trainer.enable_validation:
            self.log("score", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> None:
        self.log("score", self.loss(batch))


@pytest.mark.parametrize("forms", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("case", DIFFERENT.values(), ids=DIFFERENT)
def test_a_fold_of_another_trainer_settles_anew_when_callbacks_check(
    case: Different, forms: tuple[type[EarlyStopping], type[ModelCheckpoint]], tmp_path: Path
) -> None:
    def make() -> list[Callback]:
        return [scheduler(PATIENT), forms[0]("score", patience=1, min_delta=0.5), forms[1](monitor="score")]

    callbacks = make()
    program(tmp_path / "first", callbacks, ScoredEverywhere(seed=1), **case.first).fit()
    used = program(tmp_path / "used", callbacks, ScoredEverywhere(seed=2), **case.second).fit()
    alone = program(tmp_path / "alone", make(), ScoredEverywhere(seed=2), **case.second).fit()
    assert_equals_the_fold_alone(used, alone)


def test_arguments_changed_between_folds_count(tmp_path: Path) -> None:
    ours = scheduler(PATIENT, max_depth=0)
    first = program(tmp_path / "first", [ours, patient()], fold_model(0), max_epochs=3).fit()
    ours.max_depth, ours.ft_schedule = -1, TWO_PHASES
    second = program(tmp_path / "second", [ours, patient()], fold_model(1), max_epochs=3).fit()
    assert first.phases == [0, 0, 0]
    assert second.phases == [0, 0, 1]


class Wider(Net):
    """Other names and other shapes than the model of the fold before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.extra = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.extra(super().forward(x))


def test_a_generated_schedule_is_generated_for_each_model(tmp_path: Path) -> None:
    ours = FinetuningScheduler()
    program(tmp_path / "first", [ours, EarlyStopping("val_loss", patience=1)], fold_model(0)).fit()
    second = program(tmp_path / "second", [ours, EarlyStopping("val_loss", patience=1)], Wider()).fit()
    before = {**weights_of(Wider())}
    moved = different_weights(second.epochs[0].weights, before)
    assert moved == {"extra.weight", "extra.bias"}
    assert (tmp_path / "second" / "Wider_ft_schedule.yaml").exists()


@pytest.mark.parametrize("make", WITH_AND_WITHOUT_OWN.values(), ids=WITH_AND_WITHOUT_OWN)
def test_the_same_module_in_another_trainer_starts_in_phase_0(
    make: Callable[[], list[Callback]], tmp_path: Path
) -> None:
    """As somebody does who runs a notebook's cell twice: weights go on, the session starts anew."""
    callbacks, model = make(), Net(scores=SCORES[0])
    program(tmp_path / "first", callbacks, model, max_epochs=5).fit()
    start = weights_of(model)
    again = program(tmp_path / "again", callbacks, model, max_epochs=5).fit()

    copied = Net(scores=SCORES[0])
    copied.load_state_dict(start)
    alone = program(tmp_path / "alone", make(), copied, max_epochs=5).fit()
    assert again.phases[0] == 0
    assert different_weights(again.epochs[0].weights, start) == HEAD
    assert_equals_the_fold_alone(again, alone)


@pytest.mark.parametrize("make", WITH_AND_WITHOUT_OWN.values(), ids=WITH_AND_WITHOUT_OWN)
def test_another_module_in_the_same_trainer_starts_in_phase_0(
    make: Callable[[], list[Callback]], tmp_path: Path
) -> None:
    """Lightning counts epochs on, and the best of the module before is nobody's: no weight of it is loaded."""
    run = program(tmp_path, make(), Net(seed=1, scores=(1.0,)), max_epochs=3).fit()
    run.trainer.fit_loop.max_epochs = 7
    other = Net(seed=2, scores=(5.0,))
    start = weights_of(other)
    run.trainer.fit(other)
    phases = run.phases[3:]
    assert phases[0] == 0
    assert max(phases) > 0
    assert different_weights(run.epochs[3].weights, start) == HEAD
    best = saved(run.trainer.checkpoint_callback.best_model_path)
    assert best["epoch"] == 3
    assert different_weights(best["state_dict"], run.epochs[3].weights) == set()


@pytest.mark.parametrize("make", WITH_AND_WITHOUT_OWN.values(), ids=WITH_AND_WITHOUT_OWN)
@pytest.mark.parametrize("first", [1, 2, 3])
def test_the_same_trainer_and_module_go_on_where_they_were(
    make: Callable[[], list[Callback]], first: int, tmp_path: Path
) -> None:
    """Without momentum, which an optimizer made anew has not, two fits are one."""
    model = Net(scores=(3.0, 2.5, 2.75, 2.0, 1.5, 1.0), momentum=0.0)
    at_once = program(tmp_path / "at-once", make(), model, max_epochs=6).fit()
    model = Net(scores=(3.0, 2.5, 2.75, 2.0, 1.5, 1.0), momentum=0.0)
    in_two = program(tmp_path / "in-two", make(), model, max_epochs=first).fit()
    in_two.trainer.fit_loop.max_epochs = 6
    in_two.fit()
    assert max(at_once.phases) > 0
    assert_same_epochs(in_two.epochs, at_once.epochs)
