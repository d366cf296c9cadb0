"""Which calls of a pass need not be made again, and what of theirs has to be kept, by the dataflow of a trace."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .watch import Call, Trace

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_NOISY = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, _BatchNorm)


@dataclass(frozen=True)
class Site:
    """A call that is skipped.

    Attributes:
        name: The module's name.
        occurrence: How many calls of it in the same pass come before.
        needed: Which leaves of its result later code reads.
        changed: Which of its arguments' leaves it changes in place, each with the leaf of the result that it is then.
    """

    name: str
    occurrence: int
    needed: frozenset[int]
    changed: tuple[tuple[int, int], ...] = ()

    @property
    def place(self) -> tuple[str, int]:
        """The call, whatever is needed of it."""
        return self.name, self.occurrence

    def __str__(self) -> str:
        return self.name if not self.occurrence else f"{self.name}, call {self.occurrence + 1}"


@dataclass(frozen=True)
class Cut:
    """The calls that are skipped in some phases, in their order, and why others are not."""

    sites: tuple[Site, ...] = ()
    refusals: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why there is nothing to skip."""
        seen = tuple(dict.fromkeys(self.refusals))
        return "; ".join(seen[:3]) if seen else "no frozen module runs before what is trained"


def block(trace: Trace, model: nn.Module, compiled: Collection[nn.Module], batch: Collection[int]) -> None:
    """Note of each call why it can never be skipped, if it cannot, whatever is trained.

    Args:
        trace: What was seen.
        model: The model.
        compiled: Its compiled modules.
        batch: The storages of the batch.
    """
    weights = {trace.storage(each) for each in (*model.parameters(), *model.buffers())}
    attributes = {
        trace.storage(each) for module in model.modules() for each in vars(module).values() if isinstance(each, Tensor)
    }
    known = weights | {storage for storage in attributes if storage not in batch and storage not in trace.made}
    inside = {each for module in compiled for each in module.modules() if each is not module}
    for call in _inner_first(trace.calls):
        call.blocked = (
            ("it is part of a compiled module" if call.module in inside else None)
            or _about_modules(call.module)
            or _about_leaves(call)
            or _about_effects(call)
            or _about_operations(trace, call, known)
        )


def find(trace: Trace, trained: Collection[Tensor]) -> Cut:
    """Find what is skipped while these parameters are trained.

    Skipped are the outermost calls of frozen modules that depend on nothing trained and nothing random.
    """
    search = _Search(trace, trained)
    while search.chosen() and search.lost():
        pass
    return search.cut()


class _Search:
    """Looks for calls to skip; a call that turns out to hand on more than its result is left out, and all begins anew.

    Attributes:
        left_out: Why calls are not skipped, by number.
    """

    def __init__(self, trace: Trace, trained: Collection[Tensor]) -> None:
        self._trace = trace
        self._parameters = set(map(id, trained))
        self._since = _tainted(trace, {trace.storage(each) for each in trained})
        flags = [
            any(self._since.get(each, at + 1) <= at for each in operation.reads) or operation.random
            for at, operation in enumerate(trace.operations)
        ]
        self._tainted_before = [0, *accumulate(flags)]
        self.left_out: dict[int, str] = {}
        self._taken: list[Call] = []
        self._sites: dict[int, tuple[set[int], set[int]]] = {}

    def chosen(self) -> list[Call]:
        """Choose the outermost calls that may be skipped."""
        self._taken = []
        owners: set[int] = set()

        def choose(call: Call) -> None:
            if self._may_be_skipped(call, owners):
                self._taken.append(call)
                owners.update(each.storage for each in call.results if each.storage is not None)
            else:
                for each in call.inner:
                    choose(each)

        for call in self._trace.calls:
            choose(call)
        return self._taken

    def lost(self) -> bool:
        """Find what later code reads of the chosen calls; tell if one has to be left out because of that."""
        trace, left_out = self._trace, len(self.left_out)
        self._sites = {call.number: (set(), self._changed(call)) for call in self._taken}
        inside: list[Call | None] = [None] * len(trace.operations)
        for call in self._taken:
            inside[call.begin : call.end] = [call] * (call.end - call.begin)
        given = _Given(self._taken)
        outside = [at for at, call in enumerate(inside) if call is None]
        for at in outside:
            for storage in trace.operations[at].reads:
                self._read(storage, at, inside, given)
        for storage in trace.results:
            self._read(storage, len(trace.operations), inside, given)
        for call in self._taken:
            for each in call.arguments:
                if each.storage is not None and given.by(each.storage, call.begin) is None:
                    self._leaked(each.storage, inside)
        for at in outside:
            self._overwritten(trace.operations[at].writes, at)
        return len(self.left_out) > left_out

    def cut(self) -> Cut:
        """Return what has been found."""
        sites = []
        for call in self._taken:
            needed, changed = self._sites[call.number]
            # What cannot be filled with NaN is always kept.
            needed |= {
                place for place, each in enumerate(call.results) if each.storage is not None and not each.floating
            }
            results = [each.storage for each in call.results]
            pairs = tuple((place, results.index(call.arguments[place].storage)) for place in sorted(changed))
            sites.append(Site(call.name, call.occurrence, frozenset(needed), pairs))
        if not any(site.needed for site in sites):
            sites = []
        return Cut(tuple(sites), tuple(self.left_out.values()))

    def _may_be_skipped(self, call: Call, owners: Collection[int]) -> bool:
        if call.number in self.left_out or any(id(each) in self._parameters for each in call.module.parameters()):
            return False
        if self._tainted_before[call.end] > self._tainted_before[call.begin]:
            if call.random:
                self.left_out[call.number] = f"`{call.name}`: {call.blocked}"
            return False
        inputs = [each.storage for each in call.arguments if each.storage is not None]
        if any(self._since.get(storage, call.begin) < call.begin for storage in inputs):
            return False
        has_weights = next(call.module.parameters(), None) is not None
        if not has_weights and not (
            inputs and all(storage in owners for storage in inputs) and all(map(is_always_calm, call.module.modules()))
        ):
            return False
        blocked = call.blocked
        if blocked is None and any(call.arguments[place].storage not in owners for place in self._changed(call)):
            blocked = "it changes its input in place"
        if blocked is not None and has_weights:
            self.left_out[call.number] = f"`{call.name}`: {blocked}"
        return blocked is None

    def _changed(self, call: Call) -> set[int]:
        written = {each for at in range(call.begin, call.end) for each in self._trace.operations[at].writes}
        return {place for place, each in enumerate(call.arguments) if each.storage in written}

    def _read(self, storage: int, at: int, inside: list[Call | None], given: _Given) -> None:
        source = given.by(storage, at)
        if source is None:
            self._leaked(storage, inside)
        else:
            call, place = source
            self._sites[call.number][0].add(place)

    def _leaked(self, storage: int, inside: list[Call | None]) -> None:
        made = self._trace.made.get(storage)
        if made is not None and (call := inside[made]) is not None:
            reason = f"`{call.name}`: it hands on a tensor that is not part of its result"
            self.left_out.setdefault(call.number, reason)

    def _overwritten(self, storages: Collection[int], at: int) -> None:
        """Leave out calls that may have to be made up for after their input has changed."""
        for call in self._taken if storages else ():
            waits = call.end <= at and not self._sites[call.number][0]
            if waits and any(each.storage in storages for each in call.arguments):
                reason = f"`{call.name}`: its input is changed in place after the call"
                self.left_out.setdefault(call.number, reason)


class _Given:
    """Tells which skipped call has given a storage last."""

    def __init__(self, taken: list[Call]) -> None:
        self._by_storage: dict[int, list[tuple[Call, int]]] = {}
        for call in taken:
            for place, each in enumerate(call.results):
                if each.storage is not None:
                    self._by_storage.setdefault(each.storage, []).append((call, place))

    def by(self, storage: int, at: int) -> tuple[Call, int] | None:
        """Return the call, and the place in its result, of the last result before an operation."""
        known = self._by_storage.get(storage, ())
        return next((each for each in reversed(known) if each[0].end <= at), None)


def _tainted(trace: Trace, trained: set[int]) -> dict[int, int]:
    """Return from which operation on a storage depends on what is trained or random."""
    since = dict.fromkeys(trained, -1)
    for at, operation in enumerate(trace.operations):
        if operation.random or any(storage in since for storage in operation.reads):
            for storage in (*operation.gives, *operation.writes):
                since.setdefault(storage, at)
    return since


def _inner_first(calls: list[Call]) -> Iterator[Call]:
    for call in calls:
        yield from _inner_first(call.inner)
        yield call


def _about_effects(call: Call) -> str | None:
    if call.random:
        return "it draws random numbers"
    call.changed = call.changed or next((each.changed for each in call.inner if each.changed), None)
    return f"it changes {call.changed}" if call.changed else None


def _about_modules(module: nn.Module) -> str | None:
    for name, each in module.named_modules():
        who = f"`{name}` inside" if name else "it"
        if has_hooks(each):
            return f"{who} has a hook"
        if not is_calm(each):
            return f"{who} is in train mode"
        for weight in (*each.parameters(recurse=False), *each.buffers(recurse=False)):
            if type(weight) not in (Tensor, nn.Parameter) or weight.layout is not torch.strided:
                return f"{who} has a weight of kind {type(weight).__name__}"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody else wants to be told of a module's calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_calm(module: nn.Module) -> bool:
    """Whether a module does the same in every call, as far as its mode tells."""
    return not module.training or is_always_calm(module)


def is_always_calm(module: nn.Module) -> bool:
    """Whether a module does the same in every call in train mode too.

    Of PyTorch's own modules those without weights and without randomness do.
    """
    if not type(module).__module__.startswith("torch.nn.modules.") or isinstance(module, _NOISY):
        return False
    if isinstance(module, _DROPOUT) and module.p > 0:
        return False
    return not (*module.parameters(recurse=False), *module.buffers(recurse=False))


def _about_leaves(call: Call) -> str | None:
    for what, leaves in (("is given", call.arguments), ("returns", call.results)):
        for leaf in leaves:
            if leaf.opaque is not None:
                return f"it {what} a {leaf.opaque}, whose content cannot be kept"
    if any(leaf.requires_grad for leaf in (*call.arguments, *call.results)):
        return "gradients flow through it"
    return None


def _about_operations(trace: Trace, call: Call, known: Collection[int]) -> str | None:
    given = {each.storage for each in call.arguments}
    passed_on = given & {each.storage for each in call.results}
    for at in range(call.begin, call.end):
        operation = trace.operations[at]
        if operation.communicates:
            return "it communicates with other processes"
        here = {storage for storage in operation.reads if trace.made.get(storage, -1) >= call.begin}
        if any(storage not in here and storage not in passed_on for storage in operation.writes):
            return "it changes a tensor in place that it has not made"
        if any(storage not in here and storage not in given and storage not in known for storage in operation.reads):
            return "it reads a tensor that is not among its arguments"
    return None
