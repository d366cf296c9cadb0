"""Which adapter serves a strategy: the user's own, one of this package's, or none with the reason."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from .._lightning import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    Trainer,
    strategy_flags,
)
from ..core.optim.build import importing
from ..errors import Problem, ScheduleError
from .base import StrategyAdapter
from .ddp import DDPStrategyAdapter
from .fsdp import FSDPStrategyAdapter
from .model_parallel import ModelParallelStrategyAdapter

_METHODS = [name for name, value in vars(StrategyAdapter).items() if callable(value) and not name.startswith("_")]
_BINDING = (classmethod, functools.partialmethod, functools.singledispatchmethod)  # no functions, yet make methods
ENTRY_POINT_GROUP = "finetuning_scheduler.strategy_adapters"

_ADAPTERS: Mapping[type, type[StrategyAdapter]] = {
    DDPStrategy: DDPStrategyAdapter,
    FSDPStrategy: FSDPStrategyAdapter,
    ModelParallelStrategy: ModelParallelStrategyAdapter,
}

_DEEPSPEED = (
    "DeepSpeed: parameters frozen when its engine starts and thawed later never train, and parameters frozen after it "
    "has started keep drifting under AdamW"
)


def untested_strategy(strategy: Strategy) -> str | None:
    """Say why a strategy has no adapter of this package, or return ``None``."""
    if isinstance(strategy, DeepSpeedStrategy):
        return _DEEPSPEED
    tested = (SingleDeviceStrategy, *_ADAPTERS)
    if type(strategy).__name__ in ("XLAStrategy", "SingleDeviceXLAStrategy") or not isinstance(strategy, tested):
        return f"{type(strategy).__name__} has not been tested with schedules"
    return None


def unused_adapters(trainer: Trainer, custom: Mapping[str, Any] | None) -> Iterator[Problem]:
    """Find adapters that the user has named for other strategies than the one in use, and none for this one."""
    if custom and not has_custom_adapter(trainer, custom):
        names, got = ", ".join(sorted(strategy_flags(trainer))), ", ".join(map(str, custom))
        message = f"expected an adapter for the strategy in use ({names}) in `custom_strategy_adapters`, got {got}"
        yield Problem(message, fix="Name the strategy as it is called here, or leave the adapters out.")


def has_custom_adapter(trainer: Trainer, custom: Mapping[str, Any] | None) -> bool:
    """Whether the user has named an adapter for the trainer's strategy."""
    return bool(strategy_flags(trainer) & set(custom or ()))


def make_adapter(
    trainer: Trainer, custom: Mapping[str, Any] | None, configuration: Mapping[str, Any] | None
) -> StrategyAdapter:
    """Make the adapter for the trainer's strategy.

    Args:
        trainer: The trainer.
        custom: Adapters by strategy flag: an entry-point name, ``"pkg.mod:Class"``, ``"pkg.mod.Class"`` or a class.
        configuration: Keyword arguments of the adapter.

    Raises:
        ScheduleError: The named class cannot be imported, is no adapter, or does not take the arguments.
    """
    given: Any = custom or {}
    if not isinstance(given, Mapping):
        message = f"expected `custom_strategy_adapters` to be adapters by strategy, got {given!r}"
        raise ScheduleError(Problem(message, fix='Use a mapping such as {"ddp": "pkg.mod:Class"}.'))
    flags = strategy_flags(trainer)
    name = next((path for flag, path in given.items() if flag in flags), None)
    kind: type[StrategyAdapter] = StrategyAdapter
    if name is not None:
        kind = _adapter_class(name)
    elif untested_strategy(trainer.strategy) is None:
        kind = next((mine for base, mine in _ADAPTERS.items() if isinstance(trainer.strategy, base)), kind)
    try:
        adapter = kind(**(configuration or {}))
    except (Exception, SystemExit) as error:
        message = f"{kind.__name__} does not take `strategy_adapter_cfg` {configuration!r}: {error}"
        raise ScheduleError(Problem(message, fix="Correct `strategy_adapter_cfg`.")) from error
    found = {name: inspect.getattr_static(adapter, name) for name in _METHODS}
    if wrong := [name for name, value in found.items() if not callable(value) and not isinstance(value, _BINDING)]:
        message = f"expected {', '.join(f'`{name}`' for name in wrong)} of {kind.__name__} to be methods"
        raise ScheduleError(Problem(message, fix="Write methods, without `property`."))
    return adapter


def _adapter_class(named: Any) -> type[StrategyAdapter]:
    """Return the class that a user has named, or given itself."""
    found = _imported(named) if isinstance(named, str) else named
    if not (isinstance(found, type) and issubclass(found, StrategyAdapter)):
        message = f"expected a subclass of StrategyAdapter, got {named!r}"
        raise ScheduleError(
            Problem(message, fix="Derive it from finetuning_scheduler.strategy_adapters.StrategyAdapter.")
        )
    return found


def _imported(name: str) -> Any:
    fix = f"Use the name of an entry point of the group {ENTRY_POINT_GROUP}, 'pkg.mod:Class' or 'pkg.mod.Class'."
    try:
        with importing():
            if points := entry_points(group=ENTRY_POINT_GROUP, name=name):
                return next(iter(points)).load()
            module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
            return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        message = f"the strategy adapter {name!r} cannot be imported ({error})"
        raise ScheduleError(Problem(message, fix=fix)) from error
