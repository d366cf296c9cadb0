"""One step in which calls are kept or skipped: every call is known by the content of all that it depends on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .calls import Forward
from .cut import Cut, Site
from .fingerprints import row_keys, tensor_key
from .refusal import Refused
from .stand_ins import Deferred, StandIn, Surroundings, real, version_of
from .store import PrefixStore
from .trees import Form, flatten, is_plain

Token = tuple[object, ...]
_KEY_BYTES = 16


@dataclass(frozen=True)
class Kind:
    """A tensor of a result without its content; ``row_dim`` is ``None`` if it is the same for all rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    row_dim: int | None

    def shape_of(self, rows: int) -> tuple[int, ...]:
        """Return the shape for a number of rows."""
        return tuple(rows if dim == self.row_dim else size for dim, size in enumerate(self.shape))


@dataclass(frozen=True)
class Result:
    """The form of a call's result, for all calls of one structure; the leaves are plain values or kinds of tensors."""

    form: Form
    leaves: tuple[object, ...]


@dataclass
class Rows:
    """Along which dimension the rows of a site's tensors lie, by place; filled in when half a batch has been seen."""

    arguments: dict[int, int | None] = field(default_factory=dict)
    results: dict[int, int | None] = field(default_factory=dict)
    half: dict[int, Tensor] = field(default_factory=dict)
    half_rows: int = 0


@dataclass
class Kept:
    """What is known of one cut in one stage.

    Attributes:
        seen: The keys of rows that have entered the prefix and whose outputs were kept.
        results: By site and structure, what calls return.
        verified: Whether a replayed batch was compared with a plain one.
    """

    label: object
    cut: Cut
    rows: Mapping[tuple[str, int], Rows]
    store: PrefixStore
    seen: set[bytes] = field(default_factory=set)
    results: dict[tuple[Site, bytes], Result] = field(default_factory=dict)
    verified: bool = False
    failure: str | None = None

    def split(self, site: Site) -> object:
        """Name the rows of a site in the store."""
        return (self.label, site.name, site.occurrence)

    def drop(self) -> None:
        """Forget all rows."""
        for site in self.cut.sites:
            self.store.drop(self.split(site))
        self.seen.clear()
        self.verified = False


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
            hashlib.blake2b(self.structure + b"".join(row), digest_size=_KEY_BYTES).digest()
            for row in zip(*parts, strict=True)
        ]


class Lineage:
    """Knows in one step where the tensors come from that are given to the calls of one cut."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.entered: list[bytes] = []
        self._sources: dict[Token, tuple[Node, int]] = {}
        self._groups: dict[Token, tuple[int, Sequence[bytes]]] = {}
        self._wholes: dict[Token, bytes] = {}
        self._held: list[Tensor] = []  # no storage is used twice in the step

    def node(self, site: Site, leaves: Sequence[Any], form: Form, around: Surroundings) -> Node:
        """Tell what a call depends on."""
        rows_of = self.kept.rows[site.place].arguments
        digest = hashlib.blake2b(f"{site} {form.code} {around.code}".encode(), digest_size=_KEY_BYTES)
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
                self._enter(leaf, rows_of.get(place), digest, groups)
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
                self._sources[token(leaf)] = (node, place)
                self._held.append(leaf)

    def _enter(self, leaf: Tensor, row_dim: int | None, digest: Any, groups: dict[int, Sequence[bytes]]) -> None:
        known = self._groups.get(token(leaf))
        if known is None:
            if row_dim is None or row_dim >= leaf.dim():
                digest.update(b"|whole" + self._whole(leaf))
                return
            known = (len(self._groups), row_keys([leaf], [row_dim]))
            self._groups[token(leaf)] = known
            self._held.append(leaf)
            if not self.entered:
                self.entered = list(known[1])
        number, keys = known
        shape = [size for dim, size in enumerate(leaf.shape) if dim != row_dim]
        digest.update(f"|rows {number} {row_dim} {shape} {leaf.dtype} {leaf.device}".encode())
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
    version = tensor_key(tensor) if tensor.is_inference() else version_of(tensor)
    return (address, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version)


class Step:
    """Answers the calls of skipped modules during one step.

    Args:
        current: What is skipped in the present phase.
        others: What is skipped in coming phases, and kept in plain steps.
        replays: Whether calls are skipped: always, never, or (``None``) if the first rows to enter are known.

    Attributes:
        over: Set when the step is over; what activation checkpointing makes again is answered as before then.
        replayed: Whether a call has been skipped.
        plain_seconds: Time spent in making calls that can be skipped.
        reuse_seconds: Time spent in keeping and finding results.
        rows: How many rows have entered.
    """

    def __init__(self, current: Kept, others: Sequence[Kept] = (), *, replays: bool | None) -> None:
        self._lineages = [Lineage(kept) for kept in (current, *others)]
        self._sites = [{site.place: site for site in each.kept.cut.sites} for each in self._lineages]
        self._replays = replays
        self._counts: dict[str, int] = {}
        self._memory: dict[tuple[object, ...], Any] = {}
        self._missed: set[int] = set()
        self._looked: set[int] = set()
        self.over = self.replayed = False
        self.plain_seconds = self.reuse_seconds = 0.0
        self.rows = 0

    @property
    def hits(self) -> bool:
        """Whether all results that were needed were there."""
        return 0 in self._looked and 0 not in self._missed

    def called(self, name: str, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of a module."""
        leaves, form = flatten((args, kwargs))
        if self.over:
            return self._again(name, original, leaves, form)
        occurrence = self._counts.get(name, 0)
        self._counts[name] = occurrence + 1
        wanted = [
            (number, sites[name, occurrence]) for number, sites in enumerate(self._sites) if (name, occurrence) in sites
        ]
        if wanted and wanted[0][0] == 0 and self._replays is None:
            self._decide(wanted[0][1], leaves, form)
        if not self._replays:
            return self._plain(wanted, original, leaves, form) if wanted else original(*args, **kwargs)
        if wanted and wanted[0][0] == 0:
            return self._replay(wanted[0][1], original, leaves, form)
        return _made(original, [real(leaf) for leaf in leaves], form)

    def _decide(self, site: Site, leaves: Sequence[Any], form: Form) -> None:
        """Replay if the first rows that enter are known."""
        lineage = self._lineages[0]
        self._node(0, site, leaves, form, Surroundings.now(_device_types(leaves)))
        if lineage.entered:
            self._replays = all(key in lineage.kept.seen for key in lineage.entered)

    def commit(self) -> None:
        """Take it that the rows that have entered are there from now on, if all that is needed of them was kept."""
        for number, lineage in enumerate(self._lineages):
            if number in self._looked and lineage.kept.failure is None:
                lineage.kept.seen.update(lineage.entered)

    def _plain(self, wanted: Sequence[tuple[int, Site]], original: Forward, leaves: list[Any], form: Form) -> Any:
        """Make a call, and keep what is needed of it."""
        begin = time.perf_counter()
        around = Surroundings.now(_device_types(leaves))
        nodes = [self._node(number, site, leaves, form, around) for number, site in wanted]
        made, inside = time.perf_counter(), self.reuse_seconds
        outcome = _made(original, leaves, form)
        after = time.perf_counter()
        results, result_form = flatten(outcome)
        for (number, _), node in zip(wanted, nodes, strict=True):
            self._keep(number, node, results, result_form)
        if wanted[0][0] == 0:
            self.plain_seconds += after - made - (self.reuse_seconds - inside)
        self.reuse_seconds += made - begin + time.perf_counter() - after
        return outcome

    def _node(self, number: int, site: Site, leaves: Sequence[Any], form: Form, around: Surroundings) -> Node:
        """Tell what a call depends on; what cannot be read makes it one that is never skipped."""
        lineage = self._lineages[number]
        try:
            return lineage.node(site, leaves, form, around)
        except (Refused, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            lineage.kept.failure = f"the inputs of `{site}` cannot be read: {error}"
            return Node(site, b"", {}, None, usable=False)

    def _keep(self, number: int, node: Node, results: list[Any], form: Form) -> None:
        lineage = self._lineages[number]
        kept, site = lineage.kept, node.site
        lineage.given(node, results)
        if kept.failure is not None:
            return
        if not node.usable:
            if site.needed:
                self._missed.add(number)
            return
        try:
            result = _kind_of(results, form, kept.rows[site.place], node.rows)
            _compare_half(site, results, kept.rows[site.place])
        except Refused as refusal:
            kept.failure = str(refusal)
            return
        if kept.results.setdefault((site, node.structure), result) != result:
            kept.failure = f"`{site}` returns results of different forms for inputs of one form"
            return
        if not site.needed:
            return
        places = sorted(site.needed)
        keys, split = node.keys(), kept.split(site)
        if not all(kept.store.has(split, keys)):
            self._missed.add(number)
            tensors = [results[place].detach() for place in places]
            dims = [_row_dim(result.leaves[place]) for place in places]
            if node.rows is None:
                tensors, dims = [each[None] for each in tensors], [0] * len(tensors)
            kept.store.add(split, keys, tensors, dims)
        self._looked.add(number)
        if number == 0:
            self.rows = max(self.rows, node.rows or 0)

    def _replay(self, site: Site, original: Forward, leaves: list[Any], form: Form) -> Any:
        """Answer a call with what was kept; make it if something is missing."""
        begin = time.perf_counter()
        lineage = self._lineages[0]
        kept = lineage.kept
        around = Surroundings.now(_device_types(leaves))
        node = self._node(0, site, leaves, form, around)
        result = kept.results.get((site, node.structure)) if node.usable else None
        in_place_on_others = any(not isinstance(leaves[place], StandIn) for place, _ in site.changed)
        known = None if result is None or in_place_on_others else self._known(site, node, kept)
        if result is None or known is None:
            self._missed.add(0)
            plain_leaves = [real(leaf) for leaf in leaves]
            outcome = _made(original, plain_leaves, form)
            results, result_form = flatten(outcome)
            self._keep(0, node, results, result_form)
            return outcome

        def make(arguments: list[Any]) -> list[Any]:
            return flatten(_made(original, arguments, form))[0]

        given = [leaf.twin() if isinstance(leaf, StandIn) else leaf for leaf in leaves] if site.changed else leaves
        deferred = Deferred(make, given, around)
        filled: list[Any] = []
        for place, leaf in enumerate(result.leaves):
            if place in known:
                filled.append(known[place])
            elif isinstance(leaf, Kind):
                shape = leaf.shape_of(node.rows or 0)
                filled.append(StandIn.of(deferred, place, shape, leaf.dtype, leaf.device))
            else:
                filled.append(leaf)
        for place, returned in site.changed:
            leaves[place].source = (deferred, returned)
        lineage.given(node, filled)
        outcome = result.form.build(filled)
        self.replayed = True
        if around.gradients:
            self._memory[_identities(site.name, leaves)] = outcome
        self.reuse_seconds += time.perf_counter() - begin
        return outcome

    def _known(self, site: Site, node: Node, kept: Kept) -> dict[int, Tensor] | None:
        """Return what was kept of a call, by place."""
        if not site.needed:
            return {}
        self._looked.add(0)
        self.rows = max(self.rows, node.rows or 0)
        tensors = kept.store.get(kept.split(site), node.keys())
        if tensors is not None and node.rows is None:
            tensors = [each[0] for each in tensors]
        return None if tensors is None else dict(zip(sorted(site.needed), tensors, strict=True))

    def _again(self, name: str, original: Forward, leaves: list[Any], form: Form) -> Any:
        """Answer a call after the step: one of activation checkpointing, that has been made before, or another."""
        known = self._memory.get(_identities(name, leaves))
        return _made(original, [real(leaf) for leaf in leaves], form) if known is None else known


def _made(original: Forward, leaves: Sequence[Any], form: Form) -> Any:
    args, kwargs = form.build(leaves)
    return original(*args, **kwargs)


def _identities(name: str, leaves: Sequence[Any]) -> tuple[object, ...]:
    return (name, *map(_identity, leaves))


def _identity(leaf: Any) -> object:
    return token(leaf) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf))


def _device_types(leaves: Sequence[Any]) -> list[str]:
    return sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} | {"cpu"})


def _row_dim(leaf: object) -> int | None:
    return leaf.row_dim if isinstance(leaf, Kind) else None


def _kind_of(results: Sequence[Any], form: Form, rows: Rows, count: int | None) -> Result:
    leaves: list[object] = []
    for place, leaf in enumerate(results):
        if not isinstance(leaf, Tensor):
            leaves.append(leaf)
            continue
        if type(leaf) is not Tensor or leaf.is_nested or leaf.layout is not torch.strided:
            raise Refused(f"a frozen module returns a tensor of kind {type(leaf).__name__}, {leaf.layout}")
        if leaf.requires_grad:
            raise Refused("gradients flow through a frozen module")
        dim = None if count is None else rows.results.get(place)
        if dim is not None and leaf.shape[dim] != count:
            raise Refused("the outputs of a frozen module have other rows than its inputs")
        shape = tuple(-1 if number == dim else size for number, size in enumerate(leaf.shape))
        leaves.append(Kind(shape, leaf.dtype, leaf.device, dim))
    return Result(form, tuple(leaves))


def _compare_half(site: Site, results: Sequence[Any], rows: Rows) -> None:
    """Compare once what half of a batch has given with the same rows of the whole one."""
    half, rows.half = rows.half, {}
    for place, expected in half.items():
        dim, actual = rows.results.get(place), results[place]
        actual = actual if dim is None else actual.narrow(dim, 0, rows.half_rows)
        if not close(actual, expected):
            raise Refused(f"the outputs of `{site}` for a row depend on the other rows of the batch")


TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def close(actual: Tensor, expected: Tensor, *, least: float = 0.0, tolerance: float | None = None) -> bool:
    """Whether two tensors are equal but for rounding, relative to their greatest value."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not (actual.is_floating_point() or actual.is_complex()):
        return torch.equal(actual, expected)
    if not actual.numel():
        return True
    exact = torch.complex128 if actual.is_complex() else torch.float64
    one, other = actual.detach().to(exact), expected.detach().to(exact)
    finite = torch.isfinite(other)
    if not torch.equal(finite, torch.isfinite(one)) or not torch.equal(
        one[~finite].nan_to_num(), other[~finite].nan_to_num()
    ):
        return False
    scale = max(float(other[finite].abs().max()) if bool(finite.any()) else 0.0, least)
    allowed = (TOLERANCE.get(actual.dtype, 1e-4) if tolerance is None else tolerance) * scale
    return bool(((one - other)[finite].abs() <= allowed + 1e-30).all())
