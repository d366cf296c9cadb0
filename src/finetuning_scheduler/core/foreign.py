"""Checkpoints that hold more than tensors and plain values: the rest is read as inert stand-ins, so that nothing runs.

PyTorch's ``weights_only`` loading refuses a file as a whole if it names a class that is not known to be safe. Here each
such name is known, for as long as one file is read, as a class that does nothing; the real one is never called.
"""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


class StandIn:
    """Takes the place of an object, a class or a function whose name ``weights_only`` does not know."""

    name = ""

    def __new__(cls, *arguments: object, **options: object) -> Any:
        """Take whatever the object was made of, and keep nothing."""
        return object.__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        """Do nothing."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


@contextmanager
def stand_ins(file: Path | BytesIO) -> Iterator[Sequence[str]]:
    """Let ``torch.load(file, weights_only=True)`` read a file with foreign objects; yield what these are called.

    Classes that the program has allowed by ``torch.serialization.add_safe_globals`` are read as they are.
    """
    names = _foreign_names(file)
    with safe_globals([(_stand_in(name), name) for name in names]):
        yield names


def foreign_places(value: object, place: str) -> Iterator[tuple[str, str]]:
    """Find the stand-ins in nested mappings, sequences and sets: the place of each, and what it stands for."""
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [(place, value)]
    while waiting:
        place, item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, StandIn) or (isinstance(item, type) and issubclass(item, StandIn)):
            yield place, item.name
        elif isinstance(item, Mapping):
            waiting += [(f"a key of {place}", key) for key in item]
            waiting += [(f"{place}[{key!r}]", inner) for key, inner in item.items()]
        elif isinstance(item, (list, tuple)):
            waiting += [(f"{place}[{index}]", inner) for index, inner in enumerate(item)]
        elif isinstance(item, Set):
            waiting += [(place, inner) for inner in item]


def _foreign_names(file: Path | BytesIO) -> list[str]:
    try:
        return sorted(get_unsafe_globals_in_checkpoint(str(file) if isinstance(file, Path) else file))
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
        return []  # it is no file of this format: loading it tells what is wrong


def _stand_in(name: str) -> type[StandIn]:
    """Make a class for a name. What is filled as a list or a mapping has to be one for PyTorch to read on."""

    def made(cls: type[StandIn], *arguments: object, **options: object) -> Any:
        marker = object.__new__(cls)
        return [marker] if kind is list else OrderedDict({marker: None})

    kind = next((kind for kind in (list, dict) if issubclass(_known_class(name), kind)), None)
    members: dict[str, Any] = {"name": name} if kind is None else {"name": name, "__new__": made}
    return type("StandIn", (StandIn,), members)


def _known_class(name: str) -> type:
    """Find a class by its name among what the program has imported; nothing is imported, nor asked for."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), "__dict__", {}).get(attribute)
    return found if isinstance(found, type) else object
