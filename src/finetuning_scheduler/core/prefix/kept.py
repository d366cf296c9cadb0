"""What is known of the calls of a cut: the forms of their results, their rows, and where these are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .closeness import Comparison
from .cut import Cut, Site
from .lineage import Rows, Token, token
from .padding import PaddedBatch
from .refusal import Refused
from .store import PrefixStore
from .trees import Form


@dataclass(frozen=True)
class Kind:
    """A tensor of a result without its content.

    Attributes:
        row_dim: ``None`` if it is the same for all rows.
        positions: The dimensions in which it is as wide as the batch.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    row_dim: int | None
    positions: tuple[int, ...] = ()

    def shape_of(self, rows: int, width: int) -> tuple[int, ...]:
        """Return the shape for a number of rows, and of positions."""
        sizes = {self.row_dim: rows} | dict.fromkeys(self.positions, width)
        return tuple(sizes.get(dim, size) for dim, size in enumerate(self.shape))


@dataclass(frozen=True)
class Passed:
    """An argument that a call has returned as it was, as layers that are off do."""

    place: int


@dataclass(frozen=True)
class Result:
    """The form of a call's result, for all calls of one structure.

    The leaves are plain values, kinds of tensors, or arguments that are passed on.
    """

    form: Form
    leaves: tuple[object, ...]

    def kept(self, site: Site) -> list[int]:
        """Return the leaves that have to be kept."""
        return [place for place in sorted(site.needed) if isinstance(self.leaves[place], Kind)]


@dataclass
class Kept:
    """What is known of one cut in one stage.

    Attributes:
        seen: The keys of rows that have entered the prefix and whose outputs were kept.
        shared: Whether other processes read the rows, too.
        results: By site and structure, what calls return.
        verified: Whether a replayed batch was compared with a plain one.
    """

    label: object
    cut: Cut
    rows: Mapping[tuple[str, int], Rows]
    store: PrefixStore
    shared: bool = False
    seen: set[bytes] = field(default_factory=set)
    results: dict[tuple[Site, bytes], Result] = field(default_factory=dict)
    verified: bool = False
    failure: str | None = None

    def split(self, site: Site) -> object:
        """Name the rows of a site in the store."""
        return (self.label, site.name, site.occurrence)

    def known(self, entered: Sequence[bytes]) -> int:
        """Count the rows whose outputs were kept, by the keys with which they have entered."""
        if not self.shared or all(key in self.seen for key in entered):
            return sum(key in self.seen for key in entered)
        return sum(self.store.has((self.label, "entered"), entered))

    def learn(self, entered: Sequence[bytes]) -> None:
        """Note that outputs of rows are kept."""
        new = [key for key in entered if key not in self.seen]
        if self.shared and new:
            self.store.add((self.label, "entered"), new, [torch.zeros(len(new), 1, dtype=torch.uint8)], [0])
        self.seen.update(new)

    def drop(self) -> None:
        """Forget all rows."""
        if self.shared:
            self.store.drop((self.label, "entered"))
        for site in self.cut.sites:
            self.store.drop(self.split(site))
        self.seen.clear()
        self.verified = False


def result_of(
    results: Sequence[Any],
    form: Form,
    given: Mapping[Token, int],
    rows: Rows,
    count: int | None,
    padding: PaddedBatch | None = None,
    site: Site | None = None,
) -> Result:
    """Tell what a call has returned, without the content of tensors.

    Args:
        results: The leaves.
        form: How they are nested.
        given: The arguments' leaves.
        rows: Where the rows lie.
        count: How many rows have entered; ``None`` if none has.
        padding: What counts of each row, if not all does.
        site: The call.

    Raises:
        Refused: It is nothing that can be kept.
    """
    leaves: list[object] = []
    for place, leaf in enumerate(results):
        if not isinstance(leaf, Tensor):
            leaves.append(leaf)
            continue
        if (passed := given.get(token(leaf))) is not None:
            leaves.append(Passed(passed))
            continue
        if type(leaf) is not Tensor or leaf.is_nested or leaf.layout is not torch.strided:
            raise Refused(f"a frozen module returns a tensor of kind {type(leaf).__name__}, {leaf.layout}")
        if leaf.requires_grad:
            raise Refused("gradients flow through a frozen module")
        dim = None if count is None else rows.results.get(place)
        if dim is not None and (dim >= leaf.dim() or leaf.shape[dim] != count):
            raise Refused("the outputs of a frozen module have other rows than its inputs")
        positions = () if padding is None or site is None else padding.positions_of_result(site.place, place)
        if padding is not None and any(leaf.shape[each] != padding.width for each in positions):
            raise Refused("the outputs of a frozen module have another width than its inputs")
        shape = tuple(-1 if each == dim or each in positions else size for each, size in enumerate(leaf.shape))
        leaves.append(Kind(shape, leaf.dtype, leaf.device, dim, positions))
    return Result(form, tuple(leaves))


def compare_half(site: Site, results: Sequence[Any], rows: Rows) -> None:
    """Compare once what half of a batch has given with the same rows of the whole one."""
    half, rows.half = rows.half, {}
    for place, expected in half.items():
        dim, actual = rows.results.get(place), results[place]
        actual = actual if dim is None else actual.narrow(dim, 0, rows.half_rows)
        if not Comparison().close(actual, expected):
            rows.refused = f"the outputs of `{site}` for a row depend on the other rows of the batch"
    if rows.refused is not None:
        raise Refused(rows.refused)
