"""``fts new``: a commented schedule to edit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import Problem, ScheduleError
from .models import Init, Model, ModelOutline, read_model
from .output import AsJson, Force, answering, counted, share

if TYPE_CHECKING:
    from .making import PhaseDraft

EXAMPLES = """\
Examples:

\b
  fts new bert-base-uncased/ -o schedule.yaml
  fts new model.safetensors --heuristic blocks
  fts new model.safetensors --phase head --phase 'upper half' --phase rest
  fts new llava/ --phase projector --phase 'last 4 of language' -o llava.yaml

--phase takes head, embeddings, vision, projector, language, upper half,
lower third, upper 25 %, last 4, first 2, any of these "of" another,
rest, or a pattern; several joined by +.

Exit status: 0, 2 if there is no such model, or the file exists already."""

SCHEMA = Path(__file__).parents[1] / "schedule.schema.json"


class HeuristicName(str, Enum):
    """How phases are made."""

    pairs = "pairs"
    blocks = "blocks"
    head_first = "head-first"
    layer_wise = "layer-wise"


Heuristic = Annotated[
    HeuristicName,
    typer.Option(
        "--heuristic",
        help="pairs: two parameters a phase; blocks: a block a phase; head-first: the head, then everything; "
        "layer-wise: the same with learning rates that fall from block to block.",
    ),
]
PhaseTexts = Annotated[
    list[str] | None,
    typer.Option("--phase", metavar="PART", help="Instead of a heuristic: what the next phase thaws; repeat it."),
]
File = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="The file to write; else it is printed.")
]


def new(
    model: Model,
    heuristic: Heuristic = HeuristicName.blocks,
    phase: PhaseTexts = None,
    file: File = None,
    force: Force = False,
    init: Init = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented schedule for MODEL, to be edited."""
    with answering(as_json=as_json) as output:
        if file is not None and file.exists() and not force:
            raise _exists(file)
        outline = read_model(model, init)
        from .making import by_heuristic, by_roles

        drafts = by_roles(outline, phase) if phase else by_heuristic(outline, heuristic.value)
        made_by = "phase by phase" if phase else f"by the heuristic {heuristic.value}"
        text = schedule_file(outline, drafts, made_by, file)
        if file is not None:
            _write(file, text, force=force)
        if as_json:
            from .shapes import NewAnswer, NewPhase

            phases = [
                NewPhase(
                    selectors=list(draft.selectors),
                    tensors=len(draft.names),
                    parameters=outline.sizes_of(draft.names),
                )
                for draft in drafts
            ]
            output.answer(
                NewAnswer(
                    model=outline.summary,
                    heuristic=None if phase else heuristic.value,
                    file=None if file is None else str(file),
                    yaml=text,
                    phases=phases,
                )
            )
        elif file is None:
            output.print(text.rstrip("\n"))
        else:
            output.paragraph(f"{file}: {counted(len(drafts), 'phase')} for {outline.title}, {made_by}.")
            for note in outline.notes:
                output.paragraph(note)


def schedule_file(outline: ModelOutline, drafts: Sequence[PhaseDraft], made_by: str, file: Path | None) -> str:
    """Return the text of a schedule's file: what editors need, what a reader needs, and the phases."""
    return "\n".join([*_head(outline, made_by, file), *_phases(outline, drafts)]) + "\n"


def _head(outline: ModelOutline, made_by: str, file: Path | None) -> Iterator[str]:
    """Yield the comments above the first phase."""
    size = f"{counted(len(outline.parameters), 'tensor')}, {outline.total:,} parameters"
    yield f"# yaml-language-server: $schema={_schema_for(file)}"
    yield "#"
    yield f"# Fine-tuning schedule of {outline.title} ({size}), {made_by}."
    for note in outline.notes:
        yield f"# {note}"
    yield "# Everything is frozen at first; each phase thaws what its `params` select, by full"
    yield "# names or regular expressions. It ends when the monitored metric has stopped"
    yield "# improving, or at a limit; then the best checkpoint is restored, and the next begins."
    yield f"# After editing: fts check {file or 'FILE'} {outline.source}"


def _phases(outline: ModelOutline, drafts: Sequence[PhaseDraft]) -> Iterator[str]:
    from ..core.schedule.yaml_writer import schedule_text

    thawed = 0
    for number, draft in enumerate(drafts):
        size = outline.sizes_of(draft.names)
        thawed += size
        title = f"{draft.title}: " if draft.title else ""
        yield ""
        yield (
            f"# {title}{counted(len(draft.names), 'tensor')}, {size:,} parameters"
            f"; {share(thawed, outline.total)} of the model trains"
        )
        yield schedule_text({number: {"params": list(draft.selectors), **draft.keys}}).rstrip("\n")
        if number < 2:
            yield from _hints(number, last=number == len(drafts) - 1)


def _hints(number: int, *, last: bool) -> Iterator[str]:
    """Yield the keys that a phase can have, as comments to be taken out."""
    what = "the session ends" if last else f"phase {number + 1} begins"
    yield f"  # max_transition_epoch: {3 * (number + 1)}  # {what} at this epoch at the latest"
    if number:
        yield "  # lr: 1.0e-05              # learning rate of what this phase thaws"
        yield "  # lr_warmup_steps: 100     # optimizer steps in which it rises from 0"


def _schema_for(file: Path | None) -> str:
    """Name the JSON Schema for editors: from the file on if both are in the folder at hand, else as an address."""
    here, folder = Path.cwd(), (file or Path("x")).absolute().parent
    if here in SCHEMA.parents and (here == folder or here in folder.parents):
        return Path(os.path.relpath(SCHEMA, folder)).as_posix()
    return SCHEMA.as_uri()


def _write(file: Path, text: str, *, force: bool) -> None:
    from ..core.drafts import draft_of, publish, publish_new

    try:
        with draft_of(file) as draft:
            draft.write(text.encode())
            if force:
                publish(draft, file)
            else:
                publish_new(draft, file)
    except FileExistsError as error:
        raise _exists(file) from error
    except OSError as error:
        message = f"expected a file that can be written, got an error: {error.strerror or error}"
        raise ScheduleError(Problem(message, "name a file in a folder that is there", str(file))) from error


def _exists(file: Path) -> ScheduleError:
    message = "expected a file that is not there yet"
    return ScheduleError(Problem(message, "name another, or replace it with --force", str(file)))
