"""The best checkpoint, read as tensors and plain values whatever else it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._lightning import FSDPStrategy, LightningModule, Trainer, datamodule_of, holds_weights
from ..core.foreign import foreign_places, stand_ins
from ..core.translation import progress_in
from ..errors import CheckpointError, Problem, in_file

METADATA = "meta.pt"  # beside a distributed checkpoint's shards, Lightning keeps everything that is no tensor here
_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")


@contextmanager
def read_plainly(trainer: Trainer, path: str) -> Iterator[Sequence[str]]:
    """Let a checkpoint with objects of other classes be read with ``weights_only=True``; yield the names of these.

    Raises:
        CheckpointError: It does, and Lightning's strategy would make them for real.
    """
    file = Path(path)
    with stand_ins(file / METADATA if file.is_dir() else file) as names:
        if names and isinstance(trainer.strategy, FSDPStrategy) and not file.is_dir():
            message = f"expected tensors and plain values in the best checkpoint {path}, got {', '.join(names)}"
            fix = 'Keep other objects out of `save_hyperparameters`, or use FSDPStrategy(state_dict_type="sharded").'
            raise CheckpointError(Problem(message, fix=fix))
        yield names


def load_plain(trainer: Trainer, path: str, state_key: str) -> dict[str, Any]:
    """Load a checkpoint by the trainer's strategy, without the objects of other classes that it may hold.

    Raises:
        CheckpointError: What a restore needs is among them; with the place of each.
    """
    with read_plainly(trainer, path) as names:
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    return without_objects(trainer, path, checkpoint, state_key) if names else checkpoint


def saved_position(checkpoint: Mapping[str, Any], path: str, state_key: str) -> Mapping[str, Any]:
    """Return the scheduler's state in a checkpoint: its phase, and the names of the parameters in each group.

    Raises:
        CheckpointError: It has none, or one of no known form.
    """
    with in_file(path):
        progress = progress_in(checkpoint.get("callbacks"), state_key)
        if not isinstance(progress, Mapping) or not {"phase", "parameter_groups"} <= progress.keys():
            message = "expected a best checkpoint written with FinetuningScheduler, got one without its state"
            raise CheckpointError(Problem(message, fix="Use restore_best=False, or resume from another checkpoint."))
    return progress


def without_objects(trainer: Trainer, path: str, checkpoint: Mapping[str, Any], state_key: str) -> dict[str, Any]:
    """Leave out of a checkpoint what stand-ins are in.

    That is the user's hyper-parameters, which are taken from memory, and the state of callbacks that a restore leaves
    alone.

    Raises:
        CheckpointError: What a restore needs is among it; with the place of each.
    """
    kept: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in checkpoint.items():
        if key == "callbacks":
            states = {name: state for name, state in value.items() if not _foreign(state, "")}
            for name in value.keys() - states.keys():
                if name == state_key or holds_weights(value[name], trainer):
                    problems += _problems(path, _foreign(value[name], f"callbacks[{name!r}]"))
            kept[key] = states
        elif found := _foreign(value, f"checkpoint[{key!r}]"):
            if _is_needed(trainer, key):
                problems += _problems(path, found)
        else:
            kept[key] = value
    for key, owner in zip(_HYPER_PARAMETERS, (trainer.lightning_module, datamodule_of(trainer)), strict=True):
        if key in checkpoint and key not in kept and owner is not None:
            kept[key] = dict(owner.hparams)
    if problems:
        raise CheckpointError(problems)
    return kept


def _foreign(value: object, place: str) -> list[tuple[str, str]]:
    return list(foreign_places(value, place))


def _is_needed(trainer: Trainer, key: str) -> bool:
    """Whether a restore, or a hook that is asked in it, may read what is under a key."""
    owners = [type(trainer.precision_plugin).__qualname__, type(datamodule_of(trainer)).__qualname__]
    if key in ("state_dict", "optimizer_states", "native_amp_scaling_state", *owners):
        return True
    if key in (*_HYPER_PARAMETERS, "hparams_type", "loops", "lr_schedulers"):
        return False
    return type(trainer.lightning_module).on_load_checkpoint is not LightningModule.on_load_checkpoint


def _problems(path: str, found: list[tuple[str, str]]) -> Iterator[Problem]:
    for place, name in found:
        message = f"expected tensors and plain values in the best checkpoint {path}, got an object of {name} at {place}"
        fix = f"Save plain values there, or allow the class: torch.serialization.add_safe_globals([{name}])."
        yield Problem(message, fix=fix)
