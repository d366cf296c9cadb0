"""What each phase of a schedule will do to a model and its optimizer, computed before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .schedule.model import Phase
from .schedule.schedule import Schedule

Options = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedGroup:
    """A parameter group that a phase adds to the optimizer, at this learning rate and with these options."""

    names: tuple[str, ...]
    lr: float
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedPhase:
    """One phase, resolved against a model, and the groups it adds to those that the optimizer has."""

    index: int
    limits: Phase
    groups: tuple[PlannedGroup, ...]
    parameter_count: int


@dataclass(frozen=True)
class GroupRules:
    """What decides how a phase's parameters are split into groups.

    Args:
        default_lr: Learning rate of a phase after the first that names none.
        no_decay: Fragments of names whose parameters get a group without weight decay.
        options: Options by which parameters differ from their optimizer's defaults, by name.
        block_numbers: For ``lr_decay``, each parameter's block, counted from the output.
        held: Names of parameters that already have a group and are given no other.
        meshes: The device mesh that a distributed tensor lives on, by name. Optimizers that update many tensors at
            once cannot mix tensors of different meshes, nor these with plain ones.
    """

    default_lr: float
    no_decay: Collection[str] = ()
    options: Mapping[str, Options] = field(default_factory=dict)
    block_numbers: Mapping[str, int] = field(default_factory=dict)
    held: Collection[str] = frozenset()
    meshes: Mapping[str, Any] = field(default_factory=dict)

    def options_of(self, name: str) -> dict[str, Any]:
        """Return the options that a parameter's group gets besides its learning rate."""
        return {**self.options.get(name, {}), **({"weight_decay": 0.0} if is_exempt(name, self.no_decay) else {})}

    def groups(self, phase: Phase) -> Iterator[PlannedGroup]:
        """Split a phase's parameters: by block from the output if learning rates decay, then by options."""
        lr = self.default_lr if phase.lr is None else phase.lr
        names = [name for name in phase.params if name not in self.held]
        blocks = {name: self.block_numbers[name] if phase.lr_decay is not None else 0 for name in names}
        top = min(blocks.values(), default=0)
        splits: dict[int, list[tuple[dict[str, Any], Any, list[str]]]] = {}
        for name in names:
            options, mesh = self.options_of(name), self.meshes.get(name)
            candidates = splits.setdefault(blocks[name] - top, [])
            members = next((known[2] for known in candidates if known[:2] == (options, mesh)), None)
            if members is None:
                candidates.append((options, mesh, members := []))
            members.append(name)
        for distance, candidates in sorted(splits.items()):
            scale = max((phase.lr_decay or 1.0) ** distance, phase.lr_decay_min_scale)
            for options, _, members in sorted(candidates, key=lambda candidate: "weight_decay" in candidate[0]):
                yield PlannedGroup(tuple(members), lr * scale, options)


@dataclass(frozen=True)
class Plan:
    """The phases that will be executed and the size of the model they share."""

    phases: tuple[PlannedPhase, ...]
    model_parameter_count: int

    @classmethod
    def of(cls, schedule: Schedule, sizes: Mapping[str, int], rules: GroupRules, *, max_depth: int = -1) -> Plan:
        """Plan a schedule whose selectors are full parameter names.

        Args:
            schedule: The resolved schedule.
            sizes: The number of values in each of the model's parameters, by name.
            rules: How parameters are split into groups.
            max_depth: Deepest phase to execute; -1 for all.
        """
        phases = tuple(
            PlannedPhase(
                index=index,
                limits=phase,
                groups=tuple(rules.groups(phase)) if index > 0 else (),  # phase 0's are the initial optimizer's
                parameter_count=sum(sizes[name] for name in phase.params),
            )
            for index, phase in enumerate(schedule.up_to(max_depth).phases)
        )
        return cls(phases, sum(sizes.values()))

    @property
    def last_phase(self) -> int:
        """Index of the deepest phase to execute."""
        return len(self.phases) - 1

    def trainable_count(self, phase: int) -> int:
        """Count the parameters (elements, not tensors) that are trainable in ``phase``."""
        return sum(planned.parameter_count for planned in self.phases[: phase + 1])

    def group_counts(self, initial: int) -> list[int]:
        """Count the groups that exist when each phase is entered, before its own are added.

        Args:
            initial: How many groups the optimizer has in phase 0.
        """
        counts = [initial]
        for planned in self.phases[:-1]:
            counts.append(counts[-1] + len(planned.groups))
        return counts

    def overdue_phases(self) -> list[int]:
        """List the phases whose epoch limit is not larger than an earlier phase's; each of them lasts one epoch."""
        overdue, latest = [], -1
        for planned in self.phases:
            limit = planned.limits.max_transition_epoch
            if 0 <= limit <= latest:
                overdue.append(planned.index)
            latest = max(latest, limit)
        return overdue

    def unreachable_phases(self, *, max_epochs: int | None = None, max_steps: int = -1) -> list[int]:
        """List the phases that can only begin at or after a ceiling on epochs or optimizer steps.

        Only limits count, since a phase may end by early stopping at any time. A phase lasts at least one epoch or
        step.
        """
        earliest_epoch = earliest_step = 0
        for planned in self.phases[:-1]:
            epoch, step = planned.limits.max_transition_epoch, planned.limits.max_transition_step
            if epoch < 0 and step < 0:
                continue
            by_epoch = max(epoch, earliest_epoch + 1) if epoch >= 0 else None
            by_step = max(step, earliest_step + 1) if step >= 0 else None
            epochs_suffice = by_epoch is not None and not (max_epochs is not None and 0 <= max_epochs <= by_epoch)
            steps_suffice = by_step is not None and not 0 <= max_steps <= by_step
            if not epochs_suffice and not steps_suffice:
                return list(range(planned.index + 1, len(self.phases)))
            if by_step is None and by_epoch is not None:
                earliest_epoch = by_epoch
            if by_epoch is None and by_step is not None:
                earliest_step = by_step
        return []

    def lines(self) -> list[str]:
        """Describe each phase in one line: parameters, and the groups it adds with their learning rates."""
        total = max(self.model_parameter_count, 1)
        described = []
        for planned in self.phases:
            share = self.trainable_count(planned.index) / total
            rates = ", ".join(f"{group.lr:g}" for group in planned.groups)
            adds = f"adds groups at learning rates [{rates}]" if planned.index else "keeps the initial groups"
            described.append(f"Phase {planned.index}: {share:.2%} of the parameters trainable, {adds}")
        return described


def is_exempt(name: str, no_decay: Collection[str]) -> bool:
    """Whether a parameter's name contains one of the fragments that exempt it from weight decay."""
    return any(fragment in name for fragment in no_decay)


def block_numbers(blocks: Schedule) -> dict[str, int]:
    """Number each parameter's block from the output, given the model's schedule by blocks."""
    return {name: number for number, phase in enumerate(blocks.phases) for name in phase.params}


def deviating_options(
    groups: Sequence[Mapping[str, Any]], defaults: Options, names: Sequence[Sequence[str]]
) -> dict[str, Options]:
    """Tell, by parameter name, the options in which its group differs from the optimizer's defaults.

    Learning rates are left out: a phase sets its own.
    """
    deviating: dict[str, Options] = {}
    for group, group_names in zip(groups, names, strict=True):
        options = {key: group[key] for key in defaults if key != "lr" and group[key] != defaults[key]}
        deviating.update(dict.fromkeys(group_names, options))
    return deviating
