"""Distributed data parallel: every rank holds the whole model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .._lightning import LightningModule, rebuild_ddp
from ..core.held import Held
from ..core.sharding.replicas import check_replicas, held_from_rank_zero
from ..core.view import ModelView
from .base import StrategyAdapter


class DDPStrategyAdapter(StrategyAdapter):
    """Rebuild the reducer whenever parameters are frozen or thawed.

    ``DistributedDataParallel`` only reduces gradients of parameters that required them when it was made; layers thawed
    later would be trained on each rank by itself, without an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lent: str | None = None  # the name of a parameter that requires gradients only to have the module wrapped

    def on_model_configured(self) -> None:
        """Let a module be wrapped that is frozen as a whole, which PyTorch refuses; a schedule may thaw it."""
        parameters = dict(self.trainer.lightning_module.named_parameters())
        if not any(parameter.requires_grad for parameter in parameters.values()):
            self._lent = next((name for name, each in parameters.items() if each.dtype.is_floating_point), None)
            if self._lent is not None:
                parameters[self._lent].requires_grad = True

    def on_set_up(self) -> None:
        """Freeze what was lent, if :meth:`view` has not been asked for."""
        self._return_lent()

    def view(self, module: LightningModule) -> ModelView:
        """View the module as it came."""
        self._return_lent()
        return super().view(module)

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

    def _return_lent(self) -> None:
        if self._lent is not None:
            self.trainer.lightning_module.get_parameter(self._lent).requires_grad = False
            self._lent = None
