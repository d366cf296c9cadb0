"""Shard a module's parts with FSDP2 as a plan says, which may come from a configuration file."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

from ...errors import Problem, ScheduleError
from ..schedule.wording import closest, did_you_mean
from .checkpointing import ActivationCheckpointing, checkpointing_problem
from .modules import select_modules
from .precision import mixed_precision

_ARGUMENTS = [name for name in inspect.signature(fully_shard).parameters if name != "module"]
_ALIASES = ["act_ckpt", "cpu_offload_policy"]


class FSDPPlan:
    """Arguments of ``fully_shard`` for the modules that selectors stand for, in order.

    Args:
        entries: Arguments by selector.
        defaults: Arguments of every entry that gives none of that name.
    """

    def __init__(self, entries: Mapping[str, Mapping[str, Any] | None], defaults: Mapping[str, Any]) -> None:
        for name, value in {"fsdp_plan": entries, "fsdp_default_kwargs": defaults}.items():
            if not isinstance(value, Mapping):
                raise TypeError(f"expected `{name}` to be a mapping, got {value!r}")
        self._given = {"`fsdp_default_kwargs`": defaults}
        self._given |= {f"`fsdp_plan` for {selector!r}": own or {} for selector, own in entries.items()}
        self._entries = {selector: {**defaults, **(arguments or {})} for selector, arguments in entries.items()}

    def apply(self, root: nn.Module, mesh: DeviceMesh) -> None:
        """Shard the selected modules of ``root`` that are not sharded yet.

        Args:
            root: The module whose submodules the selectors name.
            mesh: The mesh to shard over where no other is given.

        Raises:
            ScheduleError: With all that is wrong with the plan; nothing has been sharded then.
        """
        problems = list(self._argument_problems())
        try:
            selected = select_modules(root, self._entries, "`fsdp_plan`")
        except ScheduleError as error:
            raise ScheduleError([*problems, *error.problems]) from error
        if problems := [*problems, *_order_problems(root, selected)]:
            raise ScheduleError(problems)
        for selector, modules in selected.items():
            for name, module in modules:
                if not _is_sharded(root, name):
                    _shard(root, name, module, {"mesh": mesh, **self._entries[selector]})

    def _argument_problems(self) -> Iterator[Problem]:
        known = [*_ARGUMENTS, *_ALIASES]
        for place, arguments in self._given.items():
            for name in arguments:
                if name not in known:
                    fix = did_you_mean(closest(name, known), f"Use any of {', '.join(known)}.")
                    yield Problem(f"expected {place} to hold arguments of `fully_shard`, got {name!r}", fix=fix)
            if (problem := checkpointing_problem(arguments.get("act_ckpt"), place)) is not None:
                yield problem
            if "cpu_offload_policy" in arguments:
                yield from _offload_problems(arguments, place)
            if "mp_policy" in arguments:
                yield from _precision_problems(arguments["mp_policy"], place)


def _order_problems(root: nn.Module, selected: Mapping[str, list[tuple[str, nn.Module]]]) -> Iterator[Problem]:
    """Find modules that the plan would shard after a module that holds them: they are a part of its unit then."""
    earlier: dict[str, str] = {}
    for selector, modules in selected.items():
        for name, _ in modules:
            outer = next((path for path in _paths_around(name) if path in earlier), None)
            if outer is not None and name not in earlier and not _is_sharded(root, name):
                message = f"expected `fsdp_plan` to shard inner modules first, got {name} after {outer}"
                yield Problem(message, fix=f"Put {selector!r} before {earlier[outer]!r}.", selector=selector)
        earlier = {**{name: selector for name, _ in modules}, **earlier}


def _offload_problems(arguments: Mapping[str, Any], place: str) -> Iterator[Problem]:
    if "offload_policy" in arguments:
        message = f"expected one of `offload_policy` and `cpu_offload_policy` in {place}, got both"
        yield Problem(message, fix="Keep one of them.")
    try:
        _offload_policy(arguments["cpu_offload_policy"])
    except TypeError as error:
        message = f"expected `cpu_offload_policy` of {place} to be True or arguments of CPUOffloadPolicy ({error})"
        yield Problem(message, fix="Write, for example, {pin_memory: false}.")


def _precision_problems(value: Any, place: str) -> Iterator[Problem]:
    try:
        mixed_precision(value)
    except TypeError as error:
        message = f"expected `mp_policy` of {place} to be a MixedPrecisionPolicy or arguments of one ({error})"
        yield Problem(message, fix="Write, for example, {param_dtype: bfloat16, reduce_dtype: float32}.")


def _offload_policy(value: Any) -> CPUOffloadPolicy | None:
    """Make the policy of its configuration; raises `TypeError` for what is none."""
    if value is None or isinstance(value, bool):
        return CPUOffloadPolicy() if value else None
    return CPUOffloadPolicy(**value)


def _shard(root: nn.Module, name: str, module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Call ``fully_shard``; an entry's ``cpu_offload_policy`` wins over a default ``offload_policy``."""
    options = {key: value for key, value in arguments.items() if key not in _ALIASES}
    if "mp_policy" in options:
        options["mp_policy"] = mixed_precision(options["mp_policy"])
    if (policy := _offload_policy(arguments.get("cpu_offload_policy"))) is not None:
        options["offload_policy"] = policy
    checkpointing = ActivationCheckpointing.of(arguments.get("act_ckpt"))
    if checkpointing is not None and (wrapper := checkpointing.apply(module)) is not module:
        path, _, attribute = name.rpartition(".")
        root.get_submodule(path).register_module(attribute, wrapper)
        module = wrapper
    fully_shard(module, **options)


def _is_sharded(root: nn.Module, name: str) -> bool:
    """Whether a module, or one that holds it, is a unit already."""
    return any(isinstance(root.get_submodule(path), FSDPModule) for path in (name, *_paths_around(name), ""))


def _paths_around(name: str) -> Iterator[str]:
    """Yield the paths of the modules that hold a module, from the inside out, without the root."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
