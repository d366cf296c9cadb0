"""Reuse in one stage, training or validation: what is skipped, what is kept, and whether it may be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..session import Session
from .accounts import PrefixAccount
from .calls import Interception
from .closeness import Comparison
from .cut import Cut
from .guard import Guard
from .kept import Kept
from .padding import PaddedBatch, Places, padded_batch
from .planning import Planner, rows_of_batch
from .refusal import Refused
from .replay import Step
from .state import State
from .store import PrefixStore
from .trial import Observed, Trials, gradients_of, moved, versions_of

_ATTEMPTS = 3  # to verify a batch, in an epoch
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
        comparison: Compares a replayed batch with a plain one.
        shared: Whether other processes read the store, too.
    """

    def __init__(
        self,
        name: str,
        session: Session,
        store: PrefixStore,
        trials: Trials,
        give_up: Callable[[str], None],
        tell: Callable[[str], None],
        comparison: Comparison,
        *,
        shared: bool,
    ) -> None:
        self.name = name
        self._session = session
        self._store = store
        self._trials = trials
        self._give_up = give_up
        self._tell = tell
        self._comparison = comparison
        self._shared = shared
        self._model = session.view.model
        self._planner = Planner(session, trials)
        self._kept: dict[Cut, Kept] = {}
        self._born: dict[Cut, int] = {}
        self._current: Kept | None = None
        self._due = True
        self._guard: Guard | None = None
        self._obstacle: str | None = None
        self._changes = 0
        self._read_in = 0  # the epoch in which what is frozen has been read
        self._epoch = 0
        self._epoch_rows = self._epoch_hits = 0
        self._attempts = 0  # to verify, in the present epoch
        self._known = False  # whether rows were kept when the epoch began
        self._step: Step | None = None
        self._interception: Interception | None = None
        self._account: dict[str, Any] = {}
        self._plain_per_row = 0.0
        self._padding_counts = False
        self._mask: int | None = None  # the leaf of batches that is their mask
        self._places: Places | None = None  # the positions of rows, once padding has been shown not to count

    # --- what the driver calls

    def run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a step, with what is known of its batch."""
        self.after_backward()
        begin = time.perf_counter()
        try:
            kept = self._ready(step, args, kwargs)
            padding = None if kept is None else self._padding_of(step, args, kwargs)
        except Refused as refusal:
            self._refuse(str(refusal))
            kept = padding = None
        self._count("seconds_recording", time.perf_counter() - begin)
        if kept is None:
            return step(*args, **kwargs)
        shows = padding is None or padding.is_padded
        may_verify = not kept.verified and shows and self._epoch > self._born[kept.cut] and self._attempts < _ATTEMPTS
        before = State.of(self._live(kept), step) if may_verify else None
        versions = versions_of(self._model) if may_verify else {}
        run = Step(kept, self._others(kept), replays=None if kept.verified else False, padding=padding)
        observed = Observed()
        with self._intercepted(run, observed if may_verify else None).active():
            output = step(*args, **kwargs)
        known = run.known
        self._epoch_hits += run.known_rows if self._known else 0
        self._finish(run, kept)
        if (name := moved(self._model, versions)) is not None:
            self._give_up(f"the step changes `{name}` itself")
        elif before is not None and known and kept.failure is None:
            self._verify(kept, before, output, observed, partial(step, *args, **kwargs), padding)
        return output

    def after_backward(self) -> None:
        """Let the modules be called as before: activation checkpointing has nothing to make again any more."""
        if self._interception is not None:
            self._interception.remove()
        self._interception = self._step = None

    def phase_begins(self) -> None:
        """Take note that something else is trained."""
        self._due, self._account, self._known, self._attempts = True, {}, False, 0

    def epoch_ends(self) -> None:
        """Take note that rows come again from now on; stop keeping them if none has."""
        kept = self._current
        if kept is not None and kept.failure is None and self._known and self._epoch_rows and not self._epoch_hits:
            self._stop(kept, "no row has come again in a whole epoch")
        self._epoch += 1
        self._epoch_rows = self._epoch_hits = self._attempts = 0
        self._known = bool(kept is not None and kept.seen)

    def account(self, phase: int) -> PrefixAccount:
        """Tell what reuse has done in a phase so far."""
        held = self._store.bytes + self._store.spilled_bytes
        return PrefixAccount(phase, self.name, bytes=held, **self._account)

    def note(self, reason: str) -> None:
        """Take it into the account that there is no reuse any more."""
        self._account["reason"] = reason

    def close(self) -> None:
        """Let go of everything."""
        self.after_backward()
        self._current, self._guard, self._kept = None, None, {}
        self._planner = Planner(self._session, self._trials)

    # --- before a step

    def _ready(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kept | None:
        """Return what is kept in the present phase, or ``None`` if the step has to be a plain one."""
        if self._due:
            if (rows := rows_of_batch(args, kwargs)) < 2:
                batch = "a batch of one row does not show which dimensions are rows"
                raise Refused(batch if rows else "the step is given no batch of tensors")
            self._due = False
            before, self._current, self._guard, self._obstacle = self._guard, None, None, None
            self._current = planned = self._plan(step, args, kwargs)
            if before is not None and not before.same():
                self._still_same(before.narrowed(self._inside(planned)))
        kept = self._current
        if kept is None:
            return None
        if kept.failure is not None:
            self._stop(kept, kept.failure)
            return None
        if self._guard is None:
            self._guard = Guard(self._inside(kept))
            return kept if self._may_be_skipped(self._guard) else None
        if (self._obstacle is None and self._guard.same()) or self._still_good(self._guard):
            return None if self._has_moved_unseen() else self._current
        return None

    def _has_moved_unseen(self) -> bool:
        """Once an epoch, read what is frozen; tell if something has been changed behind PyTorch's back."""
        if self._read_in == self._epoch or self._guard is None:
            return False
        self._read_in = self._epoch
        if (change := self._guard.moved()) is None:
            return False
        self._give_up(f"{change}, through `.data` or the like; up to an epoch was trained on outputs of before")
        return True

    def _may_be_skipped(self, guard: Guard) -> bool:
        """Tell if nothing stands against skipping the modules at the moment."""
        obstacle, before = guard.obstacle(), self._obstacle
        self._obstacle = obstacle
        if obstacle is not None and obstacle != before:
            self._refuse(obstacle)
        return obstacle is None

    def _still_good(self, guard: Guard) -> bool:
        """Look at what has changed in the skipped modules; tell if they may be skipped."""
        return self._may_be_skipped(guard) and self._still_same(guard)

    def _still_same(self, guard: Guard) -> bool:
        """Forget all rows if what is frozen has changed; tell if it may be reused."""
        if (change := guard.difference()) is not None:
            self._changes += 1
            self._forget()
            if self._changes >= _CHANGES:
                self._give_up(change)
                return False
            self._guard = None
        return True

    def _forget(self) -> None:
        """Forget all rows."""
        self._known = False
        for kept in self._kept.values():
            kept.drop()
            kept.results.clear()
            self._born[kept.cut] = self._epoch

    def _padding_of(
        self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> PaddedBatch | None:
        """Tell what counts of each row, once a batch has shown that padding does not.

        Raises:
            Refused: The batch has no such mask although others had.
        """
        current = self._current
        if self._padding_counts or current is None:
            return None
        batch = padded_batch((args, kwargs), self._mask)
        if self._places is not None and any(site.place not in self._places for site in current.cut.sites):
            self._places = None
        if self._places is None:
            if batch is None or not batch.is_padded:
                return None
            try:
                self._places = self._planner.positions(batch, step, args, kwargs)
            except Refused as refusal:
                self._count_padding(str(refusal))
                return None
            self._mask = batch.leaf
            self._forget()
        if batch is None:
            raise Refused("a batch is not padded at the end of its rows, as others are")
        return replace(batch, places=self._places)

    def _count_padding(self, reason: str) -> None:
        """Take rows as they are from now on, padding included."""
        self._padding_counts = True
        self._account["left_out"] = (*self._account.get("left_out", ()), f"padding counts: {reason}")
        self._forget()

    def _plan(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kept:
        """Keep what the present phase and the coming ones need, and nothing else.

        Raises:
            Refused: Nothing can be skipped in the present phase.
        """
        watches, planner = self._planner.watches, self._planner
        cut = planner.plan(step, args, kwargs)
        wanted = {each: None for each in planner.cuts.values() if each.sites}
        for old in [each for each in self._kept if each not in wanted or planner.watches > watches]:
            self._kept.pop(old).drop()
        for each in wanted:
            if each not in self._kept and all(site.place in planner.rows for site in each.sites):
                label = (self.name, *(f"{site.name} {site.occurrence} {sorted(site.needed)}" for site in each.sites))
                self._kept[each] = Kept(label, each, planner.rows, self._store, self._shared)
                self._born[each] = self._epoch
        self._account["left_out"] = cut.refusals
        if not cut.sites:
            raise Refused(cut.reason)
        self._account["skipped"] = tuple(dict.fromkeys(site.name for site in cut.sites))
        self._kept[cut].verified = False
        return self._kept[cut]

    # --- during and after a step

    def _others(self, current: Kept) -> list[Kept]:
        """Return what is kept for coming phases; less of it where memory is short."""
        others = [kept for kept in self._kept.values() if kept is not current and kept.failure is None]
        if others and self._store.bytes and self._store.spilled_bytes:
            others[-1].drop()
            self._kept.pop(others.pop().cut)
        return others

    def _intercepted(self, run: Step, observed: Observed | None) -> Interception:
        names = {site.name for kept in self._kept.values() for site in kept.cut.sites}
        wrappers: dict[nn.Module, Any] = {self._planner.modules[name]: partial(run.called, name) for name in names}
        if observed is not None:
            for name, module in self._planner.outermost.items():
                wrappers.setdefault(module, partial(observed.called, name))
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
            self._count("hits", hits)
            self._count("seconds_saved", hits * self._plain_per_row - run.reuse_seconds)
            if torch.is_grad_enabled():
                self._step, self._interception = run, self._intercepted(run, None)
                self._interception.install()
        else:
            self._plain_per_row = run.plain_seconds / max(run.rows, 1)
            self._count("seconds_recording", run.reuse_seconds)
        if self._store.failure is not None:
            self._give_up(f"the store has failed: {self._store.failure}")
        elif kept.failure is not None:
            self._stop(kept, kept.failure)

    def _verify(
        self,
        kept: Kept,
        before: State,
        output: object,
        observed: Observed,
        step: Callable[[], Any],
        padding: PaddedBatch | None,
    ) -> None:
        """Replay a step that has just been made plainly, and compare all that it has led to."""
        begin = time.perf_counter()
        live = self._live(kept)
        after = State.of(live, getattr(step, "func", step))
        parameters = [each for each in self._session.parameters.values() if each.requires_grad]
        gradients = gradients_of(output, parameters) if torch.is_grad_enabled() else None
        run, seen_again = Step(kept, replays=True, padding=padding), Observed()
        comparison = replace(self._comparison, padding=padding)
        replayed_gradients: list[list[Tensor | None] | None] = []

        def replayed() -> Any:
            with self._intercepted(run, seen_again).active():
                result = step()
                run.over = True
                replayed_gradients.append(gradients_of(result, parameters) if torch.is_grad_enabled() else None)
            return result

        before.restore()
        try:
            result, state = self._trials.run(replayed, live, step)
            found = (
                comparison.results(output, result, "the result of the step")
                or _differing_outputs(observed, seen_again, comparison)
                or comparison.gradients(gradients, replayed_gradients[0])
                or comparison.states(after, state)
            )
        except (Refused, RuntimeError) as error:
            found = str(error)
        finally:
            after.restore()
        self._count("seconds_recording", time.perf_counter() - begin)
        if found is not None and padding is not None:
            self._count_padding(f"without it, {found}")
        elif found is not None:
            self._give_up(f"a replayed batch differs from the plain one: {found}")
        else:
            self._attempts += 1
            kept.verified = run.replayed and run.hits

    def _forget_uncompared(self, current: Kept) -> None:
        """Leave out what half a batch has shown of calls that the whole one has not made."""
        uncompared = self._planner.uncompared()
        for kept in list(self._kept.values()) if uncompared else ():
            if any(site.place in uncompared for site in kept.cut.sites):
                if kept is current:
                    kept.failure = kept.failure or "the modules are not called in every step"
                else:
                    self._kept.pop(kept.cut).drop()

    # --- small things

    def _live(self, kept: Kept) -> list[nn.Module]:
        """Return the modules that are not skipped."""
        skipped = set(self._inside(kept).values())
        return [module for module in self._model.modules() if module not in skipped]

    def _inside(self, kept: Kept) -> dict[str, nn.Module]:
        inside: dict[str, nn.Module] = {}
        for name in {site.name: None for site in kept.cut.sites}:
            inside |= {
                f"{name}.{inner}" if inner else name: each
                for inner, each in self._planner.modules[name].named_modules()
            }
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


def _differing_outputs(plain: Observed, replayed: Observed, comparison: Comparison) -> str | None:
    if [name for name, _ in plain.results] != [name for name, _ in replayed.results]:
        return "other modules are called"
    for (name, one), (_, other) in zip(plain.results, replayed.results, strict=True):
        where = f"the result of `{name}`" if name else "the result of the model"
        if (found := comparison.results(one, other, where)) is not None:
            return found
    return None
