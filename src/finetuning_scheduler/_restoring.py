"""The best state of a fit: its checkpoint, and what is in memory of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ._entry import Entry, Owner
from ._lightning import Trainer, callbacks_of
from ._trainer import as_misconfiguration
from .callbacks.best import ran_out_of_memory, restore_best
from .callbacks.checkpoint import FTSCheckpoint
from .core.checksums import Resting
from .core.held import Held, NoRoomError
from .core.slim import Fresh, fill_in, is_slim, names_of_keys
from .core.view import ModelView, plain_name

_NOT_HELD = "what it holds was written by another run, or in another way than Lightning's"


class BestState:
    """Keeps what the best checkpoint holds in memory, too, and returns to it.

    The file stays what another run resumes from. A copy in memory, on rank zero, is what was written, but for frozen
    parameters that rest: their values are those of the model. It is used if it is of the checkpoint that is to be
    restored; else the file is read, and the reason told.

    Args:
        owner: The callback.
        trainer: The trainer.
        entry: Has the session.
        checkpoint: Knows the best checkpoint; ``None`` if there is none.
    """

    def __init__(self, owner: Owner, trainer: Trainer, entry: Entry, checkpoint: FTSCheckpoint | None) -> None:
        self._owner = owner
        self._trainer = trainer
        self._entry = entry
        self._checkpoint = checkpoint
        self._restores = checkpoint is not None and owner.restore_best
        self._path = ""  # of the checkpoint that is held, on every rank
        self._held: Held | None = None
        self._why_not: str | None = _NOT_HELD
        self._resting = Resting()
        self._at_rest: frozenset[str] = frozenset()  # frozen parameters of which nothing is held
        self._told: set[str] = set()
        if self._restores and checkpoint is not None:
            checkpoint.give_best_to(self._keep)

    def begin(self) -> None:
        """Note the values of what is frozen; to be called when training starts."""
        if self._restores and self._entry.adapter.why_from_disk() is None:
            self._resting.begin(self._resting.of(self._entry.session.parameters))

    def before_thaw(self, thawed: Mapping[str, nn.Parameter]) -> None:
        """Hold the values of parameters that the best checkpoint has none of, in memory or on disk."""
        checkpoint = self._checkpoint
        late = self._trainer.strategy.restore_checkpoint_after_setup
        if self._entry.carried_on and self._restores and not late and checkpoint and checkpoint.best_model_path:
            if self._path:
                self._look_at(thawed)
            self._entry.session.hold(thawed)

    def restore(self) -> None:
        """Return to the best checkpoint so far, if there is one."""
        checkpoint, entry = self._checkpoint, self._entry
        if checkpoint is not None:
            checkpoint.best_model_path = entry.adapter.from_rank_zero(checkpoint.best_model_path)
        if checkpoint is None or not checkpoint.best_model_path:
            self._tell(logging.INFO, "No checkpoint has been saved yet: the next phase starts from present weights.")
            return
        held = None if self._why_not is not None else self._path
        with as_misconfiguration():
            if not restore_best(checkpoint, self._load, entry.ranks, entry.report, held):
                text = "No checkpoint has a finite {!r}: phases start from present weights until one has."
                self._tell(logging.WARNING, text.format(checkpoint.monitor), once=text)

    def _keep(self, path: str, checkpoint: dict[str, Any]) -> None:
        """Copy what has been written, on rank zero, if that is possible and there is room."""
        self._held, self._path = None, path
        self._why_not = self._entry.adapter.why_from_disk()
        session, trainer = self._entry.session, self._trainer
        if self._why_not is None and session.view.has_lazy:
            self._why_not = "some parameters have no shape yet"
        if self._why_not is not None:
            return
        self._resting.moved(session.parameters)
        present = self._present()
        resting = {name: each for name, each in self._resting.of(session.parameters).items() if id(each) in present}
        self._at_rest = frozenset(resting)
        if not trainer.is_global_zero:
            return
        try:
            phase = checkpoint["callbacks"][self._owner.state_key]["phase"]
            self._held = Held.of(checkpoint, phase, resting)
        except Exception as error:  # noqa: BLE001 - the file is there, and is read instead
            short = isinstance(error, NoRoomError) or ran_out_of_memory(error)
            said = "there is not enough memory to hold it" if short else "it could not be copied"
            self._why_not = f"{said} ({error})"
            return
        if self._checkpoint is not None and self._checkpoint.save_frozen_weights:
            session.forget_frozen({plain_name(key) for key in checkpoint["state_dict"]})

    def _load(self, path: str) -> None:
        entry = self._entry
        reason = self._reason(path)
        if entry.ranks.any(reason is not None):
            reason = reason or "of what another rank has said"
            self._tell(logging.INFO, f"The best checkpoint {path} is read from disk: {reason}.", once=reason)
            entry.adapter.restore(path, entry.session, self._owner.state_key)
        else:
            entry.adapter.restore_held(self._held, path, entry.session, self._owner.state_key)

    def _reason(self, path: str) -> str | None:
        """Say why a checkpoint cannot be restored from memory."""
        if self._why_not is None and path == self._path:
            self._look_at({name: self._entry.session.parameters[name] for name in self._at_rest})
        if self._why_not is not None:
            return self._why_not
        return None if path == self._path else _NOT_HELD

    def _look_at(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """See whether frozen parameters of which nothing is held have moved, or are no longer the model's."""
        present = self._present()
        moved = self._resting.moved(parameters)
        moved |= {name for name, parameter in parameters.items() if id(parameter) not in present}
        if moved := moved & self._at_rest:
            self._held = None
            self._why_not = f"{min(moved)} has been changed since without the optimizer"

    def _present(self) -> set[int]:
        """Tell which parameters the model has; user code may have put others in the place of some."""
        return {id(parameter) for parameter in self._entry.module.parameters()}

    def _tell(self, level: int, message: str, *, once: str | None = None) -> None:
        """Report something; what is told once only is known by the reason of it."""
        if once not in self._told:
            self._entry.report(level, message)
        if once is not None:
            self._told.add(once)


class FrozenWeights:
    """Leaves frozen weights out of checkpoints, if a callback asks for it, and fills them in when one is loaded.

    Args:
        trainer: The trainer.
        entry: Has the session.
    """

    def __init__(self, trainer: Trainer, entry: Entry) -> None:
        self._entry = entry
        self._fresh = Fresh()
        self._savings = [
            each for each in callbacks_of(trainer) if isinstance(each, FTSCheckpoint) and not each.save_frozen_weights
        ]
        for saving in self._savings:
            saving.leave_out_by(self._without_frozen)

    def go_on_from(self, earlier: FrozenWeights) -> None:
        """Take over from an earlier fit of the same model how that was when it was made."""
        self._fresh = earlier._fresh

    def begin(self) -> None:
        """Note the model's values, once; to be called before anything is loaded or trained."""
        if self._savings and not self._fresh.begun:
            entry = self._entry
            self._fresh.begin(entry.session.parameters if entry.begun else ModelView.of(entry.module).trained)

    def end(self) -> None:
        """Let the callbacks save by themselves."""
        for saving in self._savings:
            saving.leave_out_by(None)

    def fill_in(self, checkpoint: dict[str, Any], path: object) -> None:
        """Make a checkpoint whole that the run is resumed from."""
        if not self._entry.begun:
            filled(self._entry.module, checkpoint, path)

    def _without_frozen(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        module, parameters = self._entry.module, self._entry.session.parameters
        return self._fresh.without_frozen(checkpoint, parameters, names_of_keys(module, parameters))


def filled(module: nn.Module, checkpoint: dict[str, Any], path: object) -> None:
    """Make a checkpoint whole, if it leaves out frozen weights, with those of the module that is to load it.

    Raises:
        MisconfigurationException: The module has others.
    """
    if is_slim(checkpoint):
        with as_misconfiguration():
            fill_in(checkpoint, module.state_dict(), path)
