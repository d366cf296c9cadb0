"""Which calls are skipped in the present phase and in those to come, and where their rows lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..session import Session
from .calls import Forward, Interception, compiled_modules
from .cut import Cut, block, find
from .lineage import Rows
from .padding import PaddedBatch, Places, Positions, padding_is_unread, positions_of
from .refusal import Refused
from .trees import first_rows, flatten, mapped_by_number
from .trial import Trials
from .watch import Call, Trace, Watch

Captured = dict[tuple[str, int], tuple[list[tuple[int, ...] | None], list[Any]]]
_PHASES_AHEAD = 8  # whose outputs are kept in one pass


class Planner:
    """Watches a pass, and finds in it what can be skipped.

    Args:
        session: Tells what is trained.
        trials: Runs steps of which nothing remains.

    Attributes:
        modules: The modules whose calls can be watched, by name.
        cuts: What is skipped, by phase, from the present one on.
        rows: By call, where the rows of its tensors lie.
        watches: How many passes have been watched.
    """

    def __init__(self, session: Session, trials: Trials) -> None:
        self._session = session
        self._trials = trials
        self._model = session.view.model
        self._trace: Trace | None = None
        self._trained_then: frozenset[str] = frozenset()
        self.modules = {name: module for name, module in self._model.named_modules() if _can_be_watched(module)}
        self.cuts: dict[int, Cut] = {}
        self.rows: dict[tuple[str, int], Rows] = {}
        self.watches = 0

    @property
    def outermost(self) -> dict[str, nn.Module]:
        """The modules that a step calls itself."""
        return {} if self._trace is None else {call.name: call.module for call in self._trace.calls}

    def plan(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cut:
        """Find what is skipped in the present phase and the next ones.

        Raises:
            Refused: It cannot be found.
        """
        phase, plan = self._session.phase, self._session.plan
        trained = frozenset(plan.phases[phase].trainable)
        if self._trace is None or not trained >= self._trained_then:
            self._trace, self.rows = None, {}
            self._trace, self._trained_then = self._watched(step, args, kwargs), trained
        self.cuts = {}
        for state in islice(plan.phases, phase, phase + _PHASES_AHEAD):
            if not frozenset(state.trainable) >= trained:
                break
            tensors = [self._session.parameters[name] for name in state.trainable if name in self._session.parameters]
            self.cuts[state.index] = find(self._trace, tensors)
            if not self.cuts[state.index].sites:
                break
        if any(site.place not in self.rows for site in self.cuts[phase].sites):
            self._see_rows(self._trace, step, args, kwargs)
        return self.cuts[phase]

    def positions(
        self, batch: PaddedBatch, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Places:
        """Show that padding does not count, by a batch with more and other padding.

        Raises:
            Refused: It counts, or it cannot be told.
        """
        plain = self._captured(self.rows.keys(), step, args, kwargs)
        wider = batch.wider((args, kwargs), mapped_by_number)
        wide = self._captured(self.rows.keys(), step, *wider)
        places: dict[tuple[str, int], Positions] = {}
        for call, rows in self.rows.items():
            if call not in plain or call not in wide:
                raise Refused("other modules are called for a wider batch")
            found = positions_of(batch, plain[call], wide[call])
            if found is None or not padding_is_unread(batch, found, rows.results, plain[call][1], wide[call][1]):
                raise Refused(f"padding counts in `{call[0]}`")
            places[call] = found
        if not any(any(each.arguments.values()) for each in places.values()):
            raise Refused("no frozen module is given padded rows")
        return places

    def _captured(
        self,
        places: Collection[tuple[str, int]],
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Captured:
        """Run a step of which nothing remains but the shapes and results of calls."""
        seen = _Capture(places)
        names = {name for name, _ in places}
        interception = Interception({self.modules[name]: partial(seen.called, name) for name in names})

        def captured() -> None:
            with interception.active():
                step(*args, **kwargs)

        self._trials.run(captured, self._model.modules(), step, eager=True)
        return seen.seen

    def uncompared(self) -> set[tuple[str, int]]:
        """Forget the calls that half a batch has shown and the whole one has not made; return them."""
        places = {place for place, rows in self.rows.items() if rows.half}
        for place in places:
            del self.rows[place]
        return places

    def _watched(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        """Watch a pass."""
        watch = Watch(self.modules, self._model.parameters())

        def watched() -> None:
            with watch.active():
                result = step(*args, **kwargs)
            watch.trace.results = _storages(watch.trace, result)

        try:
            self._trials.run(watched, self._model.modules(), step, eager=True)
        finally:
            watch.bring_back()
        if watch.written:
            raise Refused("the step changes weights itself")
        self.watches += 1
        if any(each.communicates for each in watch.trace.operations):
            raise Refused("the step communicates with other processes")
        block(watch.trace, self._model, compiled_modules(self._model), _storages(watch.trace, (args, kwargs)))
        return watch.trace

    def _see_rows(self, trace: Trace, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run half of the batch, to see which dimensions are rows; what it gives is compared with the whole later."""
        places = {site.place for cut in self.cuts.values() for site in cut.sites}
        count = rows_of_batch(args, kwargs)
        take = (count + 1) // 2
        half_args, half_kwargs = first_rows(args, count, take), first_rows(kwargs, count, take)
        seen = self._captured(places, step, half_args, half_kwargs)
        calls = {(call.name, call.occurrence): call for call in _all_calls(trace.calls)}
        found = {
            place: _rows_of(calls[place], shapes, results, count, take)
            for place, (shapes, results) in seen.items()
            if place in calls
        }
        sites = self.cuts[self._session.phase].sites
        if missing := [site for site in sites if found.get(site.place) is None]:
            raise Refused(f"the rows of `{missing[0]}` cannot be told from its other dimensions")
        if not any(rows is not None and set(rows.arguments.values()) - {None} for rows in found.values()):
            raise Refused("no frozen module is given rows of the batch that the step is given")
        self.rows |= {place: rows for place, rows in found.items() if rows is not None}


def rows_of_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of rows of a batch, by its first tensor; 0 if there is none."""
    leaves, _ = flatten((args, kwargs))
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 0)


class _Capture:
    """Notes the shapes of arguments and the results of calls."""

    def __init__(self, places: Collection[tuple[str, int]]) -> None:
        self.seen: Captured = {}
        self._places = places
        self._counts: dict[str, int] = {}

    def called(self, name: str, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        occurrence = self._counts.get(name, 0)
        self._counts[name] = occurrence + 1
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in flatten((args, kwargs))[0]]
        result = original(*args, **kwargs)
        if (name, occurrence) in self._places:
            leaves = [each.detach().clone() if isinstance(each, Tensor) else each for each in flatten(result)[0]]
            self.seen[name, occurrence] = shapes, leaves
        return result


def _rows_of(
    call: Call, shapes: Sequence[tuple[int, ...] | None], results: Sequence[Any], count: int, take: int
) -> Rows | None:
    """Compare the shapes of a call with those of half a batch; ``None`` if they do not fit."""
    rows = Rows(half_rows=take)
    sizes: set[int] = set()
    if len(shapes) != len(call.arguments) or len(results) != len(call.results):
        return None
    for place, (seen, shape) in enumerate(zip(call.arguments, shapes, strict=True)):
        if seen.storage is not None and shape is not None:
            dim = _row_dim(seen.shape, shape, count, take)
            rows.arguments[place] = None if dim == -1 else dim
            sizes |= {seen.shape[dim]} if dim is not None and dim >= 0 else set()
    for place, (seen, leaf) in enumerate(zip(call.results, results, strict=True)):
        if seen.storage is None or not isinstance(leaf, Tensor):
            continue
        dim = _row_dim(seen.shape, tuple(leaf.shape), count, take)
        if dim == -1 or (dim is not None and len(sizes) == 1 and seen.shape[dim] not in sizes):
            return None
        rows.results[place] = dim
        if dim is not None:
            rows.half_rows = leaf.shape[dim]
        rows.half[place] = leaf
    return rows


def _row_dim(full: tuple[int, ...], half: tuple[int, ...], count: int, take: int) -> int | None:
    """Return the only dimension in which two shapes differ, -1 if there are several or it is no dimension of rows."""
    if len(full) != len(half):
        return -1
    dims = [dim for dim, (one, other) in enumerate(zip(full, half, strict=True)) if one != other]
    if not dims:
        return None
    return dims[0] if len(dims) == 1 and full[dims[0]] * take == half[dims[0]] * count else -1


def _storages(trace: Trace, value: object) -> set[int]:
    return {trace.storage(leaf) for leaf in flatten(value)[0] if isinstance(leaf, Tensor) and not leaf.is_nested}


def _all_calls(calls: Sequence[Call]) -> Iterator[Call]:
    for call in calls:
        yield call
        yield from _all_calls(call.inner)


def _can_be_watched(module: nn.Module) -> bool:
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, torch.jit.ScriptModule)
    return not isinstance(module, containers)
