"""What is inside the objects that a step may change: noted at one moment, and brought back."""

from __future__ import annotations

import functools
import random
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 12  # of objects within objects
_LONG = 10_000  # what has more members is noted without what is inside them
_MOST = 200_000  # objects that are looked at
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
# Their objects belong to the training or to the machine, or are never changed by a step.
_LIBRARIES = ("builtins", "torch", "lightning", "pytorch_lightning", "lightning_fabric", "transformers", "threading")
_INSTALLED = tuple(sysconfig.get_paths()[each] for each in ("stdlib", "purelib", "platlib"))
_LARGE = 2**26  # bytes; no copy is made of what is larger
_DRIVERS = ("finetuning_scheduler", "torch.optim")  # nor do objects of classes that are derived from theirs
_FOREIGN = (nn.Module, type, ModuleType, FunctionType, MethodType)

Restore = Callable[[], object]


class Inside:
    """The content of objects, of containers and of generators of random numbers, as deep as a step is likely to go.

    Args:
        values: Where to begin.
        step: The function whose variables outside of it are noted as well, those of its closure and of its module; so
            are those of functions that it finds there, libraries apart.
    """

    def __init__(self, values: Iterable[Any], step: Callable[..., Any] | None = None) -> None:
        self.runs_on: str | None = None  # the kind of something that cannot be put back, if there is one
        self._restores: list[Restore] = []
        self._seen: dict[int, Any] = {}  # keeps what has been seen, so that no other object gets its number
        for value in (step, *values):
            self._note(value, _DEPTH)

    def restore(self) -> None:
        """Bring everything back, into the objects that were there."""
        for restore in self._restores:
            restore()

    def _note_variables(self, function: FunctionType, depth: int) -> None:
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # nothing has been assigned yet
                continue
            self._restores.append(functools.partial(_assign, cell, value))
            self._note(value, depth)
        names = function.__globals__
        for name in function.__code__.co_names:
            if name in names:
                self._restores.append(functools.partial(names.__setitem__, name, names[name]))
                self._note(names[name], depth)

    def _note(self, value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN) or id(value) in self._seen or not depth or len(self._seen) == _MOST:
            return
        self._seen[id(value)] = value
        if isinstance(value, (MethodType, functools.partial)) or hasattr(value, "__wrapped__"):
            self._note(_behind(value), depth)
        if isinstance(value, FunctionType):
            if not value.__code__.co_filename.startswith(_INSTALLED):
                self._note_variables(value, depth - 1)
            return
        if (restore := _restore_of(value)) is not None:
            self._restores.append(restore)
        elif isinstance(value, Iterator) and not hasattr(value, "__dict__"):
            self.runs_on = type(value).__name__
        for member in _members(value):
            self._note(member, depth - 1)


def _behind(function: Any) -> Any:
    """Look through a method, a partial function or a decorated one."""
    if isinstance(function, functools.partial):
        return function.func
    return function.__func__ if isinstance(function, MethodType) else function.__wrapped__


def _assign(cell: CellType, value: Any) -> None:
    cell.cell_contents = value


def _is_own(value: Any) -> bool:
    """Whether an object is of a class that no library has that belongs to the training."""
    kind = type(value)
    if isinstance(value, _FOREIGN) or kind.__module__.partition(".")[0] in _LIBRARIES:
        return False
    bases = [(base.__module__, base.__name__) for base in kind.__mro__]
    return not any(module.startswith(_DRIVERS) or name == "Trainer" for module, name in bases)


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, deque, tuple, set, frozenset)):
        return tuple(value) if len(value) <= _LONG else ()
    if isinstance(value, dict):
        return tuple(value.values()) if len(value) <= _LONG else ()
    return tuple(vars(value).values()) if _is_own(value) and hasattr(value, "__dict__") else ()


def _restore_of(value: Any) -> Restore | None:
    """Return what brings the content of one object back; ``None`` if it has none that is known."""
    if isinstance(value, Tensor):
        return _tensor_back(value)
    if isinstance(value, (list, deque)):
        return functools.partial(_refill, value, list(value))
    if isinstance(value, (dict, set)):
        return functools.partial(_refill, value, dict(value) if isinstance(value, dict) else set(value))
    return _generator_back(value) or _object_back(value)


def _refill(container: Any, content: Any) -> None:
    """Give a container the members that it had, if it has others."""
    if isinstance(container, dict):
        pairs = zip(container.items(), content.items(), strict=False)
        if len(container) == len(content) and all(one is two and x is y for (one, x), (two, y) in pairs):
            return
        container.clear()
        for key, value in content.items():  # a counter's `update` adds
            container[key] = value
    elif isinstance(container, set):
        if container != content:
            container.clear()
            container.update(content)
    elif len(container) != len(content) or any(one is not two for one, two in zip(container, content, strict=True)):
        container.clear()
        container.extend(content)


def _tensor_back(tensor: Tensor) -> Restore | None:
    if tensor.is_meta or tensor.layout is not torch.strided or isinstance(tensor, nn.Parameter) or tensor.is_nested:
        return None
    if tensor.nbytes > _LARGE:
        return None
    content, version = tensor.detach().clone(), tensor._version

    def back() -> None:
        if tensor._version != version and not torch.equal(tensor, content):
            tensor.data.copy_(content)  # not a change to autograd, which may have saved it

    return back


def _generator_back(value: Any) -> Restore | None:
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.ndarray) and not value.dtype.hasobject and value.nbytes <= _LARGE:
        return functools.partial(numpy.copyto, value, value.copy())
    return None


def _object_back(value: Any) -> Restore | None:
    if not (_is_own(value) and hasattr(value, "__dict__")):
        return None
    attributes = vars(value)
    return functools.partial(_refill, attributes, dict(attributes))
