"""Parameter groups by parameter name: what phase 0 makes of the user's, and those that later phases add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .schedulers import grow, select
from .zero import repartition

NamedParameters = Mapping[str, nn.Parameter]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedGroup:
    """A parameter group, as it will be when its phase is entered.

    Attributes:
        names: The parameters' names.
        lr: Its learning rate when it is made; ``None`` under an optimizer that has none.
        options: The options in which it differs from its optimizer's defaults, such as ``weight_decay``.
        takes_first_lr: Whether ``lr`` is that of phase 0's first group.
        source: In phase 0, the position of the user's group that it goes on with; ``None`` for one that is added.
        label: What the optimizer and those who log its learning rates call it: the group's ``name``.
    """

    names: tuple[str, ...]
    lr: float | None
    options: Options = field(default_factory=dict)
    takes_first_lr: bool = False
    source: int | None = None
    label: str = ""


class Labels:
    """Calls the groups of a plan ``phase1``, ``phase1/no_decay``, ``phase1/2``, ...; no two have one name."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._counts: Counter[tuple[str, str]] = Counter()

    def of(self, groups: Iterable[PlannedGroup], phase: int) -> Iterator[PlannedGroup]:
        """Name groups that a phase begins with; one that the user has named keeps its name."""
        for group in groups:
            label = group.label if group.label and group.label not in self._taken else self._made(group, phase)
            self._taken.add(label)
            yield group if label == group.label else replace(group, label=label)

    def _made(self, group: PlannedGroup, phase: int) -> str:
        base = group.label or f"phase{phase}"
        ending = "/no_decay" if group.options.get("weight_decay") == 0 else ""
        while True:
            self._counts[base, ending] += 1
            number = self._counts[base, ending]
            label = f"{base}{ending}" if number == 1 else f"{base}/{number}{ending}"
            if label not in self._taken:
                return label


_FOREIGN = "(not in the model: "
LABEL = "name"  # the key by which Lightning's LearningRateMonitor knows it


def is_foreign(name: str) -> bool:
    """Whether a name given by :func:`group_names` stands for a tensor that is not the model's."""
    return name.startswith(_FOREIGN)


def group_names(optimizer: Optimizer, parameters: NamedParameters) -> list[list[str]]:
    """List the names of each group's parameters, in the optimizer's order.

    Args:
        optimizer: An optimizer over some of ``parameters``.
        parameters: The model's parameters by name. One that is not among them is named by its place among such.
    """
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    places = count()
    groups = (group["params"] for group in optimizer.param_groups)
    return [[name_of.get(id(p)) or f"{_FOREIGN}{next(places)})" for p in parameters_] for parameters_ in groups]


def put_labels(optimizer: Optimizer, groups: Iterable[PlannedGroup]) -> None:
    """Give an optimizer's groups the names of planned ones: the state that it has loaded may have none, or others."""
    for group, planned in zip(optimizer.param_groups, groups, strict=True):
        if planned.label:
            group[LABEL] = planned.label


def without_label(group: Options) -> dict[str, Any]:
    """Copy a group, or its options, without its name."""
    return {key: value for key, value in group.items() if key != LABEL}


def own_label(group: Options) -> str:
    """Return the name that a user has given a group; empty if none."""
    return str(group.get(LABEL) or "")


def learning_rates(optimizer: Optimizer) -> list[float | None]:
    """Return each group's present learning rate; ``None`` for an optimizer that sets its steps itself."""
    return [None if group["lr"] is None else float(group["lr"]) for group in optimizer.param_groups]


def mesh_of(parameter: nn.Parameter) -> Any:
    """Return the device mesh that a distributed tensor lives on, ``None`` for a plain one."""
    return getattr(parameter, "device_mesh", None)


def like(reference: object, lr: Any) -> Any:
    """Give a learning rate the kind its optimizer uses: capturable and compiled optimizers hold it in a tensor.

    There is none for an optimizer that sets its steps itself.
    """
    if lr is None:
        return None
    return torch.full_like(reference, float(lr)) if isinstance(reference, torch.Tensor) else float(lr)


def add_groups(
    optimizer: Optimizer,
    lr_schedulers: Iterable[LRScheduler],
    parameters: NamedParameters,
    groups: Iterable[PlannedGroup],
    *,
    apply_lambdas: bool = False,
) -> None:
    """Add groups, each at its ``lr``, and extend the schedulers by them.

    Args:
        optimizer: The optimizer to extend. It takes of a group's options those that it knows; others are its defaults.
        lr_schedulers: The schedulers that act on ``optimizer``; they act on the new groups from their next step on.
        parameters: The model's parameters by name; no group may hold those of the new groups.
        groups: The groups.
        apply_lambdas: Let groups start at ``lr`` times the present value of a scheduler's last ``lr_lambda``.
    """
    first = len(optimizer.param_groups)
    reference = optimizer.param_groups[0] if first else {}
    for group in groups:
        named = [(name, parameters[name]) for name in group.names]
        _append(
            optimizer,
            {
                "params": named if "param_names" in reference else [parameter for _, parameter in named],
                **{key: value for key, value in group.options.items() if key in optimizer.defaults},
                "lr": like(reference.get("lr"), group.lr),
                "initial_lr": like(reference.get("lr"), group.lr),
                **({LABEL: group.label} if group.label else {}),
            },
        )
    added = optimizer.param_groups[first:]
    for scheduler in lr_schedulers if added else ():
        grow(scheduler, added, optimizer.param_groups[0], apply_lambdas=apply_lambdas)


def arrange(
    optimizer: Optimizer,
    lr_schedulers: Iterable[LRScheduler],
    parameters: NamedParameters,
    groups: Sequence[PlannedGroup],
) -> None:
    """Make an optimizer hold exactly these groups, in place; each goes on with one of the present groups.

    The optimizer and the first group of each source stay the same objects with their hyper-parameters, so whatever
    refers to them goes on working; schedulers keep the entries of each group's source.
    """
    present, pristine = list(optimizer.param_groups), [dict(group) for group in optimizer.param_groups]
    tensors = dict(parameters)
    for group, names in zip(present, group_names(optimizer, parameters), strict=True):
        tensors.update(zip(names, group["params"], strict=True))
    arranged: list[dict[str, Any]] = []
    sources = [planned.source or 0 for planned in groups]
    for position, (planned, source) in enumerate(zip(groups, sources, strict=True)):
        group = present[source] if source not in sources[:position] else _copied(pristine[source])
        group.update({key: value for key, value in planned.options.items() if key in optimizer.defaults})
        group["params"] = [tensors[name] for name in planned.names]
        if "param_names" in group:
            group["param_names"] = list(planned.names)
        arranged.append(group)
    for scheduler in lr_schedulers:
        select(scheduler, sources, len(present))
    optimizer.param_groups[:] = arranged
    held = {id(parameter) for group in arranged for parameter in group["params"]}
    for parameter in [p for p in optimizer.state if id(p) not in held]:
        del optimizer.state[parameter]
    if hasattr(optimizer, "_params"):  # LBFGS keeps its only group's list under another name
        optimizer._params = optimizer.param_groups[0]["params"]
    repartition(optimizer)


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in group.items()}


def _append(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Add a group that holds no parameter of another.

    ``Optimizer.add_param_group`` compares with every parameter that is held already, so adding many groups would take
    time that grows with the square of their number; it is shown an empty list instead.
    """
    if type(optimizer).add_param_group is not Optimizer.add_param_group or "param_groups" not in vars(optimizer):
        optimizer.add_param_group(group)
        return
    held = optimizer.param_groups
    optimizer.param_groups = []
    try:
        optimizer.add_param_group(group)
        held.extend(optimizer.param_groups)
    finally:
        optimizer.param_groups = held
