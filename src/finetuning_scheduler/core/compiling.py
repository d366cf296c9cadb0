"""How many graphs `torch.compile` may make of a model whose trainable part changes."""

from __future__ import annotations

import sys
from types import ModuleType

from .transitions import Listener

_LIMITS = ("recompile_limit", "accumulated_recompile_limit")
_added_by_all = dict.fromkeys(_LIMITS, 0)  # the limits are those of the process, and so is what was added to them


class RecompileLimits(Listener):
    """Lets each phase have as many graphs as a run without phases may have.

    A graph is only used for the tensors that were trainable when it was made: gradients are right in any case. But a
    model that is compiled as a whole needs graphs of its own in each phase, and from `torch._dynamo.config`'s
    `recompile_limit` on it would be run without being compiled. Both of its limits grow by what they were at the first
    transition, without what other sessions had added, with each transition. Graphs that are there stay: resetting the
    compiler instead would have modules that are compiled one by one, which need few graphs in all phases together,
    compiled anew in each.
    """

    def __init__(self) -> None:
        self._begun = False
        self._initial: dict[str, int] = {}
        self._added = dict.fromkeys(_LIMITS, 0)

    def after_thaw(self) -> None:
        """Raise the limits for another phase, unless it is the first of this process."""
        if not self._begun:
            self._begun = True
            return
        if (config := _config()) is None:  # nothing has been compiled yet
            return
        self._initial = self._initial or {name: getattr(config, name) - _added_by_all[name] for name in _LIMITS}
        for name, initial in self._initial.items():
            setattr(config, name, getattr(config, name) + initial)
            self._added[name] += initial
            _added_by_all[name] += initial

    def release(self) -> None:
        """Take back what has been added; what others have set meanwhile stays."""
        config, added = _config(), self._added
        self._added = dict.fromkeys(_LIMITS, 0)
        for name in _LIMITS if config is not None else ():
            _added_by_all[name] -= added[name]
            if (present := getattr(config, name)) > added[name]:
                setattr(config, name, present - added[name])


def _config() -> ModuleType | None:
    """Return the compiler's settings, if it has been imported."""
    dynamo = sys.modules.get("torch._dynamo")
    return None if dynamo is None else dynamo.config
