"""Hooks around the forward passes of modules, and what they have left on the modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch import Tensor, nn

RECORDED = ("rss_diff_bytes", "forward_calls")
STACK = "rss_before_forward_bytes"  # of the forward passes that have begun: a module may be inside itself


def rss() -> int:
    """Bytes of this process that are in main memory."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def rss_before_forward(module: nn.Module, args: object) -> None:
    """Remember how large the process is before a module's forward pass."""
    vars(module).setdefault(STACK, []).append(rss())


def rss_after_forward(module: nn.Module, args: object, output: object) -> None:
    """Add to ``module.rss_diff_bytes`` what the process has grown by, which can be negative; count the pass."""
    attributes = vars(module)
    grown = rss() - attributes[STACK].pop()
    attributes["rss_diff_bytes"] = attributes.get("rss_diff_bytes", 0) + grown
    attributes["forward_calls"] = attributes.get("forward_calls", 0) + 1


class ModuleHooks:
    """A pair of hooks on every module of a model.

    Args:
        model: Its submodules, and itself, get the hooks.
        pre_forward: See ``MemoryHooks``.
        post_forward: See ``MemoryHooks``.
        recorded: The attributes that the hooks set on modules.
    """

    def __init__(
        self,
        model: nn.Module,
        pre_forward: Callable[..., Any],
        post_forward: Callable[..., Any],
        recorded: Sequence[str],
    ) -> None:
        self._model = model
        self._pre_forward, self._post_forward = pre_forward, post_forward
        self._recorded = recorded

    @contextmanager
    def on(self) -> Iterator[None]:
        """Put the hooks on; take them off and clear what they have recorded at the end."""
        self.clear()
        handles = []
        for module in self._model.modules():
            handles.append(module.register_forward_pre_hook(self._pre_forward))
            handles.append(module.register_forward_hook(self._post_forward))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.clear()

    def clear(self) -> None:
        """Remove the recorded attributes from all modules."""
        for module in self._model.modules():
            for name in (*self._recorded, STACK):
                vars(module).pop(name, None)

    def records(self) -> dict[str, dict[str, Any]]:
        """What the hooks have left, by the modules' names; modules without any are left out."""
        found = {}
        for path, module in self._model.named_modules():
            values = {name: plain(vars(module)[name]) for name in self._recorded if name in vars(module)}
            if values:
                found[path or type(module).__name__] = values
        return found


def plain(value: Any) -> Any:
    """Make something of a value that YAML can hold."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (int, float, str):  # such as numpy's float64, or an enumeration
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return repr(value)
