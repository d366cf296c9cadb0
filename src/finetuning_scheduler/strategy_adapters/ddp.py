"""Distributed data parallel: every rank holds the whole model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .._lightning import rebuild_ddp
from ..core.held import Held
from ..core.sharding.replicas import check_replicas, held_from_rank_zero
from .base import StrategyAdapter


class DDPStrategyAdapter(StrategyAdapter):
    """Rebuild the reducer whenever parameters are frozen or thawed.

    ``DistributedDataParallel`` only reduces gradients of parameters that required them when it was made; layers thawed
    later would be trained on each rank by itself, without an error.
    """

    def on_phase_thawed(self) -> None:
        """Wrap the module anew, with its settings and communication hooks."""
        rebuild_ddp(self.trainer)

    def check_replicas(self, parameters: Iterable[nn.Parameter]) -> None:
        """Compare the replicas."""
        expected = (
            "gradients to be averaged over ranks: is `no_sync` used, or a module called outside of the "
            "LightningModule's steps?"
        )
        check_replicas(parameters, self.trainer.strategy.root_device, expected)

    def spread(self, held: Held | None) -> Held:
        """Send it, one tensor after the other."""
        return held_from_rank_zero(held, self.trainer.strategy.root_device, self.from_rank_zero)
