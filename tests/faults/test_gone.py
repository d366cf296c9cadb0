"""A run can be resumed from any file that is there, whatever has become of those that it tells of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from finetuning_scheduler import FTSCheckpoint
from tests.reference.history import snapshot
from tests.reference.networks import HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, Recipe, momentum_sgd
from tests.reference.toys import Session

pytestmark = pytest.mark.quick

RECIPE = Recipe(
    phases=(PhaseSpec(HEAD, max_epoch=3), PhaseSpec(THIRD, lr=0.05, max_epoch=5), PhaseSpec(SECOND, lr=0.02)),
    epochs=6,
    optimizer=momentum_sgd,
    scores=(2.0, 1.0, 3.0, 4.0, 5.0, 6.0),
)
BEST = "epoch=1-step=8.ckpt"


class Seen(Callback):
    """The best checkpoint when training starts and ends, and the weights at the first batch of each epoch."""

    def __init__(self) -> None:
        self.best: list[str] = []
        self.kept: list[str] = []
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        saving = trainer.checkpoint_callback
        self.best.append(Path(saving.best_model_path).name)
        self.kept = sorted(Path(path).name for path in saving.best_k_models)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.best.append(Path(trainer.checkpoint_callback.best_model_path).name)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.weights[trainer.current_epoch] = snapshot(pl_module)


def begun(root: Path, epochs: int = 3, **saving: Any) -> Path:
    """Train some epochs with a `last.ckpt`; return the directory of checkpoints."""
    Session(replace(RECIPE, epochs=epochs), root, checkpoint={"save_last": True, **saving}).fit()
    return root / "checkpoints"


def resumed(root: Path, name: str, **saving: Any) -> tuple[Session, Seen]:
    seen = Seen()
    session = Session(RECIPE, root, checkpoint={"save_last": True, **saving}, extra_callbacks=(seen,))
    return session.fit(ckpt_path=root / "checkpoints" / name), seen


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return weights


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.parametrize("loss", [remove, flip])
def test_a_file_whose_best_is_gone_is_its_own_best(
    loss: Callable[[Path], None], messages: Callable[[], list[str]], tmp_path: Path
) -> None:
    files = begun(tmp_path)
    last = weights_in(files / "last.ckpt")
    loss(files / BEST)
    session, seen = resumed(tmp_path, "last.ckpt")
    assert session.scheduler.curr_depth == 2
    assert seen.best == ["best-of-last.ckpt", "best-of-last.ckpt"]
    # at both transitions, also at the one before which last.ckpt has been written anew
    assert alike(seen.weights[3], last)
    assert alike(seen.weights[5], last)
    (warning,) = [message for message in messages() if "is the best now" in message]
    assert BEST in warning
    assert "last.ckpt" in warning


def test_it_can_be_resumed_again_and_again(tmp_path: Path) -> None:
    files = begun(tmp_path)
    last = weights_in(files / "last.ckpt")
    remove(files / BEST)
    for epochs in (4, 5):
        session = Session(replace(RECIPE, epochs=epochs), tmp_path, checkpoint={"save_last": True})
        session.fit(ckpt_path=files / "last.ckpt")
    _, seen = resumed(tmp_path, "last.ckpt")
    assert seen.best == ["best-of-last.ckpt", "best-of-last.ckpt"]
    assert alike(seen.weights[5], last)


def test_a_better_checkpoint_takes_its_place(tmp_path: Path) -> None:
    files = begun(tmp_path)
    remove(files / BEST)
    seen = Seen()
    recipe = replace(RECIPE, scores=(2.0, 1.0, 3.0, 0.5, 5.0, 6.0))
    Session(recipe, tmp_path, checkpoint={"save_last": True}, extra_callbacks=(seen,)).fit(
        ckpt_path=files / "last.ckpt"
    )
    assert seen.best == ["best-of-last.ckpt", "epoch=3-step=16.ckpt"]
    assert not (files / "best-of-last.ckpt").exists()


def test_kept_checkpoints_that_are_gone_are_forgotten(messages: Callable[[], list[str]], tmp_path: Path) -> None:
    files = begun(tmp_path, save_top_k=3)
    remove(files / "epoch=0-step=4.ckpt")
    _, seen = resumed(tmp_path, "last.ckpt", save_top_k=3)
    assert seen.kept == [BEST, "epoch=2-step=12.ckpt"]
    assert seen.best == [BEST, BEST]
    (line,) = [message for message in messages() if "are gone" in message]
    assert "epoch=0-step=4.ckpt" in line
    kept = {path.name for path in files.iterdir()}
    assert kept == {BEST, "epoch=2-step=12.ckpt", "epoch=3-step=16.ckpt", "last.ckpt"}


@pytest.mark.parametrize("loss", [remove, flip])
def test_the_next_best_that_is_left_is_the_best(loss: Callable[[Path], None], tmp_path: Path) -> None:
    files = begun(tmp_path, save_top_k=3)
    loss(files / BEST)
    expected = weights_in(files / "epoch=0-step=4.ckpt")
    _, seen = resumed(tmp_path, "last.ckpt", save_top_k=3)
    assert seen.best[0] == "epoch=0-step=4.ckpt"
    assert alike(seen.weights[3], expected)


def test_a_finished_run_needs_no_other_file_to_go_on(tmp_path: Path) -> None:
    """Only the last checkpoint has been kept, under another name and in another place."""
    files = begun(tmp_path)
    kept = tmp_path / "kept.ckpt"
    shutil.copy(files / "last.ckpt", kept)
    shutil.rmtree(files)
    seen = Seen()
    session = Session(RECIPE, tmp_path, extra_callbacks=(seen,)).fit(ckpt_path=kept)
    assert seen.best[0] == "best-of-kept.ckpt"
    assert alike(seen.weights[3], weights_in(kept))
    assert session.scheduler.curr_depth == 2


class DiesAfterSaving(FTSCheckpoint):
    """Ends the run at the moment when the best has been saved, and the last one is still the one before."""

    def after_save(self, trainer: Any, filepath: str) -> None:
        super().after_save(trainer, filepath)
        if filepath.endswith(BEST):
            raise ConnectionAbortedError("killed")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the class has another name
@pytest.mark.parametrize("save_last", [True, "link"])
def test_what_the_last_checkpoint_tells_of_stays_until_that_is_written_anew(save_last: Any, tmp_path: Path) -> None:
    files = tmp_path / "checkpoints"
    session = Session(RECIPE, tmp_path)
    callbacks: list[Callback] = session.trainer.callbacks  # type: ignore[attr-defined]
    callbacks[-1] = DiesAfterSaving(files, monitor="val_loss", save_last=save_last)
    with pytest.raises(ConnectionAbortedError):
        session.fit()
    assert {path.name for path in files.iterdir()} == {"epoch=0-step=4.ckpt", BEST, "last.ckpt"}
    uninterrupted = Session(RECIPE, tmp_path / "whole").fit().history
    went_on, seen = resumed(tmp_path, "last.ckpt", save_last=save_last)
    assert seen.best[0] == "epoch=0-step=4.ckpt"
    assert alike(went_on.history.epochs[-1].weights, uninterrupted.epochs[-1].weights)


def test_an_outdated_checkpoint_is_removed_in_the_end(tmp_path: Path) -> None:
    files = begun(tmp_path)
    assert {path.name for path in files.iterdir()} == {BEST, "last.ckpt"}
