"""A checkpoint is complete or absent, whenever the process is killed and whatever the disk does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

import finetuning_scheduler
from finetuning_scheduler.callbacks.files import CompleteCheckpointIO
from tests.reference.toys import Session, Toy

from . import kill_loop
from .hostile import EPOCHS, ONE_TRANSITION

SOURCES = Path(finetuning_scheduler.__file__).parents[1]
REPOSITORY = Path(__file__).parents[2]
DRAFTS = ".*.fts-draft"


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than the tests'."""
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    with tempfile.TemporaryDirectory(dir=shared_memory) as directory:
        yield Path(directory)


def run(*words: str, temporary: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder in a process of its own."""
    path = os.pathsep.join([str(SOURCES), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if temporary is not None:
        environment["TMPDIR"] = str(temporary)
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


def begun(root: Path) -> dict[str, bytes]:
    """Train two epochs; return the content of the checkpoints."""
    recipe = replace(kill_loop.RECIPE, epochs=2)
    Session(recipe, root, checkpoint=kill_loop.SAVING).fit()
    return {path.name: path.read_bytes() for path in (root / "checkpoints").iterdir()}


@pytest.mark.parametrize("what", ["error", "kill"])
def test_a_file_that_cannot_be_written_leaves_the_others_as_they_were(
    what: str, other_file_system: Path, tmp_path: Path
) -> None:
    before = begun(tmp_path / "run")
    limit = str(len(before["last.ckpt"]) // 2)
    script = str(Path(__file__).parent / "scripts" / "full_disk.py")
    ended = run(script, str(tmp_path / "run"), limit, what, temporary=other_file_system)
    assert ended.returncode == (-signal.SIGXFSZ if what == "kill" else 1), ended.stderr
    directory = tmp_path / "run" / "checkpoints"
    assert {path.name: path.read_bytes() for path in directory.glob("*.ckpt")} == before
    assert list(other_file_system.glob("**/*ckpt*")) == []
    assert len(list(directory.glob(DRAFTS))) == (1 if what == "kill" else 0)
    kill_loop.train(tmp_path / "run", directory / "last.ckpt")  # which removes what has been left behind
    kill_loop.train(tmp_path / "whole", None)
    assert list(directory.glob(DRAFTS)) == []
    left, whole = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("run", "whole"))
    assert all(torch.equal(left[name], value) for name, value in whole.items())


@pytest.mark.slow
def test_runs_killed_at_random_moments_are_resumed_bitwise(tmp_path: Path) -> None:
    ended = run("-m", "tests.faults.kill_loop", "--kills", "6", "--seconds", "30", "--directory", str(tmp_path))
    counts = {key: int(count) for count, key in (line.split(maxsplit=1) for line in ended.stdout.splitlines())}
    assert ended.returncode == 0, counts
    assert counts["killed"] >= 1
    assert sum(count for key, count in counts.items() if key.endswith("same")) >= 1


# --- who writes files -------------------------------------------------------------------------------------------------


class Own(TorchCheckpointIO):
    """The user's way to files, which is the same."""


class Observe(Callback):
    def __init__(self) -> None:
        self.kinds: list[type] = []

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.kinds.append(type(trainer.strategy.checkpoint_io))


class Fails(Callback):
    def on_train_epoch_end(self, *_: Any) -> None:
        raise ConnectionAbortedError


@pytest.mark.quick
@pytest.mark.parametrize(
    ("plugins", "during", "after"),
    [
        ([], CompleteCheckpointIO, TorchCheckpointIO),
        ([TorchCheckpointIO()], CompleteCheckpointIO, TorchCheckpointIO),
        ([Own()], Own, Own),
    ],
)
def test_what_the_user_has_chosen_is_used_and_what_was_there_is_put_back(
    plugins: list[Any], during: type, after: type, tmp_path: Path
) -> None:
    observe = Observe()
    session = Session(ONE_TRANSITION, tmp_path, extra_callbacks=(observe,), plugins=plugins).fit()
    assert set(observe.kinds) == {during}
    assert type(session.trainer.strategy.checkpoint_io) is after


@pytest.mark.quick
def test_it_is_put_back_after_a_fit_that_failed(tmp_path: Path) -> None:
    session = Session(ONE_TRANSITION, tmp_path, extra_callbacks=(Fails(),))
    with pytest.raises(ConnectionAbortedError):
        session.fit()
    session.trainer.test(session.module, verbose=False)
    assert type(session.trainer.strategy.checkpoint_io) is TorchCheckpointIO


class CannotBeSaved(Toy):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.current_epoch == 1:
            checkpoint["bad"] = lambda: None


@pytest.mark.quick
def test_what_cannot_be_saved_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    checkpoint = {"save_last": True, "save_top_k": 2}
    with pytest.raises(Exception, match="pickle"):
        Session(EPOCHS, tmp_path, module=CannotBeSaved, checkpoint=checkpoint).fit()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"epoch=0-step=4.ckpt", "last.ckpt"}
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0


@pytest.mark.quick
def test_an_address_is_written_and_restored_as_before(messages: Callable[[], list[str]], tmp_path: Path) -> None:
    session = Session(EPOCHS, tmp_path, checkpoint={"dirpath": f"memory://{tmp_path.name}", "save_last": True}).fit()
    assert session.scheduler.curr_depth == 2
    assert len([message for message in messages() if "not verified" in message]) == 1
