"""The hooks of a strategy adapter, with the behaviour that suits a single device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike
from typing import Any, TypeVar

from torch import Tensor, nn

from .._lightning import (
    AttachableCallback,
    LightningModule,
    Strategy,
    Trainer,
    callbacks_of,
    hooks_ask_for_weights,
    load_model_and_precision,
    loads_in_its_own_way,
)
from ..core.held import WEIGHTS, Held, on_host
from ..core.optim.states import state_by_name
from ..core.optim.zero import forget_state
from ..core.schedule.files import save_schedule
from ..core.schedule.generate import generate
from ..core.schedule.schedule import Schedule
from ..core.session import Session
from ..core.slim import fill_in, is_slim, names_of_keys
from ..core.view import ModelView, plain_name
from ..core.weights import ByName, loading_linearly
from ..errors import Problem, ScheduleError
from .plain import load_plain, saved_position, without_objects

T = TypeVar("T")


def overrides(instance: object, base: type, name: str) -> bool:
    """Whether a method is another than that of a base class, on whatever it has been set."""
    return getattr(getattr(instance, name), "__func__", None) is not vars(base)[name]


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
            raise RuntimeError("expected an adapter in use, got one whose trainer has not begun")
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def pl_module(self) -> LightningModule:
        """The module that is trained."""
        return self.trainer.lightning_module

    @property
    def fts_handle(self) -> Any:
        """The :class:`.FinetuningScheduler` of the trainer."""
        return _scheduler_of(self.trainer)

    @property
    def pls_handle(self) -> Strategy:
        """The strategy that is adapted."""
        return self.trainer.strategy

    def connect(self, fts_parent: Any) -> None:
        """Called first of all hooks, before the module's ``configure_model``, in every fit, validation or test.

        Args:
            fts_parent: The :class:`.FinetuningScheduler`, which :attr:`fts_handle` is, too.

        Raises:
            ScheduleError: The trainer has something that the strategy's module cannot be set up with.
        """

    def on_before_init_fts(self) -> None:
        """Called in a fit's ``setup``, before the schedule is read; what it sets of the callback's arguments counts."""

    def on_model_configured(self) -> None:
        """Called when the module has its layers, before the strategy wraps or moves it and before optimizers are made.

        Raises:
            ScheduleError: The adapter's configuration does not fit the module.
        """

    def on_set_up(self) -> None:
        """Called when the strategy has set up the module and made the optimizers, or has failed to.

        It is the place to take back what :meth:`on_model_configured` has lent to the strategy.
        """

    def view(self, module: LightningModule) -> ModelView:
        """Tell which tensors are trained for the parameters that the module had before the strategy set it up."""
        return ModelView.of(module)

    def get_named_params_for_schedule_validation(self) -> Mapping[str, nn.Parameter]:
        """Name the parameters as the schedule does; by default as :meth:`view` does.

        With other names, the schedule is validated, generated and saved in these, and what is thawed for each is the
        parameter itself. Parameters without a name stay frozen.
        """
        return self.view(self.trainer.lightning_module).tensors

    def gen_ft_schedule(self, dump_loc: str | PathLike[str]) -> str | PathLike[str]:
        """Write the schedule of a fit that is given none, and return its path.

        An override is called on rank zero. Without one, what this writes is executed without being written first.

        Args:
            dump_loc: The directory.
        """
        view = schedule_view(self, self.view(self.trainer.lightning_module))
        return save_schedule(generate(view.plain, frozen=view.frozen), view.plain, dump_loc)

    def validate_ft_sched(self) -> tuple[int, int] | None:
        """Called when a schedule that is right has been read, before anything is frozen; raise an error to refuse it.

        ``self.fts_handle.ft_schedule`` is the schedule in full names.

        Returns:
            The deepest phase and the largest ``max_transition_epoch``, -1 if there is none. An override may return
            ``None``, but no other deepest phase.
        """
        schedule: Schedule = _scheduler_of(self.trainer).ft_schedule
        return len(schedule) - 1, max(phase.max_transition_epoch for phase in schedule.phases)

    def on_after_init_fts(self) -> None:
        """Called when the schedule has been read and all but phase 0 is frozen, before ``configure_optimizers``."""

    def on_before_fts_fit_start(self) -> None:
        """Called when the optimizers exist, before anything of them is checked or changed."""

    def problems(self, view: ModelView, schedule: Schedule) -> Iterable[Problem]:
        """List what keeps a schedule from being executed under the strategy.

        Asked when the optimizers exist, and the model is in the state of phase 0; nothing of the optimizers has been
        changed.

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
        progress = saved_position(checkpoint, path, state_key)
        self._complete(checkpoint, path, session, progress["phase"])
        with loading_linearly(self.trainer.lightning_module):
            load_model_and_precision(self.trainer, checkpoint)
        self._load_optimizer_state(checkpoint, session, progress)

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
        self._load_optimizer_state(checkpoint, session, saved_position(checkpoint, path, state_key))

    def spread(self, held: Held | None) -> Held:
        """Give every rank what rank zero holds."""
        if held is None:
            raise RuntimeError("expected rank zero to hold a checkpoint, got none")
        return held

    def _load_optimizer_state(
        self, checkpoint: Mapping[str, Any], session: Session, progress: Mapping[str, Any]
    ) -> None:
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


def _scheduler_of(trainer: Trainer) -> Any:
    return next(each for each in callbacks_of(trainer) if isinstance(each, AttachableCallback))


def schedule_view(adapter: StrategyAdapter, view: ModelView) -> ModelView:
    """Tell a view by the names under which an adapter wants schedules to be validated.

    Raises:
        ScheduleError: These are names of other things than the parameters in ``view``.
    """
    if not overrides(adapter, StrategyAdapter, "get_named_params_for_schedule_validation"):
        return view
    given: Any = adapter.get_named_params_for_schedule_validation()
    try:
        named = dict(given)
    except (TypeError, ValueError) as error:
        message = "expected `get_named_params_for_schedule_validation` to return parameters by name, got"
        raise ScheduleError(Problem(f"{message} {type(given).__name__} ({error})", fix="Return a mapping.")) from error
    return view.renamed(named)
