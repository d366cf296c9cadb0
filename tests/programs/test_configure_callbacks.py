"""Callbacks that the module returns from ``configure_callbacks``: Lightning asks for them at each fit and scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping

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

Make = Callable[[], list[Callback]]

SCORES = (3.0, 2.5, 2.75, 2.0, 1.5, 1.75, 1.25)


class Configures(Net):
    """Returns callbacks: the same objects each time, or new ones.

    Args:
        make: Makes the callbacks.
        anew: Whether each call makes new ones, as in most people's code.
    """

    def __init__(self, make: Make, *, anew: bool) -> None:
        super().__init__(scores=SCORES, accuracies=[1 - score / 4 for score in SCORES], momentum=0.0)
        self.make, self.anew = make, anew
        self.returned: list[Callback] = []

    def configure_callbacks(self) -> list[Callback]:
        if self.anew or not self.returned:
            self.returned = self.make()
        return self.returned

    def returned_of(self, kind: type[Any]) -> Any:
        (only,) = (callback for callback in self.returned if isinstance(callback, kind))
        return only


def stop() -> EarlyStopping:
    return EarlyStopping("val_loss", patience=1)


def save() -> ModelCheckpoint:
    return ModelCheckpoint(monitor="val_loss", save_top_k=2)


RETURNED: dict[str, Make] = {
    "early-stopping": lambda: [stop()],
    "checkpoint": lambda: [save()],
    "both": lambda: [stop(), save()],
    "multi-phase-forms": lambda: [
        FTSEarlyStopping("val_loss", patience=1),
        FTSCheckpoint(monitor="val_loss", save_top_k=2),
    ],
    "the-scheduler": lambda: [scheduler(PATIENT)],
    "all": lambda: [scheduler(PATIENT), stop(), save()],
}
GIVEN: dict[str, Make] = {
    "early-stopping": lambda: [scheduler(PATIENT), save()],
    "checkpoint": lambda: [scheduler(PATIENT), stop()],
    "both": lambda: [scheduler(PATIENT)],
    "multi-phase-forms": lambda: [scheduler(PATIENT)],
    "the-scheduler": lambda: [stop(), save()],
    "all": list,
}
"""What else the trainer is given, so that each row is one program: a schedule, patience of one epoch, the best two."""

PROGRAMS: dict[str, tuple[int | str, ...]] = {
    "validate-fit": ("validate", 7),
    "fit-fit": (4, 7),
    "fit-fit-fit": (4, 5, 7),
    "fit-validate-fit": (4, "validate", 7),
}
"""Fits up to an epoch, and scorings. Phase 1 begins in epoch 3."""


def carry_out(run: Program, steps: Sequence[int | str]) -> Program:
    for step in steps:
        if isinstance(step, str):
            assert getattr(run.trainer, step)(run.model)
        else:
            run.trainer.fit_loop.max_epochs = step
            run.fit()
    return run


def everything_given(root: Path) -> Program:
    """The same callbacks given to the trainer, in one fit: without momentum two fits are one."""
    model = Net(scores=SCORES, accuracies=[1 - score / 4 for score in SCORES], momentum=0.0)
    return program(root, RETURNED["all"](), model, max_epochs=7).fit()


def of_kind(run: Program, kind: type[Any]) -> list[Any]:
    return [callback for callback in run.trainer.callbacks if isinstance(callback, kind)]


KEPT_PROGRAMS = PROGRAMS | {"fit-fit-at-a-transition": (3, 7), "fit-test-fit-before-a-transition": (2, "test", 7)}


@pytest.mark.parametrize("steps", KEPT_PROGRAMS.values(), ids=KEPT_PROGRAMS)
@pytest.mark.parametrize("name", RETURNED)
def test_callbacks_that_a_module_keeps_do_what_the_trainers_do(
    name: str, steps: tuple[int | str, ...], tmp_path: Path
) -> None:
    given = everything_given(tmp_path / "given")
    assert given.phases == [0, 0, 0, 1, 1, 1, 2]
    model = Configures(RETURNED[name], anew=False)
    returned = carry_out(program(tmp_path / "returned", GIVEN[name](), model), steps)
    assert_same_epochs(returned.epochs, given.epochs)
    assert files_below(returned.root) == files_below(given.root) != []
    assert len(of_kind(returned, FinetuningScheduler)) == 1


ANEW = {name: make for name, make in RETURNED.items() if name not in ("the-scheduler", "all")}


@pytest.mark.parametrize("steps", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("name", ANEW)
def test_callbacks_that_a_module_makes_anew_leave_the_session_in_its_phase(
    name: str, steps: tuple[int | str, ...], tmp_path: Path
) -> None:
    """A new early stopping has seen nothing and a new checkpoint has saved nothing; the scheduler is the same."""
    model = Configures(RETURNED[name], anew=True)
    run = carry_out(program(tmp_path, GIVEN[name](), model), steps)
    assert [epoch.number for epoch in run.epochs] == list(range(7))
    assert run.phases == sorted(run.phases)
    assert run.phases[:4] == [0, 0, 0, 1]
    assert run.phases[-1] >= 1


@pytest.mark.parametrize("steps", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("name", ["early-stopping", "checkpoint", "both"])
def test_callbacks_that_a_module_makes_anew_answer_as_in_plain_lightning(
    name: str, steps: tuple[int | str, ...], tmp_path: Path
) -> None:
    """One phase trains everything; those of the last fit are asked, and what all fits have left on disk."""
    outcomes = {}
    for where, ours in {"ours": [scheduler(EVERYTHING)], "plain": []}.items():
        root = tmp_path / where
        others = [callback for callback in GIVEN[name]() if not isinstance(callback, FinetuningScheduler)]
        run = carry_out(program(root, [*ours, *others], Configures(RETURNED[name], anew=True)), steps)
        asked = [*run.model.returned, *others]
        outcomes[where] = {
            "epochs": [epoch.number for epoch in run.epochs],
            "stopping": [stopping_answers(each) for each in asked if isinstance(each, EarlyStopping)],
            "saving": [checkpoint_answers(each, root) for each in asked if isinstance(each, ModelCheckpoint)],
            "files": files_below(root),
        }
    assert outcomes["plain"]["files"]
    assert outcomes["ours"] == outcomes["plain"]


@pytest.mark.parametrize("steps", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("name", ["the-scheduler", "all"])
def test_a_scheduler_that_a_module_makes_anew_goes_on_where_the_one_before_was(
    name: str, steps: tuple[int | str, ...], tmp_path: Path
) -> None:
    """The same trainer fits the same module again: whose phase it is in does not hang on the callback object."""
    run = carry_out(program(tmp_path, GIVEN[name](), Configures(RETURNED[name], anew=True)), steps)
    assert len(of_kind(run, FinetuningScheduler)) == 1
    assert [epoch.number for epoch in run.epochs] == list(range(7))
    assert run.phases[:4] == [0, 0, 0, 1]
    assert run.phases == sorted(run.phases)


def test_what_the_module_returns_takes_the_place_of_what_the_trainer_has(tmp_path: Path) -> None:
    """Lightning replaces callbacks of the same class: the trainer's own patience and best count for nothing."""
    model = Configures(RETURNED["both"], anew=False)
    trainers = [EarlyStopping("val_accuracy", patience=50), ModelCheckpoint(monitor="val_accuracy", mode="max")]
    run = carry_out(program(tmp_path, [scheduler(PATIENT), *trainers], model), (4, 7))
    assert run.phases == [0, 0, 0, 1, 1, 1, 2]
    assert model.returned_of(ModelCheckpoint).best_model_path == run.trainer.checkpoint_callback.best_model_path
    assert saved(model.returned_of(ModelCheckpoint).best_model_path)["epoch"] == 6
    assert float(model.returned_of(EarlyStopping).best_score) == 1.25
    assert trainers[1].best_model_path == ""


@pytest.mark.parametrize("anew", [False, True], ids=["kept", "anew"])
@pytest.mark.parametrize("name", ["both", "all"])
def test_a_session_of_returned_callbacks_resumes(name: str, anew: bool, tmp_path: Path) -> None:
    given = everything_given(tmp_path / "given")
    killed = program(tmp_path / "killed", GIVEN[name](), Configures(RETURNED[name], anew=anew), max_epochs=4).fit()
    killed.trainer.save_checkpoint(tmp_path / "killed.ckpt")
    resumed = program(tmp_path / "killed", GIVEN[name](), Configures(RETURNED[name], anew=anew), max_epochs=7)
    resumed.fit(ckpt_path=tmp_path / "killed.ckpt")
    assert_same_epochs(killed.epochs + resumed.epochs, given.epochs)
