"""A monitored metric, for loops that have no early stopping of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass
class Patience:
    """Count the checks since a monitored quantity last improved, as PyTorch Lightning's ``EarlyStopping`` does.

    The best score carries over phases; the count restarts with each.
    """

    limit: int
    mode: Literal["min", "max"] = "min"
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
