"""FSDP2 and tensor parallel: parameters are distributed tensors, sharded in the module's ``configure_model``."""

from __future__ import annotations

from ..core.runner import PhaseRunner
from . import loading
from .base import StrategyAdapter


class ModelParallelStrategyAdapter(StrategyAdapter):
    """Serve ``ModelParallelStrategy``.

    Thawing needs nothing: a unit's gradients are reduced as far as they are there.
    """

    def restore(self, path: str, runner: PhaseRunner, state_key: str, *, weights_only: bool) -> None:
        """Load with the groups that the optimizer had in the checkpoint's phase."""
        loading.restore(self.trainer, path, runner, state_key, weights_only=weights_only)
