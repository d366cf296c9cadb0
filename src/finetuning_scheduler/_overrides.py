"""What a user's subclass defines and nothing calls: refused if it is known what it is for, else named in a warning."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .core.schedule.wording import closest, did_you_mean
from .errors import Problem

# By method, what to use instead of it.
CALLBACK_METHODS: Mapping[str, str] = {
    "add_optimizer_groups": (
        "Give phases their `lr` or `lr_decay` and the module its `no_decay`; change groups in `step`, after "
        "`super().step()`."
    ),
    "finetune_function": "Override `should_transition` or `step`.",
    "freeze_before_training": "Leave it out: all that is in no phase stays frozen, and phase 0 is thawed at start.",
    "init_fts": "Override `setup`, or `on_before_init_fts` and `on_after_init_fts` of a strategy adapter.",
    "init_ft_sched": "Give the schedule as `ft_schedule`, or override `gen_ft_schedule` of a strategy adapter.",
    "reinit_lr_scheduler": "Use `new_lr_scheduler` of a phase, or `reinit_lr_cfg`.",
    "reinit_optimizer": "Use `new_optimizer` of a phase, or `reinit_optim_cfg`.",
    "step_pg": "Override `step`, and change groups after `super().step()`.",
}
ADAPTER_METHODS: Mapping[str, str] = {
    "before_restore_model": "Override `restore`, which ends with `super().restore(path, session, state_key)`.",
    "fts_handle": "Leave it out: `self.fts_handle` is the callback.",
    "fts_optim_transform": "Override `view`, which tells the tensors that the optimizer holds for each name.",
    "load_optimizer_state_dict": "Override `restore` for transitions and `resume` for runs that are resumed.",
    "logical_param_translation": "Override `view`, which tells the tensors that the optimizer holds for each name.",
    "pls_handle": "Leave it out: `self.pls_handle` is the strategy.",
}
_NOT_THE_USERS = ("abc", "builtins", "finetuning_scheduler", "lightning", "pytorch_lightning", "torch", "typing")


@dataclass(frozen=True)
class Defined:
    """What a user has defined: in a class, a parent or a mixin of it, or on the object alone."""

    name: str
    value: Any
    owner: str

    def problem(self, fix: str) -> Problem:
        """Say that it is never called."""
        source, line = _place(self.value)
        message = f"expected no `{self.name}`, which is never called here, got one in {self.owner}"
        return Problem(message, fix=fix, source=source, line=line)


def override_problems(callback: object, adapter: object) -> Iterator[Problem]:
    """List what a subclass of the callback, or of an adapter, defines that would never be called."""
    for thing, methods in ((callback, CALLBACK_METHODS), (adapter, ADAPTER_METHODS)):
        for found in _defined(thing):
            if found.name in methods:
                yield found.problem(methods[found.name])


def unknown_hooks(callback: object, adapter: object) -> Iterator[str]:
    """Say which methods are called like hooks and are none."""
    for thing in (callback, adapter):
        base = next(kind for kind in type(thing).__mro__ if not _is_users(kind))
        hooks = sorted(name for name in dir(base) if name.startswith("on_"))
        for found in _defined(thing):
            if found.name.startswith("on_") and found.name not in hooks:
                near = did_you_mean(closest(found.name, hooks), f"The hooks are {', '.join(hooks)}.")
                yield str(found.problem(f"{near} Give it another name if you call it yourself."))


def _defined(thing: object) -> Iterator[Defined]:
    """Go through what users have defined, each name once, as Python looks it up."""
    seen: set[str] = set()
    kinds = [kind for kind in type(thing).__mro__ if _is_users(kind)]
    places: list[tuple[str, Mapping[str, Any]]] = [(kind.__qualname__, vars(kind)) for kind in kinds]
    for owner, content in [(f"this {type(thing).__qualname__}", vars(thing)), *places]:
        for name in sorted(content.keys() - seen):
            seen.add(name)
            if _is_method(content[name]):
                yield Defined(name, content[name], owner)


def _is_users(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in _NOT_THE_USERS


def _is_method(value: object) -> bool:
    return callable(value) or hasattr(type(value), "__get__")  # a property, a `functools.partialmethod`, ...


def _place(value: Any) -> tuple[str | None, int | None]:
    """Find the file and line of a function, however it is wrapped."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    wrappers = (functools.cached_property, functools.partial, functools.partialmethod, functools.singledispatchmethod)
    while isinstance(value, wrappers):
        value = value.func
    code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
    return (None, None) if code is None else (code.co_filename, code.co_firstlineno)
