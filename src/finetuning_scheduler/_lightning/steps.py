"""Standing between a trainer and the methods of a module that make its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .package import DummyLogger, LightningModule

Runner = Callable[..., Any]


class _Answered:
    """A method of a module that something else answers; a copy of the module has the method itself."""

    def __init__(self, module: LightningModule, name: str, run: Runner) -> None:
        self._module = module
        self._method = getattr(module, name)
        self._run = run
        functools.update_wrapper(self, self._method, updated=())
        # Lightning looks at the arguments of a method, and through one decorator.
        self.__wrapped__ = getattr(self._method, "__wrapped__", self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._method, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module), self._module)
        return getattr(type(copied), self._method.__name__).__get__(copied)

    def __reduce__(self) -> Any:
        return getattr, (self._module, self._method.__name__)


@contextmanager
def answered(module: LightningModule, runners: Mapping[str, Runner]) -> Iterator[None]:
    """Let functions answer methods of a module for a while: ``run(method, *args, **kwargs)``."""
    attributes = vars(module)
    before = {name: attributes.get(name) for name in runners}
    answers = {name: _Answered(module, name, run) for name, run in runners.items()}
    attributes.update(answers)
    try:
        yield
    finally:
        for name, method in before.items():
            attributes.pop(name, None)
            if method is not None:
                attributes[name] = method


@contextmanager
def without_logging(module: LightningModule) -> Iterator[None]:
    """Let what a module logs for a while go nowhere, by itself or through the loggers of its trainer."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    trainer = module.trainer
    loggers, trainer.loggers = trainer.loggers, [DummyLogger() for _ in trainer.loggers]
    try:
        with answered(module, {"log": nothing, "log_dict": nothing}):
            yield
    finally:
        trainer.loggers = loggers
