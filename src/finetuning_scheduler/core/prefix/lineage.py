"""Every call is known by the content of all that it depends on: the calls before it, and the rows that have entered."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checksums import Checksums
from .cut import Site
from .fingerprints import KEY_BYTES, row_keys, tensor_key
from .padding import PaddedBatch
from .stand_ins import StandIn, Surroundings, real, version_of
from .trees import Form, is_plain

Token = tuple[object, ...]


@dataclass
class Rows:
    """Along which dimension the rows of a site's tensors lie, by place; filled in when half a batch has been seen."""

    arguments: dict[int, int | None] = field(default_factory=dict)
    results: dict[int, int | None] = field(default_factory=dict)
    half: dict[int, Tensor] = field(default_factory=dict)
    half_rows: int = 0
    refused: str | None = None


@dataclass(frozen=True)
class Node:
    """A call in a step: the site, what its structure is, and the keys of the rows of all that it depends on.

    Attributes:
        structure: A digest of all but rows: the calls that lead here, their plain arguments, whole tensors.
        groups: The keys of the rows that have entered on the way, by the number of the entry.
        rows: How many rows there are; ``None`` if none has entered.
    """

    site: Site
    structure: bytes
    groups: Mapping[int, Sequence[bytes]]
    rows: int | None
    usable: bool = True

    def keys(self) -> list[bytes]:
        """Return one key a row; one for all, if no row has entered."""
        if self.rows is None:
            return [self.structure]
        parts = [self.groups[number] for number in sorted(self.groups)]
        return [
            hashlib.blake2b(self.structure + b"".join(row), digest_size=KEY_BYTES).digest()
            for row in zip(*parts, strict=True)
        ]


class Lineage:
    """Knows in one step where the tensors come from that are given to the calls of one cut.

    Args:
        rows: By call, along which dimension the rows of its arguments lie.
        padding: What counts of each row, if not all does.

    Attributes:
        entered: The keys of the first rows that have entered.
    """

    def __init__(self, rows: Mapping[tuple[str, int], Rows], padding: PaddedBatch | None = None) -> None:
        self._rows = rows
        self._padding = padding
        self.entered: list[bytes] = []
        self._sources: dict[Token, tuple[Node, int]] = {}
        self._groups: dict[tuple[Token, tuple[int, ...]], tuple[int, Sequence[bytes]]] = {}
        self._wholes: dict[Token, bytes] = {}
        self._held: list[Tensor] = []  # no storage is used twice in the step

    def node(self, site: Site, leaves: Sequence[Any], form: Form, around: Surroundings) -> Node:
        """Tell what a call depends on."""
        rows_of = self._rows[site.place].arguments
        digest = hashlib.blake2b(f"{site} {form.code} {around.code}".encode(), digest_size=KEY_BYTES)
        groups: dict[int, Sequence[bytes]] = {}
        usable = True
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                if not is_plain(leaf):
                    usable = False
                digest.update(f"|{type(leaf).__qualname__} {leaf!r}".encode())
            elif (source := self.source(leaf)) is not None:
                node, result = source
                digest.update(b"|from" + node.structure + str(result).encode())
                groups.update(node.groups)
                usable &= node.usable
            elif leaf.requires_grad or leaf.is_nested or leaf.layout is not torch.strided:
                usable = False
            else:
                self._enter(real(leaf), rows_of.get(place), self._positions(site, place), digest, groups)
        counts = {len(keys) for keys in groups.values()}
        usable &= len(counts) <= 1
        return Node(site, digest.digest(), groups, next(iter(counts), None), usable)

    def source(self, tensor: Tensor) -> tuple[Node, int] | None:
        """Return the call that has given a tensor, as it is now."""
        return self._sources.get(token(tensor))

    def given(self, node: Node, leaves: Sequence[Any]) -> None:
        """Note what a call has returned."""
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self._sources.setdefault(token(leaf), (node, place))
                self._held.append(leaf)

    def changed(self, leaf: Tensor, node: Node, result: int) -> None:
        """Note that an argument is a leaf of the result, now that the call has changed it in place."""
        self._sources[token(leaf)] = (node, result)

    def _positions(self, site: Site, place: int) -> tuple[int, ...]:
        """Return the dimensions of an argument in which not all counts."""
        places = {} if self._padding is None else self._padding.places
        return places[site.place].arguments.get(place, ()) if site.place in places else ()

    def _enter(
        self,
        leaf: Tensor,
        row_dim: int | None,
        positions: tuple[int, ...],
        digest: Any,
        groups: dict[int, Sequence[bytes]],
    ) -> None:
        known = self._groups.get((token(leaf), positions))
        if known is None:
            if not positions and (row_dim is None or row_dim >= leaf.dim()):
                digest.update(b"|whole" + self._whole(leaf))
                return
            if self._padding is not None and positions:
                known = (len(self._groups), self._padding.keys(leaf, row_dim, positions))
            else:
                known = (len(self._groups), row_keys([leaf], [row_dim]))
            self._groups[token(leaf), positions] = known
            self._held.append(leaf)
            if not self.entered:
                self.entered = list(known[1])
        number, keys = known
        shape = ["any" if dim in positions else size for dim, size in enumerate(leaf.shape) if dim != row_dim]
        digest.update(f"|rows {number} {row_dim} {shape} {leaf.dtype} {leaf.device.type}".encode())
        groups[number] = keys

    def _whole(self, leaf: Tensor) -> bytes:
        """Return the key of a tensor that counts for every row."""
        name = token(leaf)
        if name not in self._wholes:
            self._wholes[name] = tensor_key(leaf)
            self._held.append(leaf)
        return self._wholes[name]


def token(tensor: Tensor) -> Token:
    """Tell a tensor, with its content, from all others that are there at the same time."""
    if isinstance(tensor, StandIn):
        call, place = tensor.source
        return ("stand-in", id(call), place)
    if tensor.layout is not torch.strided or tensor.is_nested:
        return ("object", id(tensor))
    address = tensor.untyped_storage().data_ptr()
    # PyTorch does not count the changes of inference tensors: their content has to be read.
    version = _content(tensor) if tensor.is_inference() else version_of(tensor)
    return (address, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version)


def _content(tensor: Tensor) -> object:
    """Tell one content of a tensor from another, as far as its kind can be read."""
    batches = Checksums.of(cast("dict[str, nn.Parameter]", {"": tensor})).batches
    return tuple(tuple(values.tolist()) for _, values in batches)
