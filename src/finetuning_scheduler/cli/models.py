"""MODEL, as commands take it: a file, a folder, or code that makes a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..core.schedule.wording import closest, did_you_mean
from ..errors import Problem, ScheduleError
from .outline import ModelOutline, TensorFacts

__all__ = ["Init", "Model", "ModelOutline", "TensorFacts", "read_model"]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A safetensors file, a checkpoint of PyTorch or Lightning, a folder with either (of Hugging Face, too), "
        "or package.module:Class. No weights are read.",
        show_default=False,
    ),
]
Init = Annotated[
    list[str] | None,
    typer.Option("--init", metavar="KEY=VALUE", help="An argument of MODEL's class or function; can be repeated."),
]


def read_model(model: str, init: Sequence[str] | None = None) -> ModelOutline:
    """Outline a model: its names, shapes and types, without its weights.

    Args:
        model: A safetensors file or index, a checkpoint, a folder with one, or ``package.module:Class``.
        init: ``key=value`` for each argument of the class.

    Raises:
        ScheduleError: There is no such model; with what there is, and what to do.
    """
    from .programs import PROGRAM, parsed_arguments, read_hugging_face, read_program
    from .tensor_files import read_file, read_folder

    path = Path(model)
    arguments = parsed_arguments(init or ())
    if not _exists(path) and PROGRAM.fullmatch(model):
        return read_program(model, arguments)
    if arguments:
        raise ScheduleError(Problem("expected --init with package.module:Class only, got it with a file", "remove it"))
    if not _exists(path):
        message = "expected a model: a file, a folder, or package.module:Class, but there is none of that name"
        fix = "check the path; nothing is downloaded, so a model of a hub has to be a folder here"
        raise ScheduleError(Problem(message, did_you_mean(_near(path), fix), model))
    if path.is_file():
        beside = path.suffix in (".safetensors", ".bin", ".json") and (path.parent / "config.json").is_file()
        note = (
            "A config.json lies beside it: transformers may call the parameters otherwise, the folder as MODEL tells."
        )
        return read_file(path).with_notes(note) if beside else read_file(path)
    if not (path / "config.json").is_file():
        return read_folder(path)
    note = "Its config.json makes no model here: transformers is not installed, or does not know it."
    return read_hugging_face(path) or read_folder(path).with_notes(note)


def _near(path: Path) -> list[str]:
    """Names in the same folder that look like one that is not there."""
    if not path.parent.is_dir():
        return []
    return [str(path.with_name(name)) for name in closest(path.name, (each.name for each in path.parent.iterdir()))]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
