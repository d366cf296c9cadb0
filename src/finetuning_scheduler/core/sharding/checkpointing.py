"""Activation checkpointing of a module, as a configuration writes it: a kind, alone or in a list with its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from ...errors import Problem

KINDS = ("composable", "wrapped", "wrapped_offload")


@dataclass(frozen=True)
class ActivationCheckpointing:
    """How a module keeps less for the backward pass.

    Attributes:
        kind: One of :data:`KINDS`.
        arguments: Those of ``torch.utils.checkpoint.checkpoint``, without reentrance.
    """

    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> ActivationCheckpointing | None:
        """Read ``None``, a kind, ``[kind]`` or ``[kind, arguments]``.

        Raises:
            ValueError: It is something else.
        """
        if given is None:
            return None
        parts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        kind, arguments = (*parts, None, None)[:2]
        arguments = {} if arguments is None else arguments
        if len(parts) > 2 or not isinstance(kind, str) or kind not in KINDS or not isinstance(arguments, Mapping):
            raise ValueError(given)
        return cls(kind, dict(arguments))

    def apply(self, module: nn.Module) -> nn.Module:
        """Let a module recompute what it would keep; returns it, or the wrapper to put in its place."""
        if self.kind == "composable":
            checkpoint(module, **self.arguments)
            return module
        wrapper = checkpoint_wrapper(module, **self.arguments)
        return offload_wrapper(wrapper) if self.kind == "wrapped_offload" else wrapper

    def try_out(self) -> None:
        """Go once forward and backward through a stand-in; raises what wrong arguments raise."""
        module = checkpoint(nn.ReLU(), **self.arguments)  # a wrapper would hand on what it does not know
        with torch.enable_grad():
            module(torch.ones(1, device="cpu", requires_grad=True)).sum().backward()


def checkpointing_problem(given: Any, place: str) -> Problem | None:
    """Say what is wrong with ``act_ckpt`` at a place of a configuration."""
    try:
        checkpointing = ActivationCheckpointing.of(given)
    except ValueError:
        message = (
            f"expected `act_ckpt` of {place} to be one of {', '.join(KINDS)}, alone or in a list with a mapping of its "
            f"arguments, got {given!r}"
        )
        return Problem(message, fix="Leave it out for no activation checkpointing.")
    if checkpointing is None or not checkpointing.arguments:
        return None
    try:
        checkpointing.try_out()
    except Exception as error:  # noqa: BLE001  # whatever wrong arguments raise is the reason
        message = f"`act_ckpt` of {place} does not take the arguments {checkpointing.arguments!r}: {error}"
        return Problem(message, fix="Use arguments of torch.utils.checkpoint.checkpoint, such as preserve_rng_state.")
    return None
