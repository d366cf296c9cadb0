"""The page of the command line shows what its commands print; the reference has every key of their answers."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import torch
import transformers
from pydantic import BaseModel

from finetuning_scheduler.cli import shapes
from finetuning_scheduler.report import shapes as planned
from tests.cli.files import fts, safetensors, written
from tests.docs import pages

PAGE, REFERENCE = "docs/guide/command_line.md", "docs/api/command_line.md"


@pytest.fixture
def bert_base(here: Path) -> Path:
    """The page's folder: the header of a BERT with its two classes."""
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig())
    shapes = {name: tuple(parameter.shape) for name, parameter in sorted(model.named_parameters())}
    return safetensors(here / "bert.safetensors", shapes).parent


def test_the_page_shows_what_its_commands_print(bert_base: Path) -> None:
    blocks = pages.blocks(PAGE)
    (mistaken,) = (block for block in blocks if block.language == "yaml" and "three" in block.text)
    written(bert_base / "mistaken.yaml", mistaken.text)
    shown = 0
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "console":
            continue
        (command,) = pages.commands_of(block.text)
        answer = fts(*shlex.split(command)[1:])
        assert answer.err == ""
        if after is not None and after.language in ("text", "json"):
            assert answer.out == after.text
            shown += 1
    assert shown == 7


def test_the_page_shows_the_schedule_that_its_command_writes(bert_base: Path) -> None:
    fts("new", "bert.safetensors", "--phase", "head", "--phase", "last 4", "--phase", "rest", "-o", "schedule.yaml")
    block = next(block for block in pages.blocks(PAGE, "yaml") if "last 4" in block.text)
    assert (bert_base / "schedule.yaml").read_text(encoding="utf-8").endswith(f"\n\n{block.text}")


def test_the_reference_has_every_key_of_every_answer() -> None:
    text = (pages.ROOT / REFERENCE).read_text(encoding="utf-8")
    assert text.endswith(reference())


def reference() -> str:
    """The tables of the reference, as the models have them."""
    found = [each for module in (shapes, planned) for each in vars(module).values()]
    models = [each for each in found if isinstance(each, type) and issubclass(each, BaseModel)]
    named = {each.__name__: each for each in models if each not in (BaseModel, shapes.Shape)}
    return "\n".join(table(shape) for name, shape in named.items() if not name.startswith("_"))


def table(shape: type[BaseModel]) -> str:
    rows = [
        f"| `{name}` | {kind(field.annotation)} | {field.description or ''} |".replace("  |", " |")
        for name, field in shape.model_fields.items()
    ]
    return "\n".join(
        [f"## {shape.__name__}", "", f"{shape.__doc__}", "", "| key | type | what |", "|---|---|---|", *rows, ""]
    )


def kind(annotation: object) -> str:
    """An annotation in the words of JSON."""
    words = {str: "string", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    if annotation in words:
        return words[annotation]  # type: ignore[index]  # one of them
    if annotation is Any:
        return "any value"
    inner = get_args(annotation)
    if get_origin(annotation) in (UnionType, Union):
        return " or ".join(kind(each) for each in inner)
    if get_origin(annotation) is dict:
        return "object"
    if get_origin(annotation) is list:
        return f"list of {kind(inner[0])}"
    if inner:
        return " or ".join(f"`{each}`" for each in inner)
    return (
        f"[{annotation.__name__}](#{annotation.__name__.lower()})" if isinstance(annotation, type) else str(annotation)
    )
