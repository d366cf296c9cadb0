"""How the processes of a node share rows: each appends to files of its own, and reads those of the others.

A line of an index says where rows are, and is written when they are whole. A process that is killed leaves at most the
beginning of a line, which nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .fingerprints import KEY_BYTES, Key
from .records import Column, Layout
from .tiers import RecordFile, opened

_INDEX, _ROWS = ".index", ".rows"


@dataclass(frozen=True)
class Entry:
    """Records that one process has appended: one a key, from ``begin`` on."""

    keys: Sequence[Key]
    begin: int
    layout: Layout
    width: int | None
    common: tuple[Key | None, ...]
    batch_width: int | None  # the positions of the batch, padding included

    def line(self) -> bytes:
        """Write it as a line."""
        content = {
            "keys": b"".join(self.keys).hex(),
            "begin": self.begin,
            "columns": [None if column is None else _column_as_plain(column) for column in self.layout.columns],
            "width": self.width,
            "common": [None if key is None else key.hex() for key in self.common],
            "batch_width": self.batch_width,
        }
        return json.dumps(content).encode() + b"\n"

    @classmethod
    def of(cls, line: bytes) -> Entry:
        """Read a line."""
        content = json.loads(line)
        keys = bytes.fromhex(content["keys"])
        return cls(
            keys=[keys[place : place + KEY_BYTES] for place in range(0, len(keys), KEY_BYTES)],
            begin=content["begin"],
            layout=Layout(tuple(None if each is None else _column_of_plain(each) for each in content["columns"])),
            width=content["width"],
            common=tuple(None if key is None else bytes.fromhex(key) for key in content["common"]),
            batch_width=content["batch_width"],
        )


class Exchange:
    """The files of one split.

    Args:
        directory: A directory that the processes have in common.
        split: The name of the split.
        generation: How often the split has been dropped: rows of before are not read.
    """

    def __init__(self, directory: Path, split: str, generation: int) -> None:
        name = hashlib.blake2b(split.encode(), digest_size=16).hexdigest()
        self._directory = directory
        self._stem = f"{name}-{generation}-"
        self._own = f"{self._stem}{uuid.uuid4().hex}"
        self._index = opened(self, directory / (self._own + _INDEX), "xb")
        self._peers: dict[str, _Peer] = {}
        self._gone: set[str] = set()

    def new_file(self) -> RecordFile:
        """Make the file of this process's rows."""
        return RecordFile(self._directory / (self._own + _ROWS), new=True)

    def publish(self, entry: Entry) -> None:
        """Tell the others of rows that are in the file."""
        left = entry.line()
        while left:
            left = left[self._index.write(left) :]

    def news(self) -> Iterator[tuple[RecordFile, Entry]]:
        """Yield what the others have published since the last time."""
        for name in sorted({path.name for path in self._directory.iterdir()} - self._gone):
            if not (name.startswith(self._stem) and name.endswith(_INDEX)) or name == self._own + _INDEX:
                continue
            try:
                if name not in self._peers:
                    self._peers[name] = _Peer(self._directory / name)
                yield from self._peers[name].news()
            except FileNotFoundError:  # that process has dropped the split
                self._gone.add(name)

    def close(self) -> None:
        """Remove the index, and let go of the others' files."""
        self._index.close()
        with suppress(OSError):
            (self._directory / (self._own + _INDEX)).unlink()
        for peer in self._peers.values():
            peer.close()


class _Peer:
    """The files of another process."""

    def __init__(self, index: Path) -> None:
        self._index = opened(self, index, "rb")
        self._rows = index.with_suffix(_ROWS)
        self._file: RecordFile | None = None
        self._unread = b""

    def news(self) -> Iterator[tuple[RecordFile, Entry]]:
        *lines, self._unread = (self._unread + self._index.read()).split(b"\n")
        for line in lines:
            if self._file is None:
                self._file = RecordFile(self._rows, new=False)
            yield self._file, Entry.of(line)

    def close(self) -> None:
        self._index.close()
        if self._file is not None:
            self._file.close(remove=False)


def _column_as_plain(column: Column) -> list[Any]:
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (column.dtype, column.stored)]
    return [*dtypes, column.device.type, column.row_dim, column.order, column.sizes, column.position]


def _column_of_plain(plain: list[Any]) -> Column:
    dtype, stored, kind, row_dim, order, sizes, position = plain
    # This process's device of the kind: records come from a file in any case.
    device = torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device(kind)
    return Column(getattr(torch, dtype), getattr(torch, stored), device, row_dim, tuple(order), tuple(sizes), position)
