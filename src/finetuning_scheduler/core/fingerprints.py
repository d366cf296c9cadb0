"""What a checkpoint holds, told by its content: is it what was written?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile, ZipFile

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


def damaged_parts(path: Path) -> list[str]:
    """Name the parts of a file whose checksums, which ``torch.save`` writes and ``torch.load`` ignores, do not match.

    A directory, a file of another format and one that has been saved without checksums have none.
    """
    if path.is_dir():
        return []
    damaged = []
    try:
        with ZipFile(path) as archive:
            for part in archive.infolist():
                if part.CRC == 0:
                    continue
                try:
                    with archive.open(part) as opened:
                        while opened.read(_PIECE):
                            pass
                except BadZipFile:
                    damaged.append(part.filename)
    except (BadZipFile, OSError, NotImplementedError):
        return damaged
    return damaged


def _read(file: Path, content: _Hash) -> None:
    piece = memoryview(bytearray(_PIECE))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(piece):
            content.update(piece[:count])
