"""``fts check``: everything that is wrong with a schedule, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .models import Init, Model, read_model
from .output import OK, PROBLEMS, AsJson, Output, answering, counted, share

if TYPE_CHECKING:
    from .shapes import CheckAnswer

EXAMPLES = """\
Examples:

\b
  fts check schedule.yaml bert-base-uncased/
  fts check schedule.yaml model.safetensors
  fts check schedule.yaml my_package.models:Classifier --init num_labels=3
  fts check schedule.yaml runs/last.ckpt --json

Exit status: 0 if the schedule can be used, 1 if something is wrong with it, 2 if there is nothing to check."""

Schedule = Annotated[str, typer.Argument(metavar="SCHEDULE", help="The schedule's YAML file.", show_default=False)]


def check(schedule: Schedule, model: Model, init: Init = None, as_json: AsJson = False) -> None:
    """Find everything that is wrong with SCHEDULE for MODEL, each with file, line and column."""
    with answering(as_json=as_json) as output:
        from .findings import findings, readable, resolved
        from .shapes import CheckAnswer

        readable(schedule)
        outline = read_model(model, init)
        found = resolved(schedule, outline)
        names = [] if found.errors else [name for phase in found.phases for name in phase.params]
        answer = CheckAnswer(
            ok=not found.errors,
            schedule=schedule,
            model=outline.summary,
            phases=None if found.errors else len(found.phases),
            thawed_tensors=None if found.errors else len(names),
            thawed_parameters=None if found.errors else outline.sizes_of(names),
            findings=findings(found, schedule),
        )
        if as_json:
            output.answer(answer)
        else:
            _print(output, answer)
    raise typer.Exit(OK if answer.ok else PROBLEMS)


def _print(output: Output, answer: CheckAnswer) -> None:
    from rich.text import Text

    from .findings import print_findings

    print_findings(output, answer.findings)
    kinds = [finding.kind for finding in answer.findings]
    others = [counted(kinds.count(kind), kind) for kind in ("warning", "notice") if kind in kinds]
    model = answer.model
    if not answer.ok:
        counts = ", ".join([counted(kinds.count("error"), "error"), *others])
        output.print(Text.assemble((f"{answer.schedule}: ", "bold"), (counts, "bold red")))
        return
    thawed, total = answer.thawed_parameters or 0, model.parameters
    output.print(
        Text.assemble((f"{answer.schedule}: ", "bold"), ("ok", "bold green"), *(f", {each}" for each in others))
    )
    output.paragraph(
        f"{counted(answer.phases or 0, 'phase')} for {model.name}: in the end {answer.thawed_tensors:,} of "
        f"{counted(model.tensors, 'tensor')} train, {thawed:,} of {total:,} parameters ({share(thawed, total)}).",
        indent=2,
    )
