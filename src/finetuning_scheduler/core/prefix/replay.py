"""One step in which the results of calls are kept, or calls are skipped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .calls import Forward
from .cut import Site
from .kept import Kept, Kind, Passed, Result, compare_half, result_of
from .lineage import Lineage, Node, Token, token
from .padding import PaddedBatch
from .refusal import Refused
from .stand_ins import Deferred, StandIn, Surroundings, real, stand_ins
from .trees import Form, flatten, mapped


class Step:
    """Answers the calls of skipped modules during one step.

    Args:
        current: What is skipped in the present phase.
        others: What is skipped in coming phases, and kept in plain steps.
        replays: Whether calls are skipped: always, never, or (``None``) if the first rows to enter are known.
        padding: What counts of each row, if not all does.

    Attributes:
        replayed: Whether a call has been skipped.
        plain_seconds: Time spent in making calls that can be skipped.
        reuse_seconds: Time spent in keeping and finding results.
        rows: How many rows have entered.
    """

    def __init__(
        self,
        current: Kept,
        others: Sequence[Kept] = (),
        *,
        replays: bool | None,
        padding: PaddedBatch | None = None,
    ) -> None:
        self._kept = [current, *others]
        self._padding = padding
        self._lineages = [Lineage(kept.rows, padding) for kept in self._kept]
        self._sites = [{site.place: site for site in kept.cut.sites} for kept in self._kept]
        self._replays = replays
        self._counts: dict[str, int] = {}
        self._memory: dict[tuple[object, ...], Any] = {}
        self._missed: set[int] = set()
        self._looked: set[int] = set()
        self.replayed = self._over = False
        self.plain_seconds = self.reuse_seconds = 0.0
        self.rows = 0

    @property
    def known_rows(self) -> int:
        """How many of the rows that have entered had outputs that were kept before the step."""
        return self._kept[0].known(self._lineages[0].entered)

    @property
    def known(self) -> bool:
        """Whether outputs of all rows that have entered were kept before the step."""
        return 0 < len(self._lineages[0].entered) == self.known_rows

    @property
    def hits(self) -> bool:
        """Whether all results that were needed were there."""
        return 0 in self._looked and 0 not in self._missed

    def called(self, name: str, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of a module."""
        leaves, form = flatten((args, kwargs))
        if self._over:
            known = self._memory.get(_identities(name, leaves))
            return _made(original, args, kwargs) if known is None else known
        occurrence = self._counts.get(name, 0)
        self._counts[name] = occurrence + 1
        wanted = [
            (number, sites[name, occurrence]) for number, sites in enumerate(self._sites) if (name, occurrence) in sites
        ]
        if wanted and wanted[0][0] == 0 and self._replays is None:
            self._decide(wanted[0][1], leaves, form)
        if not self._replays:
            return self._plain(wanted, original, args, kwargs) if wanted else original(*args, **kwargs)
        if wanted and wanted[0][0] == 0:
            return self._replay(wanted[0][1], original, args, kwargs)
        return _made(original, args, kwargs)

    def _decide(self, site: Site, leaves: Sequence[Any], form: Form) -> None:
        """Replay if the first rows that enter are known."""
        lineage = self._lineages[0]
        self._node(0, site, leaves, form, Surroundings.now(_device_types(leaves)))
        if lineage.entered:
            self._replays = self.known

    def end(self) -> None:
        """Take note that the step is over: what activation checkpointing makes again is answered as before."""
        self._over = True

    def commit(self) -> None:
        """Take it that the rows that have entered are there from now on, if all that is needed of them was kept."""
        for number, (kept, lineage) in enumerate(zip(self._kept, self._lineages, strict=True)):
            if number in self._looked and kept.failure is None:
                kept.learn(lineage.entered)

    def _plain(
        self, wanted: Sequence[tuple[int, Site]], original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a call, and keep what is needed of it."""
        begin = time.perf_counter()
        leaves, form = flatten((args, kwargs))
        around = Surroundings.now(_device_types(leaves))
        nodes = [self._node(number, site, leaves, form, around) for number, site in wanted]
        tokens = _tokens(leaves)
        made, inside = time.perf_counter(), self.reuse_seconds
        outcome = _made(original, args, kwargs)
        after = time.perf_counter()
        results, result_form = flatten(outcome)
        for (number, _), node in zip(wanted, nodes, strict=True):
            self._keep(number, node, tokens, results, result_form)
        if wanted[0][0] == 0:
            self.plain_seconds += after - made - (self.reuse_seconds - inside)
        self.reuse_seconds += made - begin + time.perf_counter() - after
        return outcome

    def _node(self, number: int, site: Site, leaves: Sequence[Any], form: Form, around: Surroundings) -> Node:
        """Tell what a call depends on; what cannot be read makes it one that is never skipped."""
        try:
            return self._lineages[number].node(site, leaves, form, around)
        except (Refused, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            self._kept[number].failure = f"the inputs of `{site}` cannot be read: {error}"
            return Node(site, b"", {}, None, usable=False)

    def _keep(self, number: int, node: Node, given: Mapping[Token, int], results: list[Any], form: Form) -> None:
        kept, site = self._kept[number], node.site
        self._lineages[number].given(node, results)
        if kept.failure is not None:
            return
        if not node.usable:
            if site.needed:
                self._missed.add(number)
            return
        try:
            result = result_of(results, form, given, kept.rows[site.place], node.rows, self._padding, site)
            compare_half(site, results, kept.rows[site.place])
        except Refused as refusal:
            kept.failure = str(refusal)
            return
        if kept.results.setdefault((site, node.structure), result) != result:
            kept.failure = f"`{site}` returns results of different forms for inputs of one form"
            return
        if places := result.kept(site):
            self._store(number, node, {place: (results[place], result.leaves[place]) for place in places})

    def _store(self, number: int, node: Node, results: Mapping[int, tuple[Any, object]]) -> None:
        """Keep what is needed of a result, if it is not there yet."""
        kept = self._kept[number]
        keys, split = node.keys(), kept.split(node.site)
        if not all(kept.store.has(split, keys)):
            self._missed.add(number)
            tensors = [tensor.detach() for tensor, _ in results.values()]
            kinds = [kind for _, kind in results.values() if isinstance(kind, Kind)]
            if node.rows is None:
                kept.store.add(split, keys, [each[None] for each in tensors], [0] * len(tensors))
            else:
                positions = [next(iter(kind.positions), None) for kind in kinds]
                lengths = None if self._padding is None else self._padding.lengths
                dims = [kind.row_dim for kind in kinds]
                kept.store.add(split, keys, tensors, dims, position_dims=positions, lengths=lengths)
        self._looked.add(number)
        if number == 0:
            self.rows = max(self.rows, node.rows or 0)

    def _replay(self, site: Site, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call with what was kept; make it if something is missing."""
        begin = time.perf_counter()
        leaves, form = flatten((args, kwargs))
        lineage, kept = self._lineages[0], self._kept[0]
        around = Surroundings.now(_device_types(leaves))
        node = self._node(0, site, leaves, form, around)
        result = kept.results.get((site, node.structure)) if node.usable else None
        in_place_on_others = any(not isinstance(leaves[place], StandIn) for place, _ in site.changed)
        known = None if result is None or in_place_on_others else self._known(result.kept(site), node, kept)
        if result is None or known is None:
            return self._made_after_all(node, original, leaves, form)

        def make(arguments: list[Any]) -> list[Any]:
            again, more = form.build(arguments)
            return flatten(original(*again, **more))[0]

        given = [leaf.twin() if isinstance(leaf, StandIn) else leaf for leaf in leaves] if site.changed else leaves
        deferred = Deferred(make, given, around)
        width = 0 if self._padding is None else self._padding.width
        filled = _filled(result, known, leaves, deferred, (node.rows or 0, width))
        lineage.given(node, filled)
        for place, returned in site.changed:
            leaves[place].source = (deferred, returned)
            lineage.changed(leaves[place], node, returned)
        outcome = result.form.build(filled)
        self.replayed = True
        if around.gradients:
            self._memory[_identities(site.name, leaves)] = outcome
        self.reuse_seconds += time.perf_counter() - begin
        return outcome

    def _known(self, places: Sequence[int], node: Node, kept: Kept) -> dict[int, Tensor] | None:
        """Return what was kept of a call, by place."""
        if not places:
            return {}
        self._looked.add(0)
        self.rows = max(self.rows, node.rows or 0)
        width = None if self._padding is None or node.rows is None else self._padding.width
        tensors = kept.store.get(kept.split(node.site), node.keys(), width=width)
        if tensors is not None and node.rows is None:
            tensors = [each[0] for each in tensors]
        return None if tensors is None else dict(zip(places, tensors, strict=True))

    def _made_after_all(self, node: Node, original: Forward, leaves: Sequence[Any], form: Form) -> Any:
        """Make a call of which something is missing."""
        self._missed.add(0)
        leaves = [real(leaf) for leaf in leaves]
        tokens = _tokens(leaves)
        args, kwargs = form.build(leaves)
        outcome = original(*args, **kwargs)
        results, result_form = flatten(outcome)
        self._keep(0, node, tokens, results, result_form)
        return outcome


def _filled(
    result: Result, known: Mapping[int, Tensor], arguments: Sequence[Any], deferred: Deferred, sizes: tuple[int, int]
) -> list[Any]:
    """Return the leaves that a skipped call hands on."""
    filled: list[Any] = []
    for place, leaf in enumerate(result.leaves):
        if place in known:
            filled.append(known[place])
        elif isinstance(leaf, Passed):
            filled.append(arguments[leaf.place])
        elif isinstance(leaf, Kind):
            filled.append(StandIn.of(deferred, place, leaf.shape_of(*sizes), leaf.dtype, leaf.device))
        else:
            filled.append(leaf)
    return filled


def _made(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call, with what stand-ins stand for. What is passed otherwise is the caller's own."""
    if stand_ins((args, kwargs)):
        args, kwargs = mapped(real, (args, kwargs))
    return original(*args, **kwargs)


def _identities(name: str, leaves: Sequence[Any]) -> tuple[object, ...]:
    return (name, *map(_identity, leaves))


def _identity(leaf: Any) -> object:
    return token(leaf) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf))


def _device_types(leaves: Sequence[Any]) -> list[str]:
    return sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} | {"cpu"})


def _tokens(leaves: Sequence[Any]) -> dict[Token, int]:
    return {token(leaf): place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
