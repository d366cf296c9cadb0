"""Distributed data parallel: every rank holds the whole model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .._lightning import rebuild_ddp
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
        """Compare a fingerprint of two numbers a rank, summed in double precision."""
        with torch.no_grad():
            sums = [torch.stack([p.double().sum(), p.double().square().sum()]) for p in parameters]
            mine = torch.nan_to_num(torch.stack(sums).sum(0)).to(self.trainer.strategy.root_device)
        everyone = [torch.empty_like(mine) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(everyone, mine)
        odd = [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
        if odd:
            raise RuntimeError(
                f"The ranks' copies of the model differ after the first step of a phase (ranks {odd} from rank 0). "
                "Expected gradients to be averaged over ranks: is `no_sync` used, or a module called outside of the "
                "LightningModule's steps?"
            )
