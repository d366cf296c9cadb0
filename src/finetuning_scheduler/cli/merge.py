"""``fts merge``: a checkpoint without its frozen weights, made whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Problem, ScheduleError
from .models import Init
from .output import AsJson, Force, answering, foreign_code

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = """\
Examples:

\b
  fts merge runs/best.ckpt my_package.models:Classifier --init num_labels=3
  fts merge runs/best.ckpt runs/first_and_whole.ckpt -o best_whole.ckpt
  fts merge runs/best.ckpt model.safetensors --json

WEIGHTS has to give the parameters the names and the values that they had when
the fit began; each value is compared with what the checkpoint says of it.

Exit status: 0, 2 if the checkpoint is whole already, or the weights differ."""

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT", help="What FTSCheckpoint(save_frozen_weights=False) has written.", show_default=False
    ),
]
Weights = Annotated[
    str,
    typer.Argument(
        metavar="WEIGHTS",
        help="package.module:Class that makes the model as the fit did, or a file with all its weights.",
        show_default=False,
    ),
]
File = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="The file to write; else NAME_whole beside CKPT.")
]


def merge(
    checkpoint: Checkpoint,
    weights: Weights,
    file: File = None,
    force: Force = False,
    init: Init = None,
    as_json: AsJson = False,
) -> None:
    """Make the checkpoint CKPT, which leaves out frozen weights, a whole one that everything loads."""
    with answering(as_json=as_json) as output:
        from .shapes import MergeAnswer

        target = checkpoint.with_name(f"{checkpoint.stem}_whole{checkpoint.suffix}") if file is None else file
        _check(checkpoint, target, force=force)
        from ..core.slim import merge_checkpoint

        source = _source(weights, init)
        try:
            merge_checkpoint(checkpoint, source, target)
        except OSError as error:
            message = f"expected a file that can be written, got an error: {error.strerror or error}"
            raise ScheduleError(Problem(message, "name another with -o", str(target))) from error
        before, after = checkpoint.stat().st_size, target.stat().st_size
        if as_json:
            output.answer(
                MergeAnswer(checkpoint=str(checkpoint), file=str(target), bytes_before=before, bytes_after=after)
            )
        else:
            output.paragraph(f"{target}: whole, {after:,} bytes of {before:,} bytes in {checkpoint}.")


def _check(checkpoint: Path, target: Path, *, force: bool) -> None:
    """Look at the files before a model is made."""
    if not checkpoint.is_file():
        raise ScheduleError(Problem("expected a checkpoint, but there is none", "check the path", str(checkpoint)))
    if target.exists() and not force:
        message = "expected a file that is not there yet"
        raise ScheduleError(Problem(message, "name another with -o, or replace it with --force", str(target)))


def _source(weights: str, init: list[str] | None) -> nn.Module | dict[str, Any]:
    """Return the model with its values, or the values by name."""
    from .programs import PROGRAM, built, parsed_arguments
    from .tensor_files import weights_of

    path = Path(weights)
    if path.is_file():
        return weights_of(path)
    if not PROGRAM.fullmatch(weights):
        message = "expected a file with weights, or package.module:Class, but there is none of that name"
        raise ScheduleError(Problem(message, "check the path", weights))
    with foreign_code():
        return built(weights, parsed_arguments(init or ()), devices=("cpu",))
