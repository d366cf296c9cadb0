"""An optimizer's state by parameter name, and groups in the order of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ...errors import CheckpointError, Problem
from .param_groups import NamedParameters, group_names


def reorder_groups(optimizer: Optimizer, parameters: NamedParameters, stored: Sequence[Sequence[str]]) -> None:
    """Bring the groups' parameters into a checkpoint's order, since optimizer state is stored by position.

    Raises:
        CheckpointError: The groups do not hold the parameters that the checkpoint's groups held.
    """
    present = group_names(optimizer, parameters)
    problems = group_differences(present, stored)
    if problems:
        raise CheckpointError(problems)
    for group, names, wanted in zip(optimizer.param_groups, present, stored, strict=True):
        if names != list(wanted):
            held = dict(zip(names, group["params"], strict=True))
            group["params"] = [held[name] for name in wanted]
            if "param_names" in group:
                group["param_names"] = list(wanted)


def group_differences(present: Sequence[Sequence[str]], stored: Sequence[Sequence[str]]) -> list[Problem]:
    """Find groups that do not hold the parameters that a checkpoint's groups held."""
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


def state_problems(optimizer: Optimizer, names: Sequence[Sequence[str]], stored: object) -> list[Problem]:
    """Find what of a stored ``state_dict`` belongs to another optimizer or to other parameters, or is none at all.

    Args:
        optimizer: The optimizer that is to load it.
        names: The names of its groups' parameters.
        stored: What a checkpoint has in the place of its state.
    """
    fix = "Resume with the optimizer that wrote the checkpoint, or from another checkpoint."
    kind = type(optimizer).__name__
    groups = stored.get("param_groups") if isinstance(stored, Mapping) else None
    state = stored.get("state") if isinstance(stored, Mapping) else None
    if not isinstance(groups, Sequence) or not isinstance(state, Mapping):
        message = (
            f"optimizer_states[0]: expected the state of {kind}, with `state` and `param_groups`, got {_form(stored)}"
        )
        return [Problem(message, fix=fix)]
    sizes = [len(group["params"]) if isinstance(group, Mapping) and "params" in group else None for group in groups]
    if sizes != [len(group) for group in names]:
        message = (
            f"optimizer_states[0]['param_groups']: expected groups of {[len(group) for group in names]} parameters, "
            f"got {sizes}"
        )
        return [Problem(message, fix=fix)]
    problems = []
    for index, (group, present) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        missing, other = sorted(optimizer.defaults.keys() - group.keys()), sorted(group.keys() - present.keys())
        if missing and other:  # of the same optimizer, another release may have more options or fewer, but not both
            message = f"optimizer_states[0]['param_groups'][{index}]: expected {kind}'s {missing}, got {other}"
            problems.append(Problem(message, fix=fix))
    return problems or _shape_problems(optimizer, names, groups, state)


def _shape_problems(
    optimizer: Optimizer, names: Sequence[Sequence[str]], groups: Sequence[Any], state: Mapping[Any, Any]
) -> list[Problem]:
    """Find state of PyTorch's own optimizers whose shapes are not those of the parameters."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return []  # others keep what they like
    fix = "Resume with the model that wrote the checkpoint, or from another checkpoint."
    problems = []
    for group, present, group_names_ in zip(groups, optimizer.param_groups, names, strict=True):
        for position, parameter, name in zip(group["params"], present["params"], group_names_, strict=True):
            for key, value in _items(state.get(position)):
                if isinstance(value, torch.Tensor) and not _broadcasts(value, parameter):
                    place = f"optimizer_states[0]['state'][{position}]['{key}']"
                    expected = f"expected the shape {tuple(parameter.shape)} of {name}, got {tuple(value.shape)}"
                    problems.append(Problem(f"{place}: {expected}", fix=fix))
    return problems


def _items(state: object) -> Iterable[tuple[Any, Any]]:
    return state.items() if isinstance(state, Mapping) else ()


def _broadcasts(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether a value applies to a parameter elementwise: of its shape, one number, or rows or columns (Adafactor)."""
    if value.dim() > parameter.dim() and value.numel() > 1:
        return False
    aligned = zip(reversed(value.shape), reversed(parameter.shape), strict=False)
    return all(size in (1, wanted) for size, wanted in aligned)


def _form(value: object) -> str:
    return f"the keys {sorted(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__


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
