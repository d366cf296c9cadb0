"""Documented import path of the types that the signatures of this package need: re-exports only."""

from __future__ import annotations

from .core.monitor import Mode
from .core.schedule.generate import Heuristic
from .core.schedule.schedule import ScheduleSource
from .core.session import Report
from .core.thaw import FrozenModulesMode

__all__ = [
    "FrozenModulesMode",
    "Heuristic",
    "Mode",
    "Report",
    "ScheduleSource",
]
