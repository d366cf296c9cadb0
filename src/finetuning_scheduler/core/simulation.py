"""A session without training: the engine goes through its phases on stand-ins, and tells the learning rates."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .optim.build import SchedulerSettings, emptied
from .optim.param_groups import learning_rates, own_label
from .prepare import Prepared, prepare
from .schedule.resolve import Resolution
from .schedule.schedule import ScheduleSource
from .session import Session
from .settings import Settings
from .steps import stepping
from .transitions import Moment, Reason
from .view import ModelView

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
_USERS_SETTINGS = SchedulerSettings()


@dataclass(frozen=True)
class Pace:
    """How long a session lasts that nothing is trained in.

    Attributes:
        epochs: After so many it ends.
        steps_per_epoch: Optimizer steps in each.
        epochs_per_phase: After so many, a phase without a limit of its own ends, as early stopping would end it;
            ``None`` if it does not.
    """

    epochs: int
    steps_per_epoch: int = 1
    epochs_per_phase: int | None = None


@dataclass(frozen=True)
class SimulatedStep:
    """An optimizer step.

    Attributes:
        epoch: Its epoch, from 0.
        step: How many steps were made before it.
        phase: Its phase.
        learning_rates: Of each group, in the order of the optimizer; ``None`` under one that has none.
    """

    epoch: int
    step: int
    phase: int
    learning_rates: tuple[float | None, ...]


class Simulation:
    """The session of a schedule on tensors of one value each, with the names of a model's.

    A metric always improves here: no phase runs out of patience, apart from what ``Pace.epochs_per_phase`` says, and
    ``ReduceLROnPlateau`` leaves rates alone.

    Args:
        source: The schedule, as the user gave it or as it was read; ``None`` generates one.
        view: The model.
        make_optimizer: Makes the user's optimizer over all parameters.
        settings: How the schedule is executed.
        make_lr_scheduler: Makes the user's LR scheduler, if there is one.
        scheduler_settings: When it steps.

    Raises:
        ScheduleError: With everything that is wrong, as before a run.
    """

    def __init__(
        self,
        source: ScheduleSource | Resolution | None,
        view: ModelView,
        make_optimizer: MakeOptimizer,
        settings: Settings,
        *,
        make_lr_scheduler: MakeScheduler | None = None,
        scheduler_settings: SchedulerSettings = _USERS_SETTINGS,
    ) -> None:
        stand_ins = stand_in_view(view)
        optimizer = make_optimizer(stand_ins.trained.values())
        schedulers = [] if make_lr_scheduler is None else [make_lr_scheduler(optimizer)]
        self.prepared: Prepared = prepare(source, stand_ins, optimizer, settings, lr_schedulers=schedulers)
        self._settings = scheduler_settings
        self._session = Session(
            stand_ins, optimizer, self.prepared, settings, lr_schedulers=schedulers, report=lambda *_: None
        )

    @property
    def labels(self) -> list[str]:
        """The names of all groups that the session comes to have."""
        return [group.label for group in self.prepared.plan.phases[-1].groups]

    @property
    def scheduler_names(self) -> list[str]:
        """The classes of the LR schedulers in force."""
        return [type(scheduler).__name__ for scheduler in self._session.lr_schedulers]

    def run(self, pace: Pace) -> Iterator[SimulatedStep]:
        """Go through the session once; a simulation can be run once."""
        session, step = self._session, 0
        session.begin()
        for epoch in range(pace.epochs):
            self._follow(Moment(epoch, step, out_of_patience=self._out_of_patience(epoch, pace)))
            for batch in range(pace.steps_per_epoch):
                if batch:
                    self._follow(Moment(epoch, step, between_epochs=False))
                rates = _rates_in_step(session.optimizer)
                yield SimulatedStep(epoch, step, session.phase, rates)
                step += 1
                self._step_schedulers("step", batch + 1)
                if self._is_over(Moment(epoch, step, between_epochs=False)):
                    return
            self._step_schedulers("epoch", epoch + 1)
            if self._is_over(Moment(epoch + 1, step)):
                return

    def entries(self) -> Iterator[tuple[float | None, ...]]:
        """Enter phase after phase without a step between; yields the groups' learning rates at each entry."""
        session = self._session
        session.begin()
        yield tuple(learning_rates(session.optimizer))
        for phase in range(1, session.plan.last_phase + 1):
            session.enter(phase, Moment(phase, phase), Reason.REQUEST)
            yield tuple(learning_rates(session.optimizer))

    def present_labels(self) -> list[str]:
        """The names of the groups that the optimizer has at the moment."""
        return [own_label(group) for group in self._session.optimizer.param_groups]

    def _follow(self, moment: Moment) -> None:
        reason = self._session.decide(moment).reason
        if reason is not None and self._session.phases_remaining:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._session.enter(self._session.phase + 1, moment, reason)

    def _is_over(self, moment: Moment) -> bool:
        return not self._session.phases_remaining and self._session.decide(moment).advance

    def _out_of_patience(self, epoch: int, pace: Pace) -> bool:
        limits = self._session.plan.phases[self._session.phase].limits
        has_limit = limits.max_transition_epoch >= 0 or limits.max_transition_step >= 0
        lasted = epoch - self._session.progress.entry_epoch
        return pace.epochs_per_phase is not None and not has_limit and lasted >= max(pace.epochs_per_phase, 1)

    def _step_schedulers(self, interval: str, count: int) -> None:
        """Step LR schedulers when Lightning does: after so many steps of an epoch, or epochs."""
        settings = self._session.scheduler_settings or self._settings
        if settings.interval != interval or count % settings.frequency:
            return
        for scheduler in self._session.lr_schedulers:
            if not isinstance(scheduler, ReduceLROnPlateau):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a run tells, too
                    scheduler.step()


def stand_in_view(view: ModelView) -> ModelView:
    """View a model of the same names and structure, whose tensors have one value each."""
    made: dict[int, nn.Parameter] = {}
    for tensor in view.tensors.values():
        if id(tensor) not in made:
            value = torch.zeros([1] * tensor.dim())
            made[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad)
    tensors = {name: made[id(tensor)] for name, tensor in view.tensors.items()}
    return replace(view, model=nn.Module(), tensors=tensors)


def like_optimizer(optimizer: Optimizer, view: ModelView) -> MakeOptimizer | None:
    """Return what makes an optimizer with the groups of one that is there, over stand-ins of a model's tensors.

    Args:
        optimizer: The optimizer; ``None`` is returned for a wrapper, which cannot be copied.
        view: The model.
    """
    if emptied(optimizer) is optimizer:
        return None

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        stand_in = {id(tensor): own for tensor, own in zip(view.trained.values(), parameters, strict=True)}
        other = emptied(optimizer)
        for group in optimizer.param_groups:
            held = [stand_in.get(id(each), nn.Parameter(torch.zeros(1))) for each in group["params"]]
            other.param_groups.append({**group, "params": held})
        return other

    return make


def _rates_in_step(optimizer: Optimizer) -> tuple[float | None, ...]:
    """Let an optimizer make a step that changes nothing; return the rates inside it, where a warm-up scales them."""
    found: list[float | None] = []
    inner = stepping(optimizer) or optimizer
    handle = inner.register_step_pre_hook(lambda *_: found.extend(learning_rates(optimizer)))
    try:
        if "closure" in inspect.signature(optimizer.step).parameters:
            optimizer.step(_no_loss)
        else:
            optimizer.step()
    finally:
        handle.remove()
    return tuple(found)


def _no_loss() -> Any:  # PyTorch says that it is a float, everybody returns a tensor
    return torch.zeros(())
