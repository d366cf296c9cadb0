"""Reuse in one stage, training or validation: what is skipped, what is kept, and whether it may be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..session import Session
from .accounts import PrefixAccount
from .calls import Forward, Interception, compiled_modules
from .cut import Cut, block, find
from .guard import Guard
from .refusal import Refused
from .replay import Kept, Rows, Step
from .state import State
from .store import PrefixStore
from .trees import first_rows, flatten
from .trial import Observed, Trials, difference, differing_gradients, gradients_of, state_difference
from .watch import Call, Trace, Watch

_PHASES_AHEAD = 8  # whose outputs are kept in one pass
_CHANGES = 2  # of what is frozen, after which reuse is given up


class Stage:
    """Runs the steps of one stage.

    Args:
        name: ``"train"`` or ``"validation"``.
        session: Tells what is trained.
        store: Where outputs are kept.
        trials: Runs steps of which nothing remains.
        give_up: Called with the reason when reuse is over for the session.
        tell: Called with a reason why a phase goes without reuse.
    """

    def __init__(
        self,
        name: str,
        session: Session,
        store: PrefixStore,
        trials: Trials,
        give_up: Callable[[str], None],
        tell: Callable[[str], None],
    ) -> None:
        self.name = name
        self._session = session
        self._store = store
        self._trials = trials
        self._give_up = give_up
        self._tell = tell
        self._model = session.view.model
        self._names = {name: module for name, module in self._model.named_modules() if _can_be_watched(module)}
        self._trace: Trace | None = None
        self._trained_then: frozenset[str] = frozenset()
        self._planned: dict[int, Cut] = {}
        self._rows: dict[tuple[str, int], Rows] = {}
        self._kept: dict[Cut, Kept] = {}
        self._born: dict[Cut, int] = {}
        self._current: Kept | None = None
        self._due = True
        self._guard: Guard | None = None
        self._obstacle: str | None = None
        self._changes = 0
        self._epoch = 0
        self._epoch_rows = self._epoch_hits = 0
        self._known = False  # whether rows were kept when the epoch began
        self._step: Step | None = None
        self._interception: Interception | None = None
        self._account: dict[str, Any] = {}
        self._plain_per_row = 0.0

    # --- what the driver calls

    def run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a step, with what is known of its batch."""
        self.after_backward()
        begin = time.perf_counter()
        try:
            kept = self._ready(step, args, kwargs)
        except Refused as refusal:
            self._refuse(str(refusal))
            kept = None
        self._count("seconds_recording", time.perf_counter() - begin)
        if kept is None:
            return step(*args, **kwargs)
        may_verify = not kept.verified and bool(kept.seen) and self._epoch > self._born[kept.cut]
        before = State.of(self._live(kept)) if may_verify else None
        others = [] if kept.verified and not self._others(kept) else self._others(kept)
        run = Step(kept, others, replays=None if kept.verified else False)
        observed = Observed()
        with self._intercepted(run, observed if may_verify else None).active():
            output = step(*args, **kwargs)
        self._finish(run, kept)
        if before is not None and run.hits and kept.failure is None:
            self._verify(kept, before, output, observed, partial(step, *args, **kwargs))
        return output

    def after_backward(self) -> None:
        """Let the modules be called as before: activation checkpointing has nothing to make again any more."""
        if self._interception is not None:
            self._interception.remove()
        self._interception = self._step = None

    def phase_begins(self) -> None:
        """Take note that something else is trained."""
        self._due, self._account, self._known = True, {}, False

    def epoch_ends(self) -> None:
        """Take note that rows come again from now on; stop keeping them if none has."""
        kept = self._current
        if kept is not None and kept.failure is None and self._known and self._epoch_rows and not self._epoch_hits:
            self._stop(kept, "no row has come again in a whole epoch")
        self._epoch += 1
        self._epoch_rows = self._epoch_hits = 0
        self._known = bool(kept is not None and kept.seen)

    def account(self, phase: int) -> PrefixAccount:
        """Tell what reuse has done in a phase so far."""
        held = self._store.bytes + self._store.spilled_bytes
        return PrefixAccount(phase, self.name, bytes=held, **self._account)

    def close(self) -> None:
        """Let go of everything."""
        self.after_backward()
        self._trace, self._current, self._guard = None, None, None
        self._kept, self._rows, self._planned = {}, {}, {}

    # --- before a step

    def _ready(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kept | None:
        """Return what is kept in the present phase, or ``None`` if the step has to be a plain one."""
        if self._due:
            self._due = False
            self._current, self._guard = None, None
            self._obstacle = None
            self._plan(step, args, kwargs)
        kept = self._current
        if kept is None:
            return None
        if kept.failure is not None:
            self._stop(kept, kept.failure)
            return None
        if self._guard is None:
            self._guard = Guard(self._inside(kept))
        elif not self._guard.same() and not self._still_good():
            return None
        return self._current

    def _still_good(self) -> bool:
        """Look at what has changed in the skipped modules; tell if they may be skipped."""
        guard = self._guard
        if guard is None:
            return False
        if (obstacle := guard.obstacle()) is not None:
            if obstacle != self._obstacle:
                self._obstacle = obstacle
                self._account["reason"] = obstacle
                self._tell(obstacle)
            return False
        self._obstacle = None
        if (change := guard.difference()) is not None:
            self._changes += 1
            for kept in self._kept.values():
                kept.drop()
                kept.results.clear()
                self._born[kept.cut] = self._epoch
            if self._changes >= _CHANGES:
                self._give_up(change)
                return False
            self._guard = None
        return True

    def _plan(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find what is skipped in this phase and the next ones."""
        phase, plan = self._session.phase, self._session.plan
        trained = frozenset(plan.phases[phase].trainable)
        if self._trace is None or not trained >= self._trained_then:
            self._look(step, args, kwargs)
            self._trained_then = trained
        trace = self._trace
        if trace is None:
            return
        self._planned = {}
        for state in islice(plan.phases, phase, min(phase + _PHASES_AHEAD, len(plan.phases))):
            if state.index > phase and not frozenset(state.trainable) >= trained:
                break
            tensors = [self._session.parameters[name] for name in state.trainable if name in self._session.parameters]
            self._planned[state.index] = cut = find(trace, tensors)
            if not cut.sites:
                break
        cut = self._planned[phase]
        if not cut.sites:
            self._refuse(cut.reason)
            return
        self._see_rows(step, args, kwargs, trace)
        self._choose(cut)

    def _choose(self, cut: Cut) -> None:
        """Keep what the present and the coming cuts need, and nothing else."""
        wanted = {each: None for each in self._planned.values() if each.sites}
        for old in [each for each in self._kept if each not in wanted]:
            self._kept.pop(old).drop()
        for each in wanted:
            if each not in self._kept and all(site.place in self._rows for site in each.sites):
                label = (self.name, *(f"{site.name} {site.occurrence} {sorted(site.needed)}" for site in each.sites))
                self._kept[each] = Kept(label, each, self._rows, self._store)
                self._born[each] = self._epoch
        self._current = self._kept[cut]
        self._current.verified = False
        self._account["skipped"] = tuple(dict.fromkeys(site.name for site in cut.sites))

    def _look(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Watch a pass."""
        watch = Watch(self._names)

        def watched() -> Any:
            with watch.active():
                result = step(*args, **kwargs)
            watch.trace.results = _storages(watch.trace, result)
            return None

        self._trials.run(watched, self._model.modules(), eager=True)
        block(watch.trace, self._model, compiled_modules(self._model), _storages(watch.trace, (args, kwargs)))
        self._trace, self._rows = watch.trace, {}
        if any(each.communicates for each in watch.trace.operations):
            self._trace = None
            raise Refused("the step communicates with other processes")

    def _see_rows(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], trace: Trace) -> None:
        """Run half of the batch, to see which dimensions are rows; what it gives is compared with the whole later."""
        places = {site.place for cut in self._planned.values() for site in cut.sites}
        now = self._planned[self._session.phase].sites
        if all(site.place in self._rows for site in now):
            return
        count = next((len(leaf) for leaf in flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and leaf.dim()), 0)
        if count < 2:
            self._due = True  # a later batch may have more
            raise Refused("a batch of one row does not show which dimensions are rows")
        take = (count + 1) // 2
        half_args, half_kwargs = first_rows(args, count, take), first_rows(kwargs, count, take)
        half = _Half(places)
        names = {name for name, _ in places}
        interception = Interception({self._names[name]: partial(half.called, name) for name in names})

        def halved() -> Any:
            with interception.active():
                step(*half_args, **half_kwargs)

        self._trials.run(halved, self._model.modules(), eager=True)
        calls = {(call.name, call.occurrence): call for call in _all_calls(trace.calls)}
        found = {
            place: _rows_of(calls[place], shapes, results, count, take)
            for place, (shapes, results) in half.seen.items()
            if place in calls
        }
        if missing := [site for site in now if found.get(site.place) is None]:
            raise Refused(f"the rows of `{missing[0]}` cannot be told from its other dimensions")
        self._rows |= {place: rows for place, rows in found.items() if rows is not None}

    # --- during and after a step

    def _others(self, current: Kept) -> list[Kept]:
        """Return what is kept for coming phases; less of it where memory is short."""
        others = [kept for kept in self._kept.values() if kept is not current and kept.failure is None]
        if others and self._store.spilled_bytes:
            others[-1].drop()
            self._kept.pop(others.pop().cut)
        return others

    def _intercepted(self, run: Step, observed: Observed | None) -> Interception:
        names = {site.name for kept in self._kept.values() for site in kept.cut.sites}
        wrappers: dict[nn.Module, Any] = {self._names[name]: partial(run.called, name) for name in names}
        if observed is not None and self._trace is not None:
            for call in self._trace.calls:
                wrappers.setdefault(call.module, partial(observed.called, call.name))
        return Interception(wrappers)

    def _finish(self, run: Step, kept: Kept) -> None:
        """Count what a step has brought."""
        run.over = True
        self._forget_uncompared(kept)
        if not run.replayed:
            run.commit()
        self._epoch_rows += run.rows
        self._count("rows", run.rows)
        if run.replayed:
            hits = run.rows if run.hits else 0
            self._epoch_hits += hits
            self._count("hits", hits)
            self._count("seconds_saved", hits * self._plain_per_row - run.reuse_seconds)
            if torch.is_grad_enabled():
                self._step, self._interception = run, self._intercepted(run, None)
                self._interception.install()
        else:
            self._plain_per_row = run.plain_seconds / max(run.rows, 1)
            self._count("seconds_recording", run.reuse_seconds)
            if run.hits and kept.seen:
                self._epoch_hits += run.rows
        if self._store.failure is not None:
            self._give_up(f"the store has failed: {self._store.failure}")
        elif kept.failure is not None:
            self._stop(kept, kept.failure)

    def _verify(self, kept: Kept, before: State, output: object, observed: Observed, step: Callable[[], Any]) -> None:
        """Replay a step that has just been made plainly, and compare all that it has led to."""
        begin = time.perf_counter()
        live = self._live(kept)
        after = State.of(live)
        parameters = [each for each in self._session.parameters.values() if each.requires_grad]
        gradients = gradients_of(output, parameters) if torch.is_grad_enabled() else None
        run, seen_again = Step(kept, replays=True), Observed()
        replayed_gradients: list[list[Tensor | None] | None] = []

        def replayed() -> Any:
            with self._intercepted(run, seen_again).active():
                result = step()
                run.over = True
                replayed_gradients.append(gradients_of(result, parameters) if torch.is_grad_enabled() else None)
            return result

        before.restore()
        try:
            result, state = self._trials.run(replayed, live)
            found = difference(output, result, "the result of the step") or _observed(observed, seen_again)
            if found is None and differing_gradients(gradients, replayed_gradients[0]):
                found = "a gradient has other values"
            found = found or state_difference(after, state)
        except (Refused, RuntimeError) as error:
            found = str(error)
        finally:
            after.restore()
        self._count("seconds_recording", time.perf_counter() - begin)
        if found is not None:
            self._give_up(f"a replayed batch differs from the plain one: {found}")
        else:
            kept.verified = True

    def _forget_uncompared(self, current: Kept) -> None:
        """Leave out what half a batch has shown of calls that the whole one has not made."""
        uncompared = {place for place, rows in self._rows.items() if rows.half}
        for kept in list(self._kept.values()) if uncompared else ():
            if any(site.place in uncompared for site in kept.cut.sites):
                if kept is current:
                    kept.failure = kept.failure or "the modules are not called in every step"
                else:
                    self._kept.pop(kept.cut).drop()
        for place in uncompared:
            del self._rows[place]

    # --- small things

    def _live(self, kept: Kept) -> list[nn.Module]:
        """Return the modules that are not skipped."""
        skipped = set(self._inside(kept).values())
        return [module for module in self._model.modules() if module not in skipped]

    def _inside(self, kept: Kept) -> dict[str, nn.Module]:
        inside: dict[str, nn.Module] = {}
        for name in {site.name: None for site in kept.cut.sites}:
            inside |= {f"{name}.{inner}" if inner else name: each for inner, each in self._names[name].named_modules()}
        return inside

    def _count(self, what: str, value: float) -> None:
        self._account[what] = self._account.get(what, 0) + value

    def _refuse(self, reason: str) -> None:
        if self._account.get("reason") != reason:
            self._account["reason"] = reason
            self._tell(reason)

    def _stop(self, kept: Kept, reason: str) -> None:
        """Go on without what is kept of the present cut."""
        kept.failure = reason
        kept.drop()
        self._current = None
        self._refuse(reason)


class _Half:
    """Notes the shapes of arguments and the results of calls."""

    def __init__(self, places: Collection[tuple[str, int]]) -> None:
        self.seen: dict[tuple[str, int], tuple[list[tuple[int, ...] | None], list[Any]]] = {}
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


def _observed(plain: Observed, replayed: Observed) -> str | None:
    if [name for name, _ in plain.results] != [name for name, _ in replayed.results]:
        return "other modules are called"
    pairs = zip(plain.results, replayed.results, strict=True)
    return next((found for (name, one), (_, other) in pairs if (found := difference(one, other, f"`{name}`"))), None)


def _storages(trace: Trace, value: object) -> set[int]:
    return {trace.storage(leaf) for leaf in flatten(value)[0] if isinstance(leaf, Tensor) and not leaf.is_nested}


def _all_calls(calls: Sequence[Call]) -> Iterator[Call]:
    for call in calls:
        yield call
        yield from _all_calls(call.inner)


def _can_be_watched(module: nn.Module) -> bool:
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, torch.jit.ScriptModule)
    return not isinstance(module, containers)
