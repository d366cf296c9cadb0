"""How what a batch needs lies in a store: a record of bytes a row, the rows of all tensors behind one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

ALIGNMENT = 16  # of each tensor in a record, so that its bytes can be viewed as any type


@dataclass(frozen=True)
class Column:
    """How the rows of one tensor lie in a record, and how the tensor is made of them again.

    A tensor without rows is a record of its own, as if it were its only row.
    """

    dtype: torch.dtype
    stored: torch.dtype
    device: torch.device
    row_dim: int | None
    order: tuple[int, ...]  # the dimensions from the outermost in memory inwards
    sizes: tuple[int, ...]  # of a row, in this order
    position: int | None = None  # the dimension of a row, among the sizes, that is padded

    @classmethod
    def of(cls, tensor: Tensor, row_dim: int | None, position_dim: int | None, stored: torch.dtype | None) -> Column:
        """Read how a tensor lies in memory, so that later code meets the same memory format."""
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        if not tensor.permute(order).is_contiguous():
            order = list(range(tensor.dim()))
        if row_dim is not None:
            row_dim %= tensor.dim()
        inner = [dim for dim in order if dim != row_dim]
        return cls(
            dtype=tensor.dtype,
            stored=stored if stored is not None and tensor.is_floating_point() else tensor.dtype,
            device=tensor.device,
            row_dim=row_dim,
            order=tuple(order),
            sizes=tuple(tensor.shape[dim] for dim in inner),
            position=None if position_dim is None else inner.index(position_dim % tensor.dim()),
        )

    @cached_property
    def numel(self) -> int:
        """Values of a row."""
        count = 1
        for size in self.sizes:
            count *= size
        return count

    @property
    def size(self) -> int:
        """Bytes of a row."""
        return self.numel * self.stored.itemsize

    def of_width(self, width: int) -> Column:
        """The same with another number of positions."""
        if self.position is None:
            return self
        sizes = (*self.sizes[: self.position], width, *self.sizes[self.position + 1 :])
        return replace(self, sizes=sizes)

    def rows(self, tensor: Tensor) -> Tensor:
        """View a tensor as [rows, *sizes]."""
        if self.row_dim is None:
            return tensor.permute(self.order)[None]
        return tensor.permute(self.row_dim, *(dim for dim in self.order if dim != self.row_dim))

    def tensor(self, rows: Tensor) -> Tensor:
        """Make the tensor of rows [rows, numel or *sizes], which nothing else uses."""
        rows = rows.reshape(len(rows), *self.sizes).to(self.device, self.dtype)
        dense = rows[0] if self.row_dim is None else rows.movedim(0, self.order.index(self.row_dim)).contiguous()
        return dense.permute([self.order.index(dim) for dim in range(len(self.order))])


@dataclass(frozen=True)
class Layout:
    """The columns of a record: ``None`` for a tensor without rows, which a record of its own holds."""

    columns: tuple[Column | None, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each column begins."""
        offsets, end = [], 0
        for column in self.columns:
            offsets.append(end)
            end += 0 if column is None else -(-column.size // ALIGNMENT) * ALIGNMENT
        return (*offsets, end)

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return max(ALIGNMENT, self.offsets[-1])

    @cached_property
    def device(self) -> torch.device:
        """Where records lie as long as they are in memory."""
        return next((column.device for column in self.columns if column is not None), torch.device("cpu"))

    @cached_property
    def width(self) -> int | None:
        """The positions of a row, if it has a width of its own."""
        padded = (column for column in self.columns if column is not None and column.position is not None)
        return next((column.sizes[column.position] for column in padded if column.position is not None), None)

    def of_width(self, width: int) -> Layout:
        """The same with another number of positions."""
        return Layout(tuple(None if column is None else column.of_width(width) for column in self.columns))

    def values(self, records: Tensor, number: int) -> Tensor:
        """View a column of records [rows, bytes] as [rows, numel] of the type that is stored."""
        column, begin = self.columns[number], self.offsets[number]
        if column is None:
            raise LookupError(f"column {number} has no rows")
        return records[:, begin : begin + column.size].view(column.stored)

    def write(self, tensors: Sequence[Tensor], rows: Sequence[int], records: Tensor) -> None:
        """Copy rows of a batch's tensors into records [rows, bytes]."""
        for number, (column, tensor) in enumerate(zip(self.columns, tensors, strict=True)):
            if column is None or not column.numel:
                continue
            chosen = column.rows(tensor)
            if list(rows) != list(range(len(chosen))):
                chosen = chosen.index_select(0, torch.tensor(rows, device=tensor.device))
            if column.position is not None:
                chosen = chosen.narrow(column.position + 1, 0, column.sizes[column.position])
            self.values(records, number).view(len(chosen), *column.sizes).copy_(chosen)
