"""Copies of parameters that every rank holds for itself and that must not drift apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import repeat
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ..held import Held, mapped


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


def held_from_rank_zero(held: Held | None, device: torch.device, broadcast: Callable[[Any], Any]) -> Held:
    """Give every rank what rank zero holds of a checkpoint.

    Each tensor is sent by itself, so that no device has to take all of them, and as bytes, whatever the process group
    knows of types.

    Args:
        held: What rank zero holds; nothing is asked of the other ranks.
        device: One that the ranks' process group can send from.
        broadcast: Gives every rank an object without tensors that rank zero has.
    """
    mine: list[Tensor] = []

    def noted(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        mine.append(leaf)
        return _Form(leaf.shape, leaf.dtype)

    def received(leaf: Any) -> Any:
        return _sent(leaf, next(tensors), device) if isinstance(leaf, _Form) else leaf

    content = None if held is None else [vars(held)[each.name] for each in fields(Held)]
    forms = broadcast(mapped(content, noted))
    tensors = iter(mine) if mine else repeat(None)
    return Held(*mapped(forms, received))


@dataclass(frozen=True)
class _Form:
    """Stands for a tensor that is sent by itself."""

    shape: torch.Size
    dtype: torch.dtype


def _sent(form: _Form, mine: Tensor | None, device: torch.device) -> Tensor:
    tensor = torch.empty(form.shape, dtype=form.dtype) if mine is None else mine
    if tensor.numel():
        data = tensor.reshape(-1).view(torch.uint8).to(device)
        torch.distributed.broadcast(data, src=0)
        if mine is None:
            tensor = data.cpu().view(form.dtype).reshape(form.shape)
    return tensor
