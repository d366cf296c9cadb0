"""Standing between a module and its caller, for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]
Wrapper = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]


class Interception:
    """Lets functions answer the calls of modules. Hooks of the modules still run around the answer.

    Args:
        wrappers: For each module a function that is given what it would have called, and its arguments.
    """

    def __init__(self, wrappers: Mapping[nn.Module, Wrapper]) -> None:
        self._wrappers = wrappers
        self._before: list[tuple[nn.Module, str, Any]] = []

    @property
    def installed(self) -> bool:
        """Whether calls are intercepted now."""
        return bool(self._before)

    def install(self) -> None:
        """Intercept calls from now on."""
        if self._before:
            return
        for module, wrapper in self._wrappers.items():
            attributes = vars(module)
            # `Module.compile` has put what is called here.
            compiled = attributes.get("_compiled_call_impl") is not None
            name = "_compiled_call_impl" if compiled else "forward"
            original = attributes[name] if compiled else module.forward
            self._before.append((module, name, attributes.get(name)))
            attributes[name] = _intercepted(original, wrapper)

    def remove(self) -> None:
        """Let modules be called as before."""
        for module, name, before in reversed(self._before):
            vars(module).pop(name, None)
            if before is not None:
                vars(module)[name] = before
        self._before = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Intercept calls for the length of a block."""
        self.install()
        try:
            yield
        finally:
            self.remove()


def _intercepted(original: Forward, wrapper: Wrapper) -> Forward:
    @functools.wraps(original, updated=())
    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, args, kwargs)

    return forward


def compiled_modules(model: nn.Module) -> set[nn.Module]:
    """Find the modules that ``torch.compile`` or ``Module.compile`` has compiled, as they are called."""
    return {
        module
        for module in model.modules()
        if "_orig_mod" in dict(module.named_children()) or vars(module).get("_compiled_call_impl") is not None
    }


def eagerly(model: nn.Module) -> AbstractContextManager[Any]:
    """Let compiled modules run uncompiled for a while."""
    return torch.compiler.set_stance("force_eager") if compiled_modules(model) else nullcontext()
