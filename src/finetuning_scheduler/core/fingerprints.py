"""What a checkpoint holds, told by its content: is it what was written?"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from zipfile import BadZipFile, ZipFile

_PIECE = 1 << 23  # bytes that a thread hashes at a time
_THREADS = 4


def fingerprint(path: Path) -> str:
    """Read a file, or all files of a directory, and return a hash of it.

    Raises:
        OSError: It is gone or cannot be read.
    """
    files = [path] if not path.is_dir() else sorted(each for each in path.rglob("*") if each.is_file())
    content = hashlib.blake2b(digest_size=32)
    with ThreadPoolExecutor(_THREADS) as pool:
        for file in files:
            size = file.stat().st_size
            content.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
            for digest in pool.map(partial(_digest, file), range(0, size, _PIECE)):
                content.update(digest)
    return content.hexdigest()


def _digest(file: Path, begin: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(begin)
        return hashlib.blake2b(opened.read(_PIECE)).digest()


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
