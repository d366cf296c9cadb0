"""Restore the best checkpoint into a running session: weights, optimizer, precision; loops and callbacks go on."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from .._lightning import Trainer, load_model_and_precision
from ..core.param_groups import state_by_name
from ..core.runner import PhaseRunner
from ..errors import CheckpointError, Problem
from .checkpoint import FTSCheckpoint


def restore_best(trainer: Trainer, checkpoint_callback: FTSCheckpoint, runner: PhaseRunner, state_key: str) -> None:
    """Load the best checkpoint's weights, optimizer state, precision state and datamodule state.

    The optimizer's groups and learning rates stay as they are. Parameters that the checkpoint's optimizer did not hold,
    because a later phase thawed them, start without optimizer state.

    Args:
        trainer: The trainer, in the middle of a fit.
        checkpoint_callback: Knows the path of the best checkpoint, which must not be empty.
        runner: Executes the schedule.
        state_key: Key of the scheduler's state, which holds the phase and the names of the saved parameter groups.

    Raises:
        CheckpointError: The file is gone or cannot be read.
    """
    checkpoint = _load(trainer, checkpoint_callback)
    load_model_and_precision(trainer, checkpoint)
    progress = checkpoint["callbacks"][state_key]
    states = state_by_name(checkpoint["optimizer_states"][0], progress["parameter_groups"])
    state = runner.optimizer_state_from(states, progress["phase"])
    trainer.strategy.load_optimizer_state_dict({"optimizer_states": [state]})


def _load(trainer: Trainer, checkpoint_callback: FTSCheckpoint) -> dict[str, Any]:
    path = checkpoint_callback.best_model_path
    try:
        return dict(trainer.strategy.load_checkpoint(path, weights_only=True))
    except pickle.UnpicklingError as error:
        # The user's hyper-parameters may hold objects that a weights-only load refuses. What this process has written
        # itself is safe to load with them.
        if checkpoint_callback.was_written_here(path):
            try:
                return dict(trainer.strategy.load_checkpoint(path, weights_only=False))
            except Exception as second_error:
                raise _unreadable(checkpoint_callback, second_error) from second_error
        raise _unreadable(checkpoint_callback, error) from error
    except Exception as error:
        raise _unreadable(checkpoint_callback, error) from error


def _unreadable(checkpoint_callback: FTSCheckpoint, error: Exception) -> CheckpointError:
    path = checkpoint_callback.best_model_path
    others = [p for p in checkpoint_callback.ranked_paths() if p != path and Path(p).exists()]
    others += [p for p in (checkpoint_callback.last_model_path,) if p and p != path and Path(p).exists()]
    reason = "is gone" if not Path(path).exists() else f"cannot be read ({type(error).__name__}: {error})"
    fix = (
        f"The next best is {others[0]}; resume from it with trainer.fit(model, ckpt_path={others[0]!r})."
        if others
        else "There is no other checkpoint to resume from."
    )
    return CheckpointError(Problem(f"the best checkpoint {path} {reason}", fix=fix))
