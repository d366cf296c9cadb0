"""Documented import path of the callbacks and of schedule generation."""

from __future__ import annotations

from .callbacks.checkpoint import FTSCheckpoint
from .callbacks.early_stopping import FTSEarlyStopping
from .core.schedule.files import ScheduleImplMixin

__all__ = ["FTSCheckpoint", "FTSEarlyStopping", "ScheduleImplMixin"]
