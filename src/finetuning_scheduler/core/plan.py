"""What each phase of a schedule is: a whole state of the model and its optimizer, known before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar, overload

from .optim.build import steps_by_lr
from .optim.initial import is_exempt
from .optim.param_groups import Labels, Options, PlannedGroup
from .schedule.model import LRSchedulerSpec, OptimizerSpec, Phase
from .schedule.schedule import Schedule

T = TypeVar("T")


class Prefix(Sequence[T]):
    """The first items of a list, which many phases share: n states of a growing model take no n lists."""

    def __init__(self, items: Sequence[T], length: int) -> None:
        self.items = items
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[T]:
        return islice(self.items, self.length)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self.items[position] for position in range(*index.indices(self.length))]
        return self.items[range(self.length)[index]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __repr__(self) -> str:
        return repr(list(self))


def difference(before: Sequence[str], after: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell which names are new and which are gone; takes time in these alone if one state continues the other."""
    if isinstance(before, Prefix) and isinstance(after, Prefix) and before.items is after.items:
        return list(after[before.length :]), list(before[after.length :])
    old, new = set(before), set(after)
    return [name for name in after if name not in old], [name for name in before if name not in new]


@dataclass(frozen=True)
class PhaseState:
    """One phase: all that is trained in it, and with what.

    Attributes:
        index: The phase.
        limits: What the schedule says of it, in full names.
        trainable: The names of all parameters that are trained, in the order in which they were thawed.
        trainable_count: How many values these parameters have.
        groups: All groups of the optimizer, in order.
        groups_before: How many of them there are before the phase adds its own.
        optimizer: The optimizer in force; ``None`` for the user's.
        optimizer_since: The phase that installed it.
        lr_scheduler: The LR scheduler in force; ``None`` for the user's.
        lr_scheduler_since: The phase that installed it.
        keeps_frozen_state: Whether the optimizer's state of parameters that are trained no more waits for them.
    """

    index: int
    limits: Phase
    trainable: Sequence[str]
    trainable_count: int
    groups: Sequence[PlannedGroup]
    groups_before: int = 0
    optimizer: OptimizerSpec | None = None
    optimizer_since: int = 0
    lr_scheduler: LRSchedulerSpec | None = None
    lr_scheduler_since: int = 0
    keeps_frozen_state: bool = True

    @property
    def new_groups(self) -> Sequence[PlannedGroup]:
        """The groups that the phase adds."""
        return self.groups[self.groups_before :]


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
        takes_first_lr: Whether ``default_lr`` is the initial one of phase 0's first group.
    """

    default_lr: float | None
    no_decay: Collection[str] = ()
    options: Mapping[str, Options] = field(default_factory=dict)
    block_numbers: Mapping[str, int] = field(default_factory=dict)
    held: Collection[str] = frozenset()
    meshes: Mapping[str, Any] = field(default_factory=dict)
    takes_first_lr: bool = False

    def options_of(self, name: str) -> dict[str, Any]:
        """Return the options that a parameter's group gets besides its learning rate."""
        return {**self.options.get(name, {}), **({"weight_decay": 0.0} if is_exempt(name, self.no_decay) else {})}

    def groups(self, phase: Phase, *, has_lr: bool = True) -> Iterator[PlannedGroup]:
        """Split a phase's parameters: by block from the output if learning rates decay, then by options.

        Args:
            phase: The phase.
            has_lr: Whether the optimizer in force has learning rates.
        """
        lr = self.default_lr if phase.lr is None else phase.lr
        lr = lr if has_lr else None
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
                takes_first_lr = phase.lr is None and self.takes_first_lr and scale == 1
                yield PlannedGroup(tuple(members), None if lr is None else lr * scale, options, takes_first_lr)


@dataclass(frozen=True)
class Plan:
    """The phases that will be executed and the size of the model they share."""

    phases: tuple[PhaseState, ...]
    model_parameter_count: int

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        sizes: Mapping[str, int],
        rules: GroupRules,
        *,
        initial: Sequence[PlannedGroup] = (),
        max_depth: int = -1,
    ) -> Plan:
        """Plan a schedule whose selectors are full parameter names.

        Args:
            schedule: The resolved schedule.
            sizes: The number of values in each of the model's parameters, by name.
            rules: How parameters are split into groups.
            initial: Phase 0's groups.
            max_depth: Deepest phase to execute; -1 for all.
        """
        phases: list[PhaseState] = []
        names: list[str] = []
        labels = Labels()
        groups = list(labels.of(initial, 0))
        count = 0
        optimizer: tuple[OptimizerSpec | None, int] = (None, 0)
        scheduler: tuple[LRSchedulerSpec | None, int] = (None, 0)
        has_lr = all(group.lr is not None for group in initial)
        for index, phase in enumerate(schedule.up_to(max_depth).phases):
            before = len(groups) if index > 0 else 0
            has_lr = has_lr if phase.new_optimizer is None else steps_by_lr(phase.new_optimizer)
            groups += labels.of(rules.groups(phase, has_lr=has_lr), index) if index > 0 else ()
            names += phase.params
            count += sum(sizes[name] for name in phase.params)
            optimizer = optimizer if phase.new_optimizer is None else (phase.new_optimizer, index)
            scheduler = scheduler if phase.new_lr_scheduler is None else (phase.new_lr_scheduler, index)
            trainable, all_groups = Prefix(names, len(names)), Prefix(groups, len(groups))
            phases.append(PhaseState(index, phase, trainable, count, all_groups, before, *optimizer, *scheduler))
        return cls(tuple(phases), sum(sizes.values()))

    @property
    def last_phase(self) -> int:
        """Index of the deepest phase to execute."""
        return len(self.phases) - 1

    def recounted(self, sizes: Mapping[str, int]) -> Plan:
        """Count anew, now that parameters that had no shape have got one."""
        phases, count = [], 0
        for state in self.phases:
            count += sum(sizes[name] for name in state.limits.params)
            phases.append(replace(state, trainable_count=count))
        return Plan(tuple(phases), sum(sizes.values()))

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
            share = planned.trainable_count / total
            rates = ", ".join("none" if group.lr is None else f"{group.lr:g}" for group in planned.new_groups)
            adds = f"adds groups at learning rates [{rates}]" if planned.index else "keeps the initial groups"
            line = f"Phase {planned.index}: {share:.2%} of the parameters trainable, {adds}"
            described.append(", ".join([line, *_details(planned.limits)]))
        return described

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _details(limits: Phase) -> Iterator[str]:
    """Say what else a phase brings along, and until when it lasts."""
    if limits.new_optimizer is not None:
        yield f"optimizer {limits.new_optimizer.optimizer_init.class_path}"
    if limits.new_lr_scheduler is not None:
        yield f"LR scheduler {limits.new_lr_scheduler.lr_scheduler_init.class_path}"
    if limits.lr_warmup_steps:
        yield f"warms up over {limits.lr_warmup_steps} steps"
    if limits.max_transition_epoch >= 0:
        yield f"until epoch {limits.max_transition_epoch}"
    if limits.max_transition_step >= 0:
        yield f"until step {limits.max_transition_step}"


def block_numbers(blocks: Schedule) -> dict[str, int]:
    """Number each parameter's block from the output, given the model's schedule by blocks."""
    return {name: number for number, phase in enumerate(blocks.phases) for name in phase.params}
