"""The best state so far, in memory: taken when the monitored quantity improves, restored at a transition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .param_groups import group_names, state_by_name, with_state


@dataclass
class Snapshot:
    """Trainable weights, buffers and optimizer state at one moment.

    Frozen parameters are not copied: they do not change. One that is thawed later must be added by :meth:`add` while
    it still has its frozen value, so that a restore undoes what later phases did to it.
    """

    weights: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    optimizer_state: dict[str, dict[str, Any]]

    @classmethod
    def take(cls, model: nn.Module, optimizer: Optimizer) -> Snapshot:
        """Copy what training can have changed since the model was frozen."""
        parameters = dict(model.named_parameters())
        names = group_names(optimizer, parameters)
        states = state_by_name(optimizer.state_dict(), names)
        return cls(
            weights={name: p.detach().clone() for name, p in parameters.items() if p.requires_grad},
            buffers={name: b.detach().clone() for name, b in model.named_buffers()},
            optimizer_state={name: _cloned(state) for name, state in states.items()},
        )

    def add(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Remember parameters about to be thawed, unless they were trainable when the snapshot was taken."""
        for name, parameter in named:
            self.weights.setdefault(name, parameter.detach().clone())

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Write the copies back; parameters without saved optimizer state start with none, learning rates stay."""
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        for saved, present in ((self.weights, parameters), (self.buffers, buffers)):
            for name, value in saved.items():
                present[name].copy_(value)
        states = {name: _cloned(state) for name, state in self.optimizer_state.items()}
        optimizer.load_state_dict(with_state(optimizer, parameters, states))


def _cloned(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
