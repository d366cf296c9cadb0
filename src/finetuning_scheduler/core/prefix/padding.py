"""Batches padded to their longest row: what the mask excludes does not count, once it is shown not to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .fingerprints import Key, row_keys, tensor_key
from .rounding import close
from .trees import flatten

# What results may differ by in another width, as a share of the greatest.
_SHARE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_EXTRA = 3  # positions by which a batch is made wider to be watched
Shapes = Sequence[tuple[int, ...] | None]
Places = Mapping[tuple[str, int], "Positions"]


@dataclass(frozen=True)
class Positions:
    """Which dimensions of a call's tensors are the positions of rows, by place."""

    arguments: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    results: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PaddedBatch:
    """A batch of rows of different lengths.

    Attributes:
        leaf: Which of the batch's leaves is the mask.
        mask: Which positions count [rows, width], from the first up to a row's length.
        lengths: Of the rows.
        places: The positions in the tensors of calls, once they are known.
    """

    leaf: int
    mask: Tensor
    lengths: Sequence[int]
    places: Places = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The number of positions, padding included."""
        return self.mask.shape[1]

    @property
    def is_padded(self) -> bool:
        """Whether a row is shorter than the batch is wide."""
        return min(self.lengths) < self.width

    def positions_of_result(self, call: tuple[str, int], place: int) -> tuple[int, ...]:
        """Return the dimensions in which a leaf of a call's result is as wide as the batch."""
        return self.places[call].results.get(place, ()) if call in self.places else ()

    def keys(self, leaf: Tensor, row_dim: int | None, dims: Sequence[int]) -> Sequence[Key]:
        """Return a key of what counts of each row of a tensor.

        Args:
            leaf: The tensor.
            row_dim: The dimension of its rows; ``None`` if all rows have the same.
            dims: The dimensions of positions.
        """
        if len(dims) == 1:
            before = [dim for dim in range(dims[0]) if dim != row_dim]
            mask = self.mask.to(leaf.device).reshape(len(self.mask), *[1] * len(before), self.width)
            return row_keys([leaf], [row_dim], masks=[mask])
        keys = []
        for row, length in enumerate(self.lengths):
            counts = leaf[None] if row_dim is None else leaf.narrow(row_dim, row, 1)
            for dim in dims:
                counts = counts.narrow(dim + (row_dim is None), 0, length)
            keys.append(tensor_key(counts.contiguous()))
        return keys

    def without_padding(self, tensor: Tensor) -> Tensor:
        """Set what does not count to zero in a tensor whose first dimensions are rows and positions."""
        if tensor.shape[:2] != self.mask.shape:
            return tensor
        mask = self.mask.to(tensor.device).reshape(*self.mask.shape, *[1] * (tensor.dim() - 2))
        return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))

    def wider(self, batch: Any, change: Callable[[Callable[[int, Any], Any], Any], Any]) -> Any:
        """Return the batch with more padding, and with other content in all of it."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.stack(
            [torch.randint(each, (self.width + _EXTRA,), generator=generator) for each in self.lengths]
        )

        def widened(number: int, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() < 2 or leaf.shape[:2] != self.mask.shape:
                return leaf
            more = leaf.new_zeros(len(leaf), _EXTRA, *leaf.shape[2:])
            if number == self.leaf:
                return torch.cat([leaf, more], dim=1)
            index = (
                chosen.to(leaf.device).reshape(*chosen.shape, *[1] * (leaf.dim() - 2)).expand(-1, -1, *leaf.shape[2:])
            )
            mask = torch.cat([self.mask, self.mask.new_zeros(len(leaf), _EXTRA)], dim=1).to(leaf.device)
            mask = mask.reshape(*mask.shape, *[1] * (leaf.dim() - 2))
            return torch.where(mask, torch.cat([leaf, more], dim=1), leaf.gather(1, index))

        return change(widened, batch)


def padded_batch(batch: object, leaf: int | None = None) -> PaddedBatch | None:
    """Find the mask of a batch and the lengths of its rows; ``None`` if there is none.

    A mask is a tensor [rows, width] of zeros and ones, or of truth values, with the ones of each row first.

    Args:
        batch: The batch.
        leaf: Which of its leaves is the mask, if that is known.
    """
    leaves, _ = flatten(batch)
    for number, each in enumerate(leaves):
        if leaf in (None, number) and isinstance(each, Tensor) and _may_be_mask(each):
            mask = each.detach().to("cpu")
            lengths = (mask != 0).sum(dim=1)
            first = torch.arange(mask.shape[1]) < lengths[:, None]
            if torch.equal(mask, first.to(mask.dtype)) and int(lengths.min()) > 0:
                return PaddedBatch(number, first, lengths.tolist())
    return None


def _may_be_mask(tensor: Tensor) -> bool:
    integer = not (tensor.is_floating_point() or tensor.is_complex())
    return integer and tensor.layout is torch.strided and tensor.dim() == 2 and min(tensor.shape) > 1


def positions_of(
    batch: PaddedBatch, plain: tuple[Shapes, Sequence[Any]], wide: tuple[Shapes, Sequence[Any]]
) -> Positions | None:
    """Compare the shapes in a call with those in a wider batch; ``None`` if they do not fit."""
    arguments: dict[int, tuple[int, ...]] = {}
    results: dict[int, tuple[int, ...]] = {}
    found = (
        (arguments, plain[0], wide[0]),
        (results, list(_shapes(plain[1])), list(_shapes(wide[1]))),
    )
    for dims_of, shapes, wide_shapes in found:
        if len(shapes) != len(wide_shapes):
            return None
        for place, (shape, wider) in enumerate(zip(shapes, wide_shapes, strict=True)):
            if shape is None or wider is None or len(shape) != len(wider):
                if shape is not wider:
                    return None
                continue
            dims = tuple(dim for dim, size in enumerate(shape) if size != wider[dim])
            if any(shape[dim] != batch.width or wider[dim] != batch.width + _EXTRA for dim in dims):
                return None
            dims_of[place] = dims
    return Positions(arguments, results)


def _shapes(leaves: Sequence[Any]) -> Iterator[tuple[int, ...] | None]:
    for leaf in leaves:
        yield tuple(leaf.shape) if isinstance(leaf, Tensor) else None


def padding_is_unread(
    batch: PaddedBatch,
    positions: Positions,
    row_dims: Mapping[int, int | None],
    plain: Sequence[Any],
    wide: Sequence[Any],
) -> bool:
    """Whether a call's results are the same at the positions that count, with other padding."""
    for place, dims in positions.results.items():
        one, other, row_dim = plain[place], wide[place], row_dims.get(place)
        if len(dims) > 1:
            return False
        if dims:
            other = other.narrow(dims[0], 0, batch.width)
            if row_dim is not None:
                one = batch.without_padding(one.movedim((row_dim, dims[0]), (0, 1)))
                other = batch.without_padding(other.movedim((row_dim, dims[0]), (0, 1)))
        if not close(other, one, _SHARE.get(one.dtype, 0.0)):
            return False
    return True
