"""Copies of parameters that every rank holds for itself and that must not drift apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ..held import Held


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
    forms: tuple[Any, ...] | None = None
    if held is not None:
        weights = {key: value if isinstance(value, str) else _form(value) for key, value in held.weights.items()}
        forms = (held.phase, weights, [_form(tensor) for tensor in held.tensors], held.frozen, held.rest)
    phase, weights, others, frozen, rest = broadcast(forms)
    sent = {
        key: form if isinstance(form, str) else _sent(form, None if held is None else held.weights[key], device)
        for key, form in weights.items()
    }
    tensors = [_sent(form, None if held is None else held.tensors[index], device) for index, form in enumerate(others)]
    return Held(phase, sent, tensors, frozen, rest)


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _sent(form: tuple[torch.Size, torch.dtype], mine: Any, device: torch.device) -> Tensor:
    tensor: Tensor = torch.empty(form[0], dtype=form[1]) if mine is None else mine
    if tensor.numel():
        data = tensor.reshape(-1).view(torch.uint8).to(device)
        torch.distributed.broadcast(data, src=0)
        if mine is None:
            tensor = data.cpu().view(form[1]).reshape(form[0])
    return tensor
