"""Do the optimizers and LR schedulers that phases install suit the model, its optimizer and the groups there are?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn
from torch.optim import LBFGS, Muon, Optimizer, SparseAdam

from ...errors import Problem
from ..schedule.model import LRSchedulerSpec, Phase
from ..schedule.wording import listed
from .build import import_class
from .checks import ONE_GROUP, Complaint, construction_complaints, located
from .schedulers import row_of
from .stand_ins import OptimizerFactory, factory_like, factory_of


@dataclass(frozen=True)
class Groups:
    """How many parameter groups exist before a phase, and how many it adds."""

    before: int
    added: int

    @property
    def total(self) -> int:
        """How many there are in the phase."""
        return self.before + self.added


@dataclass(frozen=True)
class Places:
    """Where a schedule file says what phases install: its name, and its lines by phase and key."""

    source: str | None = None
    lines: Mapping[tuple[int, str], int] = field(default_factory=dict)


def check_against_model(
    phases: Sequence[Phase],
    groups: Sequence[Groups],
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    sparse: frozenset[str] = frozenset(),
    places: Places | None = None,
) -> list[Problem]:
    """Check numbers of groups, and optimizers that suit only some parameters.

    Args:
        phases: The phases to execute, with full parameter names.
        groups: The parameter groups of each phase.
        optimizer: The optimizer of phase 0.
        parameters: The model's parameters by name.
        sparse: Names of parameters whose gradients are sparse.
        places: Where the schedule's file says what phases install, for messages.
    """
    problems: list[Problem] = []
    source, lines = (places.source, places.lines) if places is not None else (None, {})
    kind: type[Optimizer] = type(optimizer)
    device = next((parameter.device for parameter in parameters.values()), None)
    factory = factory_like(optimizer)
    held: list[str] = []
    for number, (phase, counts) in enumerate(zip(phases, groups, strict=True)):
        held += phase.params
        line = lines.get((number, "new_optimizer"))
        if phase.new_optimizer is not None:
            kind = import_class(phase.new_optimizer.optimizer_init.class_path)
            factory = factory_of(phase.new_optimizer, device)
        if issubclass(kind, (Muon, SparseAdam)):
            concerned = held if phase.new_optimizer is not None else list(phase.params)
            problems += located(_parameter_complaints(kind, concerned, parameters, sparse), number, source, line)
        if number > 0 and kind is type(optimizer) and issubclass(kind, LBFGS):
            problems += located([(ONE_GROUP.format(kind.__name__), "Choose another optimizer.")], number)
        if phase.new_lr_scheduler is not None:
            for key, complaint in _scheduler_complaints(phase.new_lr_scheduler, counts, factory):
                at = lines.get((number, key), lines.get((number, "new_lr_scheduler")))
                problems += located([complaint], number, source, at)
    return problems


def _parameter_complaints(
    kind: type[Optimizer], names: Sequence[str], parameters: Mapping[str, nn.Parameter], sparse: frozenset[str]
) -> Iterator[Complaint]:
    if issubclass(kind, Muon):
        others = [name for name in names if parameters[name].dim() != 2]
        if others:
            yield (
                f"Muon optimizes matrices only, but this phase gives it {listed(others, limit=3)}",
                ("Thaw these with another optimizer."),
            )
    if issubclass(kind, SparseAdam):
        dense = [name for name in names if name not in sparse]
        if dense:
            yield (
                f"SparseAdam needs sparse gradients, but this phase gives it the dense {listed(dense, limit=3)}",
                ("Use Adam, or thaw embeddings with sparse=True only."),
            )


def _scheduler_complaints(
    spec: LRSchedulerSpec, groups: Groups, factory: OptimizerFactory
) -> Iterator[tuple[str, Complaint]]:
    """Say what is wrong with an LR scheduler, each with the key that it is about."""
    wrong = [*_starts_complaints(spec, groups), *_list_complaints(spec, groups)]
    yield from wrong
    if any(key != "init_pg_lrs" for key, _ in wrong):
        return
    for message, fix in construction_complaints(spec, partial(factory, groups.total)):
        yield "new_lr_scheduler", (message, _unknown_lists_fix(spec, groups, factory) or fix)


def _starts_complaints(spec: LRSchedulerSpec, groups: Groups) -> Iterator[tuple[str, Complaint]]:
    """Count the learning rates that existing groups start from."""
    if spec.init_pg_lrs is None or len(spec.init_pg_lrs) == groups.before:
        return
    got = len(spec.init_pg_lrs)
    fix = f"Give {groups.before} learning rates."
    if groups.added == 1 and got == groups.total:
        fix = "Leave out the last one: the new group starts at the phase's own rate."
    elif got == groups.total:
        fix = f"Leave out the last {groups.added}: the new groups start at the phase's own rate."
    message = f"expected `init_pg_lrs` to have {groups.before} values, one per existing group, got {got}"
    yield "init_pg_lrs", (message, fix)


def _list_complaints(spec: LRSchedulerSpec, groups: Groups) -> Iterator[tuple[str, Complaint]]:
    """Count the entries of lists that the class is known to take: one for each group that exists when it is made."""
    arguments = spec.lr_scheduler_init.init_args
    kinds = f" ({groups.before} existing, {groups.added} new)" if groups.added else ""
    for name in row_of(import_class(spec.lr_scheduler_init.class_path)).arguments:
        values = arguments.get(name)
        if isinstance(values, list) and len(values) != groups.total:
            got = len(values)
            message = f"expected `{name}` to be one value or a list of {groups.total}, one per group{kinds}, got {got}"
            fix = _add_new(groups) if got == groups.before else f"Give one value or a list of {groups.total}."
            yield name, (message, fix)


def _unknown_lists_fix(spec: LRSchedulerSpec, groups: Groups, factory: OptimizerFactory) -> str | None:
    """Say whether all that a class is wrong with is a list of its own, which leaves out the groups that are added."""
    lengths = {len(value) for value in spec.lr_scheduler_init.init_args.values() if isinstance(value, list)}
    if not groups.added or groups.before not in lengths:
        return None
    return None if [*construction_complaints(spec, partial(factory, groups.before))] else _add_new(groups)


def _add_new(groups: Groups) -> str:
    if groups.added == 1:
        return "Add one for the new group."
    return f"Add {groups.added} for the new groups."
