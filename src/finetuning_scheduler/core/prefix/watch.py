"""One forward pass seen from inside: which module was called with what, and which operation read and wrote what.

Tensors are followed by their storage, which views share. A watched pass computes with other kernels than a plain one
in some modules, so that nothing of it is kept but what was seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import Forward, Interception
from .generators import Generators
from .refusal import Refused
from .state import class_values, own_classes
from .trees import Form, flatten, is_plain

_COMMUNICATION = ("c10d", "symm_mem")  # parts of the namespaces of operations


@dataclass(frozen=True)
class Seen:
    """A leaf of what a module was given or has returned: a tensor's storage and kind, or a plain value."""

    value: object = None
    storage: int | None = None
    shape: tuple[int, ...] = ()
    requires_grad: bool = False
    floating: bool = False
    opaque: str | None = None


@dataclass
class Call:
    """One call of a module.

    Attributes:
        number: Its place among all calls, in the order of their beginnings.
        name: The module's name.
        occurrence: How many calls of the module were before it.
        begin: The first operation inside.
        end: The first operation after it.
        inner: The calls made by it.
        random: Whether it has drawn random numbers.
        changed: What it has changed besides tensors, if it has.
        blocked: Why it can never be skipped, if it cannot.
    """

    number: int
    name: str
    module: nn.Module
    occurrence: int
    begin: int
    arguments: list[Seen]
    end: int = -1
    results: list[Seen] = field(default_factory=list)
    form: Form = field(default_factory=Form)
    inner: list[Call] = field(default_factory=list)
    random: bool = False
    changed: str | None = None
    blocked: str | None = None


@dataclass(frozen=True)
class Operation:
    """What one operation read, wrote in place and gave, as storages."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    gives: tuple[int, ...]
    random: bool
    communicates: bool


@dataclass
class Trace:
    """All that was seen of one pass.

    Attributes:
        calls: The calls that no other watched call has made.
        made: For each storage that was made in the pass, the operation that did.
        results: The storages of what the pass has returned.
    """

    operations: list[Operation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    made: dict[int, int] = field(default_factory=dict)
    results: set[int] = field(default_factory=set)
    kept: list[StorageWeakRef] = field(default_factory=list)  # as long as they live, no storage gets the number again

    def storage(self, tensor: Tensor) -> int:
        """Return a number for the tensor's storage that no other has."""
        try:
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        except (NotImplementedError, RuntimeError) as error:
            raise Refused(f"a tensor of kind {type(tensor).__name__}, {tensor.layout}, has no storage") from error
        self.kept.append(reference)
        number: int = reference.cdata
        return number

    def seen(self, leaf: object) -> Seen:
        """Note a leaf."""
        if not isinstance(leaf, Tensor):
            return Seen(value=leaf) if is_plain(leaf) else Seen(opaque=type(leaf).__name__)
        if leaf.is_nested or leaf.layout is not torch.strided:
            return Seen(opaque=f"{'nested' if leaf.is_nested else leaf.layout} tensor")
        if type(leaf) not in (Tensor, nn.Parameter):
            return Seen(opaque=type(leaf).__name__)
        return Seen(
            storage=self.storage(leaf),
            shape=tuple(leaf.shape),
            requires_grad=leaf.requires_grad,
            floating=leaf.is_floating_point() or leaf.is_complex(),
        )


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fills a trace while it is active.

    Args:
        modules: The modules whose calls are noted, by name.
        weights: What the pass must not change; it is noted if it does.
    """

    def __init__(self, modules: Mapping[str, nn.Module], weights: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.written: list[tuple[Tensor, Tensor]] = []  # what of the weights is changed, and how it was
        self._weights = {storage for each in weights if (storage := self._storage_of(each)) is not None}
        self._stack: list[Call] = []
        self._counts: dict[str, int] = {}
        self._number = 0
        self._pauses = False  # while the watch itself computes
        self._interception = Interception({each: partial(self._called, name, each) for name, each in modules.items()})

    def bring_back(self) -> None:
        """Give weights the values that they had before the pass."""
        with torch.no_grad():
            for tensor, content in reversed(self.written):
                tensor.data.copy_(content)

    def _storage_of(self, tensor: Tensor) -> int | None:
        try:
            return self.trace.storage(tensor)
        except Refused:
            return None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Watch for the length of a block."""
        with self._interception.active(), self:
            yield

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave out importing the compiler, which takes seconds: nothing is compiled while this is active."""
        return False

    def __torch_dispatch__(self, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._pauses:
            return function(*args, **kwargs)
        trace, place = self.trace, len(self.trace.operations)
        tensors = _tensors((*args, *kwargs.values()))
        reads = tuple(trace.storage(tensor) for tensor in tensors)
        written = _written(function, args, kwargs)
        writes = tuple(trace.storage(tensor) for tensor in written)
        self.written += [
            (tensor, tensor.detach().clone())
            for tensor, storage in zip(written, writes, strict=True)
            if storage in self._weights
        ]
        may_draw = torch.Tag.nondeterministic_seeded in function.tags
        before = Generators.now() if may_draw else None
        outcome = function(*args, **kwargs)
        gives = tuple(trace.storage(tensor) for tensor in _tensors((outcome,)))
        known = set(reads)
        for storage in gives:
            if storage not in known:
                trace.made.setdefault(storage, place)
        communicates = any(part in function.namespace for part in _COMMUNICATION)
        moved = before is not None and before.moved()
        trace.operations.append(Operation(reads, writes, gives, moved, communicates))
        return outcome

    def _called(
        self, name: str, module: nn.Module, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = self._entered(name, module, args, kwargs)
        given, given_form = flatten((args, kwargs))
        generators, attributes = Generators.now(), _attributes(module)
        self._stack.append(call)
        try:
            outcome = original(*args, **kwargs)
        finally:
            self._stack.pop()
        call.end = len(self.trace.operations)
        with self._paused():
            leaves, call.form = flatten(outcome)
            call.results = [self.trace.seen(leaf) for leaf in leaves]
            call.random = generators.moved()
            call.changed = _changed(attributes, _attributes(module))
            later, later_form = flatten((args, kwargs))
            if later_form != given_form or any(one is not other for one, other in zip(given, later, strict=True)):
                call.changed = "a list or mapping that it is given"
        return outcome

    def _entered(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        occurrence = self._counts.get(name, 0)
        self._counts[name] = occurrence + 1
        with self._paused():
            arguments = [self.trace.seen(leaf) for leaf in flatten((args, kwargs))[0]]
        call = Call(self._number, name, module, occurrence, len(self.trace.operations), arguments)
        self._number += 1
        (self._stack[-1].inner if self._stack else self.trace.calls).append(call)
        return call

    @contextmanager
    def _paused(self) -> Iterator[None]:
        before, self._pauses = self._pauses, True
        try:
            yield
        finally:
            self._pauses = before


def _tensors(values: Sequence[object]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _written(function: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """Return the tensors that an operation changes in place."""
    written: list[Tensor] = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += _tensors((value,))
    return written


def _attributes(module: nn.Module) -> dict[str, tuple[object, int]]:
    """Note the attributes of a module and its classes, without what is inside other objects."""
    attributes = dict(vars(module))
    for kind in own_classes(type(module)):
        attributes |= {f"{kind.__name__}.{name}": value for name, value in class_values(kind).items()}
    return {
        name: (value, len(value) if isinstance(value, (list, dict, set)) else 0)
        for name, value in attributes.items()
        if name not in ("forward", "_compiled_call_impl")
    }


def _changed(before: Mapping[str, tuple[object, int]], after: Mapping[str, tuple[object, int]]) -> str | None:
    gone = (None, -1)
    for name in {**before, **after}:
        (value, length), (later, later_length) = before.get(name, gone), after.get(name, gone)
        if value is not later or length != later_length:
            return f"the attribute `{name}`"
    return None
