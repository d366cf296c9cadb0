"""The hooks of a strategy adapter, with the behaviour that suits a single device."""

from __future__ import annotations

from .._lightning import Trainer


class StrategyAdapter:
    """Adapt a schedule's execution to a training strategy.

    Override the hooks that a strategy needs; the defaults do what training on one device requires.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None

    def connect(self, trainer: Trainer) -> None:
        """Attach the trainer whose strategy is adapted; called once a fit, before training starts."""
        self._trainer = trainer

    def on_phase_thawed(self) -> None:
        """Called after each change of ``requires_grad``, the first thaw and the one of a resumed run included."""
