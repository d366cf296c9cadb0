"""The best checkpoint is known by its content: what has changed on disk is not restored, nor is what is not finite."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from finetuning_scheduler import FTSEarlyStopping
from finetuning_scheduler.core.fingerprints import fingerprint
from tests.reference.networks import HEAD, THIRD
from tests.reference.recipe import PhaseSpec, Recipe
from tests.reference.toys import Session

from .hostile import EPOCHS, ONE_TRANSITION, AtFirstBatch, Meddle, alike

pytestmark = pytest.mark.quick
LATER = replace(EPOCHS, phases=(PhaseSpec(HEAD, max_epoch=3), PhaseSpec(THIRD, lr=0.05)), epochs=4)
BEST, NEXT_BEST = "epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"


def flipped_at(share: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return flip


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_another_there(path: Path) -> None:
    shutil.copy(path.with_name(NEXT_BEST), path)


CHANGES: dict[str, Callable[[Path], None]] = {
    **{f"a bit at {share:.0%}": flipped_at(share) for share in (0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1)},
    "truncated": truncate,
    "longer": lengthen,
    "empty": empty,
    "another file": put_another_there,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_best_checkpoint_gives_way_to_the_next_best(
    change: Callable[[Path], None], messages: Callable[[], list[str]], tmp_path: Path
) -> None:
    seen = AtFirstBatch()
    meddling = (Meddle(change, epoch=2), seen)
    session = Session(LATER, tmp_path, checkpoint={"save_top_k": 2}, extra_callbacks=meddling).fit()
    assert alike(seen.weights[3], session.history.epochs[1].weights)
    assert seen.best[3] == NEXT_BEST
    (warning,) = [message for message in messages() if "no longer what was written" in message]
    assert BEST in warning
    assert NEXT_BEST in warning


def test_untouched_files_are_restored_without_a_word(messages: Callable[[], list[str]], tmp_path: Path) -> None:
    seen = AtFirstBatch()
    session = Session(ONE_TRANSITION, tmp_path, checkpoint={"save_top_k": 2}, extra_callbacks=(seen,)).fit()
    assert alike(seen.weights[2], session.history.epochs[0].weights)
    assert [message for message in messages() if "written" in message or "verified" in message] == []


def test_if_all_have_changed_the_error_names_them(tmp_path: Path) -> None:
    def change(path: Path) -> None:
        truncate(path)
        lengthen(path.with_name(NEXT_BEST))

    session = Session(LATER, tmp_path, checkpoint={"save_top_k": 2}, extra_callbacks=(Meddle(change, epoch=2),))
    with pytest.raises(MisconfigurationException, match="no longer what was written") as error:
        session.fit()
    assert BEST in str(error.value)
    assert NEXT_BEST in str(error.value)


class AtStart(Callback):
    """Calls a function with the best checkpoint when all states have been loaded."""

    def __init__(self, action: Callable[[Path], None]) -> None:
        self.action = action

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self.action(Path(trainer.checkpoint_callback.best_model_path))


@pytest.mark.parametrize("resumed_from", ["last.ckpt", BEST])
def test_what_is_resumed_from_is_known_by_its_content_too(resumed_from: str, tmp_path: Path) -> None:
    recipe = replace(ONE_TRANSITION, epochs=2)
    Session(recipe, tmp_path, checkpoint={"save_last": True}).fit()
    path = tmp_path / "checkpoints" / resumed_from
    session = Session(ONE_TRANSITION, tmp_path, checkpoint={"save_last": True}, extra_callbacks=(AtStart(truncate),))
    with pytest.raises(MisconfigurationException, match=rf"{BEST} is no longer what was written"):
        session.fit(ckpt_path=path)


def test_a_file_that_is_written_over_is_known_by_its_new_content(tmp_path: Path) -> None:
    """Also by a run that is resumed from it, or from a checkpoint that was written after it."""
    saving = {"filename": "best", "enable_version_counter": False, "save_last": True}
    recipe = replace(LATER, scores=(3.0, 2.0, 4.0, 5.0))
    for resumed_from in (None, "best.ckpt", "last.ckpt"):
        root = tmp_path / str(resumed_from)
        seen = AtFirstBatch()
        session = Session(recipe, root, checkpoint=saving, extra_callbacks=(seen,))
        if resumed_from is not None:
            Session(replace(recipe, epochs=2), root, checkpoint=saving).fit()
        session.fit(ckpt_path=None if resumed_from is None else root / "checkpoints" / resumed_from)
        assert seen.best[3] == "best.ckpt"


@pytest.mark.parametrize("restore_best", [True, False])
def test_what_is_never_restored_is_not_read_again(restore_best: bool, tmp_path: Path) -> None:
    recipe = replace(EPOCHS, restore_best=restore_best)
    Session(recipe, tmp_path, checkpoint={"save_last": True, "save_top_k": -1}).fit()
    states = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (files,) = (state["files"] for state in states.values() if "files" in state)
    assert len(files) == 5
    assert all((file["fingerprint"] is not None) == restore_best for file in files.values())


def test_what_is_written_later_is_not_verified_and_that_is_said_once(
    messages: Callable[[], list[str]], tmp_path: Path
) -> None:
    Session(EPOCHS, tmp_path, checkpoint={"save_top_k": -1}, plugins=[AsyncCheckpointIO()]).fit()
    assert len([message for message in messages() if "not verified" in message]) == 1


def test_a_directory_is_known_by_all_its_files(tmp_path: Path) -> None:
    directory = tmp_path / "sharded"
    (directory / "inner").mkdir(parents=True)
    (directory / "a").write_bytes(b"1" * 3_000_000)
    (directory / "inner" / "b").write_bytes(b"2")
    prints = [fingerprint(directory)]
    (directory / "inner" / "b").write_bytes(b"3")
    prints.append(fingerprint(directory))
    (directory / "inner" / "b").rename(directory / "b")
    prints.append(fingerprint(directory))
    (directory / "c").write_bytes(b"")
    prints.append(fingerprint(directory))
    assert len(set(prints)) == len(prints)
    (directory / "c").unlink()
    assert fingerprint(directory) == prints[2]


# --- scores that are not finite ---------------------------------------------------------------------------------------


def fitted(recipe: Recipe, root: Path, **saving: Any) -> tuple[Session, AtFirstBatch]:
    seen = AtFirstBatch()
    session = Session(recipe, root, checkpoint=saving, extra_callbacks=(seen,))
    callbacks: list[Callback] = session.trainer.callbacks  # type: ignore[attr-defined]
    callbacks[1] = FTSEarlyStopping("val_loss", mode=recipe.mode, patience=100, check_finite=False)
    return session.fit(), seen


@pytest.mark.parametrize("save_top_k", [1, 2, -1])
@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [
        ("min", (nan, 3.0, 1.0), 1),
        ("min", (3.0, nan, 1.0), 0),
        ("max", (nan, 3.0, 1.0), 1),
        ("max", (3.0, inf, 1.0), None),
        ("min", (-inf, 3.0, 1.0), None),
    ],
)
def test_a_score_that_is_not_finite_is_never_the_best(
    mode: str, scores: tuple[float, ...], best: int | None, save_top_k: int, tmp_path: Path
) -> None:
    recipe = replace(ONE_TRANSITION, scores=scores, mode=mode)
    session, seen = fitted(recipe, tmp_path, save_top_k=save_top_k)
    if best is None:  # nothing is better: whether another is kept depends on how many are
        best = 1 if save_top_k == 1 else scores.index(3.0)
    assert alike(seen.weights[2], session.history.epochs[best].weights)


def test_with_no_finite_score_phases_go_on_from_present_weights_which_is_said_once(
    messages: Callable[[], list[str]], tmp_path: Path
) -> None:
    session, seen = fitted(replace(EPOCHS, scores=(nan,) * 5), tmp_path)
    assert session.scheduler.curr_depth == 2
    assert alike(seen.weights[2], session.history.epochs[1].weights)
    assert len([message for message in messages() if "a finite" in message]) == 1
