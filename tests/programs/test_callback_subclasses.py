"""A user's subclass of ModelCheckpoint or EarlyStopping drives the phases and stays what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from finetuning_scheduler import FinetuningScheduler, FTSEarlyStopping

from .toy_programs import (
    EVERYTHING,
    PATIENT,
    TWO_PHASES,
    Net,
    Program,
    Starts,
    assert_same_epochs,
    checkpoint_answers,
    different_weights,
    files_below,
    patient,
    program,
    saved,
    scheduler,
    stopping_answers,
)


class Spoken:
    """A list of what a subclass's own methods were asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []


class NamesFiles(ModelCheckpoint, Spoken):
    """Overrides a public method that Lightning calls for each file."""

    def __init__(self, **options: Any) -> None:
        Spoken.__init__(self)
        super().__init__(**options)

    def format_checkpoint_name(self, metrics: dict[str, Any], *arguments: Any, **options: Any) -> str:
        name = Path(super().format_checkpoint_name(metrics, *arguments, **options))
        self.calls.append(f"name {int(metrics['epoch'])}")
        return str(name.with_name(f"mine-{name.name}"))


class SkipsTheFirst(ModelCheckpoint, Spoken):
    """Overrides a hook, and skips Lightning's own in the first epoch."""

    def __init__(self, **options: Any) -> None:
        Spoken.__init__(self)
        super().__init__(**options)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append(f"epoch {trainer.current_epoch}")
        if trainer.current_epoch > 0:
            super().on_train_epoch_end(trainer, pl_module)


class AfterValidation(ModelCheckpoint, Spoken):
    """Overrides the hook that saves after validation."""

    def __init__(self, **options: Any) -> None:
        Spoken.__init__(self)
        super().__init__(**options, save_on_train_epoch_end=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        self.calls.append(f"validated {trainer.current_epoch} {Path(self.best_model_path).name}")


class ChoosesItsDirectory(ModelCheckpoint, Spoken):
    """Overrides ``setup``, and has a required argument of its own."""

    def __init__(self, folder: str, **options: Any) -> None:
        Spoken.__init__(self)
        super().__init__(**options)
        self.folder = folder

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        self.dirpath = str(Path(trainer.default_root_dir) / self.folder)
        super().setup(trainer, pl_module, stage)


class Remembers(ModelCheckpoint, Spoken):
    """Adds to the state, under a key of its own."""

    def __init__(self, **options: Any) -> None:
        Spoken.__init__(self)
        super().__init__(**options)
        self.epochs_seen = 0

    @property
    def state_key(self) -> str:
        return "the-users-own-key"

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs_seen += 1
        super().on_train_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        self.calls.append(f"state {self.epochs_seen}")
        return {**super().state_dict(), "epochs_seen": self.epochs_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.epochs_seen = state_dict["epochs_seen"]
        self.calls.append(f"loaded {self.epochs_seen}")


CHECKPOINT_SUBCLASSES: dict[str, Callable[[], ModelCheckpoint]] = {
    "names-files": lambda: NamesFiles(monitor="val_loss", save_top_k=2),
    "skips-the-first": lambda: SkipsTheFirst(monitor="val_loss", save_top_k=2),
    "after-validation": lambda: AfterValidation(monitor="val_loss", save_top_k=2),
    "chooses-its-directory": lambda: ChoosesItsDirectory("of-mine", monitor="val_loss"),
    "remembers": lambda: Remembers(monitor="val_loss", save_top_k=2),
}


@pytest.mark.parametrize("make", CHECKPOINT_SUBCLASSES.values(), ids=CHECKPOINT_SUBCLASSES)
def test_a_checkpoint_subclass_drives_and_keeps_its_behaviour(
    make: Callable[[], ModelCheckpoint], tmp_path: Path
) -> None:
    outcomes = {}
    for name, ours in {"ours": [scheduler(EVERYTHING)], "plain": []}.items():
        given = make()
        kind = type(given)
        run = program(tmp_path / name, [*ours, patient(), given], Net(scores=(3.0, 2.0, 4.0, 2.5, 5.0))).fit()
        assert type(given) is kind
        outcomes[name] = {
            "calls": list(given.calls),
            "answers": checkpoint_answers(given, run.root),
            "files": files_below(run.root),
            "key": given.state_key,
        }
    assert outcomes["plain"]["files"]
    assert outcomes["ours"] == outcomes["plain"]


@pytest.mark.parametrize("make", CHECKPOINT_SUBCLASSES.values(), ids=CHECKPOINT_SUBCLASSES)
def test_what_a_checkpoint_subclass_holds_for_the_best_is_restored(
    make: Callable[[], ModelCheckpoint], tmp_path: Path
) -> None:
    """Epoch 0 has the best loss and epoch 1 the next: one class does not save epoch 0."""
    starts, given = Starts(), make()
    run = program(tmp_path, [scheduler(), patient(), given, starts], Net(scores=(1.0, 2.0, 3.0)), max_epochs=3).fit()
    best = 1 if isinstance(given, SkipsTheFirst) else 0
    assert run.phases == [0, 0, 1]
    assert saved(given.best_model_path)["epoch"] == best
    assert different_weights(starts.weights[2], run.epochs[best].weights) == set()


def test_a_checkpoint_subclass_gets_its_own_state_back(tmp_path: Path) -> None:
    first = program(
        tmp_path,
        [scheduler(), patient(), Remembers(monitor="val_loss", save_top_k=-1)],
        Net(scores=(1.0, 2.0, 3.0, 4.0, 5.0)),
    )
    first.fit()
    (third,) = (tmp_path / name for name in files_below(tmp_path) if "epoch=2-" in name)
    again = Remembers(monitor="val_loss", save_top_k=-1)
    resumed = program(tmp_path, [scheduler(), patient(), again], Net(scores=(1.0, 2.0, 3.0, 4.0, 5.0))).fit(
        ckpt_path=third
    )
    assert "loaded 3" in again.calls
    assert again.epochs_seen == 5
    assert_same_epochs(resumed.epochs, first.epochs[3:])


class Counts(FinetuningScheduler):
    """Adds to the scheduler's state, and leaves what it has added there when it is loaded."""

    transitions = 0

    def step(self) -> None:
        super().step()
        self.transitions += 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "transitions": self.transitions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.transitions = state_dict["transitions"]


def test_a_subclass_of_the_scheduler_may_save_more(tmp_path: Path) -> None:
    def made(root: Path) -> Program:
        saving = ModelCheckpoint(monitor="val_loss", save_top_k=-1)
        return program(root, [Counts(dict(TWO_PHASES)), patient(), saving], Net(scores=(1.0, 2.0, 3.0, 4.0, 5.0)))

    first = made(tmp_path).fit()
    (third,) = (tmp_path / name for name in files_below(tmp_path) if "epoch=2-" in name)
    resumed = made(tmp_path / "resumed").fit(ckpt_path=third)
    assert_same_epochs(resumed.epochs, first.epochs[3:])
    ours = [callback for callback in resumed.trainer.callbacks if isinstance(callback, Counts)]
    assert [callback.transitions for callback in ours] == [1]


class UnderItsOwnKey(FTSEarlyStopping):
    """Its state stands under a key without settings."""

    @property
    def state_key(self) -> str:
        return "mine"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_no_other_state_is_taken_for_that_of_a_subclass_with_a_key_of_its_own(tmp_path: Path) -> None:
    def made(root: Path, stopping: FTSEarlyStopping) -> Program:
        saving = ModelCheckpoint(monitor="val_loss", save_top_k=-1)
        return program(root, [scheduler(), stopping, saving], Net(scores=(1.0, 2.0, 3.0, 4.0, 5.0)))

    first = made(tmp_path, FTSEarlyStopping("val_loss", patience=1000)).fit()
    (third,) = (tmp_path / name for name in files_below(tmp_path) if "epoch=2-" in name)
    stopping = UnderItsOwnKey("val_loss", patience=1000)
    resumed = made(tmp_path / "resumed", stopping).fit(ckpt_path=third)
    assert_same_epochs(resumed.epochs, first.epochs[3:])
    assert float(stopping.best_score) == 4.0  # it begins with the first score that it meets


class WarmsUp(EarlyStopping):
    """Does not look at the first three epochs."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch >= 3:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch >= 3:
            super().on_validation_end(trainer, pl_module)


class WaitsLonger(EarlyStopping):
    """Gets more patient with each epoch, and saves nothing of it."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.patience = 1 + trainer.current_epoch // 2


class ByTheMeanOfTwo(EarlyStopping):
    """Judges the mean of the last two values: a criterion of the user's own."""

    previous: torch.Tensor | None = None

    def _evaluate_stopping_criteria(self, current: torch.Tensor) -> tuple[bool, str | None]:
        mean = current if self.previous is None else (current + self.previous) / 2
        self.previous = current
        return super()._evaluate_stopping_criteria(mean)


# The phases are worked out by hand: a phase ends at the start of the epoch after patience has run out.
STOPPING_SUBCLASSES: dict[str, tuple[Callable[[], EarlyStopping], Sequence[float], list[int]]] = {
    # Epoch 3 is the first value; epochs 4 and 5 are no better.
    "warms-up": (lambda: WarmsUp("val_loss", patience=1), (5, 6, 7, 8, 9, 9, 9), [0, 0, 0, 0, 0, 1, 2]),
    # Patience 1 in epochs 0 and 1, 2 in epochs 2 and 3, 3 from epoch 4 on.
    "waits-longer": (lambda: WaitsLonger("val_loss"), (5, 6, 7, 8, 9, 9, 9), [0, 0, 1, 1, 2, 2, 2]),
    # Means: 4, 3, 3.5, 2.5, 3, ...: epoch 2 ends phase 0, epoch 4 ends phase 1.
    "by-the-mean-of-two": (lambda: ByTheMeanOfTwo("val_loss", patience=1), (4, 2, 5, 0, 6, 0), [0, 0, 0, 1, 1, 2]),
}


@pytest.mark.parametrize(("make", "scores", "phases"), STOPPING_SUBCLASSES.values(), ids=STOPPING_SUBCLASSES)
def test_an_early_stopping_subclass_drives_and_keeps_its_behaviour(
    make: Callable[[], EarlyStopping], scores: Sequence[float], phases: list[int], tmp_path: Path
) -> None:
    given = make()
    kind = type(given)
    run = program(tmp_path, [scheduler(PATIENT), given], Net(scores=scores), max_epochs=len(phases)).fit()
    assert run.phases == phases
    assert type(given) is kind


@pytest.mark.parametrize(("make", "scores"), [row[:2] for row in STOPPING_SUBCLASSES.values()], ids=STOPPING_SUBCLASSES)
def test_an_early_stopping_subclass_answers_as_in_plain_lightning(
    make: Callable[[], EarlyStopping], scores: Sequence[float], tmp_path: Path
) -> None:
    outcomes = {}
    for name, ours in {"ours": [scheduler(EVERYTHING)], "plain": []}.items():
        given = make()
        run = program(tmp_path / name, [*ours, given], Net(scores=scores), max_epochs=7).fit()
        outcomes[name] = {"epochs": len(run.epochs), **stopping_answers(given)}
    assert outcomes["plain"]["stopped_epoch"] > 0
    assert outcomes["ours"] == outcomes["plain"]
