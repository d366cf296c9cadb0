"""Parameter groups by parameter name, and the lists that LR schedulers keep one entry a group in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import CheckpointError, Problem
from .lr_schedulers import grow, select

NamedParameters = Mapping[str, nn.Parameter]


def group_names(optimizer: Optimizer, parameters: NamedParameters) -> list[list[str]]:
    """List the names of each group's parameters, in the optimizer's order.

    Args:
        optimizer: An optimizer over some of ``parameters``.
        parameters: The model's parameters by name. One that is not among them is named by its place.
    """
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    return [
        [name_of.get(id(p), f"(not in the model: {index}.{position})") for position, p in enumerate(group["params"])]
        for index, group in enumerate(optimizer.param_groups)
    ]


def learning_rates(optimizer: Optimizer) -> list[float]:
    """Return each group's present learning rate."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def add_group(
    optimizer: Optimizer,
    lr_schedulers: Iterable[LRScheduler],
    named: Sequence[tuple[str, nn.Parameter]],
    *,
    lr: float,
    overrides: Mapping[str, Any] | None = None,
    apply_lambdas: bool = False,
) -> None:
    """Add one group that starts at ``lr`` and extend the schedulers by it.

    Args:
        optimizer: The optimizer to extend; options not given are its defaults.
        lr_schedulers: The schedulers that act on ``optimizer``. The new group starts at ``lr``; they act on it from
            their next step on.
        named: The group's parameters with their names; nothing is added if it is empty.
        lr: The group's ``lr`` and ``initial_lr``.
        overrides: Other options of the group, such as ``weight_decay``.
        apply_lambdas: Let the group take a scheduler's last ``lr_lambda`` and start at ``lr`` times its present value.
    """
    if not named:
        return
    reference = optimizer.param_groups[0] if optimizer.param_groups else {}
    with_names = "param_names" in reference
    optimizer.add_param_group(
        {
            "params": list(named) if with_names else [parameter for _, parameter in named],
            **(overrides or {}),
            "lr": _like(reference.get("lr"), lr),
            "initial_lr": _like(reference.get("lr"), lr),
        }
    )
    for scheduler in lr_schedulers:
        grow(scheduler, optimizer.param_groups[-1], optimizer.param_groups[0], apply_lambdas=apply_lambdas)


def join_group(optimizer: Optimizer, index: int, named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Put parameters into an existing group."""
    group = optimizer.param_groups[index]
    group["params"] = [*group["params"], *(parameter for _, parameter in named)]
    if "param_names" in group:
        group["param_names"] = [*group["param_names"], *(name for name, _ in named)]


def clone_group(
    optimizer: Optimizer,
    lr_schedulers: Iterable[LRScheduler],
    index: int,
    named: Sequence[tuple[str, nn.Parameter]],
    overrides: Mapping[str, Any],
) -> None:
    """Add a group with the hyper-parameters and the scheduler state of an existing one, but for ``overrides``."""
    count = len(optimizer.param_groups)
    template = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in optimizer.param_groups[index].items()
        if key != "param_names"
    }
    optimizer.param_groups.append({**template, **overrides, "params": [], **_no_names(optimizer, index)})
    join_group(optimizer, -1, named)
    for scheduler in lr_schedulers:
        select(scheduler, [*range(count), index], count)


def mesh_of(parameter: nn.Parameter) -> Any:
    """Return the device mesh that a distributed tensor lives on, ``None`` for a plain one."""
    return getattr(parameter, "device_mesh", None)


def split_by_mesh(optimizer: Optimizer, lr_schedulers: Iterable[LRScheduler], parameters: NamedParameters) -> None:
    """Give distributed tensors of each mesh, and plain ones, groups of their own with the same hyper-parameters.

    Implementations of a step that update many tensors at once cannot mix them.
    """
    for index, names in enumerate(group_names(optimizer, parameters)):
        by_mesh: dict[Any, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in zip(names, optimizer.param_groups[index]["params"], strict=True):
            by_mesh.setdefault(mesh_of(parameter), []).append((name, parameter))
        first, *others = by_mesh.values()
        if others:
            optimizer.param_groups[index].update(params=[], **_no_names(optimizer, index))
            join_group(optimizer, index, first)
            for named in others:
                clone_group(optimizer, lr_schedulers, index, named, {})


def keep_only(optimizer: Optimizer, lr_schedulers: Iterable[LRScheduler], kept: Collection[nn.Parameter]) -> None:
    """Take all other parameters out of the optimizer, in place; groups left empty go, schedulers are realigned.

    The optimizer and its groups stay the same objects with their hyper-parameters, so whatever refers to them goes on
    working.
    """
    kept_ids = {id(parameter) for parameter in kept}
    for group in optimizer.param_groups:
        stays = [id(parameter) in kept_ids for parameter in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [entry for entry, keep in zip(group[key], stays, strict=True) if keep]
    remaining = [index for index, group in enumerate(optimizer.param_groups) if group["params"]]
    for scheduler in lr_schedulers:
        select(scheduler, remaining, len(optimizer.param_groups))
    optimizer.param_groups[:] = [optimizer.param_groups[index] for index in remaining]
    for parameter in [p for p in optimizer.state if id(p) not in kept_ids]:
        del optimizer.state[parameter]
    if hasattr(optimizer, "_params"):  # LBFGS keeps its only group's list under another name
        optimizer._params = optimizer.param_groups[0]["params"]
    _repartition(optimizer)


def reorder_groups(optimizer: Optimizer, parameters: NamedParameters, stored: Sequence[Sequence[str]]) -> None:
    """Bring the groups' parameters into a checkpoint's order, since optimizer state is stored by position.

    Raises:
        CheckpointError: The groups do not hold the parameters that the checkpoint's groups held.
    """
    present = group_names(optimizer, parameters)
    problems = _group_differences(present, stored)
    if problems:
        raise CheckpointError(problems)
    for group, names, wanted in zip(optimizer.param_groups, present, stored, strict=True):
        if names != list(wanted):
            group["params"] = [parameters[name] for name in wanted]
            if "param_names" in group:
                group["param_names"] = list(wanted)


def _group_differences(present: Sequence[Sequence[str]], stored: Sequence[Sequence[str]]) -> list[Problem]:
    fix = "Resume with the schedule, model and optimizer groups that wrote the checkpoint."
    if len(present) != len(stored):
        return [Problem(f"expected {len(stored)} parameter groups as in the checkpoint, got {len(present)}", fix=fix)]
    problems = []
    for index, (names, wanted) in enumerate(zip(present, stored, strict=True)):
        missing, extra = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
        if missing or extra:
            message = f"parameter group {index} differs from the checkpoint's: missing {missing}, not expected {extra}"
            problems.append(Problem(message, fix=fix))
    return problems


def state_by_name(state_dict: Mapping[str, Any], names: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Key an optimizer ``state_dict``'s per-parameter state by name instead of position."""
    position_to_name = {
        position: name
        for group, group_names_ in zip(state_dict["param_groups"], names, strict=True)
        for position, name in zip(group["params"], group_names_, strict=True)
    }
    return {position_to_name[position]: state for position, state in state_dict["state"].items()}


def with_state(
    optimizer: Optimizer, parameters: NamedParameters, states: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Build a ``state_dict`` of the optimizer's present groups and learning rates, but other per-parameter state.

    Parameters that ``states`` does not name start without state, as they do when they are first thawed.
    """
    names = group_names(optimizer, parameters)
    groups = _packed(optimizer)
    state = {
        position: dict(states[name])
        for group, names_ in zip(groups, names, strict=True)
        for position, name in zip(group["params"], names_, strict=True)
        if name in states
    }
    return {"state": state, "param_groups": groups}


def forget_state(optimizer: Any) -> None:
    """Drop all per-parameter state.

    ``ZeroRedundancyOptimizer.load_state_dict`` leaves the state of parameters alone that the given state does not name.
    """
    optimizer.state.clear()
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.optim.state.clear()


def _no_names(optimizer: Optimizer, index: int) -> dict[str, list[str]]:
    """Return the empty list of names that a group without parameters has if its optimizer knows names."""
    return {"param_names": []} if "param_names" in optimizer.param_groups[index] else {}


def _packed(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Give the groups with positions in place of parameters, as ``state_dict`` does.

    ``state_dict`` itself is no way to them where the state is spread over ranks and has to be collected first.
    """
    groups, first = [], 0
    for group in optimizer.param_groups:
        positions = list(range(first, first + len(group["params"])))
        groups.append({**group, "params": positions})
        first += len(positions)
    return groups


def _repartition(optimizer: Any) -> None:
    """Let a ``ZeroRedundancyOptimizer`` spread its parameters over the ranks anew, in place, before its first step."""
    if hasattr(optimizer, "consolidate_state_dict"):
        type(optimizer).__init__(
            optimizer,
            optimizer.param_groups,
            optimizer._optim_constructor,
            process_group=optimizer.process_group,
            parameters_as_bucket_view=optimizer.parameters_as_bucket_view,
            **optimizer._optim_defaults,
        )


def _like(reference: object, lr: float) -> float | torch.Tensor:
    """Give a learning rate the kind its optimizer uses: capturable and compiled optimizers hold it in a tensor."""
    return torch.full_like(reference, lr) if isinstance(reference, torch.Tensor) else lr
