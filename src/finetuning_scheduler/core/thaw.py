"""What a frozen network means: ``requires_grad``, the statistics of BatchNorm layers and module modes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # the common base of BatchNorm1d..3d and SyncBatchNorm

from .schedule.names import FROZEN_BY_SCHEDULE
from .transitions import Listener

FrozenModulesMode = Literal["train", "eval"]
_NEVER = math.inf  # the phase of what no phase thaws


def set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    """Set ``requires_grad`` of exactly these parameters; what is frozen or thawed loses its gradient.

    A stale gradient would otherwise be applied by the first optimizer step after the parameter is thawed, whoever has
    frozen it. What is trained already keeps its gradient: it may be half of an accumulation.
    """
    for parameter in parameters:
        if parameter.requires_grad and trainable:
            continue
        parameter.grad = None
        if parameter.requires_grad is trainable:
            continue
        parameter.requires_grad = trainable  # a lazy parameter has no `requires_grad_`
        # Whoever meets the model later can tell it from what its author froze.
        setattr(parameter, FROZEN_BY_SCHEDULE, not trainable)


def frozen_modules(model: nn.Module) -> set[nn.Module]:
    """Find the modules whose parameters, at least one, are all frozen, and every module inside them.

    Modules inside a frozen one belong to it even without parameters of their own: the dropout of a frozen block is
    frozen with the block. Linear in modules plus parameters.
    """
    holds_any: dict[nn.Module, bool] = {}
    holds_trainable: dict[nn.Module, bool] = {}
    frozen: set[nn.Module] = set()
    others: set[nn.Module] = set()

    def survey(module: nn.Module) -> None:
        own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
        children = list(module.children())
        for child in children:
            if child not in holds_any:
                survey(child)
        holds_any[module] = bool(own) or any(holds_any[child] for child in children)
        holds_trainable[module] = any(own) or any(holds_trainable[child] for child in children)

    def sort(module: nn.Module) -> None:
        if holds_any[module] and not holds_trainable[module]:
            frozen.update(module.modules())
        else:
            others.add(module)
            for child in module.children():
                sort(child)

    survey(model)
    sort(model)
    # A module without parameters may be shared by a frozen and a trainable module.
    return frozen - others


def half_nested_encoders(model: nn.Module, phase_of: Mapping[int, int]) -> dict[str, int]:
    """Find encoders that hand nested tensors from frozen layers in eval mode to trained ones, which PyTorch cannot.

    ``nn.TransformerEncoder`` decides by its first layer alone whether it packs padded rows into a nested tensor; a
    layer in train mode fails on one. Whether the model gives it a padding mask, without which it packs nothing, is not
    known before it runs.

    Args:
        model: The model.
        phase_of: By the identity of a parameter, the phase that thaws it.

    Returns:
        By name, the first phase in which it is so.
    """
    found = {}
    for name, encoder in model.named_modules():
        if isinstance(encoder, nn.TransformerEncoder) and getattr(encoder, "use_nested_tensor", False):
            thawed = [
                min((phase_of.get(id(each), _NEVER) for each in layer.parameters()), default=_NEVER)
                for layer in encoder.layers
            ]
            if thawed and (phase := min(thawed[1:], default=_NEVER)) < thawed[0]:
                found[name] = int(phase)
    return found


class FrozenModulePolicy(Listener):
    """Keep BatchNorm statistics and module modes in line with what is frozen.

    Args:
        model: The model whose parameters are frozen and thawed.
        track_running_stats: Whether frozen BatchNorm layers go on tracking their running statistics. If not,
            tracking is turned off and comes back with the first parameter of the layer that is thawed.
        mode: ``"train"`` leaves module modes alone. ``"eval"`` keeps modules whose parameters are all frozen in eval
            mode, so that their dropout is off and their BatchNorm statistics are fixed.
    """

    def __init__(
        self, model: nn.Module, *, track_running_stats: bool = True, mode: FrozenModulesMode = "train"
    ) -> None:
        self._model = model
        self._track_running_stats = track_running_stats
        self._mode = mode
        self._modes_apply = False
        self._paused: set[_BatchNorm] = set()
        self._switched: set[nn.Module] = set()

    def apply(self) -> None:
        """Bring the model in line, now that it is in train mode; from now on :meth:`update` keeps it so."""
        self._modes_apply = self._mode == "eval"
        self.update()

    def update(self) -> None:
        """Follow a change of ``requires_grad``. Module modes stay as they are until :meth:`apply` was called."""
        if self._track_running_stats and not self._modes_apply:
            return
        frozen = frozen_modules(self._model)
        if not self._track_running_stats:
            self._pause_statistics(frozen)
        if self._modes_apply:
            self._switch_modes(frozen)

    def after_thaw(self) -> None:
        """Follow a change of ``requires_grad``."""
        self.update()

    def release(self) -> None:
        """Put every module this policy switched to eval mode back to train mode, and let paused statistics go on."""
        for module in self._switched:
            module.training = True
        for layer in self._paused:
            layer.track_running_stats = True
        self._switched.clear()
        self._paused.clear()
        self._modes_apply = False

    def _pause_statistics(self, frozen: set[nn.Module]) -> None:
        for layer in self._paused - frozen:
            layer.track_running_stats = True
        self._paused &= frozen
        for module in frozen:
            if isinstance(module, _BatchNorm) and module.track_running_stats and module.affine:
                module.track_running_stats = False
                self._paused.add(module)

    def _switch_modes(self, frozen: set[nn.Module]) -> None:
        # `training` is set module by module, as PyTorch Lightning does when it restores modes after validation:
        # `train()` would also reach modules that the user keeps in another mode.
        for module in self._switched - frozen:
            module.training = True
        self._switched &= frozen
        for module in frozen:
            if module.training:
                module.training = False
                self._switched.add(module)
