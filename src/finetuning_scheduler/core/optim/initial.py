"""Phase 0's parameter groups: what becomes of those that the user's optimizer has. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .param_groups import NamedParameters, Options, PlannedGroup, group_names, is_foreign, mesh_of, own_label
from .schedulers import cycles_momentum


@dataclass(frozen=True)
class InitialGroups:
    """The groups of phase 0.

    Attributes:
        groups: The groups, each with the user's group that it goes on with.
        options: By parameter name, the options in which its group differs from the optimizer's defaults.
        lr: The initial learning rate of the first group.
        differences: How the user's groups differ from phase 0, if they are left alone.
        foreign: How many tensors of the optimizer are not the module's.
    """

    groups: tuple[PlannedGroup, ...]
    options: Mapping[str, Options]
    lr: float | None
    differences: str | None = None
    foreign: int = 0


def initial_groups(
    optimizer: Optimizer,
    lr_schedulers: Iterable[LRScheduler],
    parameters: NamedParameters,
    wanted: Sequence[str],
    *,
    no_decay: Collection[str],
    enforce: bool,
    replaced: bool = False,
) -> InitialGroups:
    """Plan groups of exactly phase 0's parameters, with the hyper-parameters the user gave their groups.

    Parameters that had no group get the hyper-parameters of the first group that stays.

    Args:
        optimizer: The user's optimizer.
        lr_schedulers: The schedulers that act on it. What they have written into the groups is not the user's.
        parameters: The model's parameters by name.
        wanted: The names of phase 0's parameters.
        no_decay: Fragments of names; parameters that had no group get one without weight decay if they match.
        enforce: If not set, the groups stay as they are.
        replaced: Whether a phase installs another optimizer. Its weight decay exempts what matches even if this one has
            none.
    """
    written = ("momentum", "betas") if any(map(cycles_momentum, lr_schedulers)) else ()
    defaults = {key: value for key, value in optimizer.defaults.items() if key not in written}
    held = group_names(optimizer, parameters)
    deviating = [deviating_options(group, defaults) for group in optimizer.param_groups]
    options = {name: deviating[index] for index, names in enumerate(held) for name in names}
    differences = None
    if enforce:
        members = list(_enforced(optimizer, held, wanted, no_decay, replaced=replaced))
        options |= {name: {**deviating[index], **more} for index, names, more in members for name in names}
        members = _split_by_mesh(members, parameters)
    else:
        members = [(index, names, {}) for index, names in enumerate(held)]
        differences = _differences(held, wanted)
    groups = tuple(
        PlannedGroup(
            tuple(names),
            _initial_lr(optimizer, index),
            {**deviating[index], **more},
            source=index,
            label=own_label(optimizer.param_groups[index]),
        )
        for index, names, more in members
    )
    own = (group.source for group in groups if not all(map(is_foreign, group.names)))
    first = next(own, 0)
    foreign = sum(is_foreign(name) for names in held for name in names)
    return InitialGroups(groups, options, _initial_lr(optimizer, first or 0), differences, foreign)


def deviating_options(group: Mapping[str, Any], defaults: Options) -> dict[str, Any]:
    """Tell in which options a group differs from its optimizer's defaults; a phase sets learning rates itself."""
    return {key: group[key] for key in defaults if key != "lr" and group[key] != defaults[key]}


def is_exempt(name: str, no_decay: Collection[str]) -> bool:
    """Whether a parameter's name contains one of the fragments that exempt it from weight decay."""
    return any(fragment in name for fragment in no_decay)


_Member = tuple[int, list[str], dict[str, Any]]  # the user's group, names, and options of their own


def _enforced(
    optimizer: Optimizer,
    held: Sequence[Sequence[str]],
    wanted: Sequence[str],
    no_decay: Collection[str],
    *,
    replaced: bool,
) -> Iterator[_Member]:
    """Yield what stays of each group, split by weight decay unless the user's groups set it themselves.

    Tensors that are not the module's, such as the weights of a loss, stay where they are. Parameters that had no group
    come last in the first group that stays.
    """
    kept = set(wanted)
    known = {name for names in held for name in names}
    missing = [name for name in wanted if name not in known]
    first = next((index for index, names in enumerate(held) if not kept.isdisjoint(names)), 0)
    default = optimizer.defaults.get("weight_decay")
    user_decides = any(group.get("weight_decay") != default for group in optimizer.param_groups)
    candidates = missing if user_decides else kept
    decays = default is not None or (replaced and not isinstance(optimizer, LBFGS))  # which has one group only
    exempt = {name for name in candidates if decays and is_exempt(name, no_decay)}
    for index, names in enumerate(held):
        adopted = missing if index == first else []
        staying = [*(name for name in names if name in kept or is_foreign(name)), *adopted]
        if decaying := [name for name in staying if name not in exempt]:
            yield index, decaying, {}
        if spared := [name for name in staying if name in exempt]:
            yield index, spared, {"weight_decay": 0.0}


def _split_by_mesh(members: Iterable[_Member], parameters: NamedParameters) -> list[_Member]:
    """Give distributed tensors of each mesh, and plain ones, groups of their own.

    Implementations of a step that update many tensors at once cannot mix them.
    """
    firsts: list[_Member] = []
    others: list[_Member] = []
    for index, names, options in members:
        by_mesh: dict[Any, list[str]] = {}
        for name in names:
            by_mesh.setdefault(mesh_of(parameters[name]) if name in parameters else None, []).append(name)
        first, *more = by_mesh.values()
        firsts.append((index, first, options))
        others += [(index, apart, options) for apart in more]
    return [*firsts, *others]


def _differences(held: Sequence[Sequence[str]], wanted: Sequence[str]) -> str | None:
    names = {name for group in held for name in group}
    missing = [name for name in wanted if name not in names]
    surplus = sorted(names - set(wanted))
    if not missing and not surplus:
        return None
    return f"The optimizer does not hold exactly phase 0's parameters: missing {missing}, also held {surplus}."


def _initial_lr(optimizer: Optimizer, index: int) -> float | None:
    group = optimizer.param_groups[index]
    if group["lr"] is None:
        return None
    return float(group.get("initial_lr", group["lr"]))
