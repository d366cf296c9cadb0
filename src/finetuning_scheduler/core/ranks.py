"""Processes that train together and have to agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Ranks(Protocol):
    """Some processes, of which this is one. Every method has to be called by all of them."""

    def any(self, flag: bool) -> bool:
        """Tell on every rank whether ``flag`` is set on any."""
        ...

    def every(self, flag: bool) -> bool:
        """Tell on every rank whether ``flag`` is set on all."""
        ...

    def from_zero(self, function: Callable[[], T]) -> T:
        """Call a function on rank zero and give every rank what it returns, or raises."""
        ...


class OneProcess:
    """A process that trains alone."""

    def any(self, flag: bool) -> bool:
        """Return ``flag``."""
        return flag

    def every(self, flag: bool) -> bool:
        """Return ``flag``."""
        return flag

    def from_zero(self, function: Callable[[], T]) -> T:
        """Call the function."""
        return function()
