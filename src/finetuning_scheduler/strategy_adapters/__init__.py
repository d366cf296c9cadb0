"""What a Lightning strategy needs to be told when parameters are frozen or thawed."""

from .base import StrategyAdapter
from .ddp import DDPStrategyAdapter
from .fsdp import FSDPStrategyAdapter
from .loading import saved_progress
from .model_parallel import ModelParallelStrategyAdapter
from .registry import has_custom_adapter, make_adapter, untested_strategy

__all__ = [
    "DDPStrategyAdapter",
    "FSDPStrategyAdapter",
    "ModelParallelStrategyAdapter",
    "StrategyAdapter",
    "has_custom_adapter",
    "make_adapter",
    "saved_progress",
    "untested_strategy",
]
