"""What a plan needs of a trainer and a module, without a fit: optimizers and a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .package import LightningDataModule, LightningModule, Trainer, pl


def optimizers_of(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None
) -> tuple[list[Optimizer], list[LRScheduler]]:
    """Let a module make its optimizers and LR schedulers as in a fit; neither it nor the trainer keeps them.

    The trainer knows module and data meanwhile, so that it can tell the number of steps.
    """
    with attached(module, trainer), _connected(trainer, module, datamodule):
        optimizers, configs = pl.core.optimizer._init_optimizers_and_lr_schedulers(module)
    return optimizers, [config.scheduler for config in configs]


@contextmanager
def attached(module: LightningModule, trainer: Trainer | None) -> Iterator[None]:
    """Give a module a trainer for a while, or none: what it logs then goes nowhere."""
    before = module._trainer
    module.trainer = trainer
    try:
        yield
    finally:
        module.trainer = before


@contextmanager
def _connected(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None) -> Iterator[None]:
    """Let a trainer have module and data for a while; what it keeps of their loaders the next fit replaces."""
    before: Any = trainer.strategy.lightning_module
    kept: Any = getattr(trainer, "datamodule", None)
    trainer._data_connector.attach_data(module, datamodule=datamodule)
    trainer.strategy.connect(module)
    try:
        yield
    finally:
        trainer.strategy.connect(before)
        trainer.datamodule = kept  # type: ignore[attr-defined]  # set by a connector
        if datamodule is not None:
            datamodule.trainer = None


def sample_batch(module: LightningModule, datamodule: LightningDataModule | None) -> Any:
    """Take the first batch of the training data, which is prepared as for a fit; ``None`` if there is none."""
    source: Any = module if datamodule is None else datamodule
    kind = LightningModule if datamodule is None else LightningDataModule
    if type(source).train_dataloader is kind.train_dataloader:
        return None
    source.prepare_data()
    source.setup("fit")
    loader = source.train_dataloader()
    return next(iter(loader), None) if isinstance(loader, Iterable) else None
