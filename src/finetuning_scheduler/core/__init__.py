"""The engine: schedules, thawing, transitions and parameter groups, for PyTorch with no Lightning installed."""

from .artifacts import save_schedule
from .generate import generate
from .plan import Plan, PlannedGroup, PlannedPhase
from .runner import PhaseRunner, Transition
from .schedule import LRSchedulerSpec, OptimizerSpec, Phase, Schedule, json_schema
from .selectors import Resolution, resolve
from .snapshot import Snapshot
from .thaw import FrozenModulePolicy, set_trainable
from .transitions import Decision, Patience, Progress, Reason, decide
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
