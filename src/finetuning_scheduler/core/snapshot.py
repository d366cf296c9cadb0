"""The best state so far, in memory: taken when the monitored quantity improves, restored at a transition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .optim.states import state_by_name
from .view import ModelView


@dataclass
class Snapshot:
    """Trainable weights, buffers and optimizer state at one moment.

    Frozen parameters are not copied: they do not change. One that is thawed later must be added by :meth:`add` while
    it still has its frozen value, so that a restore undoes what later phases did to it.
    """

    weights: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    optimizer_states: dict[str, dict[str, Any]]

    @classmethod
    def take(cls, view: ModelView, optimizer: Optimizer, group_names: Sequence[Sequence[str]]) -> Snapshot:
        """Copy what training can have changed since the model was frozen."""
        states = state_by_name(optimizer.state_dict(), group_names)
        return cls(
            weights={name: p.detach().clone() for name, p in view.trained.items() if p.requires_grad},
            buffers={name: b.detach().clone() for name, b in view.model.named_buffers()},
            optimizer_states=_cloned(states),
        )

    def add(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Remember parameters about to be thawed, unless they were trainable when the snapshot was taken."""
        for name, parameter in named:
            self.weights.setdefault(name, parameter.detach().clone())

    @torch.no_grad()
    def restore(self, view: ModelView) -> None:
        """Write the copies of weights and buffers back."""
        buffers = dict(view.model.named_buffers())
        for saved, present in ((self.weights, view.trained), (self.buffers, buffers)):
            for name, value in saved.items():
                present[name].copy_(value)

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
