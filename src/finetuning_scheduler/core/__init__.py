"""The engine: schedules, thawing, transitions and parameter groups, for PyTorch with no Lightning installed."""

from .gradients import GradientWatch, Judgement
from .history.document import RunHistory
from .history.recorder import Recorder
from .loop import PhaseRunner
from .monitor import Monitor, Patience
from .optim.param_groups import PlannedGroup
from .plan import PhaseState, Plan
from .prefix.accounts import PrefixAccount
from .prefix.reuse import FrozenPrefix
from .prepare import Prepared, prepare, read, resolve
from .ranks import OneProcess, Ranks
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
from .session import Session
from .settings import Settings
from .snapshot import Snapshot
from .thaw import FrozenModulePolicy, set_trainable
from .transitions import Decision, Listener, Moment, Progress, Reason, Transition, decide
from .view import ModelView

__all__ = [
    "Decision",
    "FrozenModulePolicy",
    "FrozenPrefix",
    "GradientWatch",
    "Judgement",
    "LRSchedulerSpec",
    "Listener",
    "ModelView",
    "Moment",
    "Monitor",
    "OneProcess",
    "OptimizerSpec",
    "Patience",
    "Phase",
    "PhaseRunner",
    "PhaseState",
    "Plan",
    "PlannedGroup",
    "PrefixAccount",
    "Prepared",
    "Progress",
    "Ranks",
    "Reason",
    "Recorder",
    "Resolution",
    "RunHistory",
    "Schedule",
    "Session",
    "Settings",
    "Snapshot",
    "Transition",
    "decide",
    "generate",
    "json_schema",
    "prepare",
    "read",
    "resolve",
    "save_schedule",
    "set_trainable",
]
