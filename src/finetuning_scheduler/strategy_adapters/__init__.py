"""What a Lightning strategy needs to be told when parameters are frozen or thawed."""

from .base import StrategyAdapter

__all__ = ["StrategyAdapter"]
