"""Choose the checkpoint to restore and have it restored; say what to do when that fails."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.ranks import Ranks
from ..errors import CheckpointError, Problem
from .checkpoint import FTSCheckpoint
from .files import is_remote


@dataclass(frozen=True)
class Choice:
    """What rank zero has found.

    Attributes:
        path: The checkpoint to restore; ``None`` if none has a finite score.
        changed: Better ones that are not what was written.
    """

    path: str | None
    changed: tuple[str, ...]


def restore_best(
    saving: FTSCheckpoint,
    load: Callable[[str], None],
    ranks: Ranks,
    report: Callable[[int, str], None],
    held: str | None = None,
) -> bool:
    """Restore the best checkpoint that still holds what was written; return whether there is one.

    Args:
        saving: Knows the paths and contents of the kept checkpoints; that of the best must not be empty.
        load: Loads a path's checkpoint.
        ranks: The processes, all of which call this.
        report: Where messages go.
        held: The checkpoint whose content rank zero has in memory: it is not read to be known again.

    Raises:
        CheckpointError: The best file is gone, none is as it was written, or one that is cannot be loaded.
    """
    choice = ranks.from_zero(lambda: choose(saving, held))
    if choice.changed:
        saving.drop(choice.changed)
        report(logging.WARNING, f"{_changed(choice.changed)}: the next best, {choice.path}, is restored instead.")
    if choice.path is None:
        return False
    try:
        load(choice.path)
    except CheckpointError:
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            message = (
                f"not enough memory to restore the best checkpoint {choice.path} ({type(error).__name__}: {error})"
            )
            fix = (
                f"Free memory and resume with trainer.fit(model, ckpt_path={choice.path!r}), or use restore_best=False."
            )
            raise CheckpointError(Problem(message, fix=fix)) from error
        raise _unusable(saving, choice.path, f"cannot be read ({_said(error)})") from error
    return True


def choose(saving: FTSCheckpoint, held: str | None = None) -> Choice:
    """Find the best checkpoint that holds what was written; the files alone are looked at.

    Args:
        saving: Knows the paths and contents of the kept checkpoints.
        held: One whose content is in memory. Of it the file system's word is enough that nothing has changed.

    Raises:
        CheckpointError: The best file is gone, or none is as it was written.
    """
    best = saving.best_model_path
    if best == held and saving.best_is_finite and saving.seems_untouched(best):
        return Choice(best, ())
    if not is_remote(best) and not Path(best).exists():
        raise _unusable(saving, best, "is gone")
    changed: list[str] = []
    finite = [best] if saving.best_is_finite else []
    for path in dict.fromkeys([*finite, *saving.ranked_paths()]):
        if saving.holds_what_was_written(path):
            return Choice(path, tuple(changed))
        changed.append(path)
    if changed:
        raise CheckpointError(Problem(_changed(changed), fix=_way_on(saving, changed)))
    return Choice(None, ())


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the machine, did not suffice."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # of PyTorch's, on the CPU


def _said(error: Exception) -> str:
    """Say what an error says, but for PyTorch's advice to unpickle the file in full."""
    advice = "weights_only" in str(error)
    return f"{type(error).__name__}: {'it holds more than tensors and plain values' if advice else error}"


def _changed(paths: list[str] | tuple[str, ...]) -> str:
    if len(paths) == 1:
        return f"The best checkpoint {paths[0]} is no longer what was written"
    return f"The best checkpoint {paths[0]} and the next best {', '.join(paths[1:])} are no longer what was written"


def _unusable(saving: FTSCheckpoint, path: str, reason: str) -> CheckpointError:
    return CheckpointError(Problem(f"the best checkpoint {path} {reason}", fix=_way_on(saving, [path])))


def _way_on(saving: FTSCheckpoint, without: list[str]) -> str:
    candidates = [*saving.ranked_paths(), saving.last_model_path]
    others = [path for path in candidates if path and path not in without and Path(path).exists()]
    if not others:
        return "There is no other checkpoint to resume from."
    return f"The next best is {others[0]}; resume from it with trainer.fit(model, ckpt_path={others[0]!r})."
