"""Checkpoints of strategies that load weights and optimizer state in one go, after ``on_fit_start``.

The optimizer that is attached when such a checkpoint is read has to hold the groups that the checkpoint holds. At a
transition the present optimizer does not, if the best checkpoint is of an earlier phase; so a stand-in is attached.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType
from torch.optim import Optimizer

from .._lightning import Trainer, install_optimizer, load_model_and_precision
from ..core.optim.param_groups import group_names, without_label
from ..core.schedule.wording import listed
from ..core.session import Session
from ..core.thaw import set_trainable
from ..core.translation import progress_in
from ..core.view import plain_name
from ..errors import CheckpointError, Problem, in_file
from .plain import METADATA, read_plainly, saved_position, without_objects

_OPTIMIZER = "optimizer_0"  # Lightning's key of the only optimizer in a distributed checkpoint


def saved_metadata(path: str, *, weights_only: bool | None) -> Mapping[str, Any]:
    """Read what a checkpoint, a file or a directory of shards, holds besides tensors."""
    file = Path(path)
    # Only the small part that is no tensor is read: the rest stays in the mapped file.
    content: Mapping[str, Any] = torch.load(
        file / METADATA if file.is_dir() else file,
        map_location="cpu",
        mmap=not file.is_dir(),
        weights_only=weights_only,
    )
    return content


def saved_progress(path: str, state_key: str, *, weights_only: bool | None) -> Mapping[str, Any] | None:
    """Read the progress out of a checkpoint that a run is resumed from; ``None`` if it has none.

    Args:
        path: The checkpoint.
        state_key: Key of the scheduler's state.
        weights_only: Refuse anything but tensors and plain values, as PyTorch does by default.

    Raises:
        CheckpointError: It is not there or cannot be read.
    """
    try:
        states = saved_metadata(path, weights_only=weights_only).get("callbacks")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        message = f"expected a checkpoint to resume from, got {path} ({type(error).__name__}: {error})"
        fix = "Name a checkpoint that the same strategy has written."
        if isinstance(error, pickle.UnpicklingError):
            fix = "Keep other objects than tensors and plain values out of `save_hyperparameters`."
        raise CheckpointError(Problem(message, fix=fix)) from error
    with in_file(path):
        progress: Mapping[str, Any] | None = progress_in(states, state_key)
    return progress


def resume(trainer: Trainer, path: str, session: Session, *, weights_only: bool | None) -> dict[str, Any]:
    """Load weights, and the state and options of an optimizer that has the checkpoint's groups; return the rest."""
    optimizer = session.optimizer
    stand_in = session.emptied_optimizer(session.phase)
    # Without names: what an earlier release has written has none, and all that is asked for has to be there.
    groups = map(without_label, optimizer.param_groups)
    stand_in.param_groups = [{**group, "params": list(group["params"])} for group in groups]
    checkpoint = _load(trainer, path, session, stand_in, weights_only=weights_only)
    optimizer.state.clear()
    optimizer.state.update(stand_in.state)
    for group, loaded in zip(optimizer.param_groups, stand_in.param_groups, strict=True):
        options = without_label(loaded)
        group.update({key: value for key, value in options.items() if key not in ("params", "param_names")})
    return checkpoint


def restore(trainer: Trainer, path: str, session: Session, state_key: str) -> None:
    """Load weights, and the optimizer's state as far as the checkpoint has it; options stay as they are.

    Raises:
        CheckpointError: The checkpoint leaves parameters out, or a restore needs an object of another class in it.
    """
    tensors = session.parameters
    with read_plainly(trainer, path) as foreign:
        _check_whole(path, session, weights_only=True)
        progress = saved_position(saved_metadata(path, weights_only=True), path, state_key)
        stand_in = session.emptied_optimizer(progress["phase"])
        stand_in.param_groups = [
            {**stand_in.defaults, "params": [tensors[name] for name in session.view.merged(names)]}
            for names in progress["parameter_groups"]
        ]
        checkpoint = _load(trainer, path, session, stand_in, weights_only=True)
    load_model_and_precision(trainer, without_objects(trainer, path, checkpoint, state_key) if foreign else checkpoint)
    name_of = {id(tensor): name for name, tensor in tensors.items()}
    states = {name_of[id(tensor)]: state for tensor, state in stand_in.state.items()}
    session.optimizer.load_state_dict(session.optimizer_state_from(states, progress["phase"]))


def _check_whole(path: str, session: Session, *, weights_only: bool) -> None:
    """Refuse a checkpoint that leaves weights out: what it lacks would keep the values of another moment."""
    if Path(path).is_dir():
        keys = FileSystemReader(path).read_metadata().state_dict_metadata
        saved = {plain_name(key.partition(".")[2]) for key in keys}
    else:
        saved = {plain_name(key) for key in saved_metadata(path, weights_only=weights_only)["state_dict"]}
    if left_out := [name for name in session.view.tensors if name not in saved]:
        message = (
            f"expected a checkpoint of all parameters, since a sharded model is restored whole, got {path} without "
            f"{listed(left_out)}"
        )
        raise CheckpointError(Problem(message, fix="Save them too, or use FinetuningScheduler(restore_best=False)."))


def _load(
    trainer: Trainer, path: str, session: Session, stand_in: Optimizer, *, weights_only: bool | None
) -> dict[str, Any]:
    """Let the strategy load a checkpoint, with the optimizer's state into a stand-in; return what it returns."""
    session.optimizer.zero_grad(set_to_none=True)
    with_state = _names_with_state(path, session.view.model, weights_only=weights_only)
    held = {name for names in group_names(stand_in, session.parameters) for name in names}
    with (
        _attached(trainer, stand_in),
        _frozen(tensor for name, tensor in session.parameters.items() if name in held - with_state),
    ):
        return trainer.strategy.load_checkpoint(path, weights_only=weights_only)


def _names_with_state(path: str, model: nn.Module, *, weights_only: bool | None) -> set[str]:
    """Tell for which parameters a checkpoint holds optimizer state: none before a parameter's first step."""
    if Path(path).is_dir():
        prefix = f"{_OPTIMIZER}.state."
        keys = FileSystemReader(path).read_metadata().state_dict_metadata
        return {key.removeprefix(prefix).rpartition(".")[0] for key in keys if key.startswith(prefix)}
    state = saved_metadata(path, weights_only=weights_only)["optimizer_states"][0]
    by_name = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, model)
    return {plain_name(name) for name in by_name["state"]}


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Freeze parameters for a while: state of trainable ones must be there, that of frozen ones is not looked for."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    set_trainable(trainable, trainable=False)
    try:
        yield
    finally:
        set_trainable(trainable, trainable=True)


@contextmanager
def _attached(trainer: Trainer, optimizer: Optimizer) -> Iterator[None]:
    """Let the strategy see another optimizer for a while."""
    present = trainer.optimizers[0]
    install_optimizer(trainer, optimizer)
    try:
        yield
    finally:
        install_optimizer(trainer, present)
