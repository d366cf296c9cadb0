"""What the user wrote, and how full parameter names are made of it; knows names, no optimizer.

The names are imported when they are first used: what looks at names only needs no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazily

if TYPE_CHECKING:
    from .draft import Draft, draft
    from .files import ScheduleImplMixin, save_renumbered, save_schedule, schedule_path
    from .generate import Heuristic, generate, implicit, phase_comments
    from .model import ClassInit, LRSchedulerSpec, OptimizerSpec, Phase, json_schema
    from .names import ParameterIndex
    from .resolve import Resolution, resolve_names
    from .schedule import Schedule, ScheduleSource

_HOMES = {
    "ClassInit": "model",
    "Draft": "draft",
    "Heuristic": "generate",
    "LRSchedulerSpec": "model",
    "OptimizerSpec": "model",
    "ParameterIndex": "names",
    "Phase": "model",
    "Resolution": "resolve",
    "Schedule": "schedule",
    "ScheduleImplMixin": "files",
    "ScheduleSource": "schedule",
    "draft": "draft",
    "generate": "generate",
    "implicit": "generate",
    "json_schema": "model",
    "phase_comments": "generate",
    "resolve_names": "resolve",
    "save_renumbered": "files",
    "save_schedule": "files",
    "schedule_path": "files",
}

__all__ = [
    "ClassInit",
    "Draft",
    "Heuristic",
    "LRSchedulerSpec",
    "OptimizerSpec",
    "ParameterIndex",
    "Phase",
    "Resolution",
    "Schedule",
    "ScheduleImplMixin",
    "ScheduleSource",
    "draft",
    "generate",
    "implicit",
    "json_schema",
    "phase_comments",
    "resolve_names",
    "save_renumbered",
    "save_schedule",
    "schedule_path",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
