"""``fts lr``: the learning rates of every group over a session, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import Problem, ScheduleError
from .check import Schedule
from .models import Init, Model, read_model
from .output import AsJson, answering
from .training import (
    BaseMaxLr,
    Lr,
    MaxDepth,
    NoDecay,
    OptimizerInit,
    OptimizerName,
    optimizer_maker,
    scheduler_maker,
    settings_of,
)

EXAMPLES = """\
Examples:

\b
  fts lr schedule.yaml model.safetensors --epochs 10
  fts lr schedule.yaml model.safetensors --epochs 10 \\
    --lr-scheduler CosineAnnealingLR --lr-scheduler-init T_max=10
  fts lr schedule.yaml model.safetensors --epochs 10 --phase-epochs 2
  fts lr schedule.yaml model.safetensors --epochs 10 --optimizer sgd --lr 0.1
  fts lr schedule.yaml model.safetensors --epochs 10 --picture rates.png

The engine of a run goes through the phases, on tensors of one value each. A
phase without limits ends by early stopping in a run; here after --phase-epochs.

Exit status: 0, or 2 if something is wrong."""

Epochs = Annotated[int, typer.Option("--epochs", min=1, help="After so many the session ends.", show_default=False)]
Steps = Annotated[int, typer.Option("--steps-per-epoch", min=1, help="Optimizer steps in an epoch.")]
PhaseEpochs = Annotated[
    int, typer.Option("--phase-epochs", min=1, help="How long a phase without limits lasts, in epochs.")
]
SchedulerName = Annotated[
    str | None,
    typer.Option("--lr-scheduler", metavar="NAME", help="The program's LR scheduler: a class of PyTorch, or a path."),
]
SchedulerInit = Annotated[
    list[str] | None,
    typer.Option("--lr-scheduler-init", metavar="KEY=VALUE", help="An argument of it; can be repeated."),
]
Interval = Annotated[str, typer.Option("--interval", help="When the program's LR scheduler steps: epoch or step.")]
Frequency = Annotated[int, typer.Option("--frequency", min=1, help="After how many of these.")]
EveryStep = Annotated[bool, typer.Option("--every-step", help="Tell the rates of all steps.")]
Picture = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE", help="Draw them to a file, such as rates.png, instead.")
]


def lr(
    schedule: Schedule,
    model: Model,
    epochs: Epochs,
    init: Init = None,
    steps_per_epoch: Steps = 1,
    phase_epochs: PhaseEpochs = 1,
    optimizer: OptimizerName = "adamw",
    optimizer_init: OptimizerInit = None,
    rate: Lr = None,
    lr_scheduler: SchedulerName = None,
    lr_scheduler_init: SchedulerInit = None,
    interval: Interval = "epoch",
    frequency: Frequency = 1,
    no_decay: NoDecay = None,
    base_max_lr: BaseMaxLr = 1e-5,
    max_depth: MaxDepth = -1,
    every_step: EveryStep = False,
    picture: Picture = None,
    as_json: AsJson = False,
) -> None:
    """Tell the learning rates of every group while SCHEDULE fine-tunes MODEL; nothing is trained."""
    with answering(as_json=as_json) as output:
        from ..core.optim.build import SchedulerSettings
        from ..core.simulation import Pace, Simulation
        from ..report.learning_rates import learning_rates, rates_table
        from .findings import usable

        outline = read_model(model, init)
        simulation = Simulation(
            usable(schedule, outline),
            outline.view,
            optimizer_maker(optimizer, optimizer_init, rate),
            settings_of(no_decay, base_max_lr, max_depth),
            make_lr_scheduler=scheduler_maker(lr_scheduler, lr_scheduler_init),
            scheduler_settings=SchedulerSettings(interval=_interval(interval), frequency=frequency),
        )
        pace = Pace(epochs, steps_per_epoch, phase_epochs)
        rates = learning_rates(simulation, pace, outline.title, every_step=every_step or picture is not None)
        if picture is not None:
            from ..report.rate_picture import draw

            draw(rates, picture)
        if as_json:
            output.answer(rates)
        elif picture is not None:
            output.print(f"The picture was written to {picture}.")
        else:
            for line in rates_table(rates, min(output.console.width, 120)):
                output.print(line)


def _interval(given: str) -> str:
    if given in ("epoch", "step"):
        return given
    raise ScheduleError(Problem(f"expected epoch or step, got {given!r}", "use one of them", "--interval"))
