"""`fts new`: schedules that are right as they are written, and never in the place of a file."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from finetuning_scheduler import Schedule
from finetuning_scheduler.cli.shapes import SHAPES
from finetuning_scheduler.core import json_schema
from tests.cli.files import fts, safetensors


@pytest.mark.parametrize(
    ("heuristic", "phases", "first", "keys"),
    [
        ("pairs", 39, ["classifier.bias", "classifier.weight"], {}),
        ("blocks", 14, ["bert.pooler.*", "classifier.*"], {}),
        ("head-first", 2, ["classifier.*"], {}),
        ("layer-wise", 2, ["classifier.*"], {"lr_decay": 0.9}),
    ],
)
def test_what_is_written_is_right_for_the_model_and_thaws_all_of_it(
    here: Path, bert: str, heuristic: str, phases: int, first: list[str], keys: dict[str, float]
) -> None:
    answer = fts("new", bert, "--heuristic", heuristic, "-o", "schedule.yaml")
    assert answer.status == 0
    schedule = Schedule.parse(here / "schedule.yaml").to_dict()
    assert len(schedule) == phases
    assert schedule[0] == {"params": first}
    assert {key: schedule[1].get(key) for key in keys} == keys
    checked = json.loads(fts("check", "schedule.yaml", bert, "--json").out)
    assert (checked["ok"], checked["thawed_tensors"], checked["findings"]) == (True, 77, [])


def test_blocks_below_ten_are_told_from_those_above(here: Path, bert: str) -> None:
    fts("new", bert, "-o", "schedule.yaml")
    schedule = Schedule.parse(here / "schedule.yaml")
    assert schedule[1].params == ("bert.encoder.layer.11.*",)
    assert schedule[11].params == (r"bert.encoder.layer.1\..*",)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["head", "upper half", "rest"], [2, 36, 39]),
        (["head", "last 4", "lower 25 %", "rest"], [2, 24, 18, 33]),
        (["head + embeddings", "last 1"], [3, 6]),
        (["classifier.bias", "upper third", "rest"], [1, 24, 52]),
        (["head", ".*bias"], [2, 37]),
    ],
)
def test_phases_can_be_named_by_their_part(bert: str, parts: list[str], expected: list[int]) -> None:
    given = [argument for part in parts for argument in ("--phase", part)]
    answer = fts("new", bert, *given, "--json")
    SHAPES["new"].model_validate_json(answer.out, strict=True)
    assert [phase["tensors"] for phase in json.loads(answer.out)["phases"]] == expected


def test_towers_have_names_and_halves_of_their_own(here: Path) -> None:
    shapes = {
        **{f"model.vision_tower.blocks.{layer}.mlp.weight": (4, 4) for layer in range(4)},
        **{f"model.language_model.layers.{layer}.mlp.weight": (4, 4) for layer in range(6)},
        "model.multi_modal_projector.linear_1.weight": (4, 4),
        "lm_head.weight": (9, 4),
    }
    model = safetensors(here / "llava.safetensors", shapes).name
    parts = ["projector", "upper half of vision", "last 2 of language", "head", "rest"]
    answer = fts("new", model, *(argument for part in parts for argument in ("--phase", part)), "--json")
    phases = json.loads(answer.out)["phases"]
    assert [phase["selectors"] for phase in phases] == [
        ["model.multi_modal_projector.linear_1.weight"],
        ["model.vision_tower.blocks.[23].mlp.weight"],
        ["model.language_model.layers.[45].mlp.weight"],
        ["lm_head.weight"],
        ["*"],
    ]


@pytest.mark.parametrize(
    ("part", "fix"), [("heod", "Did you mean `head`?"), ("projector", "or a pattern"), ("(", "or a regular expression")]
)
def test_a_part_that_is_not_there_says_what_is(bert: str, part: str, fix: str) -> None:
    answer = fts("new", bert, "--phase", part)
    assert answer.status == 2
    assert answer.out == ""
    assert fix in " ".join(answer.err.split())


def test_a_file_is_replaced_only_if_that_is_asked_for(here: Path, bert: str) -> None:
    (here / "schedule.yaml").write_text("mine", encoding="utf-8")
    answer = fts("new", bert, "-o", "schedule.yaml")
    assert answer.status == 2
    assert "schedule.yaml: expected a file that is not there yet" in answer.err
    assert (here / "schedule.yaml").read_text(encoding="utf-8") == "mine"
    assert fts("new", bert, "-o", "schedule.yaml", "--force").status == 0
    assert len(Schedule.parse(here / "schedule.yaml")) == 14
    assert sorted(path.name for path in here.iterdir()) == ["bert.safetensors", "schedule.yaml"]


def test_a_folder_that_is_not_there_is_said(bert: str) -> None:
    answer = fts("new", bert, "-o", "no/schedule.yaml")
    assert answer.status == 2
    assert "no/schedule.yaml: expected a file that can be written" in answer.err


def test_without_a_file_it_is_printed_as_it_would_be_written(here: Path, bert: str) -> None:
    printed = fts("new", bert).out
    (here / "schedule.yaml").write_text(printed, encoding="utf-8")
    assert len(Schedule.parse(here / "schedule.yaml")) == 14


def test_editors_find_the_schema_that_the_first_line_names(bert: str) -> None:
    head = fts("new", bert).out.splitlines()[0]
    assert head.startswith("# yaml-language-server: $schema=file://")
    path = Path(unquote(urlsplit(head.partition("$schema=")[2]).path))
    assert json.loads(path.read_text(encoding="utf-8")) == json_schema()
