"""Find the best checkpoint and have it restored; say what to do when that fails."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError, Problem
from .checkpoint import FTSCheckpoint


def restore_best(checkpoint_callback: FTSCheckpoint, load: Callable[[str, bool], None]) -> None:
    """Restore the best checkpoint.

    Args:
        checkpoint_callback: Knows the path of the best checkpoint, which must not be empty.
        load: Loads a path's checkpoint; the second argument is whether it may hold tensors and plain values only.

    Raises:
        CheckpointError: The file is gone or cannot be loaded.
    """
    path = checkpoint_callback.best_model_path
    try:
        try:
            load(path, True)
        except pickle.UnpicklingError:
            # The user's hyper-parameters may hold objects that a weights-only load refuses. What this process has
            # written itself is safe to load with them.
            if not checkpoint_callback.was_written_here(path):
                raise
            load(path, False)
    except CheckpointError:
        raise
    except Exception as error:
        raise _unusable(checkpoint_callback, error) from error


def _unusable(checkpoint_callback: FTSCheckpoint, error: Exception) -> CheckpointError:
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
