"""A session that is killed and resumed does what the uninterrupted one did, wherever the checkpoint was saved.

What plain Lightning itself cannot continue exactly is left out: checkpoints saved at the start of an epoch or of a
batch (the rest of the epoch is skipped), after an epoch's last batch (its validation is skipped), after validation
where ModelCheckpoint saves later than that (metrics are not saved), and the step that ``ReduceLROnPlateau`` makes at
the end of the very epoch a checkpoint belongs to.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau, StepLR

from finetuning_scheduler.core import weights
from tests.reference.history import assert_continues
from tests.reference.networks import BATCHES_PER_EPOCH, FIRST, HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, Recipe, adamw, momentum_sgd, simple_recipe
from tests.reference.toys import WHEN_SAVED, SaveAt, Session, ToyResumable, make_trainer, roll_back

if TYPE_CHECKING:
    from pathlib import Path


STEP_WISE = {"scheduler": lambda optimizer: LinearLR(optimizer, 0.25, 1.0, total_iters=11), "interval": "step"}
EPOCH_WISE = {"scheduler": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.5)}

EARLY_STOPPING = Recipe(
    phases=(PhaseSpec(HEAD), PhaseSpec(THIRD, lr=0.05), PhaseSpec(SECOND, lr=0.02), PhaseSpec(FIRST, lr=0.01)),
    epochs=9,
    optimizer=momentum_sgd,
    patience=2,
    scores=(5.0, 4.0, 4.5, 4.25, 4.0, 4.1, 3.0, 3.5, 3.25),
)
MIXED = Recipe(
    phases=(
        PhaseSpec(HEAD, max_step=6),
        PhaseSpec(THIRD, lr=0.05, max_epoch=3),
        PhaseSpec(SECOND, lr=0.02, max_epoch=2),
        PhaseSpec(FIRST, lr=0.01),
    ),
    epochs=6,
    optimizer=momentum_sgd,
    patience=2,
    scores=(5.0, 5.5, 4.0, 4.5, 3.0, 2.0),
)
RECIPES = {
    "early-stopping": EARLY_STOPPING,
    "early-stopping-adamw-step": replace(EARLY_STOPPING, optimizer=adamw, **STEP_WISE),
    "mixed": MIXED,
    "mixed-epoch": replace(MIXED, **EPOCH_WISE),
    "mixed-no-restore": replace(MIXED, restore_best=False, **EPOCH_WISE),
    "mixed-no-decay": replace(MIXED, no_decay=("bias",), optimizer=adamw, **EPOCH_WISE),
}


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end", "on_train_batch_end"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_resuming_from_any_moment(recipe: Recipe, hook: str, tmp_path: Path) -> None:
    saver = SaveAt(hook, tmp_path)
    options: dict[str, Any] = {"module": ToyResumable, "checkpoint": WHEN_SAVED[hook]}
    uninterrupted = Session(recipe, tmp_path, extra_callbacks=(saver,), **options).fit().history
    checkpoints = [path for path, steps in saver.steps.items() if steps < len(uninterrupted.steps)]
    if hook == "on_train_batch_end":
        checkpoints = [path for path in checkpoints if saver.steps[path] % BATCHES_PER_EPOCH][::2]
    for checkpoint in checkpoints:
        roll_back(tmp_path, saver.files[checkpoint])
        resumed = Session(recipe, tmp_path, **options).fit(ckpt_path=checkpoint).history
        assert_continues(resumed, uninterrupted, saver.steps[checkpoint])


@pytest.mark.quick
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
def test_resuming_from_the_end_of_an_epoch_needs_no_resumable_loader(hook: str, tmp_path: Path) -> None:
    saver = SaveAt(hook, tmp_path)
    options: dict[str, Any] = {"checkpoint": WHEN_SAVED[hook]}
    uninterrupted = Session(MIXED, tmp_path, extra_callbacks=(saver,), **options).fit().history
    for checkpoint in list(saver.files)[:-1]:
        roll_back(tmp_path, saver.files[checkpoint])
        resumed = Session(MIXED, tmp_path, **options).fit(ckpt_path=checkpoint).history
        assert_continues(resumed, uninterrupted, saver.steps[checkpoint])


def test_resuming_at_the_start_of_an_epoch_does_not_transition_twice(tmp_path: Path) -> None:
    """Plain Lightning skips the batches of that epoch, so only the phases can be compared."""
    recipe = simple_recipe()
    saver = SaveAt("on_train_epoch_start", tmp_path)
    uninterrupted = Session(recipe, tmp_path, extra_callbacks=(saver,)).fit().history
    phases = {epoch.number: epoch.phase for epoch in uninterrupted.epochs}
    for checkpoint, copied in saver.files.items():
        roll_back(tmp_path, copied)
        resumed = Session(recipe, tmp_path).fit(ckpt_path=checkpoint).history
        assert {epoch.number: epoch.phase for epoch in resumed.epochs}.items() <= phases.items()


def test_resuming_after_an_epochs_last_batch_delays_no_transition(tmp_path: Path) -> None:
    """Plain Lightning skips the validation of that epoch, so only the phases can be compared."""
    recipe = simple_recipe()
    saver = SaveAt("on_train_batch_end", tmp_path)
    uninterrupted = Session(recipe, tmp_path, extra_callbacks=(saver,)).fit().history
    phases = {epoch.number: epoch.phase for epoch in uninterrupted.epochs}
    assert phases == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    last_batches = [path for path, steps in saver.steps.items() if steps % BATCHES_PER_EPOCH == 0]
    for epoch, checkpoint in enumerate(last_batches[:-1]):
        roll_back(tmp_path, saver.files[checkpoint])
        resumed = Session(recipe, tmp_path).fit(ckpt_path=checkpoint).history
        expected = {number: phase for number, phase in phases.items() if number > epoch}
        assert {epoch.number: epoch.phase for epoch in resumed.epochs} == expected


@pytest.mark.parametrize("optimizer", [momentum_sgd, adamw], ids=["sgd", "adamw"])
def test_resuming_with_reduce_on_plateau(optimizer: Any, tmp_path: Path) -> None:
    """Every checkpoint is of an improving epoch: the step at its end, which Lightning drops, changes nothing."""
    recipe = replace(
        MIXED,
        optimizer=optimizer,
        scores=(5.0, 4.0, 3.0, 6.0, 7.0, 8.0),
        patience=None,
        scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
    )
    saver = SaveAt("on_train_epoch_end", tmp_path)
    uninterrupted = Session(recipe, tmp_path, extra_callbacks=(saver,)).fit().history
    assert uninterrupted.epochs[-1].lrs[0] == 0.25 * uninterrupted.epochs[0].lrs[0]
    for checkpoint in list(saver.files)[:3]:
        roll_back(tmp_path, saver.files[checkpoint])
        resumed = Session(recipe, tmp_path).fit(ckpt_path=checkpoint).history
        assert_continues(resumed, uninterrupted, saver.steps[checkpoint])


def test_resuming_with_epoch_transitions_only(tmp_path: Path) -> None:
    recipe = simple_recipe(scores=(5.0, 4.0, 4.5, 4.25, 4.75, 3.0))
    options: dict[str, Any] = {"scheduler_options": {"epoch_transitions_only": True}}
    phases = (*recipe.phases[:-1], replace(recipe.phases[-1], max_epoch=6))
    recipe = replace(recipe, phases=phases)
    saver = SaveAt("on_train_epoch_end", tmp_path)
    uninterrupted = Session(recipe, tmp_path, extra_callbacks=(saver,), **options).fit().history
    for checkpoint in list(saver.files)[:-1]:
        roll_back(tmp_path, saver.files[checkpoint])
        resumed = Session(recipe, tmp_path, **options).fit(ckpt_path=checkpoint).history
        assert_continues(resumed, uninterrupted, saver.steps[checkpoint])


def test_resuming_in_implicit_mode(tmp_path: Path) -> None:
    recipe = replace(EARLY_STOPPING, phases=tuple(PhaseSpec(names) for names in (HEAD, THIRD, SECOND, FIRST)))
    saver = SaveAt("on_train_epoch_end", tmp_path)
    uninterrupted = Session(recipe, tmp_path, explicit=False, extra_callbacks=(saver,)).fit().history
    for checkpoint in list(saver.files)[:-1]:
        roll_back(tmp_path, saver.files[checkpoint])
        resumed = Session(recipe, tmp_path, explicit=False).fit(ckpt_path=checkpoint).history
        assert_continues(resumed, uninterrupted, saver.steps[checkpoint])


@pytest.mark.parametrize("recipe", [EARLY_STOPPING, MIXED], ids=["early-stopping", "mixed"])
def test_resuming_from_the_best_few_and_the_last(recipe: Recipe, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": {"save_top_k": 3, "save_last": True}}
    uninterrupted = Session(recipe, tmp_path, **options).fit().history
    directory = tmp_path / "checkpoints"
    shutil.copytree(directory, tmp_path / "finished")
    for name in sorted(path.name for path in directory.glob("epoch=*.ckpt")):
        roll_back(tmp_path, tmp_path / "finished")
        steps_done = torch.load(directory / name, weights_only=True)["global_step"]
        if steps_done < len(uninterrupted.steps):
            resumed = Session(recipe, tmp_path, **options).fit(ckpt_path=directory / name).history
            assert_continues(resumed, uninterrupted, steps_done)


class Killed(Callback):
    """The session dies at the start of an epoch, as by a signal."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise ConnectionAbortedError(f"killed in epoch {self.epoch}")


@pytest.mark.parametrize("how", ["path", "last", "attribute"])
@pytest.mark.parametrize("epoch", [2, 4, 5])
def test_resuming_a_killed_session_from_its_last_checkpoint(epoch: int, how: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": {"save_top_k": 1, "save_last": True, "every_n_epochs": 1}}
    recipe = replace(EARLY_STOPPING, scores=(9.0, 8.0, 8.5, 8.25, 7.0, 6.5, 6.0, 7.5, 7.25))
    uninterrupted = Session(recipe, tmp_path / "whole", **options).fit().history
    root = tmp_path / "killed"
    with pytest.raises(ConnectionAbortedError):
        Session(recipe, root, extra_callbacks=(Killed(epoch),), **options).fit()
    last = root / "checkpoints" / "last.ckpt"
    steps_done = torch.load(last, weights_only=True)["global_step"]
    resumed = Session(recipe, root, **options)
    if how == "attribute":
        resumed.trainer.ckpt_path = str(last)
        resumed.fit()
    else:
        resumed.fit(ckpt_path="last" if how == "last" else last)
    assert_continues(resumed.history, uninterrupted, steps_done)


class BestAtStart(Callback):
    """What the multi-phase checkpoint callback knows when training starts."""

    path: str
    depth: int

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        from finetuning_scheduler import FTSCheckpoint

        (saving,) = (callback for callback in trainer.callbacks if isinstance(callback, FTSCheckpoint))
        self.path, self.depth = saving.best_model_path, saving.best_ckpt_depth


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("epoch", [0, 1, 4, 6])
def test_resuming_from_the_best_checkpoint_with_another_directory(epoch: int, tmp_path: Path) -> None:
    recipe = replace(EARLY_STOPPING, scores=(5.0, 4.0, 4.5, 4.25, 3.9, 4.1, 3.0, 3.5, 3.25))
    whole = Session(recipe, tmp_path / "whole", checkpoint={"save_top_k": -1}).fit()
    (checkpoint,) = (tmp_path / "whole" / "checkpoints").glob(f"epoch={epoch}-*.ckpt")
    best = BestAtStart()
    resumed = Session(recipe, tmp_path / "other", extra_callbacks=(best,)).fit(ckpt_path=checkpoint)
    assert_continues(resumed.history, whole.history, (epoch + 1) * 4)
    assert best.path == str(checkpoint)
    assert best.depth == whole.history.epochs[epoch].phase


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_another_directory_starts_with_the_given_checkpoint_as_its_best(tmp_path: Path) -> None:
    """Also where a better one lay in the old directory."""
    Session(EARLY_STOPPING, tmp_path / "whole", checkpoint={"save_top_k": -1}).fit()
    (checkpoint,) = (tmp_path / "whole" / "checkpoints").glob("epoch=3-*.ckpt")
    best = BestAtStart()
    Session(EARLY_STOPPING, tmp_path / "other", extra_callbacks=(best,)).fit(ckpt_path=checkpoint)
    assert best.path == str(checkpoint)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
def test_a_session_that_was_over_stays_over(hook: str, tmp_path: Path) -> None:
    """Early stopping ended the final phase: resuming from its last checkpoint trains no further."""
    recipe = replace(EARLY_STOPPING, phases=EARLY_STOPPING.phases[:2], epochs=9)
    saver = SaveAt(hook, tmp_path)
    uninterrupted = Session(recipe, tmp_path, extra_callbacks=(saver,)).fit().history
    assert len(uninterrupted.epochs) == 6
    resumed = Session(recipe, tmp_path).fit(ckpt_path=list(saver.files)[-1])
    assert resumed.history.steps == []
    ended = resumed.module.state_dict()
    assert all(torch.equal(ended[name], tensor) for name, tensor in uninterrupted.epochs[-1].weights.items())


def test_a_resumed_fit_loads_the_model_once_and_in_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(EARLY_STOPPING, restore_best=False)
    saver = SaveAt("on_train_epoch_end", tmp_path)
    Session(recipe, tmp_path, extra_callbacks=(saver,)).fit()
    loads: list[nn.Module] = []
    load = weights.load_weights

    def counted(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        loads.append(module)
        return load(module, *arguments, **options)

    monkeypatch.setattr(weights, "load_weights", counted)
    resumed = Session(recipe, tmp_path).fit(ckpt_path=next(iter(saver.files)))
    assert loads == [resumed.module]
    assert "load_state_dict" not in vars(resumed.module)
    assert "load_model_state_dict" not in vars(resumed.trainer.strategy)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_written_without_the_callback_is_refused(tmp_path: Path) -> None:
    recipe = simple_recipe(epochs=2)
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=[ModelCheckpoint(tmp_path / "plain", save_last=True)])
    trainer.fit(ToyResumable(recipe))
    with pytest.raises(MisconfigurationException, match=r"last\.ckpt|FinetuningScheduler"):
        Session(recipe, tmp_path).fit(ckpt_path=tmp_path / "plain" / "last.ckpt")


def test_a_checkpoint_of_weights_only_is_refused(tmp_path: Path) -> None:
    recipe = simple_recipe(epochs=2)
    session = Session(recipe, tmp_path).fit()
    session.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(MisconfigurationException):
        Session(recipe, tmp_path / "other").fit(ckpt_path=tmp_path / "weights.ckpt")


def test_checkpoints_load_with_weights_only(tmp_path: Path) -> None:
    saver = SaveAt("on_train_epoch_end", tmp_path)
    Session(replace(MIXED, **EPOCH_WISE), tmp_path, extra_callbacks=(saver,)).fit()
    files = [*saver.files, *(tmp_path / "checkpoints").glob("*.ckpt")]
    states = [torch.load(path, weights_only=True, map_location="cpu") for path in files]
    assert {state["epoch"] for state in states} == set(range(6))
