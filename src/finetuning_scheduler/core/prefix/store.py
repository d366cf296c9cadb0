"""The rows of what a frozen prefix gave, by the key of each sample: in memory up to a budget, then in files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .directory import Directory
from .fingerprints import Key, tensor_key
from .records import Column, Layout
from .tiers import Memory, RecordFile, Segment


class _Place(NamedTuple):
    """Where the record of a row is, and the keys of the tensors without rows that belong to it."""

    layout: Layout
    width: int | None
    common: tuple[Key | None, ...]
    tier: Segment | RecordFile
    begin: int


@dataclass
class _Split:
    """What is known of one kind of batches."""

    places: dict[Key, _Place] = field(default_factory=dict)
    common_of_width: dict[int, tuple[Key | None, ...] | None] = field(default_factory=dict)
    file: RecordFile | None = None


class PrefixStore:
    """Tensors of a batch, kept row by row and given back for any batch whose rows are all there.

    A store that cannot go on (a full disk, a directory that is gone) is empty from then on, and ``failure`` says why;
    nothing is raised.

    Args:
        budget: Bytes in memory; a quarter of what is free when the first row comes, if ``None``. The rest goes to
            files.
        directory: Where a directory of the store's own is made when it is needed; the system's temporary directory, if
            ``None``. It is removed by :meth:`close`, when the process ends, or, after a kill, by the next store there.
        dtype: A type in which floating-point tensors are kept; their own, if ``None``. With it values are rounded.
    """

    failure: str | None

    def __init__(
        self, budget: int | None = None, directory: Path | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.failure = None
        self._dtype = dtype
        self._memory = Memory(budget)
        self._directory = Directory(directory)
        self._splits: defaultdict[Hashable, _Split] = defaultdict(_Split)
        self._layouts: dict[Layout, Layout] = {}  # one object each, so that comparing them takes no time
        try:
            self._directory.remove_leftovers()
        except OSError as error:
            self._fail(error)

    @property
    def bytes(self) -> int:
        """What is in memory."""
        return self._memory.bytes

    @property
    def spilled_bytes(self) -> int:
        """What this process has in files."""
        return sum(split.file.used for split in self._splits.values() if split.file is not None)

    def add(
        self,
        split: Hashable,
        keys: Sequence[Key],
        tensors: Sequence[Tensor],
        row_dims: Sequence[int | None],
        *,
        position_dims: Sequence[int | None] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Keep the rows of a batch that are not there yet.

        Args:
            split: What the batch is part of; rows of one split are not found in another.
            keys: One for each row, see :func:`~.fingerprints.row_keys`.
            tensors: What the batch needs again, as it is now: copies are made. Plain dense tensors.
            row_dims: For each tensor the dimension of its rows, or ``None``: it is the same for all rows of the batch.
            position_dims: With ``lengths``: for each tensor the dimension that is padded, or ``None``.
            lengths: How many positions, from the first, each row has; those behind are not kept.
        """
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._add(self._splits[split], split, keys, tensors, row_dims, position_dims, lengths)
        except (OSError, TypeError) as error:
            self._fail(error)

    def get(self, split: Hashable, keys: Sequence[Key], *, width: int | None = None) -> list[Tensor] | None:
        """Return the tensors of a batch in new memory, or ``None`` unless all rows are there and fit together.

        They have the bits, types, devices, shapes and memory formats of what was added (rounded to the store's type,
        if it has one) and need no gradient.

        Args:
            split: What the batch is part of.
            keys: One for each row.
            width: The positions of the batch, for rows that were added with lengths. Rows are filled up with zeros.
        """
        known = self._splits[split]
        places = [known.places.get(key) for key in keys]
        found = [place for place in places if place is not None]
        if self.failure is not None or not found or len(found) < len(keys):
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._get(known, found, width)
        except OSError as error:
            self._fail(error)
            return None

    def has(self, split: Hashable, keys: Sequence[Key]) -> list[bool]:
        """Tell of each row whether it is there."""
        places = self._splits[split].places
        return [key in places for key in keys]

    def drop(self, split: Hashable) -> None:
        """Forget a split and give back its place."""
        known = self._splits.pop(split, None)
        if known is not None and known.file is not None:
            known.file.close(remove=True)
        self._memory.drop(split)

    def close(self) -> None:
        """Forget everything and remove the files."""
        for split in list(self._splits):
            self.drop(split)
        self._directory.remove()

    def _fail(self, error: Exception) -> None:
        self.failure = f"{type(error).__name__}: {error}"
        self.close()

    def _add(
        self,
        known: _Split,
        split: Hashable,
        keys: Sequence[Key],
        tensors: Sequence[Tensor],
        row_dims: Sequence[int | None],
        position_dims: Sequence[int | None] | None,
        lengths: Sequence[int] | None,
    ) -> None:
        new = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known.places}
        if not new or self.failure is not None:
            return
        positions = [None] * len(tensors) if position_dims is None or lengths is None else position_dims
        columns = [
            None if row_dim is None else Column.of(tensor, row_dim, position, self._dtype)
            for tensor, row_dim, position in zip(tensors, row_dims, positions, strict=True)
        ]
        whole = Layout(tuple(columns))
        common = tuple(
            self._add_common(known, split, tensor) if column is None else None
            for column, tensor in zip(columns, tensors, strict=True)
        )
        if lengths is None or not whole.padded:
            self._write(known, split, new, tensors, self._only(whole), None, common)
            return
        width = next(
            column.sizes[column.position] for column in columns if column is not None and column.position is not None
        )
        if known.common_of_width.setdefault(width, common) != common:
            known.common_of_width[width] = None  # it does not depend on the width alone
        for key, row in new.items():
            layout = self._only(whole.of_width(lengths[row]))
            self._write(known, split, {key: row}, tensors, layout, lengths[row], common)

    def _add_common(self, known: _Split, split: Hashable, tensor: Tensor) -> Key:
        """Keep a tensor without rows as a record of its own."""
        key = tensor_key(tensor)
        if key not in known.places:
            layout = self._only(Layout((Column.of(tensor, None, None, self._dtype),)))
            self._write(known, split, {key: 0}, [tensor], layout, None, ())
        return key

    def _only(self, layout: Layout) -> Layout:
        return self._layouts.setdefault(layout, layout)

    def _write(
        self,
        known: _Split,
        split: Hashable,
        new: dict[Key, int],
        tensors: Sequence[Tensor],
        layout: Layout,
        width: int | None,
        common: tuple[Key | None, ...],
    ) -> None:
        size, left = layout.size, list(new)
        while left:
            tier: Segment | RecordFile
            rows = [new[key] for key in left]
            reserved = self._memory.take(split, len(left), size, layout.device, apart=width is not None)
            if reserved is None:
                records = torch.empty(len(left), size, dtype=torch.uint8)
                layout.write(tensors, rows, records)
                tier = known.file = known.file or self._directory.new_file()
                begin, count = tier.append(records), len(left)
            else:
                tier, begin, count = reserved
                records = tier.memory[begin : begin + count * size].view(count, size)
                layout.write(tensors, rows[:count], records)
            for number, key in enumerate(left[:count]):
                known.places[key] = _Place(layout, width, common, tier, begin + number * size)
            left = left[count:]

    def _get(self, known: _Split, places: Sequence[_Place], width: int | None) -> list[Tensor] | None:
        layout, common = places[0].layout, places[0].common
        if width is not None and layout.padded:
            common_of_width = known.common_of_width.get(width)
            if common_of_width is None:
                return None
            layout, common = layout.of_width(width), common_of_width
            if any(place.width is None or place.width > width for place in places) or any(
                place.layout.of_width(width) != layout for place in places
            ):
                return None
            columns = self._padded(places, layout)
        else:
            if any(place.layout is not layout or place.common != common for place in places):
                return None
            columns = _gathered(places, layout)
        tensors = []
        for column, values, key in zip(layout.columns, columns, common, strict=True):
            if column is not None and values is not None:
                tensors.append(column.tensor(values))
            elif key is not None:
                place = known.places[key]
                only, (rows,) = place.layout.columns[0], _gathered([place], place.layout)
                if only is not None and rows is not None:
                    tensors.append(only.tensor(rows))
        return tensors

    def _padded(self, places: Sequence[_Place], layout: Layout) -> list[Tensor | None]:
        """Read rows one by one, each into zeros of the batch's width."""
        columns: list[Tensor | None] = [
            None
            if column is None
            else torch.zeros(len(places), *column.sizes, dtype=column.stored, device=layout.device)
            for column in layout.columns
        ]
        for row, place in enumerate(places):
            record = _record(place)
            for number, (values, column) in enumerate(zip(columns, place.layout.columns, strict=True)):
                if values is None or column is None:
                    continue
                target = values[row]
                if column.position is not None:
                    target = target.narrow(column.position, 0, column.sizes[column.position])
                target.copy_(place.layout.values(record, number).view(column.sizes))
        return columns


def _record(place: _Place) -> Tensor:
    """Read one record [1, Key]."""
    if isinstance(place.tier, Segment):
        return place.tier.record(place.begin, place.layout.size)
    record = torch.empty(1, place.layout.size, dtype=torch.uint8)
    place.tier.read(place.begin, record[0])
    return record


def _gathered(places: Sequence[_Place], layout: Layout) -> list[Tensor | None]:
    """Read the records of rows with one layout, as columns [rows, numel]."""
    size = layout.size
    first = places[0].tier
    if isinstance(first, Segment) and all(place.tier is first for place in places):
        records = first.records(size)
        index = torch.tensor([place.begin // size for place in places], device=layout.device)
        return [
            None if column is None else layout.values(records, number).index_select(0, index)
            for number, column in enumerate(layout.columns)
        ]
    records = torch.empty(len(places), size, dtype=torch.uint8, device=layout.device)
    by_tier: dict[Segment | RecordFile, list[int]] = {}
    for row, place in enumerate(places):
        by_tier.setdefault(place.tier, []).append(row)
    for tier, rows in by_tier.items():
        target = torch.tensor(rows, device=layout.device)
        if isinstance(tier, Segment):
            index = torch.tensor([places[row].begin // size for row in rows], device=layout.device)
            records.index_copy_(0, target, tier.records(size).index_select(0, index))
        elif layout.device.type == "cpu":
            for row in rows:
                tier.read(places[row].begin, records[row])
        else:
            read = torch.empty(len(rows), size, dtype=torch.uint8, pin_memory=layout.device.type == "cuda")
            for number, row in enumerate(rows):
                tier.read(places[row].begin, read[number])
            records.index_copy_(0, target, read.to(layout.device, non_blocking=True))
    return [None if column is None else layout.values(records, number) for number, column in enumerate(layout.columns)]
