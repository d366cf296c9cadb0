"""Fine-tune a pre-trained model in phases: a schedule says which parameters are thawed when.

The names below are imported when they are first used, so that ``import finetuning_scheduler.core`` loads no Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks.checkpoint import FTSCheckpoint
    from .callbacks.early_stopping import FTSEarlyStopping
    from .core.loop import PhaseRunner
    from .core.schedule.model import Phase
    from .core.schedule.schedule import Schedule
    from .core.slim import load_from_checkpoint, merge_checkpoint
    from .errors import ScheduleError
    from .fts import FinetuningScheduler
    from .fts_supporters import ScheduleImplMixin

__version__ = "3.0.0"

_HOME = {
    "FTSCheckpoint": "callbacks.checkpoint",
    "FTSEarlyStopping": "callbacks.early_stopping",
    "FinetuningScheduler": "fts",
    "Phase": "core.schedule.model",
    "PhaseRunner": "core.loop",
    "Schedule": "core.schedule.schedule",
    "ScheduleError": "errors",
    "ScheduleImplMixin": "fts_supporters",
    "load_from_checkpoint": "core.slim",
    "merge_checkpoint": "core.slim",
}

__all__ = [
    "FTSCheckpoint",
    "FTSEarlyStopping",
    "FinetuningScheduler",
    "Phase",
    "PhaseRunner",
    "Schedule",
    "ScheduleError",
    "ScheduleImplMixin",
    "load_from_checkpoint",
    "merge_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
