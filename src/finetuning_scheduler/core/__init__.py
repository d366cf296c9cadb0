"""The engine: schedules, thawing, transitions and parameter groups, for PyTorch with no Lightning installed."""

from .monitor import Patience
from .plan import Plan, PlannedGroup, PlannedPhase
from .prepare import resolve
from .runner import PhaseRunner, Transition
from .schedule import (
    LRSchedulerSpec,
    OptimizerSpec,
    Phase,
    Resolution,
    Schedule,
    generate,
    json_schema,
    save_schedule,
)
from .snapshot import Snapshot
from .thaw import FrozenModulePolicy, set_trainable
from .transitions import Decision, Progress, Reason, decide
from .view import ModelView

__all__ = [
    "Decision",
    "FrozenModulePolicy",
    "LRSchedulerSpec",
    "ModelView",
    "OptimizerSpec",
    "Patience",
    "Phase",
    "PhaseRunner",
    "Plan",
    "PlannedGroup",
    "PlannedPhase",
    "Progress",
    "Reason",
    "Resolution",
    "Schedule",
    "Snapshot",
    "Transition",
    "decide",
    "generate",
    "json_schema",
    "resolve",
    "save_schedule",
    "set_trainable",
]
