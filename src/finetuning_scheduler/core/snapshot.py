"""The best state so far, in memory: taken when the monitored quantity improves, restored at a transition."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .optim.states import state_by_name
from .view import ModelView


@dataclass
class Snapshot:
    """Trainable weights, persistent buffers and optimizer state at one moment.

    Frozen parameters are not copied unless they are known to move all the same, as mean teachers do. One that is thawed
    later must be added by :meth:`add` while it still has its frozen value, so that a restore undoes what later phases
    did to it.
    """

    weights: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    optimizer_states: dict[str, dict[str, Any]]

    @classmethod
    def take(
        cls,
        view: ModelView,
        optimizer: Optimizer,
        group_names: Sequence[Sequence[str]],
        *,
        moving: Collection[str] = (),
    ) -> Snapshot:
        """Copy what training can have changed since the model was frozen.

        Args:
            view: The model.
            optimizer: The optimizer in force.
            group_names: The names of its groups' parameters.
            moving: Frozen parameters that change without the optimizer.
        """
        states = state_by_name(optimizer.state_dict(), group_names)
        return cls(
            weights={
                name: parameter.detach().clone()
                for name, parameter in view.trained.items()
                if parameter.requires_grad or name in moving
            },
            buffers=_copied_buffers(view),
            optimizer_states=_cloned(states),
        )

    def add(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Remember parameters about to be thawed, unless they were trainable when the snapshot was taken."""
        for name, parameter in named:
            self.weights.setdefault(name, parameter.detach().clone())

    @torch.no_grad()
    def restore(self, view: ModelView) -> None:
        """Give weights and buffers back the values, shapes and types that they had."""
        for name, value in self.weights.items():
            present = view.trained[name]
            if _takes(present, value):
                present.copy_(value)
            else:
                present.data = value.clone()
        copies: dict[int, torch.Tensor] = {}
        for module, prefix, name in _persistent_buffers(view.model):
            if (saved := self.buffers.get(prefix + name)) is None:
                continue
            # In place where that is possible: others may hold the same tensor.
            if _takes(buffer := getattr(module, name), saved):
                buffer.copy_(saved)
            else:
                setattr(module, name, copies.setdefault(id(saved), saved.clone()))

    def present(self, view: ModelView) -> Snapshot:
        """Copy the present values of what :meth:`restore` changes of the model."""
        weights = {name: view.trained[name].detach().clone() for name in self.weights}
        return Snapshot(weights, _copied_buffers(view), {})

    def copied_optimizer_states(self) -> dict[str, dict[str, Any]]:
        """Copy the optimizer's state by parameter name, for an optimizer that will change it in place."""
        return _cloned(self.optimizer_states)


def _cloned(states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            key: value.detach().clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()
        }
        for name, state in states.items()
    }


def _copied_buffers(view: ModelView) -> dict[str, torch.Tensor]:
    copies: dict[int, torch.Tensor] = {}  # a buffer that several modules share is copied once
    buffers = {}
    for module, prefix, name in _persistent_buffers(view.model):
        buffer = getattr(module, name)
        buffers[prefix + name] = copies.setdefault(id(buffer), buffer.detach().clone())
    return buffers


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield each buffer that is saved with a model: its module, the prefix of the module's names, and its own name."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, _ in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                yield module, prefix, name


def _takes(present: torch.Tensor, saved: torch.Tensor) -> bool:
    """Whether a copy into a tensor makes it what was saved: a copy broadcasts and converts silently."""
    alike = present.shape == saved.shape and present.dtype == saved.dtype and present.device == saved.device
    return alike and not present.is_inference()
