"""How checkpoints get to disk and back."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .._lightning import AsyncCheckpointIO, Strategy, TorchCheckpointIO
from ..core.drafts import draft_of, publish, remove_leftovers


def is_remote(path: object) -> bool:
    """Whether a path is an address such as ``s3://bucket/file``, of which this package reads and writes nothing."""
    return "://" in str(path)


Mark = tuple[int, ...]


def mark_of(path: str) -> Mark | None:
    """Tell by what the file system knows a local file; ``None`` if there is none."""
    if is_remote(path):
        return None
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class CompleteCheckpointIO(TorchCheckpointIO):
    """Lightning's own way to files, but that a local one is complete or absent, whatever happens in between.

    It is written beside its place, synced and renamed. Lightning's way writes to the directory of temporary files,
    from where it is copied if that is another file system: who is killed then leaves half of a file.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tidied: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file; before the first one in a directory, remove what killed runs have left there."""
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent not in self._tidied:
            self._tidied.add(target.parent)
            remove_leftovers(target.parent)
        with draft_of(target) as file:
            torch.save(checkpoint, file)
            publish(file, target)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file: one at an address, too, as tensors and plain values unless the user says otherwise."""
        if weights_only is None and is_remote(path):
            weights_only = True
        return super().load_checkpoint(path, map_location, weights_only)


@contextmanager
def complete_checkpoints(strategy: Strategy) -> Iterator[None]:
    """Let checkpoint files be complete or absent for a while, unless the user has chosen how they are written."""
    own = strategy.checkpoint_io
    if type(own) is not TorchCheckpointIO:
        yield
        return
    strategy.checkpoint_io = mine = CompleteCheckpointIO()
    try:
        yield
    finally:
        if strategy.checkpoint_io is mine:
            strategy.checkpoint_io = own


def writes_later(strategy: Strategy) -> bool:
    """Whether a checkpoint may not be there yet when it has been saved."""
    return isinstance(strategy.checkpoint_io, AsyncCheckpointIO)


def copied_beside(source: Path, target: Path) -> Path:
    """Copy a checkpoint, a file or a directory of shards, to a place where nothing half copied is ever found."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        with source.open("rb") as original, draft_of(target) as file:
            shutil.copyfileobj(original, file, 1 << 20)
            publish(file, target)
        return target
    draft = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
    try:
        shutil.copytree(source, draft, dirs_exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target
