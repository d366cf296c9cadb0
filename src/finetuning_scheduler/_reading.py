"""The schedule of one fit: read before optimizers are made, with the model then in the state of phase 0; and saved."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from os import PathLike
from typing import Any, Protocol

from ._lightning import LightningModule, Trainer
from ._overrides import override_problems
from ._source import Implicit, generated_by, read_source, save, with_reinitialisation
from ._trainer import AdapterChoice, as_misconfiguration
from .core.optim.checks import import_problems
from .core.ranks import Ranks
from .core.schedule.generate import generate
from .core.schedule.resolve import Resolution
from .core.schedule.schedule import Schedule
from .core.thaw import set_trainable
from .core.view import ModelView
from .errors import OptimizerError, Problem, ScheduleError
from .strategy_adapters import StrategyAdapter
from .strategy_adapters.base import schedule_view
from .strategy_adapters.registry import unused_adapters


class ScheduleOwner(Implicit, AdapterChoice, Protocol):
    """The callback whose schedule is read."""


class Reading:
    """Reads what the user has asked for as a schedule, by the names that the strategy's adapter wants.

    Args:
        owner: The callback.
        given: What the user has asked for as ``ft_schedule`` and ``log_dir``; what changes before it is read counts.
        trainer: The trainer.
        module: The module.
        adapter: The strategy's adapter.
        ranks: The processes that train together.

    Attributes:
        resolved: What has become of the arguments in ``given``, by name, as far as it is known.
        found: The phases, or what is wrong with them.
        view: The model, as it is trained.
        problems: What an adapter's validation has asked for and cannot have.
    """

    def __init__(
        self,
        owner: ScheduleOwner,
        given: dict[str, Any],
        trainer: Trainer,
        module: LightningModule,
        adapter: StrategyAdapter,
        ranks: Ranks,
    ) -> None:
        self.resolved: dict[str, Any] = {}
        self.found = Resolution()
        self.view = self._named = ModelView.of(module)
        self.problems: list[Problem] = []
        self._owner = owner
        self._given = given
        self._trainer = trainer
        self._module = module
        self._adapter = adapter
        self._ranks = ranks
        self._file: str | PathLike[str] | None = None  # that the schedule was read from
        self._came_with: dict[str, bool] = {}

    def thaw_first_phase(self) -> None:
        """Read the schedule; freeze and thaw what it says for phase 0, if nothing is wrong with it."""
        view = self._adapter.view(self._module)
        with as_misconfiguration():
            self.found = self._read(view)
            self._agree_on_classes()
            if not self.found.errors:
                self.problems = [*self._validation_problems(self._adapter.validate_ft_sched())]
        self.view = view
        self._came_with = {name: parameter.requires_grad for name, parameter in view.trained.items()}
        for first in self.found.phases[:1]:
            set_trainable(view.trained.values(), trainable=False)
            set_trainable((view.tensors[name] for name in first.params), trainable=True)
        if not self.found.errors:
            with as_misconfiguration():
                self._adapter.on_after_init_fts()

    def give_back(self, thawed: Collection[str]) -> None:
        """Give the parameters that no phase has thawed the ``requires_grad`` with which they came, once."""
        for name, trainable in self._came_with.items():
            if name not in thawed:
                set_trainable([self.view.trained[name]], trainable)
        self._came_with = {}

    def save(self) -> str:
        """Save the schedule in force and return its path; to be called by every rank."""
        schedule: Schedule = self.resolved["ft_schedule"]
        return save(self._ranks, lambda: schedule, self._named.plain, self._log_dir(), self._file)

    def generate(self) -> str:
        """Write the default schedule and return its path; to be called by every rank.

        Raises:
            ScheduleError: The user has named or overridden what would not be heeded.
        """
        adapter, owner, directory = self._adapter, self._owner, self._log_dir()
        unused = unused_adapters(self._trainer, owner.custom_strategy_adapters)
        if problems := [*unused, *override_problems(owner, adapter)]:
            raise ScheduleError(problems)
        view = schedule_view(adapter, adapter.view(self._module))
        path = self._ranks.from_zero(lambda: generated_by(adapter, owner, directory))
        if path is not None:
            return str(path)
        return save(self._ranks, lambda: generate(view.plain, frozen=view.frozen), view.plain, directory)

    def _log_dir(self) -> str:
        """Settle where artifacts go; to be called by every rank, since the trainer lets rank zero decide."""
        given = self._given["log_dir"] or self._trainer.log_dir or self._trainer.default_root_dir
        self.resolved["log_dir"] = given
        return str(given)

    def _read(self, view: ModelView) -> Resolution:
        """Read the schedule, or generate it, by the names that the adapter wants; return it by those of a view."""
        named, directory = schedule_view(self._adapter, view), self._log_dir()
        source, owner = self._given["ft_schedule"], self._owner

        def read() -> tuple[Resolution, str | PathLike[str] | None]:
            written = generated_by(self._adapter, owner, directory) if source is None else None
            generated = source if written is None else with_reinitialisation(written, owner)
            return read_source(generated, owner, named, directory), written

        found, written = self._ranks.from_zero(read)
        self._named = named
        file = source if written is None else written
        self._file = file if isinstance(file, (str, PathLike)) else None
        if not found.errors:
            self.resolved["ft_schedule"] = found.schedule
        if named is view:
            return found
        phases = (each.model_copy(update={"params": named.names_for(each.params, view)}) for each in found.phases)
        unnamed = sum(id(tensor) not in named.names_of for tensor in view.trained.values())
        return replace(found, phases=tuple(phases), frozen=found.frozen + unnamed)

    def _validation_problems(self, result: Any) -> Iterator[Problem]:
        """Find what an adapter's validation returns to have other phases executed."""
        deepest = len(self.found.phases) - 1
        if result is not None and (not isinstance(result, (tuple, list)) or list(result[:1]) != [deepest]):
            message = f"expected `validate_ft_sched` to return {deepest} as the deepest phase, got {result!r}"
            yield Problem(message, fix="Use `max_depth` to execute fewer phases.")

    def _agree_on_classes(self) -> None:
        """Refuse on every rank what some rank cannot import: rank zero has checked the classes for itself only."""
        if self._trainer.world_size == 1:
            return
        problems = import_problems(self.found.phases)
        if self._ranks.any(bool(problems)):
            message = "expected all ranks to import the classes of the schedule, got another rank that cannot"
            fix = "See that rank's message; install the same modules everywhere."
            raise OptimizerError(problems or Problem(message, fix))
