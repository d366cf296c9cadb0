"""The one place that imports PyTorch Lightning, from either of its packages.

``lightning`` and the stand-alone ``pytorch_lightning`` carry the same code under two names, but their classes are not
interchangeable. The package that the program has already imported is used, else ``lightning``, else
``pytorch_lightning``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
        Strategy,
        StrategyRegistry,
    )
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities.exceptions import _TunerExitException as TunerExit
    from lightning.pytorch.utilities.types import LRSchedulerConfig
else:

    def _package() -> str:
        names = ("lightning.pytorch", "pytorch_lightning")
        for name in names:
            if name in sys.modules:
                return name
        return names[0] if importlib.util.find_spec("lightning") else names[1]

    _name = _package()
    pl = importlib.import_module(_name)
    EarlyStoppingReason = importlib.import_module(f"{_name}.callbacks.early_stopping").EarlyStoppingReason
    DummyLogger = importlib.import_module(f"{_name}.loggers.logger").DummyLogger
    _io = importlib.import_module(f"{_name}.plugins.io")
    AsyncCheckpointIO, TorchCheckpointIO = _io.AsyncCheckpointIO, _io.TorchCheckpointIO
    _strategies = importlib.import_module(f"{_name}.strategies")
    DDPStrategy, DeepSpeedStrategy = _strategies.DDPStrategy, _strategies.DeepSpeedStrategy
    FSDPStrategy, ModelParallelStrategy = _strategies.FSDPStrategy, _strategies.ModelParallelStrategy
    SingleDeviceStrategy, Strategy = _strategies.SingleDeviceStrategy, _strategies.Strategy
    StrategyRegistry = _strategies.StrategyRegistry
    MultiProcessingLauncher = importlib.import_module(f"{_name}.strategies.launchers")._MultiProcessingLauncher
    TrainerFn = importlib.import_module(f"{_name}.trainer.states").TrainerFn
    LRSchedulerConfig = importlib.import_module(f"{_name}.utilities.types").LRSchedulerConfig
    _exceptions = importlib.import_module(f"{_name}.utilities.exceptions")
    MisconfigurationException, TunerExit = _exceptions.MisconfigurationException, _exceptions._TunerExitException

Callback = pl.Callback
Checkpoint = pl.callbacks.Checkpoint
LightningDataModule = pl.LightningDataModule
LightningModule = pl.LightningModule
Trainer = pl.Trainer
EarlyStopping = pl.callbacks.EarlyStopping
ModelCheckpoint = pl.callbacks.ModelCheckpoint
ModelPruning = pl.callbacks.ModelPruning
StochasticWeightAveraging = pl.callbacks.StochasticWeightAveraging
WeightAveraging = pl.callbacks.WeightAveraging

__all__ = [
    "AsyncCheckpointIO",
    "Callback",
    "Checkpoint",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "DummyLogger",
    "EarlyStopping",
    "EarlyStoppingReason",
    "FSDPStrategy",
    "LRSchedulerConfig",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "ModelCheckpoint",
    "ModelParallelStrategy",
    "ModelPruning",
    "MultiProcessingLauncher",
    "SingleDeviceStrategy",
    "StochasticWeightAveraging",
    "Strategy",
    "StrategyRegistry",
    "TorchCheckpointIO",
    "Trainer",
    "TrainerFn",
    "TunerExit",
    "WeightAveraging",
    "pl",
]
