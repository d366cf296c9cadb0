"""The hooks of a strategy adapter, with the behaviour that suits a single device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from .._lightning import Trainer

T = TypeVar("T")


class StrategyAdapter:
    """Adapt a schedule's execution to a training strategy.

    Override the hooks that a strategy needs. The defaults do what training on one device requires, and what any
    strategy does that copes with parameters whose ``requires_grad`` changes; questions on which the ranks must agree
    are put to the strategy.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None

    @property
    def trainer(self) -> Trainer:
        """The trainer whose strategy is adapted.

        Raises:
            RuntimeError: No fit has started.
        """
        if self._trainer is None:
            raise RuntimeError("expected `connect` to be called before the adapter is used")
        return self._trainer

    def connect(self, trainer: Trainer) -> None:
        """Attach the trainer; called once a fit, when its strategy is set up and before anything is frozen."""
        self._trainer = trainer

    def on_phase_thawed(self) -> None:
        """Called after each change of ``requires_grad``, the first thaw and the one of a resumed run included."""

    def check_replicas(self, parameters: Iterable[nn.Parameter]) -> None:
        """Called after the first optimizer step of each phase with the trainable parameters.

        Raises:
            RuntimeError: The ranks' copies differ.
        """

    def any_rank(self, flag: bool) -> bool:
        """Tell on every rank whether ``flag`` is set on any."""
        return self.trainer.strategy.reduce_boolean_decision(flag, all=False)

    def every_rank(self, flag: bool) -> bool:
        """Tell on every rank whether ``flag`` is set on all."""
        return self.trainer.strategy.reduce_boolean_decision(flag, all=True)

    def from_rank_zero(self, value: T) -> T:
        """Give every rank the value that global rank zero has."""
        return self.trainer.strategy.broadcast(value, src=0)
