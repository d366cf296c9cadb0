"""What a fit needs of its trainer: the ranks, the strategy's adapter, a place for messages, the errors users expect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar, cast

from ._lightning import LightningModule, MisconfigurationException, Trainer, after_configure_model
from .errors import ScheduleError
from .strategy_adapters import StrategyAdapter, make_adapter

T = TypeVar("T")
log = logging.getLogger("finetuning_scheduler")


class AdapterChoice(Protocol):
    """Names an adapter and its arguments, if the user does."""

    custom_strategy_adapters: dict[str, str | type[StrategyAdapter]] | None
    strategy_adapter_cfg: dict[str, Any] | None


class TrainerRanks:
    """The ranks of a trainer, by way of its strategy's adapter."""

    def __init__(self, trainer: Trainer, adapter: StrategyAdapter) -> None:
        self._trainer = trainer
        self._adapter = adapter

    def any(self, flag: bool) -> bool:
        """Tell on every rank whether ``flag`` is set on any."""
        return self._adapter.any_rank(flag)

    def every(self, flag: bool) -> bool:
        """Tell on every rank whether ``flag`` is set on all."""
        return self._adapter.every_rank(flag)

    def from_zero(self, function: Callable[[], T]) -> T:
        """Call a function on global rank zero and give every rank what it returns, or raises.

        Raises:
            Exception: What the function has raised; another rank gets a ``RuntimeError`` for what cannot be sent.
        """
        outcome: T | None = None
        failure: Exception | None = None
        if self._trainer.is_global_zero:
            try:
                outcome = function()
            except Exception as error:  # noqa: BLE001 - raised below, when the other ranks no longer wait
                failure = error
        can_be_sent = failure is None or isinstance(failure, (OSError, ScheduleError))
        sent = failure if can_be_sent else RuntimeError(f"{type(failure).__name__}: {failure}")
        outcome, sent = self._adapter.from_rank_zero((outcome, sent))
        if (failure := failure or sent) is not None:
            raise failure
        return cast("T", outcome)


def adapted(choice: AdapterChoice, trainer: Trainer, module: LightningModule, hooked: ExitStack) -> StrategyAdapter:
    """Make the strategy's adapter, which is told when the module has its layers and when it has been set up.

    Whoever asks for it has it connected.

    Args:
        choice: Names the adapter.
        trainer: The trainer.
        module: The module that is about to be set up.
        hooked: What is hooked into is taken back when this is closed.
    """
    with as_misconfiguration():
        adapter = make_adapter(trainer, choice.custom_strategy_adapters, choice.strategy_adapter_cfg)
    adapter.trainer = trainer
    hooked.callback(adapter.on_set_up)

    def configured() -> None:
        with as_misconfiguration():
            adapter.on_model_configured()

    if type(adapter).on_model_configured is not StrategyAdapter.on_model_configured:
        hooked.enter_context(after_configure_model(module, configured))
    return adapter


@contextmanager
def visible_messages() -> Iterator[None]:
    """Show messages on the terminal for as long as a fit lasts, in a program that has configured no logging."""
    handler = None if log.hasHandlers() else logging.StreamHandler()
    if handler is not None:
        log.addHandler(handler)
    try:
        yield
    finally:
        if handler is not None:
            log.removeHandler(handler)


@contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Raise the engine's errors as the exception that Lightning's users expect."""
    try:
        yield
    except ScheduleError as error:
        raise MisconfigurationException(str(error)) from error
