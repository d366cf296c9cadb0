"""What a checkpoint holds, told by its content: a file, or a directory of shards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

_PIECE = 1 << 20


class _Hash(Protocol):
    def update(self, piece: memoryview) -> None: ...


def fingerprint(path: Path) -> str:
    """Read a file, or all files of a directory, and return a hash of it.

    Raises:
        OSError: It is gone or cannot be read.
    """
    content = hashlib.blake2b(digest_size=32)
    if not path.is_dir():
        _read(path, content)
        return content.hexdigest()
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        content.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        _read(file, content)
    return content.hexdigest()


def _read(file: Path, content: _Hash) -> None:
    piece = memoryview(bytearray(_PIECE))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(piece):
            content.update(piece[:count])
