"""Copies of parameters that every rank holds for itself and that must not drift apart."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed
from torch import nn


def check_replicas(parameters: Iterable[nn.Parameter], device: torch.device, expected: str) -> None:
    """Compare a fingerprint of two numbers a rank, summed in double precision.

    Args:
        parameters: The same plain tensors, in the same order, on every rank.
        device: One that the ranks' process group can send from.
        expected: What keeps the copies equal, for the message.

    Raises:
        RuntimeError: The ranks' copies differ.
    """
    with torch.no_grad():
        sums = [torch.stack([p.double().sum(), p.double().square().sum()]) for p in parameters]
        if not sums:
            return
        mine = torch.nan_to_num(torch.stack(sums).sum(0)).to(device)
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    odd = [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
    if odd:
        raise RuntimeError(
            f"The ranks' copies of the model differ after the first step of a phase (ranks {odd} from rank 0). "
            f"Expected {expected}"
        )
