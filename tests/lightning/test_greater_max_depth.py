"""A session that has ended goes on to the phases that a greater `max_depth` adds, as if these had been there before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from tests.reference.history import History, assert_continues
from tests.reference.networks import FIRST, HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, Recipe, adamw, momentum_sgd
from tests.reference.toys import WHEN_SAVED, SaveAt, Session, ToyResumable, roll_back

pytestmark = pytest.mark.quick


LAST = {"save_top_k": -1, "save_last": True}  # `last.ckpt` is written anew each time


def decay(optimizer: Any) -> StepLR:
    return StepLR(optimizer, 1, 0.7)


PATIENCE = Recipe(
    phases=(PhaseSpec(HEAD), PhaseSpec(THIRD, lr=0.05), PhaseSpec(SECOND, lr=0.02), PhaseSpec(FIRST, lr=0.01)),
    epochs=11,
    optimizer=momentum_sgd,
    patience=2,
    scores=(5.0, 4.0, 4.5, 4.25, 4.75, 4.1, 3.0, 3.5, 3.25, 2.0, 2.5),
)
EPOCHS = Recipe(
    phases=(
        PhaseSpec(HEAD, max_epoch=2),
        PhaseSpec(THIRD, lr=0.05, max_epoch=4),
        PhaseSpec(SECOND, lr=0.02, max_epoch=5),
        PhaseSpec(FIRST, lr=0.01),
    ),
    epochs=7,
    optimizer=adamw,
    scheduler=decay,
)
STEPS = replace(
    EPOCHS,
    phases=(
        PhaseSpec(HEAD, max_step=4),
        PhaseSpec(THIRD, lr=0.05, max_step=12),
        PhaseSpec(SECOND, lr=0.02, max_step=16),
        PhaseSpec(FIRST, lr=0.01),
    ),
)
INSIDE_EPOCHS = replace(
    STEPS,
    phases=tuple(replace(phase, max_step=phase.max_step - 1) for phase in STEPS.phases[:3]) + STEPS.phases[3:],
    restore_best=False,  # the epoch that is cut short is validated, and might be the best
    scheduler=None,
)
RECIPES = {
    "patience": PATIENCE,
    "patience-no-restore": replace(PATIENCE, restore_best=False),
    "patience-decay": replace(PATIENCE, optimizer=adamw, scheduler=decay),
    "patience-no-decay": replace(PATIENCE, optimizer=adamw, no_decay=("bias",)),
    "epochs": EPOCHS,
    "steps": STEPS,
}


def until_the_end_of(depth: int, recipe: Recipe, root: Path, hook: str = "on_train_epoch_end") -> tuple[SaveAt, Any]:
    """A session that ends with phase `depth`, before its trainer would end it."""
    saver = SaveAt(hook, root)
    ended = Session(replace(recipe, max_depth=depth), root, checkpoint=WHEN_SAVED[hook], extra_callbacks=(saver,)).fit()
    assert ended.scheduler.curr_depth == depth
    return saver, ended


def went_through(history: History) -> list[int]:
    return [epoch.phase for epoch in history.epochs]


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_it_goes_on_as_if_the_phases_had_been_there(recipe: Recipe, depth: int, hook: str, tmp_path: Path) -> None:
    saver, ended = until_the_end_of(depth, recipe, tmp_path / "run", hook)
    checkpoint, copied = list(saver.files.items())[-1]
    steps = saver.steps[checkpoint]
    assert steps == len(ended.history.steps) < 4 * recipe.epochs
    uninterrupted = Session(recipe, tmp_path / "whole", checkpoint=WHEN_SAVED[hook]).fit().history
    roll_back(tmp_path / "run", copied)
    resumed = Session(recipe, tmp_path / "run", checkpoint=WHEN_SAVED[hook]).fit(ckpt_path=checkpoint)
    assert_continues(resumed.history, uninterrupted, steps)
    assert resumed.history.steps[0].phase == depth + 1
    assert resumed.scheduler.curr_depth == 3


@pytest.mark.parametrize("recipe", [PATIENCE, EPOCHS], ids=["patience", "epochs"])
def test_phase_by_phase(recipe: Recipe, tmp_path: Path) -> None:
    """Each session ends, and the next one, with one phase more, goes on from its checkpoint."""
    uninterrupted = Session(recipe, tmp_path / "whole", checkpoint=LAST).fit().history
    last, done, options = tmp_path / "run" / "checkpoints" / "last.ckpt", 0, {"checkpoint": LAST}
    for depth in range(4):
        session = Session(replace(recipe, max_depth=depth), tmp_path / "run", **options)
        session.fit(ckpt_path=last if done else None)
        assert session.history.steps == uninterrupted.steps[done : done + len(session.history.steps)]
        done += len(session.history.steps)
    assert done == len(uninterrupted.steps)
    weights = uninterrupted.epochs[-1].weights
    assert all(torch.equal(value, weights[name]) for name, value in session.module.state_dict().items())


@pytest.mark.parametrize("recipe", [PATIENCE, EPOCHS, STEPS], ids=["patience", "epochs", "steps"])
def test_from_a_checkpoint_saved_after_the_fit(recipe: Recipe, tmp_path: Path) -> None:
    """By then the user's own early stopping is back in its place."""
    ended = Session(replace(recipe, max_depth=1), tmp_path / "run").fit()
    ended.trainer.save_checkpoint(tmp_path / "run" / "saved.ckpt")
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "copied")
    steps, uninterrupted = len(ended.history.steps), Session(recipe, tmp_path / "whole").fit().history
    resumed = Session(recipe, tmp_path / "run").fit(ckpt_path=tmp_path / "run" / "saved.ckpt").history
    assert_continues(resumed, uninterrupted, steps)
    roll_back(tmp_path / "run", tmp_path / "copied")
    over = Session(replace(recipe, max_depth=1), tmp_path / "run").fit(ckpt_path=tmp_path / "run" / "saved.ckpt")
    assert over.history.steps == []


@pytest.mark.parametrize(("depth", "steps"), [(0, 3), (1, 11), (2, 15)])
def test_a_session_that_a_step_limit_has_ended_inside_an_epoch(depth: int, steps: int, tmp_path: Path) -> None:
    """From the checkpoint of the validation that Lightning adds there, the epoch goes on, too."""
    options: dict[str, Any] = {"module": ToyResumable, "checkpoint": {**LAST, "save_on_train_epoch_end": False}}
    uninterrupted = Session(INSIDE_EPOCHS, tmp_path / "whole", **options).fit().history
    ended = Session(replace(INSIDE_EPOCHS, max_depth=depth), tmp_path / "run", **options).fit()
    assert len(ended.history.steps) == steps
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    resumed = Session(INSIDE_EPOCHS, tmp_path / "run", **options).fit(ckpt_path=last).history
    assert_continues(resumed, uninterrupted, steps)


def test_an_epoch_that_was_cut_short_and_closed_is_over(tmp_path: Path) -> None:
    """As in plain Lightning: a checkpoint of the end of that epoch goes on with the next one."""
    options: dict[str, Any] = {"module": ToyResumable, "checkpoint": LAST}
    ended = Session(replace(INSIDE_EPOCHS, max_depth=1), tmp_path, **options).fit()
    assert ended.history.epochs[-1].number == 2
    resumed = Session(INSIDE_EPOCHS, tmp_path, **options).fit(ckpt_path=tmp_path / "checkpoints" / "last.ckpt").history
    assert [(epoch.number, epoch.phase) for epoch in resumed.epochs] == [(3, 2), (4, 3), (5, 3), (6, 3)]
    assert [step.phase for step in resumed.steps] == [2] * 4 + [3] * 12


@pytest.mark.parametrize("recipe", [PATIENCE, EPOCHS, STEPS, INSIDE_EPOCHS])
def test_with_the_same_depth_no_step_is_made(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, max_depth=1)
    options: dict[str, Any] = {"module": ToyResumable, "checkpoint": LAST}
    ended = Session(recipe, tmp_path, **options).fit()
    weights = {name: value.clone() for name, value in ended.module.state_dict().items()}
    resumed = Session(recipe, tmp_path, **options).fit(ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.history.steps == []
    assert resumed.trainer.global_step == len(ended.history.steps)
    assert all(torch.equal(value, weights[name]) for name, value in resumed.module.state_dict().items())


@pytest.mark.parametrize("epochs", [3, 4, 5])
def test_a_session_that_the_trainer_has_ended_goes_on_too(epochs: int, tmp_path: Path) -> None:
    """Before, with and after the end of phase 1 by its own limit; the next trainer allows more."""
    recipe = replace(EPOCHS, epochs=epochs, max_depth=1)
    ended = Session(recipe, tmp_path / "run", checkpoint=LAST).fit()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    uninterrupted = Session(EPOCHS, tmp_path / "whole").fit().history
    resumed = Session(EPOCHS, tmp_path / "run").fit(ckpt_path=last).history
    assert_continues(resumed, uninterrupted, len(ended.history.steps))


@pytest.mark.parametrize(
    ("recipe", "phases"), [(PATIENCE, [2, 2, 2, 3, 3]), (EPOCHS, [2, 3, 3])], ids=["patience", "epochs"]
)
def test_the_same_trainer_goes_on_when_it_fits_again(recipe: Recipe, phases: list[int], tmp_path: Path) -> None:
    session = Session(replace(recipe, max_depth=1), tmp_path).fit()
    before = len(session.history.epochs)
    session.scheduler.max_depth = -1
    session.fit()
    assert went_through(session.history)[before:] == phases
    assert [epoch.number for epoch in session.history.epochs] == list(range(recipe.epochs))


@pytest.mark.parametrize("threshold", [{"stopping_threshold": 4.3}, {"divergence_threshold": 4.4}])
def test_what_a_threshold_has_ended_stays_ended(threshold: dict[str, float], tmp_path: Path) -> None:
    recipe = replace(PATIENCE, max_depth=0, scores=(4.25,) if "stopping_threshold" in threshold else (4.5,))
    options: dict[str, Any] = {"checkpoint": LAST}

    def session(recipe: Recipe) -> Session:
        made = Session(recipe, tmp_path, **options)
        vars(made.trainer.callbacks[1]).update(threshold)
        return made

    session(recipe).fit()
    resumed = session(replace(recipe, max_depth=-1)).fit(ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.history.steps == []
    assert resumed.trainer.global_step == 4


def test_patience_that_no_longer_counts_ends_nothing(tmp_path: Path) -> None:
    """Resumed with `epoch_transitions_only`: phase 1 goes on until its limit."""
    ended = Session(replace(PATIENCE, max_depth=1), tmp_path, checkpoint=LAST).fit().history
    limits = [replace(phase, max_epoch=8 + 2 * number) for number, phase in enumerate(PATIENCE.phases[1:])]
    recipe = replace(PATIENCE, phases=(PhaseSpec(HEAD, max_epoch=1), *limits))
    resumed = Session(recipe, tmp_path, scheduler_options={"epoch_transitions_only": True})
    resumed.fit(ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert went_through(ended) == [0, 0, 0, 0, 1, 1]
    assert went_through(resumed.history) == [1, 1, 2, 2, 3]
