"""What a fit would do, told by the callback without fitting."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ._checks import Configuration, settings_of
from ._lightning import LightningDataModule, LightningModule, Trainer, attached, optimizers_of, sample_batch
from ._source import Implicit, read_given
from ._trainer import as_misconfiguration
from .core.prepare import prepare
from .core.view import ModelView
from .errors import Problem, ScheduleError, joined
from .report.costs import from_parameters
from .report.operations import costs_of
from .report.plan import ReadablePlan, plan_report


class Planned(Configuration, Implicit, Protocol):
    """The callback, as far as a plan depends on it."""


def plan_of(
    owner: Planned,
    given: Mapping[str, Any],
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
) -> ReadablePlan:
    """Say what a fit would do.

    Args:
        owner: The callback.
        given: What the user has asked for as ``ft_schedule`` and ``max_depth``.
        trainer: The trainer of the fit.
        module: The module, which is not changed.
        datamodule: The data of the fit.

    Raises:
        MisconfigurationException: With everything that is wrong, as before a fit.
    """
    with as_misconfiguration():
        with attached(module, trainer):
            module.configure_model()
        view = ModelView.of(module)
        found = read_given(given["ft_schedule"], owner, view)
        if found.errors:
            raise joined(found.errors)
        batch = sample_batch(module, datamodule)
        with trainable_only(view, found.phases[0].params):
            optimizers, lr_schedulers = _made(trainer, module, datamodule)
            optimizer = optimizers[0] if len(optimizers) == 1 else None
            problems = [] if optimizer is not None else [_one_optimizer(len(optimizers))]
            settings = settings_of(owner, given["max_depth"], module)
        prepared = prepare(found, view, optimizer, settings, lr_schedulers=lr_schedulers, problems=problems)
        if optimizer is None:  # it was among the problems
            raise ScheduleError(problems)
        with attached(module, None):
            plan = prepared.plan
            costs = from_parameters(plan, view) if batch is None else costs_of(plan, view, batch)
        return plan_report(
            prepared,
            view,
            optimizer,
            settings,
            costs,
            precision=str(trainer.precision),
            buffers=module.buffers(),
            notes=[*prepared.notices, *prepared.warnings],
        )


def _made(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None
) -> tuple[list[Optimizer], list[LRScheduler]]:
    """Let the module make its optimizers, which may want what only a fit brings about."""
    try:
        return optimizers_of(trainer, module, datamodule)
    except (AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        message = f"expected `configure_optimizers` to work outside a fit, got {type(error).__name__}: {reason}"
        fix = "Ask the trainer for nothing that only a fit brings about, or use `fts plan`."
        raise ScheduleError(Problem(message, fix)) from error


def _one_optimizer(count: int) -> Problem:
    return Problem(f"expected one optimizer, got {count}", "Return one optimizer from `configure_optimizers`.")


@contextmanager
def trainable_only(view: ModelView, names: Collection[str]) -> Iterator[None]:
    """Let a model be for a while as it is in the first phase; gradients and marks of parameters stay."""
    before = {name: tensor.requires_grad for name, tensor in view.trained.items()}
    wanted = set(names)
    try:
        for name, tensor in view.trained.items():
            tensor.requires_grad = name in wanted
        yield
    finally:
        for name, tensor in view.trained.items():
            tensor.requires_grad = before[name]
