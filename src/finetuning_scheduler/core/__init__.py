"""The engine: schedules, thawing, transitions and parameter groups, for PyTorch with no Lightning installed.

The names are imported when they are first used: what looks at names only needs no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazily

if TYPE_CHECKING:
    from .gradients import GradientWatch, Judgement
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

_HOMES = {
    "Decision": "transitions",
    "FrozenModulePolicy": "thaw",
    "FrozenPrefix": "prefix.reuse",
    "GradientWatch": "gradients",
    "Judgement": "gradients",
    "LRSchedulerSpec": "schedule.model",
    "Listener": "transitions",
    "ModelView": "view",
    "Moment": "transitions",
    "Monitor": "monitor",
    "OneProcess": "ranks",
    "OptimizerSpec": "schedule.model",
    "Patience": "monitor",
    "Phase": "schedule.model",
    "PhaseRunner": "loop",
    "PhaseState": "plan",
    "Plan": "plan",
    "PlannedGroup": "optim.param_groups",
    "PrefixAccount": "prefix.accounts",
    "Prepared": "prepare",
    "Progress": "transitions",
    "Ranks": "ranks",
    "Reason": "transitions",
    "Resolution": "schedule.resolve",
    "Schedule": "schedule.schedule",
    "Session": "session",
    "Settings": "settings",
    "Snapshot": "snapshot",
    "Transition": "transitions",
    "decide": "transitions",
    "generate": "schedule.generate",
    "json_schema": "schedule.model",
    "prepare": "prepare",
    "read": "prepare",
    "resolve": "prepare",
    "save_schedule": "schedule.files",
    "set_trainable": "thaw",
}

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
    "Resolution",
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

__getattr__, __dir__ = lazily(__name__, _HOMES)
