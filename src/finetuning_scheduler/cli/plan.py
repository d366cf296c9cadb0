"""``fts plan``: what each phase trains and costs, before anything is trained."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Problem, ScheduleError
from .check import Schedule
from .models import Init, Model, read_model
from .output import AsJson, Output, answering
from .training import BaseMaxLr, Lr, MaxDepth, NoDecay, OptimizerInit, OptimizerName, optimizer_maker, settings_of

if TYPE_CHECKING:
    from ..report.shapes import PlanReport
    from .outline import ModelOutline

EXAMPLES = """\
Examples:

\b
  fts plan schedule.yaml bert-base-uncased/
  fts plan schedule.yaml model.safetensors --optimizer sgd --lr 0.1
  fts plan schedule.yaml model.safetensors --precision bf16-true
  fts plan schedule.yaml my.models:Classifier --batch my.data:batch
  fts plan schedule.yaml model.safetensors --format markdown
  fts plan schedule.yaml model.safetensors --format html > plan.html

Memory is told without activations. Costs are counted with a sample batch, and
estimated from shares of parameters without one.

Exit status: 0, or 2 if something is wrong."""


class Format(str, Enum):
    """How a plan is printed."""

    TABLE = "table"
    MARKDOWN = "markdown"
    JSON = "json"
    HTML = "html"


Precision = Annotated[str, typer.Option("--precision", help="The trainer's precision, such as bf16-mixed.")]
Batch = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="MODULE:FUNCTION",
        help="Makes a sample batch: what the model's training_step takes, or its arguments (tuple or mapping).",
    ),
]
AsFormat = Annotated[Format, typer.Option("--format", help="How it is printed.")]


def plan(
    schedule: Schedule,
    model: Model,
    init: Init = None,
    optimizer: OptimizerName = "adamw",
    optimizer_init: OptimizerInit = None,
    lr: Lr = None,
    no_decay: NoDecay = None,
    base_max_lr: BaseMaxLr = 1e-5,
    max_depth: MaxDepth = -1,
    precision: Precision = "32-true",
    batch: Batch = None,
    as_format: AsFormat = Format.TABLE,
    as_json: AsJson = False,
) -> None:
    """Tell what each phase of SCHEDULE thaws in MODEL, its groups, learning rates, memory and costs."""
    as_json = as_json or as_format is Format.JSON
    with answering(as_json=as_json) as output:
        from ..report.memory import PRECISIONS

        if precision not in PRECISIONS:
            message = f"expected one of {', '.join(PRECISIONS)}, got {precision!r}"
            raise ScheduleError(Problem(message, "use the trainer's precision", "--precision"))
        outline = read_model(model, init)
        make = optimizer_maker(optimizer, optimizer_init, lr)
        report = _report(outline, schedule, make, settings_of(no_decay, base_max_lr, max_depth), precision, batch)
        _print(output, report, Format.JSON if as_json else as_format)


def _report(
    outline: ModelOutline, schedule: str, make: Any, settings: Any, precision: str, batch: str | None
) -> PlanReport:
    from ..core.prepare import prepare
    from ..report.costs import from_parameters
    from ..report.plan import plan_report
    from .findings import usable

    found = usable(schedule, outline)
    view, user_optimizer = outline.view, make(outline.view.trained.values())
    prepared = prepare(found, view, user_optimizer, settings)
    if batch is None:
        costs = from_parameters(prepared.plan, view)
    else:
        from ..report.operations import costs_of

        if outline.module is None:
            fix = "name what makes the model (package.module:Class, or a folder with its config.json)"
            raise ScheduleError(Problem("expected a model that can run, got names of tensors only", fix, "--batch"))
        costs = costs_of(prepared.plan, view, _batch(batch))
    return plan_report(
        prepared,
        view,
        user_optimizer,
        settings,
        costs,
        precision=precision,
        buffers=outline.buffer_tensors,
        title=outline.title,
        notes=outline.notes,
    )


def _batch(path: str) -> Any:
    """Make the sample batch.

    Raises:
        ScheduleError: There is nothing that makes one.
    """
    from .output import foreign_code
    from .programs import PROGRAM, found_object

    if not PROGRAM.fullmatch(path):
        message = f"expected module:function, which makes a batch, got {path!r}"
        raise ScheduleError(Problem(message, "write, for example, --batch my_package.data:batch", "--batch"))
    with foreign_code():
        made = found_object(path)
        try:
            return made() if callable(made) else made
        except Exception as error:  # whatever the user's function raises
            message = f"expected a batch, got an error from {path} ({type(error).__name__}: {error})"
            raise ScheduleError(Problem(message, "correct it", "--batch")) from error


def _print(output: Output, report: PlanReport, as_format: Format) -> None:
    from ..report.tables import plan_markdown, plan_table

    if as_format is Format.JSON:
        output.answer(report)
    elif as_format is Format.HTML:
        from ..report.pages import plan_page

        output.print(plan_page(report))
    else:
        lines = plan_markdown(report) if as_format is Format.MARKDOWN else plan_table(report)
        for line in lines:
            output.print(line)
