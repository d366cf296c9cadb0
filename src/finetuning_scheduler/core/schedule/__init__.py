"""What the user wrote, and how full parameter names are made of it; knows names, no optimizer."""

from .draft import Draft, draft
from .files import ScheduleImplMixin, save_renumbered, save_schedule, schedule_path
from .generate import Heuristic, generate, implicit, phase_comments
from .model import ClassInit, LRSchedulerSpec, OptimizerSpec, Phase, json_schema
from .names import ParameterIndex
from .resolve import Resolution, resolve_names
from .schedule import Schedule, ScheduleSource

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
