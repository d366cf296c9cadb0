"""The best checkpoint is restored before a transition."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.reference.history import snapshot
from tests.reference.networks import HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, Recipe, momentum_sgd
from tests.reference.toys import Session, ToyData

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.quick

EPOCHS = Recipe(
    phases=(PhaseSpec(HEAD, max_epoch=2), PhaseSpec(THIRD, lr=0.05, max_epoch=4), PhaseSpec(SECOND, lr=0.02)),
    epochs=5,
    optimizer=momentum_sgd,
    scores=(3.0, 4.0, 5.0, 6.0, 7.0),
)
NOTHING_SAVED = replace(EPOCHS, phases=(PhaseSpec(HEAD, max_step=2), PhaseSpec(THIRD, lr=0.05)), epochs=1)


class Meddle(Callback):
    """Calls a function at the start of an epoch, before the callback under test."""

    def __init__(self, epoch: int, action: Callable[[Any], None]) -> None:
        self.epoch = epoch
        self.action = action

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.action(trainer)


class Observe(Callback):
    """Weights and optimizer state at the first batch of each epoch, when transitions are over."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.with_state: dict[int, set[str]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            epoch, state = trainer.current_epoch, trainer.optimizers[0].state
            self.weights[epoch] = snapshot(pl_module)
            self.with_state[epoch] = {name for name, p in pl_module.named_parameters() if state.get(p)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_best_of_an_earlier_phase_is_restored(tmp_path: Path) -> None:
    observe = Observe()
    session = Session(EPOCHS, tmp_path, extra_callbacks=(observe,)).fit()
    best = session.history.epochs[0].weights
    assert [epoch for epoch, weights in observe.weights.items() if same(weights, best)] == [1, 2, 4]
    # entering phase 2 from the best of phase 0: phase 1's parameters start afresh, but are still trained
    assert observe.with_state[3] == {*HEAD, *THIRD}
    assert observe.with_state[4] == set(HEAD)
    assert session.history.epochs[4].groups == (HEAD, THIRD, SECOND)


def test_without_restoring_training_goes_on(tmp_path: Path) -> None:
    observe = Observe()
    session = Session(replace(EPOCHS, restore_best=False), tmp_path, extra_callbacks=(observe,)).fit()
    for epoch in range(1, 5):
        assert same(observe.weights[epoch], session.history.epochs[epoch - 1].weights)


def test_nothing_saved_yet_goes_on_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="finetuning_scheduler"):
        session = Session(NOTHING_SAVED, tmp_path).fit()
    assert [step.phase for step in session.history.steps] == [0, 0, 1, 1]
    assert any("no" in m.lower() and "checkpoint" in m.lower() for m in caplog.messages)


def best_path(trainer: Any) -> Any:
    from pathlib import Path

    return Path(trainer.checkpoint_callback.best_model_path)


def delete(trainer: Any) -> None:
    best_path(trainer).unlink()


def corrupt(trainer: Any) -> None:
    best_path(trainer).write_bytes(b"not a checkpoint")


def truncate(trainer: Any) -> None:
    content = best_path(trainer).read_bytes()
    best_path(trainer).write_bytes(content[: len(content) // 2])


def test_a_lost_best_checkpoint_is_an_error_that_names_the_next_best(tmp_path: Path) -> None:
    session = Session(EPOCHS, tmp_path, checkpoint={"save_top_k": 2}, extra_callbacks=(Meddle(1, delete),))
    with pytest.raises(MisconfigurationException) as error:
        session.fit()
    message = str(error.value)
    assert "epoch=0-step=4.ckpt" in message
    assert "epoch=1-step=8.ckpt" in message
    assert "ckpt_path" in message


@pytest.mark.parametrize("action", [delete, corrupt, truncate])
def test_a_lost_only_checkpoint_is_an_error(action: Any, tmp_path: Path) -> None:
    session = Session(EPOCHS, tmp_path, checkpoint={"save_top_k": 1}, extra_callbacks=(Meddle(1, action),))
    with pytest.raises(MisconfigurationException, match=r"epoch=0-step=4\.ckpt"):
        session.fit()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resuming_from_the_next_best_as_the_error_says(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException):
        Session(EPOCHS, tmp_path, checkpoint={"save_top_k": 2}, extra_callbacks=(Meddle(1, delete),)).fit()
    next_best = tmp_path / "checkpoints" / "epoch=1-step=8.ckpt"
    resumed = Session(EPOCHS, tmp_path / "fresh").fit(ckpt_path=next_best)
    assert [(epoch.number, epoch.phase) for epoch in resumed.history.epochs] == [(2, 1), (3, 1), (4, 2)]


class Counting(ToyData):
    """A datamodule with state: how many epochs it has served."""

    def __init__(self) -> None:
        super().__init__()
        self.served = 0
        self.seen: list[int] = []

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.served = state_dict["served"]


class Serve(Callback):
    """Counts epochs in the datamodule, and notes the count when an epoch's first batch arrives."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            trainer.datamodule.seen.append(trainer.datamodule.served)
            trainer.datamodule.served += 1


@pytest.mark.parametrize(("restore_best", "seen"), [(True, [0, 1, 1, 2, 1]), (False, [0, 1, 2, 3, 4])])
def test_the_state_of_a_datamodule_is_restored(restore_best: bool, seen: list[int], tmp_path: Path) -> None:
    data = Counting()
    recipe = replace(EPOCHS, restore_best=restore_best)
    Session(recipe, tmp_path, extra_callbacks=(Serve(),)).fit(datamodule=data)
    assert data.seen == seen


class Depths(Callback):
    """Depth and epoch of the best checkpoint at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, str]] = []

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self.note(trainer)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.note(trainer)

    def note(self, trainer: Any) -> None:
        saving = trainer.checkpoint_callback
        if saving.best_model_path:
            epoch = best_path(trainer).name.split("-")[0]
            self.seen.append((saving.current_ckpt_depth, saving.best_ckpt_depth, epoch))


def depth_of(path: str, root: Path) -> int:
    """The phase during which a checkpoint was written, told from the number of its parameter groups."""
    state = torch.load(root / "checkpoints" / path, weights_only=True)
    return len(state["optimizer_states"][0]["param_groups"]) - 1


@pytest.mark.parametrize("save_top_k", [1, 2, 3, -1])
@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ((3.0, 4.0, 3.0, 3.0, 3.0), "epoch=0"),
        ((3.0, 3.0, 3.0, 3.0, 3.0), "epoch=0"),
        ((4.0, 3.0, 3.0, 5.0, 3.0), "epoch=1"),
        ((4.0, 3.0, 2.0, 5.0, 2.0), "epoch=2"),
    ],
)
def test_the_best_depth_stays_with_the_best_path(
    scores: tuple[float, ...], best: str, save_top_k: int, tmp_path: Path
) -> None:
    """Equal scores in several depths never advance the depth beyond the path that is recorded as best."""
    depths = Depths()
    recipe = replace(EPOCHS, scores=scores)
    session = Session(recipe, tmp_path, checkpoint={"save_top_k": save_top_k}, extra_callbacks=(depths,)).fit()
    saving = session.trainer.checkpoint_callback
    assert isinstance(saving, ModelCheckpoint)
    assert best_path(session.trainer).name.split("-")[0] == best
    assert saving.best_ckpt_depth == depth_of(best_path(session.trainer).name, tmp_path)
    phase_of_epoch = {f"epoch={epoch.number}": epoch.phase for epoch in session.history.epochs}
    assert [depth for _, depth, _ in depths.seen] == [phase_of_epoch[epoch] for *_, epoch in depths.seen]


def test_the_current_depth_is_that_of_the_latest_checkpoint(tmp_path: Path) -> None:
    session = Session(EPOCHS, tmp_path, checkpoint={"save_top_k": -1}).fit()
    saving = session.trainer.checkpoint_callback
    assert (saving.current_ckpt_depth, saving.best_ckpt_depth) == (2, 0)


def test_restore_best_ckpt_can_be_overridden(tmp_path: Path) -> None:
    from finetuning_scheduler import FinetuningScheduler

    calls: list[int] = []

    class Watching(FinetuningScheduler):
        def restore_best_ckpt(self) -> None:
            calls.append(self.curr_depth)
            super().restore_best_ckpt()

    Session(EPOCHS, tmp_path, scheduler_class=Watching).fit()
    assert len(calls) == 2
