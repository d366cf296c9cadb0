"""The hooks of a strategy adapter, with the behaviour that suits a single device."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from .._lightning import (
    LightningModule,
    Trainer,
    hooks_ask_for_weights,
    load_model_and_precision,
    loads_in_its_own_way,
)
from ..core.held import WEIGHTS, Held, on_host
from ..core.optim.states import state_by_name
from ..core.optim.zero import forget_state
from ..core.schedule.schedule import Schedule
from ..core.session import Session
from ..core.slim import fill_in, is_slim, names_of_keys
from ..core.view import ModelView, plain_name
from ..core.weights import ByName, loading_linearly
from ..errors import Problem
from .plain import load_plain, without_objects

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
        """Attach the trainer; called before the module's ``configure_model``, in every fit, validation or test.

        Raises:
            ScheduleError: The trainer has something that the strategy's module cannot be set up with.
        """
        self._trainer = trainer

    def on_model_configured(self) -> None:
        """Called when the module has its layers, before the strategy wraps or moves it and before optimizers are made.

        Raises:
            ScheduleError: The adapter's configuration does not fit the module.
        """

    def on_set_up(self) -> None:
        """Called when the strategy has set up the module and made the optimizers, or has failed to.

        It is the place to take back what :meth:`on_model_configured` has lent to the strategy; nothing is frozen yet.
        """

    def view(self, module: LightningModule) -> ModelView:
        """Tell which tensors are trained for the parameters that the module had before the strategy set it up."""
        return ModelView.of(module)

    def problems(self, view: ModelView, schedule: Schedule) -> Iterable[Problem]:
        """List what keeps a schedule from being executed under the strategy; asked before anything is frozen.

        Args:
            view: What :meth:`view` returned.
            schedule: The phases to execute, in full parameter names.
        """
        return ()

    def on_phase_thawed(self) -> None:
        """Called after each change of ``requires_grad``, the first thaw and the one of a resumed run included."""

    def resume(self, path: str, session: Session, *, weights_only: bool | None) -> dict[str, Any]:
        """Load a checkpoint whole and return it.

        Called when a run is resumed under a strategy that loads checkpoints after ``on_fit_start``, in place of the
        strategy's own method. The checkpoint's phase has been entered, so that the optimizer has its groups.

        Args:
            path: The checkpoint.
            session: Executes the schedule.
            weights_only: Refuse anything but tensors and plain values; ``None`` leaves it to PyTorch.
        """
        return self.trainer.strategy.load_checkpoint(path, weights_only=weights_only)

    def restore(self, path: str, session: Session, state_key: str) -> None:
        """Load a checkpoint's weights, optimizer state, precision state and datamodule state into a running fit.

        Parameter groups and learning rates stay as they are. Parameters that the checkpoint's optimizer did not hold,
        because a later phase thawed them, start without optimizer state. Of a file no code is run: objects of other
        classes are left out.

        Args:
            path: The checkpoint.
            session: Executes the schedule.
            state_key: Key of the scheduler's state, which holds the phase and the names of the saved groups.
        """
        checkpoint = load_plain(self.trainer, path, state_key)
        self._complete(checkpoint, path, session, checkpoint["callbacks"][state_key]["phase"])
        with loading_linearly(self.trainer.lightning_module):
            load_model_and_precision(self.trainer, checkpoint)
        self._load_optimizer_state(checkpoint, session, state_key)

    def why_from_disk(self) -> str | None:
        """Say why :meth:`restore` is what restores a checkpoint, even if its content is in memory; ``None`` if not."""
        strategy, kind = type(self.trainer.strategy).__name__, type(self)
        if kind.restore is not StrategyAdapter.restore:
            return f"with {strategy}, {kind.__name__} restores in its own way"
        if self.trainer.strategy.restore_checkpoint_after_setup or loads_in_its_own_way(self.trainer.strategy):
            return f"{strategy} loads in its own way"
        return None

    def restore_held(self, held: Held | None, path: str, session: Session, state_key: str) -> None:
        """Do what :meth:`restore` does, with what is in memory of a checkpoint.

        Args:
            held: What is in memory on rank zero.
            path: The checkpoint.
            session: Executes the schedule.
            state_key: Key of the scheduler's state.
        """
        trainer, held = self.trainer, self.spread(held)
        thawed_since = session.left_out({plain_name(key) for key in held.changed} - held.frozen, held.phase)

        def values_of(name: str) -> Tensor:
            return thawed_since[name] if name in thawed_since else on_host(session.parameters[name])

        added = {key: value for name, value in thawed_since.items() for key in held.keys_of(name)}
        by_name = ByName(trainer.lightning_module, {**held.changed, **added})
        checkpoint, foreign = held.read(values_of)
        targets = None if checkpoint[WEIGHTS] or hooks_ask_for_weights(trainer) else by_name.targets()
        if targets is None:
            checkpoint[WEIGHTS] = held.all_weights(checkpoint, values_of)
            checkpoint[WEIGHTS].update(added)
        if foreign:
            checkpoint = without_objects(trainer, path, checkpoint, state_key)
        copy = None if targets is None else partial(by_name.copy, targets)
        with loading_linearly(trainer.lightning_module):
            load_model_and_precision(trainer, checkpoint, copy)
        self._load_optimizer_state(checkpoint, session, state_key)

    def spread(self, held: Held | None) -> Held:
        """Give every rank what rank zero holds."""
        if held is None:
            raise RuntimeError("expected rank zero to hold a checkpoint, got none")
        return held

    def _load_optimizer_state(self, checkpoint: dict[str, Any], session: Session, state_key: str) -> None:
        progress = checkpoint["callbacks"][state_key]
        states = state_by_name(checkpoint["optimizer_states"][0], progress["parameter_groups"])
        state = session.optimizer_state_from(states, progress["phase"])
        forget_state(session.optimizer)
        self.trainer.strategy.load_optimizer_state_dict({"optimizer_states": [state]})

    def _complete(self, checkpoint: dict[str, Any], path: str, session: Session, phase: int) -> None:
        """Add to a checkpoint's weights what it leaves out."""
        module = self.trainer.lightning_module
        weights = dict(checkpoint[WEIGHTS])
        missing = session.left_out({plain_name(key) for key in weights}, phase)
        if is_slim(checkpoint):
            names = names_of_keys(module, session.parameters).items()
            known = {key: missing[name] for key, name in names if name in missing}
            fill_in(checkpoint, module.state_dict(), path, known)
        elif missing:
            keys = {plain_name(key): key for key in module.state_dict()}
            weights.update({keys.get(name, name): value for name, value in missing.items()})
            checkpoint[WEIGHTS] = weights

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
