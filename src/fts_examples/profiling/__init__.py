"""What a LightningModule's methods do to memory: a callback, a decorator, and a file of numbers for each rank."""

from .config import MemoryHooks, MemProfilerCfg, MemProfilerFuncs, MemProfilerSchedule, SavedTensorsFuncs
from .memprofiler import MemProfiler

__all__ = [
    "MemProfiler",
    "MemProfilerCfg",
    "MemProfilerFuncs",
    "MemProfilerSchedule",
    "MemoryHooks",
    "SavedTensorsFuncs",
]
