"""What a run would train with, as options of commands: the optimizer, its LR scheduler, settings of the callback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.schedule.wording import closest, did_you_mean
from ..errors import Problem, ScheduleError
from .programs import found_object, parsed_arguments

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from ..core.settings import Settings
    from ..core.simulation import MakeOptimizer, MakeScheduler

OptimizerName = Annotated[
    str, typer.Option("--optimizer", metavar="NAME", help="The optimizer: a class of torch.optim, or its import path.")
]
OptimizerInit = Annotated[
    list[str] | None,
    typer.Option("--optimizer-init", metavar="KEY=VALUE", help="An argument of the optimizer; can be repeated."),
]
Lr = Annotated[
    float | None, typer.Option("--lr", help="The optimizer's learning rate, that of phase 0; else its default.")
]
NoDecay = Annotated[
    list[str] | None,
    typer.Option(
        "--no-decay", metavar="PART", help="A part of names whose parameters get no weight decay; can be repeated."
    ),
]
BaseMaxLr = Annotated[float, typer.Option("--base-max-lr", help="The learning rate of a later phase that names none.")]
MaxDepth = Annotated[int, typer.Option("--max-depth", help="The deepest phase to execute; -1 for all.")]


def settings_of(no_decay: Sequence[str] | None, base_max_lr: float, max_depth: int) -> Settings:
    """Make the settings of a session."""
    from ..core.settings import Settings

    return Settings(no_decay=tuple(no_decay or ()), base_max_lr=base_max_lr, max_depth=max_depth)


def optimizer_maker(name: str, init: Sequence[str] | None, lr: float | None) -> MakeOptimizer:
    """Return what makes the user's optimizer.

    Args:
        name: A class of ``torch.optim``, in any case, or an import path.
        init: ``key=value`` for each argument.
        lr: Its learning rate, if it is given apart.

    Raises:
        ScheduleError: There is no such class, or it does not take the arguments.
    """
    import torch
    from torch.optim import Optimizer

    kind = _class(name, "--optimizer", Optimizer, vars(torch.optim))
    arguments = parsed_arguments(init or (), "--optimizer-init") | ({} if lr is None else {"lr": lr})

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        made: Optimizer = _made(kind, "--optimizer", list(parameters), arguments)
        return made

    return make


def scheduler_maker(name: str | None, init: Sequence[str] | None) -> MakeScheduler | None:
    """Return what makes the user's LR scheduler, if there is one.

    Raises:
        ScheduleError: There is no such class, or it does not take the arguments.
    """
    from torch.optim import lr_scheduler
    from torch.optim.lr_scheduler import LRScheduler

    arguments = parsed_arguments(init or (), "--lr-scheduler-init")
    if name is None:
        return None
    kind = _class(name, "--lr-scheduler", LRScheduler, vars(lr_scheduler))

    def make(optimizer: Optimizer) -> LRScheduler:
        made: LRScheduler = _made(kind, "--lr-scheduler", optimizer, arguments)
        return made

    return make


def _class(name: str, option: str, base: type[Any], known: Mapping[str, Any]) -> type[Any]:
    """Find a class by its name, in any case, or by its import path."""
    classes = {each: kind for each, kind in known.items() if isinstance(kind, type) and issubclass(kind, base)}
    by_lower = {each.lower(): kind for each, kind in classes.items()}
    if "." not in name and ":" not in name:
        if name.lower() not in by_lower:
            names = [each for each in classes if each != base.__name__]
            fix = did_you_mean(closest(name, names), "name one, or the import path of a class")
            message = f"expected a class of PyTorch, such as {', '.join(sorted(names)[:3])}, got {name!r}"
            raise ScheduleError(Problem(message, fix, option))
        return by_lower[name.lower()]
    path = name if ":" in name else ":".join(name.rsplit(".", 1))
    kind = found_object(path)
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise ScheduleError(Problem(f"expected a subclass of {base.__name__}, got {name}", None, option))
    return kind


def _made(kind: type[Any], option: str, first: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        return kind(first, **arguments)
    except Exception as error:  # whatever a class of anybody's raises
        reason = " ".join(str(error).split())[:300]
        message = f"{kind.__name__} does not take the arguments {dict(arguments)} ({type(error).__name__}: {reason})"
        raise ScheduleError(Problem(message, f"correct {option}-init", option)) from error
