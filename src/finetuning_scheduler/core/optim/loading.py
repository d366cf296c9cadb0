"""Loading the state of an optimizer that has thousands of groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

MANY_GROUPS = 200  # from here on it takes longer than the rest of loading


def load_linearly(optimizer: Optimizer) -> None:
    """Let an optimizer of many groups load its state in time linear in them; do nothing to others.

    PyTorch's own ``load_state_dict`` looks for the group of each tensor of the state in all groups before it. The hooks
    keep the state from it and load it, group by group, by the same rules, before hooks of others are called.
    """
    many = len(optimizer.param_groups) > MANY_GROUPS
    if many and type(optimizer).load_state_dict is Optimizer.load_state_dict and not _is_known(optimizer):
        loading = _Loading()
        optimizer.register_load_state_dict_pre_hook(loading.take_state)
        optimizer.register_load_state_dict_post_hook(loading.give_state, prepend=True)


def _is_known(optimizer: Optimizer) -> bool:
    hooks = optimizer._optimizer_load_state_dict_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), _Loading) for hook in hooks)


class _Loading:
    """Hooks around one call of ``load_state_dict``."""

    def __init__(self) -> None:
        self._taken: Mapping[str, Any] | None = None

    def take_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Keep the state and hand on the groups."""
        self._taken = state_dict
        return {**state_dict, "state": {}}

    def give_state(self, optimizer: Optimizer) -> None:
        """Load the state, now that the groups are known to fit."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        waiting, state = dict(taken["state"]), defaultdict[Any, Any](dict)
        for saved, group in zip(taken["param_groups"], optimizer.param_groups, strict=True):
            for key, parameter in zip(saved["params"], group["params"], strict=True):
                if key in waiting:
                    state[parameter] = _cast(parameter, waiting.pop(key), {**saved, "params": [key]}, key)
        state.update(waiting)  # what belongs to no parameter
        optimizer.__setstate__({"state": state, "param_groups": optimizer.param_groups})


def _cast(parameter: torch.Tensor, value: Any, group: dict[str, Any], key: Any, name: Any = None) -> Any:
    """Copy a value of the state, with tensors of the kind that PyTorch's own method gives them."""
    if isinstance(value, torch.Tensor):
        return Optimizer._process_value_according_to_param_policy(parameter, value, key, [group], name)
    if isinstance(value, dict):
        return {inner: _cast(parameter, each, group, key, inner) for inner, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return type(value)(_cast(parameter, each, group, key) for each in value)  # type: ignore[call-arg]
    return value
