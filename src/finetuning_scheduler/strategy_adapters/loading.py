"""Checkpoints of strategies that load weights and optimizer state in one go, after ``on_fit_start``.

The optimizer that is attached when such a checkpoint is read has to hold the groups that the checkpoint holds. At a
transition the present optimizer does not, if the best checkpoint is of an earlier phase; so a stand-in is attached.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from .._lightning import Trainer, install_optimizer, load_model_and_precision
from ..core.param_groups import NamedParameters
from ..core.runner import PhaseRunner

_METADATA = "meta.pt"  # beside a distributed checkpoint's shards, Lightning keeps everything that is no tensor here


def saved_metadata(path: str, *, weights_only: bool = True) -> Mapping[str, Any]:
    """Read what a checkpoint, a file or a directory of shards, holds besides tensors."""
    file = Path(path)
    # Only the small part that is no tensor is read: the rest stays in the mapped file.
    content: Mapping[str, Any] = torch.load(
        file / _METADATA if file.is_dir() else file,
        map_location="cpu",
        mmap=not file.is_dir(),
        weights_only=weights_only,
    )
    return content


def restore(trainer: Trainer, path: str, runner: PhaseRunner, state_key: str, *, weights_only: bool) -> None:
    """Load through a stand-in that holds the groups of the checkpoint, then take over its state."""
    progress = saved_metadata(path, weights_only=weights_only)["callbacks"][state_key]
    optimizer, view = runner.optimizer, runner.view
    optimizer.zero_grad(set_to_none=True)
    groups = [view.merged(names) for names in progress["parameter_groups"]]
    with _attached(trainer, _with_groups(optimizer, view.trained, groups)) as stand_in:
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=weights_only)
    load_model_and_precision(trainer, checkpoint)
    name_of = {id(parameter): name for name, parameter in view.trained.items()}
    states = {name_of[id(parameter)]: state for parameter, state in stand_in.state.items()}
    optimizer.load_state_dict(runner.optimizer_state_from(states, progress["phase"]))


@contextmanager
def _attached(trainer: Trainer, optimizer: Optimizer) -> Iterator[Optimizer]:
    """Let the strategy see another optimizer for a while."""
    present = trainer.optimizers[0]
    install_optimizer(trainer, optimizer)
    try:
        yield optimizer
    finally:
        install_optimizer(trainer, present)


def _with_groups(optimizer: Optimizer, parameters: NamedParameters, names: Sequence[Sequence[str]]) -> Optimizer:
    """Copy an optimizer without its state and hooks, with the groups that it had at another moment."""
    other = copy.copy(optimizer)
    other.param_groups = [
        {**group, "params": [parameters[name] for name in group_names]}
        for group, group_names in zip(optimizer.param_groups, names, strict=False)
    ]
    other.state = defaultdict(dict)
    return other
