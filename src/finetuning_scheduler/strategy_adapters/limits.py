"""What Lightning's strategies that shard parameters cannot do, found before training instead of in the middle of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch.optim import SGD

from .._lightning import LightningModule, Trainer, WeightAveraging, callbacks_of
from ..core.optim.build import import_class
from ..core.schedule.schedule import Schedule
from ..errors import Problem


def saves_optimizers(trainer: Trainer) -> bool:
    """Whether a callback saves checkpoints with the optimizer's state."""
    return any(not getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks)


def stateless_optimizers(trainer: Trainer, schedule: Schedule) -> Iterator[Problem]:
    """Find optimizers that keep no state: Lightning cannot load the checkpoints that it saves of such an optimizer."""
    if not saves_optimizers(trainer):
        return
    fix = "Give it momentum, or use ModelParallelStrategy with distributed checkpoints."
    message = (
        "expected an optimizer that keeps state, since Lightning cannot load its checkpoint without any, got SGD "
        "without momentum"
    )
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, SGD) and not any(group.get("momentum") for group in optimizer.param_groups):
            yield Problem(message, fix=fix)
    for number, phase in enumerate(schedule.phases):
        if phase.new_optimizer is None:
            continue
        new = phase.new_optimizer.optimizer_init
        if issubclass(import_class(new.class_path), SGD) and not new.init_args.get("momentum"):
            yield Problem(message, fix=fix, phase=number)


def averaged_weights(trainer: Trainer) -> Iterator[Problem]:
    """Find callbacks that average weights: Lightning's copy the model, which is not possible once it is sharded."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, WeightAveraging):
            kind, strategy = type(callback).__name__, type(trainer.strategy).__name__
            message = f"expected no WeightAveraging with {strategy}, since Lightning cannot average shards, got {kind}"
            yield Problem(message, fix="Drop the callback, or use DDP.")


def gradient_clipping(trainer: Trainer) -> Literal["norm", "value"] | None:
    """Tell how Lightning is going to clip gradients; ``None`` if not, or if the module does it by itself."""
    if not trainer.gradient_clip_val:
        return None
    if type(trainer.lightning_module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping:
        return None
    return "value" if trainer.gradient_clip_algorithm == "value" else "norm"
