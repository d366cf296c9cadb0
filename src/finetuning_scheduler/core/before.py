"""A transition is done or has not begun: what it changes can be taken back until it is done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .optim.schedulers import nested
from .optim.zero import is_zero
from .thaw import set_trainable


class Changing(Protocol):
    """A session, as far as what a transition changes of it can be taken back."""

    optimizer: Optimizer
    lr_schedulers: list[LRScheduler]

    def changing_fields(self) -> dict[str, Any]:
        """Return what it is at the moment."""
        ...

    def take_back(self, fields: Mapping[str, Any]) -> None:
        """Be what it was."""
        ...


class Before:
    """What a session, its optimizer and its LR schedulers are at the moment: references, no copies of tensors.

    Weights are not among it: entering a phase changes none. Whoever restores some makes sure by itself that this can be
    taken back, by way of :attr:`undo`, or is made again.

    Attributes:
        driver: What the driver of the session adds to its saved state at this moment.
        undo: Called after everything else has been taken back, the last one first.
        thawed: What has been thawed, or is about to be.
        frozen: What has been frozen again.
    """

    def __init__(self, session: Changing, driver: Mapping[str, Any]) -> None:
        self.driver = driver
        self.undo: list[Callable[[], None]] = []
        self._session = session
        self.fields = session.changing_fields()
        self._optimizers = [_HeldOptimizer(session.optimizer)]
        self._schedulers = [_held(each) for outer in session.lr_schedulers for each in nested(outer)]
        self.thawed: list[nn.Parameter] = []
        self.frozen: list[nn.Parameter] = []

    def note(self, thawed: Iterable[nn.Parameter], frozen: Iterable[nn.Parameter]) -> None:
        """Note what is about to be thawed and frozen."""
        self.thawed, self.frozen = list(thawed), list(frozen)

    def restore(self) -> None:
        """Take back what has been changed since."""
        set_trainable(self.thawed, trainable=False)
        set_trainable(self.frozen, trainable=True)
        for held in self._optimizers:
            held.restore()
        for scheduler, attributes in self._schedulers:
            vars(scheduler).clear()
            vars(scheduler).update(attributes)
        self._session.take_back(self.fields)


class _HeldOptimizer:
    """An optimizer's groups and state. A restore replaces them, it does not write into them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [(group, dict(group)) for group in optimizer.param_groups]
        self._state = _shallow(optimizer.state)
        self._own = _shallow(optimizer.optim.state) if is_zero(optimizer) else None  # type: ignore[attr-defined]

    def restore(self) -> None:
        optimizer = self._optimizer
        for group, options in self._groups:
            group.clear()
            group.update(options)
        optimizer.param_groups[:] = [group for group, _ in self._groups]
        optimizer.state.clear()
        optimizer.state.update(self._state)
        if self._own is not None:
            optimizer.optim.state.clear()  # type: ignore[attr-defined]
            optimizer.optim.state.update(self._own)  # type: ignore[attr-defined]


def _shallow(state: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}


def _held(scheduler: LRScheduler) -> tuple[LRScheduler, dict[str, Any]]:
    """Hold a scheduler's attributes; lists with an entry a group grow in place."""
    attributes = {
        name: copy.copy(value) if type(value) in (list, dict) else value for name, value in vars(scheduler).items()
    }
    return scheduler, attributes
