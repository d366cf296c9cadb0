"""Callbacks that the tests of the model-parallel example name on its command line."""

from typing import Any

from lightning.pytorch import Callback, Trainer


class FailsOnOneRank(Callback):
    """Ends one rank in the midst of an epoch, when the others wait for it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == 1:
            raise RuntimeError("this rank ends here")
