"""What keeps a fit from going on from a checkpoint, found before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._lightning import Trainer, is_search_checkpoint, loaded_optimizer_state
from .callbacks.files import is_remote
from .core.fingerprints import damaged_parts
from .core.optim.states import state_problems
from .core.ranks import Ranks
from .core.session import Session
from .errors import CheckpointError, Problem


def refuse_damaged(path: object, ranks: Ranks) -> None:
    """Raise an error for a file to resume from that is not what was written, as far as it tells by itself.

    Raises:
        CheckpointError: The checksums in it do not match its content.
    """
    if path is None or is_remote(path) or is_search_checkpoint(path):
        return
    if damaged := ranks.from_zero(lambda: damaged_parts(Path(str(path)))):
        message = f"expected the content that was written, got other checksums of {', '.join(damaged)}"
        raise CheckpointError(Problem(message, fix="Resume from another checkpoint: this file has been damaged."))


def refuse_foreign(path: object, progress: Mapping[str, Any] | None) -> None:
    """Raise an error for a file that another program has written, with its name and what can be done with it.

    Args:
        path: The file to resume from; ``None`` if there is none.
        progress: The scheduler's state that was found in it.

    Raises:
        CheckpointError: There is a file, and no state.
    """
    if path is None or progress is not None:
        return
    message = f"expected a checkpoint written with FinetuningScheduler, got {path}"
    fix = "Load its weights into the module and fit without `ckpt_path`, or resume without this callback."
    raise CheckpointError(Problem(message, fix=fix))


def refuse_other_optimizer(trainer: Trainer, session: Session) -> None:
    """Raise an error if what Lightning is about to load does not fit the optimizer.

    Raises:
        CheckpointError: With the groups and parameters that differ.
    """
    stored = loaded_optimizer_state(trainer)
    if stored is not None and (problems := state_problems(session.optimizer, session.group_names, stored)):
        raise CheckpointError(problems)
