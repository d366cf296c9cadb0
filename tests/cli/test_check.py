"""`fts check`: each problem with its place, a caret below it, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetuning_scheduler.cli.shapes import SHAPES
from tests.cli.files import fts, written

GOOD = "0:\n  params: ['classifier.*']\n1:\n  params: ['*']\n"


def test_a_schedule_that_can_be_used_is_summed_up(here: Path, bert: str) -> None:
    answer = fts("check", written(here / "good.yaml", GOOD).name, bert)
    assert answer.status == 0
    assert answer.out.splitlines()[0] == "good.yaml: ok"
    assert "2 phases for bert: in the end 77 of 77 tensors train" in answer.out


@pytest.mark.parametrize(
    ("text", "place", "marked", "message", "fix"),
    [
        (
            "0:\n  params:\n  - clasifier.weight\n",
            "3:5",
            "clasifier.weight",
            "expected to match a parameter",
            "Did you mean `classifier.weight`",
        ),
        (
            "0:\n  params: ['classifier.*', 'bert.poolr.*']\n",
            "2:28",
            "'bert.poolr.*'",
            "expected to match a parameter",
            "Did you mean `bert.pooler.dense",
        ),
        (
            "0:\n  params: [classifier.*]\n  max_transition_epoch: soon  # or so\n",
            "3:3",
            "max_transition_epoch: soon",
            "expected an integer, got 'soon'",
            "Write a whole number",
        ),
        (
            "0:\n  parms: [classifier.*]\n",
            "2:3",
            "parms: [classifier.*]",
            "got `parms`",
            "Did you mean `params`?",
        ),
        ("0:\n  params: [a\n1: {}\n", "3:2", ": {}", "expected valid YAML 1.2", "Correct the YAML"),
        ("0: {params: ['(']}\n", "1:14", "'('", "got an invalid one", "Correct the expression"),
    ],
)
def test_a_problem_has_its_line_and_column_with_carets_below_what_it_is_about(
    here: Path, bert: str, text: str, place: str, marked: str, message: str, fix: str
) -> None:
    answer = fts("check", written(here / "bad.yaml", text).name, bert)
    assert answer.status == 1
    blocks = [block.splitlines() for block in answer.out.split("\n\n")]
    (block,) = (each for each in blocks if each[0].startswith(f"bad.yaml:{place}: error: "))
    assert message in " ".join(line.strip() for line in block)
    source = next(
        position for position, line in enumerate(block) if line.endswith(text.splitlines()[int(place[0]) - 1])
    )
    carets = block[source + 1]
    start = carets.index("^")
    assert block[source][start : len(carets)] == marked
    assert fix in " ".join(line.strip() for line in block)


def test_all_problems_are_found_in_one_go_and_counted(here: Path, bert: str) -> None:
    text = "0:\n  params: [nothing.*]\n  max_transition_step: x\n1:\n  params: ['bert.encoder.layer.1.*']\n"
    answer = fts("check", written(here / "bad.yaml", text).name, bert)
    assert answer.status == 1
    assert answer.out.splitlines()[-1] == "bad.yaml: 2 errors, 1 warning"
    assert r"Write 'bert.encoder.layer.1\..*'" in answer.out


def test_the_answer_for_programs_has_the_same_and_nothing_else(here: Path, bert: str) -> None:
    text = "0:\n  params: [clasifier.weight]\n1:\n  params: ['bert.encoder.layer.1.*']\n"
    answer = fts("check", written(here / "bad.yaml", text).name, bert, "--json")
    assert answer.status == 1
    SHAPES["check"].model_validate_json(answer.out, strict=True)
    error, warning = json.loads(answer.out)["findings"]
    assert (error["kind"], error["file"], error["line"], error["column"], error["phase"], error["selector"]) == (
        "error",
        "bad.yaml",
        2,
        12,
        0,
        "clasifier.weight",
    )
    assert (warning["kind"], warning["line"], warning["column"]) == ("warning", 4, 13)


def test_classes_that_a_phase_installs_are_tried(here: Path, bert: str) -> None:
    text = GOOD + (
        "  new_optimizer:\n    optimizer_init: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentun: 0.9}}\n"
    )
    answer = fts("check", written(here / "bad.yaml", text).name, bert)
    assert answer.status == 1
    assert "bad.yaml:5:3: error: phase 1:" in answer.out
    assert "momentun" in answer.out


@pytest.mark.parametrize(("schedule", "said"), [("none.yaml", "there is none of that name"), (".", "got a folder")])
def test_a_schedule_that_is_not_there_is_a_mistake_of_usage(bert: str, schedule: str, said: str) -> None:
    answer = fts("check", schedule, bert)
    assert answer.status == 2
    assert answer.out == ""
    assert said in " ".join(answer.err.split())
