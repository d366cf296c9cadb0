"""Read checkpoints of the 2.x package of this name: the state of its callbacks, in the form that this package saves.

Its scheduler keeps ``fts_metadata`` (``current_ckpt_depth``, ``best_ckpt_depth``) and ``internal_optimizer_metadata``,
by the optimizer's index a list of parameter groups whose ``params`` are names. Its checkpoint callback keeps
Lightning's keys and the two depths, early stopping Lightning's keys alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ..errors import CheckpointError, Problem
from .state import read_as, saved
from .transitions import Progress
from .view import plain_name

_METADATA, _GROUPS = "fts_metadata", "internal_optimizer_metadata"
_STILL, _OUT_OF_PATIENCE = 0, 3  # of Lightning's ``EarlyStoppingReason``
# Before, `save_last` wrote a file at each validation, in which `current_score` is that of the newest best one.
_LAST_IS_A_BEST = (2, 6)
_PATHS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path")


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    params: list[str]


class _Depths(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    current_ckpt_depth: int = Field(ge=0, description="The phase in which the file was written.")
    best_ckpt_depth: int = Field(ge=0, description="The phase in which its best checkpoint was written.")


class _Scheduling(BaseModel):
    """The state of the 2.x scheduler, as far as it is needed."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    fts_metadata: _Depths
    internal_optimizer_metadata: dict[int, list[_Group]]


def progress_in(states: object, state_key: str) -> Any:
    """Return the scheduler's state in a checkpoint, as this package saves it whichever has written it.

    Args:
        states: What the checkpoint has as ``callbacks``.
        state_key: Key of the scheduler's state.

    Returns:
        The state; ``None`` if there is none.

    Raises:
        CheckpointError: It is of the 2.x package and damaged; with every key that is missing or of the wrong kind.
    """
    state = states.get(state_key) if isinstance(states, Mapping) else None
    if not _is_from_2x(state):
        return state
    read = read_as(_Scheduling, state, "state of the 2.x FinetuningScheduler")
    groups = read.internal_optimizer_metadata
    if list(groups) != [0]:
        message = f"state of the 2.x FinetuningScheduler: expected the groups of one optimizer, got {sorted(groups)}"
        raise CheckpointError(Problem(message, fix="Resume with the release that wrote the checkpoint."))
    names = [[plain_name(name) for name in group.params] for group in groups[0]]
    # When the phase began is not told, and stays 0: earlier than whatever is decided in a resumed run, so that a limit
    # that is past counts with the next decision.
    progress = Progress(read.fts_metadata.current_ckpt_depth, read.fts_metadata.best_ckpt_depth)
    return saved(progress, names, {})


def translate(checkpoint: MutableMapping[str, Any], state_key: str, path: object) -> None:
    """Replace the states of the 2.x callbacks in a checkpoint by what this package's callbacks load.

    Args:
        checkpoint: What has been loaded; one that this package has written stays as it is.
        state_key: Key of the scheduler's state.
        path: Where it was loaded from.

    Raises:
        CheckpointError: The scheduler's state is damaged.
    """
    states = checkpoint.get("callbacks")
    if not isinstance(states, MutableMapping) or not _is_from_2x(states.get(state_key)):
        return
    progress = progress_in(states, state_key)
    metrics: dict[str, Any] = {}
    for key, state in states.items():
        if isinstance(state, Mapping) and "best_ckpt_depth" in state:
            states[key] = _located(state, Path(str(path))) | _saved_step(state, checkpoint, path)
            score, monitor = state.get("current_score"), state.get("monitor")
            if isinstance(score, torch.Tensor) and isinstance(monitor, str) and not _is_late(state, checkpoint, path):
                metrics[monitor] = score
        elif isinstance(state, Mapping) and {"wait_count", "patience"} <= state.keys():
            states[key] = {**state, "stopping_reason": _stopping_reason(state)}
    states[state_key] = {**progress, "metrics": metrics}


def _is_from_2x(state: object) -> bool:
    return isinstance(state, Mapping) and (_METADATA in state or _GROUPS in state)


def _stopping_reason(state: Mapping[str, Any]) -> Any:
    """Tell why training stopped: whether patience has run out in the present phase is told by the count alone."""
    reason, waited, patience = state.get("stopping_reason", _STILL), state["wait_count"], state["patience"]
    if isinstance(waited, int) and isinstance(patience, int) and reason in (_STILL, _OUT_OF_PATIENCE):
        return _OUT_OF_PATIENCE if waited >= max(patience, 1) else _STILL
    return reason


def _is_last(state: Mapping[str, Any], path: object) -> bool:
    """Whether a file is one that ``save_last`` has written, if it has kept its name."""
    last = state.get("last_model_path")
    return isinstance(last, str) and bool(last) and Path(last).name == Path(str(path)).resolve().name


def _is_late(state: Mapping[str, Any], checkpoint: Mapping[str, Any], path: object) -> bool:
    """Whether the score in a file may be that of an earlier one."""
    return _is_last(state, path) and _lightning_version(checkpoint) < _LAST_IS_A_BEST


def _saved_step(state: Mapping[str, Any], checkpoint: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Tell at which step the checkpoint callback has last saved, if it has written this very file.

    It has after validation; the one that goes on may save at the end of the epoch, which is not to be done twice.
    """
    best = state.get("best_k_models")
    kept = {Path(str(name)).name for name in best} if isinstance(best, Mapping) else set()
    own = Path(str(path)).resolve().name in kept or _is_last(state, path)
    return {"saved_step": checkpoint.get("global_step")} if own and not _is_late(state, checkpoint, path) else {}


def _lightning_version(checkpoint: Mapping[str, Any]) -> tuple[int, ...]:
    """Tell which Lightning has written a checkpoint; loading it may have made it one of the present version."""
    version = checkpoint.get("legacy_pytorch-lightning_version") or checkpoint.get("pytorch-lightning_version")
    return tuple(int(number) for number in re.findall(r"\d+", str(version))[:2])


def _located(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Make relative paths absolute, as Lightning writes them; what is damaged is told when the state is read.

    They begin where the file's own place shows if it still lies in its ``dirpath``, else in the present directory.
    """
    base, parent, directory = Path.cwd(), path.absolute().parent, state.get("dirpath")
    if isinstance(directory, (str, Path)) and (below := Path(directory).parts) == parent.parts[-len(below) :]:
        base = Path(*parent.parts[: -len(below)])

    def locate(each: Any) -> Any:
        if not isinstance(each, (str, Path)) or not str(each) or "://" in str(each) or Path(each).is_absolute():
            return each
        return str((base / each).parent.resolve() / Path(each).name)

    located = {name: locate(state[name]) for name in _PATHS if name in state}
    if isinstance(located.get("dirpath"), str) and located["dirpath"] != directory:
        located["dirpath"] = str(Path(located["dirpath"]).resolve())
    if isinstance(best := state.get("best_k_models"), Mapping):
        located["best_k_models"] = {locate(name): score for name, score in best.items()}
    return {**state, **located}
