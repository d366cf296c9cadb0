"""Weights of a state dictionary into a module, in time linear in what is loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_TORCH = "torch.nn.modules."  # the layers of PyTorch itself add to no file that it reads what this file lacks


class Keys(NamedTuple):
    """What a module and a state dictionary do not have in common."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_weights(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Keys:
    """Load a state dictionary as ``Module.load_state_dict`` does, with all hooks and methods that a module may have.

    PyTorch's own method looks through all keys once for each module that lies side by side with others, which is
    quadratic where there are thousands.

    Returns:
        The missing and the unexpected keys.

    Raises:
        RuntimeError: With every key that does not fit, as PyTorch words it.
    """
    metadata = getattr(state_dict, "_metadata", None)
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []

    def load(part: nn.Module, weights: OrderedDict[str, Any], prefix: str) -> None:
        own = {} if metadata is None else metadata.get(prefix[:-1], {})
        part._load_from_state_dict(weights, prefix, own, True, missing, unexpected, errors)
        by_child = _by_child(weights, prefix)  # what a hook has renamed by now is found under its new name
        for name, child in part._modules.items():
            if child is not None:
                load(child, by_child.get(name, OrderedDict()), f"{prefix}{name}.")
        for hook in part._load_state_dict_post_hooks.values():
            hook(part, Keys(missing, unexpected))

    weights = OrderedDict(state_dict)
    if metadata is not None:
        weights._metadata = metadata  # type: ignore[attr-defined]
    load(module, weights, "")
    if strict:
        for kind, keys in (("Missing", missing), ("Unexpected", unexpected)):
            if keys:
                named = ", ".join(f'"{key}"' for key in keys)
                errors.append(f"{kind} key(s) in state_dict: {named}. ")
    if errors:
        said = "\n\t".join(errors)
        raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__}:\n\t{said}")
    return Keys(missing, unexpected)


@contextmanager
def loading_linearly(module: nn.Module) -> Iterator[None]:
    """Let a module's ``load_state_dict`` take linear time for a while, unless it is a method of its own."""
    if "load_state_dict" in vars(module) or type(module).load_state_dict is not nn.Module.load_state_dict:
        yield
        return

    vars(module)["load_state_dict"] = MethodType(load_state_dict, module)  # a copy of the module gets one of its own
    try:
        yield
    finally:
        vars(module).pop("load_state_dict", None)


def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """Stand for the method of this name."""
    if assign:
        return nn.Module.load_state_dict(module, state_dict, strict, assign)
    return load_weights(module, state_dict, strict)


def _by_child(weights: Mapping[str, Any], prefix: str) -> dict[str, OrderedDict[str, Any]]:
    """Share out the entries among the children whose names follow the prefix."""
    shared: dict[str, OrderedDict[str, Any]] = {}
    for key, value in weights.items():
        if key.startswith(prefix):
            child, dot, _ = key[len(prefix) :].partition(".")
            if dot:
                shared.setdefault(child, OrderedDict())[key] = value
    return shared


def loads_as_usual(module: nn.Module) -> bool:
    """Whether a module's own values are all that loading it changes: no hook and no method of its own takes part."""
    kind = type(module)
    own_way = kind._load_from_state_dict
    return (
        not module._load_state_dict_pre_hooks
        and not module._load_state_dict_post_hooks
        and (own_way is nn.Module._load_from_state_dict or own_way.__module__.startswith(_TORCH))
        and kind.set_extra_state is nn.Module.set_extra_state
        and "_load_from_state_dict" not in vars(module)
    )


class ByName:
    """Values that can be copied into a module by name, without a look at what else it has.

    Args:
        module: The module.
        values: By key of its state dictionary.
    """

    def __init__(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        self._module = module
        self._values = values
        self._usual: dict[str, bool] = {}  # by path of a module: does it, and all that it lies in, load as usual?
        self._modules: dict[str, nn.Module] = {}

    def targets(self) -> dict[str, Tensor] | None:
        """Find the tensor to copy each value into; ``None`` if it takes more than that to load them."""
        found = {}
        for key, value in self._values.items():
            path, _, name = key.rpartition(".")
            target = self._own_tensor(path, name) if self._loads_as_usual(path) else None
            if target is None or not isinstance(value, Tensor) or target.shape != value.shape or target.is_meta:
                return None
            found[key] = target
        return found

    @torch.no_grad()
    def copy(self, targets: Mapping[str, Tensor]) -> None:
        """Copy the values."""
        for key, target in targets.items():
            target.copy_(self._values[key])

    def _own_tensor(self, path: str, name: str) -> Tensor | None:
        tensor = getattr(self._modules[path], name, None)
        return tensor if isinstance(tensor, Tensor) else None

    def _loads_as_usual(self, path: str) -> bool:
        if path not in self._usual:
            outer, _, name = path.rpartition(".")
            if path and not self._loads_as_usual(outer):
                self._usual[path] = False
                return False
            module = self._modules[outer]._modules.get(name) if path else self._module
            self._usual[path] = module is not None and loads_as_usual(module)
            if module is not None:
                self._modules[path] = module
        return self._usual[path]
