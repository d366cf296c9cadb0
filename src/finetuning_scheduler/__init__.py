"""Fine-tune a pre-trained model in phases: a schedule says which parameters are thawed when.

The names below are imported when they are first used, so that ``import finetuning_scheduler.core`` loads no Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazily

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

__getattr__, __dir__ = lazily(__name__, _HOME)
