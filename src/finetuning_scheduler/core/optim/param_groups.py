"""Parameter groups by parameter name, and the lists that LR schedulers keep one entry a group in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .schedulers import grow, select
from .zero import repartition

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
            "lr": like(reference.get("lr"), lr),
            "initial_lr": like(reference.get("lr"), lr),
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
    repartition(optimizer)


def like(reference: object, lr: Any) -> float | torch.Tensor:
    """Give a learning rate the kind its optimizer uses: capturable and compiled optimizers hold it in a tensor."""
    return torch.full_like(reference, float(lr)) if isinstance(reference, torch.Tensor) else float(lr)


def _no_names(optimizer: Optimizer, index: int) -> dict[str, list[str]]:
    """Return the empty list of names that a group without parameters has if its optimizer knows names."""
    return {"param_names": []} if "param_names" in optimizer.param_groups[index] else {}
