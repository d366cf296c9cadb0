"""What a checkpoint holds, told by its content: is it what was written?"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from torch import Tensor

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


def tensor_fingerprint(tensor: Tensor) -> str:
    """Return a hash of a plain tensor's type, shape and values."""
    values = tensor.detach().cpu().contiguous()
    size = values.numel() * values.element_size()
    content = hashlib.blake2b(f"{values.dtype}\0{tuple(values.shape)}\0".encode(), digest_size=16)
    if size:
        content.update(memoryview((ctypes.c_char * size).from_address(values.data_ptr())))
    return content.hexdigest()


def tensor_fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the hash of each of several tensors."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(tensors, pool.map(tensor_fingerprint, tensors.values()), strict=True))


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
