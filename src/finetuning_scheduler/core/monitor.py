"""A monitored metric, for loops that have no early stopping of their own: patience, and the best state so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from ..errors import Problem
from .checksums import Resting
from .session import Session
from .snapshot import Snapshot
from .transitions import Listener

Mode = Literal["min", "max"]


@dataclass
class Patience:
    """Count the checks since a monitored quantity last improved, as PyTorch Lightning's ``EarlyStopping`` does.

    The best score carries over phases; the count restarts with each.
    """

    limit: int
    mode: Mode = "min"
    min_delta: float = 0.0
    best: float | None = None
    waited: int = 0

    def update(self, score: float) -> bool:
        """Record a score; tell whether it is an improvement of more than ``min_delta``."""
        gain = math.inf if self.best is None else (score - self.best) * (1 if self.mode == "max" else -1)
        improved = gain > self.min_delta
        if improved:
            self.best, self.waited = score, 0
        else:
            self.waited += 1
        return improved

    @property
    def exhausted(self) -> bool:
        """Whether as many checks as allowed, at least one, passed without an improvement."""
        return self.waited >= max(self.limit, 1)


def mode_problems(mode: object) -> Iterator[Problem]:
    """Find a direction of improvement that there is not."""
    if mode not in ("min", "max"):
        fix = "Use 'min' for losses, 'max' for accuracies."
        yield Problem(f"expected `mode` to be 'min' or 'max', got {mode!r}", fix=fix)


class Monitor(Listener):
    """Watch a metric: keep the best state in memory and restore it.

    The best state holds frozen parameters, too, that have moved by the time it is taken, without the optimizer.

    Args:
        patience: Tells improvements, and when there have been none for too long.
        keeps_best: Whether the best state is kept.
    """

    def __init__(self, patience: Patience, *, keeps_best: bool) -> None:
        self.patience = patience
        self.keeps_best = keeps_best
        self.snapshot: Snapshot | None = None
        self._resting = Resting()  # since the present phase began

    def observe(self, metric: float, session: Session) -> None:
        """Record the metric of a session's present state."""
        if self.patience.update(metric) and self.keeps_best:
            self._resting.moved(session.parameters)
            optimizer, names = session.optimizer, session.group_names
            self.snapshot = Snapshot.take(session.view, optimizer, names, moving=self._resting.moving)
            session.progress.best_phase = session.phase

    def restore(self, session: Session) -> None:
        """Go back to the best weights and optimizer state so far, if there are any."""
        if self.snapshot is None:
            return
        if (before := session.before) is not None:
            before.undo.append(partial(self.snapshot.present(session.view).restore, session.view))
        self.snapshot.restore(session.view)
        states = self.snapshot.copied_optimizer_states()
        session.optimizer.load_state_dict(session.optimizer_state_from(states, session.progress.best_phase))

    def begin_phase(self, session: Session) -> None:
        """Note the values of what is frozen; to be called when a phase has been entered."""
        if self.keeps_best:
            self._resting.begin(self._resting.of(session.parameters))

    def before_thaw(self, thawed: Mapping[str, nn.Parameter]) -> None:
        """Remember the values of parameters that the best state did not have to remember."""
        if self.snapshot is not None:
            self.snapshot.add(list(thawed.items()))

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and count, and the best state as tensors."""
        # Copied, since the snapshot grows with the phases.
        snapshot = None if self.snapshot is None else {name: dict(part) for name, part in vars(self.snapshot).items()}
        return {"patience": {"best": self.patience.best, "waited": self.patience.waited}, "snapshot": snapshot}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, which stays as it is."""
        self.patience.best, self.patience.waited = state["patience"]["best"], state["patience"]["waited"]
        saved = state["snapshot"]
        # The snapshot grows with the phases.
        self.snapshot = None if saved is None else Snapshot(**{key: dict(part) for key, part in saved.items()})
