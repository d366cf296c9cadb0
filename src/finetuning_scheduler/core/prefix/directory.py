"""The directory of a store: made when it is needed, removed at the end, or by the next store after a kill.

Who uses it holds a lock on a file in it. The kernel lets go of the lock when the process ends, however it ends; a
directory whose lock nobody holds was left behind.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
import uuid
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .tiers import RecordFile

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None

_PREFIX = "fts-prefix-"
_LOCK = "lock"


class Directory:
    """A directory of one store. It ends with the object, with the process, or with :meth:`remove`.

    Args:
        parent: Where it is made; the system's temporary directory, if ``None``.
        shared: What the processes call it that have it in common; the last one removes it.
    """

    def __init__(self, parent: Path | None, shared: str | None = None) -> None:
        self._parent = Path(tempfile.gettempdir()) if parent is None else parent
        self._name = None if shared is None else _name_on_this_node(shared)
        self._path: Path | None = None
        self._remove: weakref.finalize[..., Directory] | None = None

    def path(self) -> Path:
        """Make it, if it has not been made.

        Raises:
            OSError: It cannot be made.
        """
        if self._path is None:
            self._path, lock = _made(self._parent, self._name)
            self._remove = weakref.finalize(self, _let_go, self._path, lock, os.getpid())
        return self._path

    def new_file(self) -> RecordFile:
        """Make a file in it.

        Raises:
            OSError: The directory or the file cannot be made.
        """
        return RecordFile(self.path() / f"{uuid.uuid4().hex}.rows", new=True)

    def remove_leftovers(self) -> None:
        """Remove what killed processes have left beside it."""
        for path in self._parent.glob(f"{_PREFIX}*"):
            with suppress(OSError):  # in use, somebody else's, or gone by now
                _remove_if_unused(path)

    def remove(self) -> None:
        """Remove it; the next file makes a new one."""
        if self._remove is not None:
            self._remove()
        self._path = self._remove = None


def _name_on_this_node(name: str) -> str:
    """Make names of different nodes different: on a disk that nodes share, one may see an index before the rows."""
    return hashlib.blake2b(f"{name}\0{platform.node()}".encode(), digest_size=16).hexdigest()


def _made(parent: Path, name: str | None) -> tuple[Path, IO[bytes]]:
    """Make a directory, or join those who have; return it with the file that holds a lock on it."""
    while True:
        path = parent / f"{_PREFIX}{name or uuid.uuid4().hex}"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            lock = (path / _LOCK).open("ab")
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_SH)
            if _same_file(lock, path / _LOCK):
                return path, lock
            lock.close()  # somebody has taken it for a leftover, and removed it


def _let_go(path: Path, lock: IO[bytes], process: int) -> None:
    """Remove a directory if nobody else uses it, unless this is a process forked from the one that has made it."""
    if os.getpid() == process:
        if fcntl is not None:
            with suppress(OSError):  # let go also of what forked processes have inherited
                fcntl.flock(lock, fcntl.LOCK_UN)
        lock.close()
        with suppress(OSError):
            _remove_if_unused(path)


def _same_file(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _remove_if_unused(path: Path) -> None:
    if fcntl is None:
        (path / _LOCK).unlink()
        shutil.rmtree(path)
        return
    with (path / _LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
