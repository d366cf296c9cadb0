"""What a frozen prefix gave, by the key of each sample: in memory up to a budget, then in files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .directory import Directory
from .exchange import Exchange
from .fingerprints import Key
from .split import Batch, Split
from .tiers import Memory

_SHORTAGES = (OSError, MemoryError, torch.OutOfMemoryError)


class PrefixStore:
    """Tensors of a batch, kept row by row and given back for any batch whose rows are all there.

    A store that cannot go on (a full disk, a directory that is gone, no memory for a batch, a tensor it cannot keep) is
    empty from then on, and ``failure`` says why; nothing is raised.

    Args:
        budget: Bytes in memory; a quarter of what is free when the first row comes, if ``None``. What does not fit goes
            to files.
        directory: Where the store makes a directory of its own when it needs one; the system's temporary directory, if
            ``None``. It is removed by :meth:`close`, when the process ends, or, after a kill, by the next store there.
        dtype: A type in which floating-point tensors are kept; their own, if ``None``. With it values are rounded.
        shared: A name that the processes of one session have agreed on and no other session has: those on one node
            read each other's rows. All rows are in files then, which the system keeps in its cache. Splits have to be
            added and dropped in the same order everywhere, and need a ``repr`` that is the same everywhere.

    Attributes:
        failure: Why the store has given up, or ``None``.
    """

    def __init__(
        self,
        budget: int | None = None,
        directory: Path | None = None,
        dtype: torch.dtype | None = None,
        *,
        shared: str | None = None,
    ) -> None:
        self.failure: str | None = None
        self._dtype = dtype
        self._shared = shared is not None
        self._memory = Memory(0 if self._shared else budget)
        self._directory = Directory(directory, shared)
        self._splits: dict[Hashable, Split] = {}
        self._dropped: Counter[Hashable] = Counter()
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
        return sum(split.spilled_bytes for split in self._splits.values())

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
            keys: One for each row, see :func:`.fingerprints.row_keys`.
            tensors: What the batch needs again, as it is now: copies are made. Plain dense tensors.
            row_dims: For each tensor the dimension of its rows, or ``None``: it is the same for all rows of the batch.
            position_dims: With ``lengths``: for each tensor the dimension that is padded, or ``None``.
            lengths: How many positions, from the first, each row has; those behind are not kept.
        """
        positions = [None] * len(tensors) if position_dims is None else position_dims
        if self.failure is not None:
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._split(split).add(Batch(keys, tensors, row_dims, positions, lengths))
        except (TypeError, *_SHORTAGES) as error:
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
        if self.failure is not None:
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._split(split).get(keys, width)
        except _SHORTAGES as error:
            self._fail(error)
            return None

    def has(self, split: Hashable, keys: Sequence[Key]) -> list[bool]:
        """Tell of each row whether it is there."""
        if self.failure is not None:
            return [False] * len(keys)
        try:
            return self._split(split).has(keys)
        except OSError as error:
            self._fail(error)
            return [False] * len(keys)

    def drop(self, split: Hashable) -> None:
        """Forget a split and give back its place."""
        self._dropped[split] += 1
        if (known := self._splits.pop(split, None)) is not None:
            self._memory.drop(known)
            known.close()

    def close(self) -> None:
        """Forget everything and remove the files."""
        for split in list(self._splits):
            self.drop(split)
        self._directory.remove()

    def _split(self, split: Hashable) -> Split:
        if split not in self._splits:
            exchange = None
            if self._shared:
                exchange = Exchange(self._directory.path(), repr(split), self._dropped[split])
            new_file = self._directory.new_file if exchange is None else exchange.new_file
            self._splits[split] = Split(self._memory, new_file, exchange, self._dtype)
        return self._splits[split]

    def _fail(self, error: Exception) -> None:
        self.failure = f"{type(error).__name__}: {error}"
        self.close()
