"""The installed command: large files, pipes, help, versions, errors of usage, what is shipped."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

import finetuning_scheduler
from finetuning_scheduler.cli.app import app
from finetuning_scheduler.cli.shapes import SCHEMAS, SHAPES, schema_text
from tests.cli.files import Answer, bert_shapes, fts, installed, safetensors, written

COMMANDS = ("check", "diff", "lr", "merge", "new", "params", "plan")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
MOST_SECONDS = 5.0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a header of 40,000 tensors, and schedules for it."""
    folder = tmp_path_factory.mktemp("large")
    names = [f"model.layers.{i}.mlp.experts.{j}.{w}.weight" for i in range(100) for j in range(100) for w in "abcd"]
    safetensors(folder / "large.safetensors", dict.fromkeys(names, (64, 64)))
    written(folder / "a.yaml", "0: {params: ['model.layers.99.*']}\n1: {params: ['*']}\n")
    written(folder / "b.yaml", "0: {params: ['model.layers.9[89].*']}\n1: {params: ['*']}\n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["new", "large.safetensors"], 0, "# block model.layers.99: 400 tensors"),
        (["new", "large.safetensors", "--phase", "upper half", "--phase", "rest"], 0, "20,000 tensors"),
        (["check", "a.yaml", "large.safetensors"], 0, "40,000 of 40,000 tensors train"),
        (["params", "large.safetensors", "model.layers.7.*"], 0, "selects 4,400 of 40,000 tensors"),
        (["params", "large.safetensors", "--json"], 0, '"tensors": 40000'),
        (["diff", "a.yaml", "b.yaml", "large.safetensors"], 1, "phase 1 -> phase 0  400 tensors"),
        (["plan", "a.yaml", "large.safetensors"], 0, "large: 163,840,000 parameters, 2 phases"),
        (["lr", "a.yaml", "large.safetensors", "--epochs", "3"], 0, "1 1 1 0.001 1e-05"),
    ],
)
def test_forty_thousand_tensors_take_seconds(large: Path, arguments: list[str], status: int, said: str) -> None:
    answer = installed(*arguments, cwd=large)
    assert answer.status == status, answer.err
    assert said in re.sub(r"\s+", " ", answer.out) or said in answer.out
    assert answer.seconds < MOST_SECONDS


def test_a_hugging_face_folder_goes_through_all_commands(here: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **small)).save_pretrained("bert")
    made = installed("new", "bert", "-o", "schedule.yaml", cwd=here)
    assert (made.status, made.err) == (0, "")
    assert made.seconds < MOST_SECONDS
    checked = installed("check", "schedule.yaml", "bert", cwd=here)
    assert checked.status == 0
    assert "5 phases for BertForSequenceClassification: in the end 57 of 57 tensors train" in checked.out


def answers(folder: Path) -> list[Answer]:
    safetensors(folder / "bert.safetensors", bert_shapes(width=768))
    written(folder / "bad.yaml", "0:\n  params: [clasifier.weight]\n  lr: x\n  colour: red\n1: {params: ['bert.*']}\n")
    written(folder / "good.yaml", "0:\n  params: ['classifier.*']\n1: {params: ['bert.*']}\n")
    return [
        fts(*arguments)
        for arguments in (
            ["new", "bert.safetensors"],
            ["check", "bad.yaml", "bert.safetensors"],
            ["check", "good.yaml", "bert.safetensors"],
            ["params", "bert.safetensors", "bert.*bias"],
            ["diff", "good.yaml", "good.yaml", "bert.safetensors"],
            ["plan", "good.yaml", "bert.safetensors"],
            ["plan", "bad.yaml", "bert.safetensors"],
            ["lr", "good.yaml", "bert.safetensors", "--epochs", "3"],
            ["params", "nothing"],
            ["--help"],
            *([command, "--help"] for command in COMMANDS),
        )
    ]


def test_what_is_piped_has_no_control_codes_and_fits_eighty_columns(here: Path) -> None:
    for answer in answers(here):
        text = answer.out + answer.err
        assert text
        assert CONTROL.search(text) is None
        wide = [line for line in text.splitlines() if len(line) > 80 and not line.startswith("#")]
        assert wide == []


def test_a_terminal_gets_colours_and_names_with_brackets_stay_as_they_are(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors(here / "bert.safetensors", bert_shapes())
    monkeypatch.setenv("FORCE_COLOR", "1")
    answer = fts("params", "bert.safetensors", "bert.encoder.layer.[89].*")
    assert "\x1b[1;32m" in answer.out
    assert "bert.encoder.layer.[89].*" in re.sub(r"\x1b\[[\d;]*m", "", answer.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_statuses(command: str) -> None:
    answer = fts(command, "--help")
    assert answer.status == 0
    assert re.search(rf"Examples:\n\n    fts {command} ", answer.out)
    assert "Exit status: 0" in answer.out
    assert "--json" in answer.out


def test_every_command_is_listed() -> None:
    listed = re.findall(r"^  (\w+)  ", fts("--help").out.partition("Commands:")[2], re.MULTILINE)
    assert {*COMMANDS} <= {*listed}


def test_the_version_is_the_package_s() -> None:
    assert fts("--version").out == f"finetuning-scheduler {finetuning_scheduler.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["check"], ["new", "x", "--heuristic", "best"], ["params", "x", "--depth", "0"]]
)
def test_wrong_usage_is_status_2_and_says_so_in_short(arguments: Sequence[str]) -> None:
    answer = fts(*arguments)
    assert (answer.status, answer.out) == (2, "")
    assert "Usage: fts" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    environment = {
        "bash": {"COMP_WORDS": "fts pa", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "fts pa"},
        "fish": {"_TYPER_COMPLETE_ARGS": "fts pa", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    result = CliRunner().invoke(app, [], prog_name="fts", env={"_FTS_COMPLETE": f"complete_{shell}", **environment})
    assert "params" in result.output


def test_the_module_is_the_command(here: Path) -> None:
    answer = installed("--version", cwd=here)
    assert answer.out.startswith("finetuning-scheduler ")
    assert answer.seconds < MOST_SECONDS / 2


@pytest.mark.parametrize("command", list(SHAPES))
def test_the_schemas_that_are_shipped_are_those_of_the_answers(command: str) -> None:
    shipped = resources.files("finetuning_scheduler") / "cli" / "schemas" / f"{command}.schema.json"
    assert shipped.read_text(encoding="utf-8") == schema_text(command)
    assert {path.name for path in SCHEMAS.iterdir()} == {f"{command}.schema.json" for command in SHAPES}


def test_failures_are_json_too(here: Path) -> None:
    answer = fts("check", "none.yaml", "none.safetensors", "--json")
    assert answer.status == 2
    SHAPES["failure"].model_validate_json(answer.out, strict=True)
    assert json.loads(answer.out)["problems"][0]["file"] == "none.yaml"
    assert "error: none.yaml" in answer.err
