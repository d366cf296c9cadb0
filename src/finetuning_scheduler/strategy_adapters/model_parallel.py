"""FSDP2 and tensor parallel: parameters are distributed tensors, sharded in the module's ``configure_model``."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from .._lightning import install_optimizer, load_model_and_precision
from ..core.param_groups import NamedParameters
from ..core.runner import PhaseRunner
from .base import StrategyAdapter

_METADATA = "meta.pt"  # beside a distributed checkpoint's shards, Lightning keeps everything that is no tensor here


class ModelParallelStrategyAdapter(StrategyAdapter):
    """Serve ``ModelParallelStrategy``, which loads weights and optimizer state in one go, after ``on_fit_start``.

    Thawing needs nothing: a unit's gradients are reduced as far as they are there. Loading does: the optimizer that is
    attached when a checkpoint is read has to hold the groups that the checkpoint holds.
    """

    def reload(self, path: str, runner: PhaseRunner) -> None:
        """Load the checkpoint once more; the first time only phase 0's parameters had a group to load state for."""
        runner.optimizer.state.clear()  # PyTorch prepares the state of new parameters only if there is none at all
        runner.optimizer.zero_grad(set_to_none=True)
        self.trainer.strategy.load_checkpoint(path)

    def restore(self, path: str, runner: PhaseRunner, state_key: str, *, weights_only: bool) -> None:
        """Load through a stand-in that holds the groups of the checkpoint, then take over its state."""
        progress = _metadata(path)["callbacks"][state_key]
        optimizer = runner.optimizer
        optimizer.zero_grad(set_to_none=True)
        with self._attached(_with_groups(optimizer, runner.parameters, progress["parameter_groups"])) as stand_in:
            checkpoint = self.trainer.strategy.load_checkpoint(path, weights_only=weights_only)
        load_model_and_precision(self.trainer, checkpoint)
        name_of = {id(parameter): name for name, parameter in runner.parameters.items()}
        states = {name_of[id(parameter)]: state for parameter, state in stand_in.state.items()}
        optimizer.load_state_dict(runner.optimizer_state_from(states, progress["phase"]))

    @contextmanager
    def _attached(self, optimizer: Optimizer) -> Iterator[Optimizer]:
        """Let the strategy see another optimizer for a while."""
        present = self.trainer.optimizers[0]
        install_optimizer(self.trainer, optimizer)
        try:
            yield optimizer
        finally:
            install_optimizer(self.trainer, present)


def _metadata(path: str) -> Mapping[str, Any]:
    file = Path(path)
    # Only the small part that is no tensor is read: the rest stays in the mapped file.
    content: Mapping[str, Any] = torch.load(
        file / _METADATA if file.is_dir() else file, map_location="cpu", mmap=not file.is_dir(), weights_only=True
    )
    return content


def _with_groups(optimizer: Optimizer, parameters: NamedParameters, names: Sequence[Sequence[str]]) -> Optimizer:
    """Copy an optimizer without its state and hooks, with the groups that it had at another moment."""
    other = copy.copy(optimizer)
    other.param_groups = [
        {**group, "params": [parameters[name] for name in group_names]}
        for group, group_names in zip(optimizer.param_groups, names, strict=False)
    ]
    other.state = defaultdict(dict)
    return other
