"""Where records lie: in memory as far as a budget goes, then in files."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import weakref
from contextlib import suppress
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from .. import memory
from .records import ALIGNMENT

_FIRST_SEGMENT = 32 << 20  # bytes; each segment is twice as large as the one before
_LARGEST_SHARE = 8  # no segment is larger than this part of the budget
_PREALLOCATED = 64 << 20  # bytes of a file
_LEFT_FREE = 0.05  # of a disk: a store never takes the place that checkpoints need


class Segment:
    """A piece of memory that is filled from its beginning. Pages nobody has written cost nothing on a CPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.used = 0

    def take(self, count: int, size: int, *, apart: bool) -> tuple[int, int]:
        """Reserve up to ``count`` records.

        Args:
            count: How many.
            size: Bytes of each.
            apart: Whether records of this size are read one by one; else they begin at multiples of their size, so
                that :meth:`records` reaches all of them.

        Returns:
            Where the first one begins, and how many there are.
        """
        begin = self.used if apart else -(-self.used // size) * size
        count = max(0, min(count, (len(self.memory) - begin) // size))
        if count:
            self.used = begin + count * size
        return begin, count

    def records(self, size: int) -> Tensor:
        """View the memory as records [all, bytes]."""
        count = len(self.memory) // size
        return self.memory[: count * size].view(count, size)

    def record(self, begin: int, size: int) -> Tensor:
        """View one record [1, bytes]."""
        return self.memory[begin : begin + size].view(1, size)


class Memory:
    """The segments of all splits."""

    def __init__(self, budget: int | None) -> None:
        self._budget = budget
        self._reserved = 0
        self._segments: dict[object, list[Segment]] = {}

    @property
    def bytes(self) -> int:
        """What records take up."""
        return sum(segment.used for segments in self._segments.values() for segment in segments)

    def take(
        self, split: object, count: int, size: int, device: torch.device, *, apart: bool
    ) -> tuple[Segment, int, int] | None:
        """Reserve up to ``count`` records of a split; ``None`` when the budget is spent."""
        segments = self._segments.setdefault(split, [])
        if segments and segments[-1].memory.device == device:
            begin, taken = segments[-1].take(count, size, apart=apart)
            if taken:
                return segments[-1], begin, taken
        segment = self._segment(len(segments), size, device)
        if segment is None:
            return None
        segments.append(segment)
        return segment, *segment.take(count, size, apart=apart)

    def _segment(self, number: int, size: int, device: torch.device) -> Segment | None:
        if self._budget is None:
            self._budget = free_memory(device) // 4
        wanted = min(_FIRST_SEGMENT << number, self._budget // _LARGEST_SHARE)
        wanted = min(max(wanted, 8 * size), self._budget - self._reserved) // ALIGNMENT * ALIGNMENT
        if wanted < size:
            return None
        try:
            segment = Segment(wanted, device)
        except RuntimeError:  # less is free than was thought
            self._budget = self._reserved
            return None
        self._reserved += wanted
        return segment

    def drop(self, split: object) -> None:
        """Give back the memory of a split."""
        self._reserved -= sum(len(segment.memory) for segment in self._segments.pop(split, []))


class RecordFile:
    """A file of records, appended by one process and read by any.

    Records are read and written by calls rather than through a mapping: what a disk cannot read or has no place for is
    then an OSError, where access to a mapping kills the process.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        self._file = opened(self, path, "xb+" if new else "rb")
        self.path = path
        self.used = 0
        self._allocated = 0

    def append(self, records: Tensor) -> int:
        """Write records [rows, bytes], contiguous and on the CPU; return where the first begins."""
        size = records.numel()
        self._allocate(self.used + size)
        begin = self.used
        self._file.seek(begin)
        left = buffer_of(records)
        while left:
            left = left[self._file.write(left) :]
        self.used = begin + size
        return begin

    def read(self, begin: int, record: Tensor) -> None:
        """Fill one record [bytes], contiguous and on the CPU."""
        self._file.seek(begin)
        left = buffer_of(record)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError(errno.EIO, "the file ends within a record", str(self.path))
            left = left[count:]

    def _allocate(self, size: int) -> None:
        if size <= self._allocated:
            return
        more = max(_PREALLOCATED, size - self._allocated)
        usage = shutil.disk_usage(self.path.parent)
        if usage.free - more < _LEFT_FREE * usage.total:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file.fileno(), self._allocated, more)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
                    raise
        self._allocated += more

    def close(self, *, remove: bool) -> None:
        """Close the file and, if it is this process's, remove it."""
        self._file.close()
        if remove:
            with suppress(OSError):
                self.path.unlink()


def opened(owner: object, path: Path, mode: str) -> FileIO:
    """Open a file without a buffer. It is closed with its owner, should nobody close it before."""
    file = FileIO(path, mode)
    weakref.finalize(owner, file.close)
    return file


def buffer_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which has to outlive it."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


def free_memory(device: torch.device) -> int:
    """Bytes that are free where tensors of a device lie."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.free_memory()
