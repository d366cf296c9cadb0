"""Has the optimizer made a step, or loaded its state? Its own hooks tell, and not the loop that has asked it to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def stepping(optimizer: Optimizer) -> Optimizer | None:
    """Return the optimizer whose hooks are called at each step: the innermost of wrappers. ``None`` if it has none."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer) and inner is not optimizer:
        optimizer = inner
    # A class that leaves out its base class's constructor has none.
    return optimizer if hasattr(optimizer, "_optimizer_step_post_hooks") else None


def when_loaded(optimizer: Optimizer, action: Callable[[], None]) -> None:
    """Call a function once, when the optimizer has loaded its state next; at once if it cannot tell."""
    if (inner := stepping(optimizer)) is None:
        action()
        return

    pending = [action]

    def loaded(_: Optimizer) -> None:
        while pending:  # the hook stays, doing nothing: PyTorch is going through all of them at this moment
            pending.pop()()

    inner.register_load_state_dict_post_hook(loaded)


class StepCounter:
    """Tells whether the optimizer has made a step since it was last asked."""

    def __init__(self) -> None:
        self._optimizer: Optimizer | None = None
        self._handle: RemovableHandle | None = None
        self._stepped = False

    def attach(self, optimizer: Optimizer) -> None:
        """Watch this optimizer, and no other."""
        if optimizer is self._optimizer:
            return
        if self._handle is not None:
            self._handle.remove()
        self._optimizer = optimizer
        inner = stepping(optimizer)
        self._handle = None if inner is None else inner.register_step_post_hook(self._note)

    def taken(self) -> bool:
        """Whether a step was made since the last call; an optimizer that has no hooks is taken to have made one."""
        stepped, self._stepped = self._stepped or self._handle is None, False
        return stepped

    def _note(self, *_: Any) -> None:
        self._stepped = True
