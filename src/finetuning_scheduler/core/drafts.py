"""Files that are complete or absent: written beside their place under a name of their own, synced, then put there.

The writer holds a lock on its draft. One that nobody holds was left by a process that has been killed; the next run
that writes there removes it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None

_SUFFIX = ".fts-draft"


@contextmanager
def draft_of(target: Path) -> Iterator[IO[bytes]]:
    """Open a draft beside a file; what the block has written is on disk when :func:`publish` is called.

    The draft is gone when the block ends, unless it has been published.

    Args:
        target: The file, whose directory exists.
    """
    file = _locked(target)
    try:
        yield file
    finally:
        with suppress(OSError):  # it has been put in its place, or the directory is gone
            Path(file.name).unlink()
        with suppress(OSError):  # a full disk may refuse what is still buffered
            file.close()


def publish(file: IO[bytes], target: Path) -> None:
    """Put a draft in its place, whatever stands there, such that a crash leaves the old file or the new one."""
    _sync(file)
    Path(file.name).replace(target)
    _sync_directory(target.parent)


def publish_new(file: IO[bytes], target: Path) -> None:
    """Put a draft in its place if nothing stands there.

    Raises:
        FileExistsError: Something does.
    """
    _sync(file)
    try:
        os.link(file.name, target)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without links; two writers at once may then both succeed
        if target.exists():
            raise FileExistsError(target) from error
        Path(file.name).replace(target)
    _sync_directory(target.parent)


def remove_leftovers(directory: Path) -> None:
    """Remove the drafts that killed processes have left in a directory."""
    for path in directory.glob(f".*{_SUFFIX}"):
        with suppress(OSError):  # its writer holds it, it is somebody else's, or gone by now
            if fcntl is None:
                path.unlink()
                continue
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _locked(target: Path) -> IO[bytes]:
    while True:
        path = target.with_name(f".{uuid.uuid4().hex}{_SUFFIX}")
        file = path.open("xb")
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # waits for a run that takes it for a leftover and removes it
        if path.exists():
            return file
        file.close()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
