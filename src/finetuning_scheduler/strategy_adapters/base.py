"""The hooks of a strategy adapter, with the behaviour that suits a single device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from .._lightning import Trainer, load_model_and_precision
from ..core.param_groups import forget_state, state_by_name
from ..core.runner import PhaseRunner

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

    def reload(self, path: str, runner: PhaseRunner) -> None:
        """Load a checkpoint's optimizer state again, now that the optimizer has the checkpoint's groups.

        Called when a run is resumed under a strategy that loads checkpoints after ``on_fit_start``, when the parameter
        groups of later phases are not there yet.

        Raises:
            NotImplementedError: The adapter does not serve such a strategy.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot resume under {type(self.trainer.strategy).__name__}")

    def restore(self, path: str, runner: PhaseRunner, state_key: str, *, weights_only: bool) -> None:
        """Load a checkpoint's weights, optimizer state, precision state and datamodule state into a running fit.

        Parameter groups and learning rates stay as they are. Parameters that the checkpoint's optimizer did not hold,
        because a later phase thawed them, start without optimizer state.

        Args:
            path: The checkpoint.
            runner: Executes the schedule.
            state_key: Key of the scheduler's state, which holds the phase and the names of the saved groups.
            weights_only: Refuse anything but tensors and plain values.
        """
        checkpoint = self.trainer.strategy.load_checkpoint(path, weights_only=weights_only)
        load_model_and_precision(self.trainer, checkpoint)
        progress = checkpoint["callbacks"][state_key]
        states = state_by_name(checkpoint["optimizer_states"][0], progress["parameter_groups"])
        state = runner.optimizer_state_from(states, progress["phase"])
        forget_state(runner.optimizer)
        self.trainer.strategy.load_optimizer_state_dict({"optimizer_states": [state]})

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
