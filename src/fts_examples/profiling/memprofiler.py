"""The callback that measures, and the decorator of the methods that it measures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from .checks import DECORATED, check_module, decorated_methods
from .config import MemProfilerCfg
from .session import Session

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)
SESSION = "_memprofiler_session"  # of the module, while it is profiled


class MemProfiler(Callback):
    """Measures what decorated methods of a LightningModule do to memory; writes a file for each rank.

    Give it to ``Trainer(callbacks=...)`` and put ``@MemProfiler.memprofilable`` above the methods. ``snapshots`` holds
    what the latest ``fit``, ``validate``, ``test`` or ``predict`` has measured in this process.

    Args:
        cfg: What is measured, when, and where it is written; the defaults of ``MemProfilerCfg`` if there is none.
    """

    def __init__(self, cfg: MemProfilerCfg | None = None) -> None:
        self.cfg = MemProfilerCfg() if cfg is None else cfg
        if not isinstance(self.cfg, MemProfilerCfg):
            raise TypeError(f"MemProfiler: expected a MemProfilerCfg, got {type(self.cfg).__name__}.")
        self.snapshots: dict[str, dict[str, Any]] = {}
        self._session: Session | None = None

    @staticmethod
    def memprofilable(method: Callable[P, R]) -> Callable[P, R]:
        """Have a LightningModule's method measured whenever a profiler is at work; else it is called as it is."""
        _check_method(method)
        name = method.__name__

        @wraps(method)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                session: Session | None = vars(args[0]).get(SESSION)
            except (IndexError, TypeError):  # no module comes first: a static method, or `self` was given by name
                session = None
            if session is None:
                return method(*args, **kwargs)
            with session.measured(name, (args[1:], kwargs)):
                return method(*args, **kwargs)

        setattr(measured, DECORATED, True)
        return measured

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the configuration and begin to measure."""
        self._end()
        if self.cfg.enabled:
            check_module(self.cfg, pl_module)
            _check_alone(pl_module)
            self._session = Session(self.cfg, trainer, pl_module)
            self.snapshots = self._session.snapshots
            vars(pl_module)[SESSION] = self._session

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what FSDP2's tracker follows: the model is complete and no batch has come yet."""
        if self._session is not None:
            self._session.find_sharded_module()

    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = on_train_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """End what lasts longer than the method that began it."""
        if self._session is not None:
            self._session.release()

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the files and leave nothing behind on the module."""
        if self._session is not None and not self.snapshots and trainer.is_global_zero:
            stage, names = self._session.stage, ", ".join(sorted(decorated_methods(pl_module)))
            logger.warning("MemProfiler: nothing was measured in %s. Decorated methods: %s.", stage, names)
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what was measured before."""
        self._end()

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            vars(session.module).pop(SESSION, None)
            session.end()


def _check_alone(module: LightningModule) -> None:
    if SESSION in vars(module):
        raise ValueError(
            "MemProfiler: expected one profiler that is enabled, got a second one of the same trainer. "
            "Fix: give one the settings of both."
        )


def _check_method(method: object) -> None:
    if not isinstance(method, FunctionType):
        raise TypeError(
            f"@MemProfiler.memprofilable: expected a method, got {type(method).__name__}. "
            "Fix: write it without parentheses, above a method that takes self."
        )
