"""Fully sharded data parallel, the first version: units, and the tensors into which it flattens their parameters.

PyTorch offers no public names for what is read here, so this file is the only one that uses the private ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy

from ..view import ModelView, plain_name, structure_of, without_values

Policy = Callable[..., bool] | CustomPolicy
FLAT = "_flat_param"  # what a unit calls the tensor into which it has flattened its parameters


def with_overrides(policy: Policy | None, chosen: Collection[nn.Module]) -> Policy:
    """Extend a policy for automatic wrapping, of any of PyTorch's kinds, by modules that it is to wrap in any case."""
    if policy is None:
        return CustomPolicy(lambda module: module in chosen)
    if isinstance(policy, CustomPolicy):
        choose = policy._lambda_fn  # its only attribute, for which there is no accessor
        return CustomPolicy(lambda module: choose(module) or module in chosen)
    if isinstance(policy, ModuleWrapPolicy):
        return CustomPolicy(lambda module: module in chosen or policy(module, recurse=False, nonwrapped_numel=0))

    def extended(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        wanted = any(part in chosen for part in module.modules()) if recurse else module in chosen
        return wanted or policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel)

    return extended


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is a unit or holds one."""
    return any(isinstance(part, FullyShardedDataParallel) for part in module.modules())


def paths_of(module: nn.Module) -> dict[int, str]:
    """By the identity of each module inside, its name without wrappers."""
    return {id(part): plain_name(name) for name, part in module.named_modules()}


def flat_view(module: nn.Module, root: nn.Module) -> ModelView:
    """View a module that FSDP has wrapped.

    Args:
        module: The module as the user knows it, with wrapped parts.
        root: ``module`` or the unit that FSDP has made of it.
    """
    paths = paths_of(module)
    flat_tensors = [flat for _, flat in units(root)]
    flat_ids = {id(flat) for flat in flat_tensors}
    registered = {id(parameter) for parameter in module.parameters()}
    held = {plain_name(name): p for name, p in module.named_parameters() if id(p) not in flat_ids}
    stand_ins: dict[int, dict[str, nn.Parameter]] = defaultdict(dict)
    for flat in flat_tensors:
        alone = id(flat) in registered  # in place of the original parameters
        for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
            stand_ins[id(info.module)][info.param_name] = without_values(shape, flat.dtype)
            if alone:
                held[joined(paths[id(info.module)], info.param_name)] = flat
        for tied in flat._shared_param_infos:
            first = stand_ins[id(tied.prim_module)][tied.prim_param_name]
            stand_ins[id(tied.module)][tied.param_name] = first
    plain = structure_of(module, stand_ins, left_out=FLAT)
    return ModelView(module, plain, {name: held[name] for name, _ in plain.named_parameters()})


def units(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each unit that holds parameters: the path of the module it wraps, and the flat tensor."""
    for name, module in root.named_modules():
        if isinstance(module, FullyShardedDataParallel) and module._flat_param is not None:
            yield plain_name(name), module._flat_param


def joined(path: str, name: str) -> str:
    """Give a parameter's full name."""
    return f"{path}.{name}" if path else name


def names_in(root: nn.Module, paths: Mapping[int, str]) -> set[str]:
    """Name the parameters that are in a unit, by the paths of the modules that hold them."""
    return {joined(paths[id(i.module)], i.param_name) for _, flat in units(root) for i in flat._param_infos}


def renew_backward_hooks(root: nn.Module) -> None:
    """Let units take part in the backward pass anew.

    A frozen unit under a frozen root keeps the hook of its last backward pass, since only a root that has something to
    train takes the hooks away; a unit that is trained needs another one.
    """
    for _, flat in units(root):
        if (state := vars(flat).pop("_post_backward_hook_state", None)) is not None:
            state[-1].remove()
