"""The rows of one kind of batches: where each is, written once and read for any batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .exchange import Entry, Exchange
from .fingerprints import Key, plain, tensor_key
from .records import Column, Layout
from .tiers import Memory, RecordFile, Segment


class Batch(NamedTuple):
    """Tensors of a batch, and how their rows are read; see :meth:`.store.PrefixStore.add`."""

    keys: Sequence[Key]
    tensors: Sequence[Tensor]
    row_dims: Sequence[int | None]
    position_dims: Sequence[int | None]
    lengths: Sequence[int] | None


class _Place(NamedTuple):
    """Where the record of a row is, and the keys of the tensors without rows that belong to it."""

    layout: Layout
    width: int | None
    common: tuple[Key | None, ...]
    tier: Segment | RecordFile
    begin: int


class Split:
    """Where each row is, and what reads and writes it.

    Args:
        memory: Takes records as long as its budget lasts.
        new_file: Makes the file that takes the others.
        exchange: Tells other processes of the file, and of theirs.
        stored: The type in which floating-point tensors are kept; their own, if ``None``.
    """

    def __init__(
        self,
        memory: Memory,
        new_file: Callable[[], RecordFile],
        exchange: Exchange | None = None,
        stored: torch.dtype | None = None,
    ) -> None:
        self._memory = memory
        self._new_file = new_file
        self._file: RecordFile | None = None
        self._exchange = exchange
        self._stored = stored
        self._places: dict[Key, _Place] = {}
        self._common_of_width: dict[int, tuple[Key | None, ...] | None] = {}
        self._layouts: dict[Layout, Layout] = {}  # one object each, so that comparing them takes no time

    @property
    def spilled_bytes(self) -> int:
        """What this process has in a file."""
        return 0 if self._file is None else self._file.used

    def has(self, keys: Sequence[Key]) -> list[bool]:
        """Tell of each row whether it is there."""
        if self._exchange is not None and not all(key in self._places for key in keys):
            self._read_news(self._exchange)
        return [key in self._places for key in keys]

    def close(self) -> None:
        """Remove the files."""
        if self._file is not None:
            self._file.close(remove=True)
        if self._exchange is not None:
            self._exchange.close()

    def add(self, batch: Batch) -> None:
        """Keep the rows that are not there yet."""
        new: dict[Key, int] = {}
        for row, (key, there) in enumerate(zip(batch.keys, self.has(batch.keys), strict=True)):
            if not there:
                new.setdefault(key, row)
        if not new:
            return
        tensors = [plain(tensor) for tensor in batch.tensors]
        columns = [
            None if row_dim is None else Column.of(tensor, row_dim, position, self._stored)
            for tensor, row_dim, position in zip(tensors, batch.row_dims, batch.position_dims, strict=True)
        ]
        common = tuple(
            self._add_common(tensor) if column is None else None
            for column, tensor in zip(columns, tensors, strict=True)
        )
        layout = Layout(tuple(columns))
        if batch.lengths is None or layout.width is None:
            self._write(new, tensors, layout, None, common, None)
            return
        self._note_common(layout.width, common)
        for key, row in new.items():
            length = batch.lengths[row]
            self._write({key: row}, tensors, layout.of_width(length), length, common, layout.width)

    def get(self, keys: Sequence[Key], width: int | None) -> list[Tensor] | None:
        """Return the tensors of a batch, or ``None`` unless all rows are there and fit together."""
        if not keys or not all(self.has(keys)):
            return None
        places = [self._places[key] for key in keys]
        layout, common = places[0].layout, places[0].common
        if width is not None and layout.width is not None:
            layout = self._only(layout.of_width(width))
            of_width = self._common_of_width.get(width)
            if of_width is None or not all(self._fits(place, layout, width) for place in places):
                return None
            common, columns = of_width, _padded(places, layout)
        elif all(place.layout is layout and place.common == common for place in places):
            columns = _gathered(places, layout)
        else:
            return None
        return [
            self._common(key) if column is None else column.tensor(values)
            for column, values, key in zip(layout.columns, columns, common, strict=True)
        ]

    def _fits(self, place: _Place, layout: Layout, width: int) -> bool:
        return place.width is not None and place.width <= width and self._only(place.layout.of_width(width)) is layout

    def _note_common(self, width: int, common: tuple[Key | None, ...]) -> None:
        """Remember which tensors without rows a batch of some width had, if that depends on the width alone."""
        if self._common_of_width.setdefault(width, common) != common:
            self._common_of_width[width] = None

    def _add_common(self, tensor: Tensor) -> Key:
        """Keep a tensor without rows as a record of its own."""
        key = tensor_key(tensor)
        if key not in self._places:
            self._write({key: 0}, [tensor], Layout((Column.of(tensor, None, None, self._stored),)), None, (), None)
        return key

    def _common(self, key: Key | None) -> Tensor:
        place = self._places[key or b""]
        (column,), (values,) = place.layout.columns, _gathered([place], place.layout)
        if column is None:
            raise LookupError("a record has no column")
        return column.tensor(values)

    def _only(self, layout: Layout) -> Layout:
        return self._layouts.setdefault(layout, layout)

    def _write(
        self,
        new: Mapping[Key, int],
        tensors: Sequence[Tensor],
        layout: Layout,
        width: int | None,
        common: tuple[Key | None, ...],
        batch_width: int | None,
    ) -> None:
        """Write records of the chosen rows of a batch: to memory as far as it goes, then to the file."""
        layout, left = self._only(layout), list(new)
        while left:
            tier: Segment | RecordFile
            reserved = self._memory.take(self, len(left), layout.size, layout.device, apart=width is not None)
            if reserved is not None:
                tier, begin, count = reserved
                records = tier.memory[begin : begin + count * layout.size].view(count, layout.size)
                layout.write(tensors, [new[key] for key in left[:count]], records)
            else:
                count = len(left)
                records = torch.empty(count, layout.size, dtype=torch.uint8, device="cpu")
                layout.write(tensors, [new[key] for key in left], records)
                self._file = tier = self._file or self._new_file()
                begin = tier.append(records)
                if self._exchange is not None:
                    self._exchange.publish(Entry(left, begin, layout, width, common, batch_width))
            for number, key in enumerate(left[:count]):
                self._places[key] = _Place(layout, width, common, tier, begin + number * layout.size)
            left = left[count:]

    def _read_news(self, exchange: Exchange) -> None:
        for file, entry in exchange.news():
            layout = self._only(entry.layout)
            if entry.batch_width is not None:
                self._note_common(entry.batch_width, entry.common)
            for number, key in enumerate(entry.keys):
                begin = entry.begin + number * layout.size
                self._places.setdefault(key, _Place(layout, entry.width, entry.common, file, begin))


def _padded(places: Sequence[_Place], layout: Layout) -> list[Tensor]:
    """Read rows one by one, each into zeros of the batch's width; an empty tensor for what has no rows."""
    columns = [
        torch.zeros(len(places), *column.sizes, dtype=column.stored, device=layout.device)
        if column is not None
        else torch.empty(0)
        for column in layout.columns
    ]
    for row, place in enumerate(places):
        record = _record(place)
        for number, (values, column) in enumerate(zip(columns, place.layout.columns, strict=True)):
            if column is None:
                continue
            target = values[row]
            if column.position is not None:
                target = target.narrow(column.position, 0, column.sizes[column.position])
            target.copy_(place.layout.values(record, number).view(column.sizes))
    return columns


def _record(place: _Place) -> Tensor:
    """Read one record [1, bytes]."""
    size = place.layout.size
    if isinstance(place.tier, Segment):
        return place.tier.memory[place.begin : place.begin + size].view(1, size)
    record = torch.empty(1, size, dtype=torch.uint8, device="cpu")
    place.tier.read(place.begin, record[0])
    return record


def _gathered(places: Sequence[_Place], layout: Layout) -> list[Tensor]:
    """Read the records of rows with one layout, as columns [rows, numel]; an empty tensor for what has no rows."""
    first = places[0].tier
    if isinstance(first, Segment) and all(place.tier is first for place in places):
        records = first.records(layout.size)
        index = torch.tensor([place.begin // layout.size for place in places], device=layout.device)
        return [
            torch.empty(0) if column is None else layout.values(records, number).index_select(0, index)
            for number, column in enumerate(layout.columns)
        ]
    records = torch.empty(len(places), layout.size, dtype=torch.uint8, device=layout.device)
    by_tier: dict[Segment | RecordFile, list[int]] = {}
    for row, place in enumerate(places):
        by_tier.setdefault(place.tier, []).append(row)
    for tier, rows in by_tier.items():
        _read([places[row].begin for row in rows], tier, rows, records)
    return [
        torch.empty(0) if column is None else layout.values(records, number).clone()  # in memory of its own
        for number, column in enumerate(layout.columns)
    ]


def _read(begins: Sequence[int], tier: Segment | RecordFile, rows: Sequence[int], records: Tensor) -> None:
    """Fill some rows of [rows, bytes] with records of one tier."""
    size, device = records.shape[1], records.device
    if isinstance(tier, RecordFile) and device.type == "cpu":
        for begin, row in zip(begins, rows, strict=True):
            tier.read(begin, records[row])
        return
    if isinstance(tier, Segment):
        index = torch.tensor([begin // size for begin in begins], device=device)
        read = tier.records(size).index_select(0, index)
    else:
        pinned = torch.empty(len(rows), size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        for number, begin in enumerate(begins):
            tier.read(begin, pinned[number])
        read = pinned.to(device, non_blocking=True)
    records.index_copy_(0, torch.tensor(rows, device=device), read)
