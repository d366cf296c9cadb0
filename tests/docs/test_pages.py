"""Every code block and every command of the README and the documentation is executed, or marked with a reason."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from finetuning_scheduler import Schedule
from tests.docs import pages, running
from tests.docs.checks import CHECKS, GIVEN
from tests.docs.commands import COMMANDS, Step
from tests.docs.pages import ROOT, Block

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = [pages.name_of(path) for path in pages.paths()]
LANGUAGES = {"console", "json", "python", "text", "toml", "yaml"}
MOST_NOT_RUN = 12


def here(page: str, language: str) -> list[Block]:
    """The blocks of a language that are executed by the tests of this file."""
    return [block for block in pages.blocks(page, language) if block.not_run is None and block.run_by is None]


def with_blocks(*languages: str) -> list[str]:
    return [page for page in PAGES if any(here(page, language) for language in languages)]


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")  # of a default checkpoint
@pytest.mark.parametrize("page", with_blocks("python"))
def test_the_python_of_a_page_runs_and_says_what_the_page_says(page: str, tmp_path: Path) -> None:
    def check(block: Block, names: Mapping[str, Any]) -> None:
        assert running.missing(running.shown(block), names["said"]) == [], f"{block} said {names['said']}"
        if (block.page, block.heading) in CHECKS:
            unchecked[block.page, block.heading].pop(0)(names)

    unchecked = {place: list(checks) for place, checks in CHECKS.items() if place[0] == page}
    with running.somewhere_quiet(tmp_path):
        running.run(here(page, "python"), GIVEN.get(page, {}), check)
    assert not any(unchecked.values()), f"no such blocks: {unchecked}"


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_the_yaml_of_a_page_is_read_and_schedules_are_schedules(page: str, tmp_path: Path) -> None:
    for block in here(page, "yaml"):
        content = YAML(typ="safe", pure=True).load(block.text)
        if is_schedule(content):
            (tmp_path / "schedule.yaml").write_text(block.text, encoding="utf-8")
            # A block that shows later phases only has some before it.
            whole = {phase: {"params": [f"phase.{phase}"]} for phase in range(min(content))} | content
            assert len(Schedule.parse(whole if min(content) else tmp_path / "schedule.yaml").phases) == len(whole)


def is_schedule(content: object) -> bool:
    return isinstance(content, dict) and all(
        isinstance(phase, int) and isinstance(keys, dict) and "params" in keys for phase, keys in content.items()
    )


@pytest.mark.parametrize("page", with_blocks("json", "toml"))
def test_the_json_and_toml_of_a_page_is_read(page: str) -> None:
    for block in here(page, "json"):
        json.loads(block.text)
    for block in here(page, "toml"):
        tomllib.loads(block.text)


def test_no_block_is_in_a_language_that_no_test_knows() -> None:
    found = [block for page in PAGES for block in pages.blocks(page) if not block.language.startswith("{")]
    assert [str(block) for block in found if block.language not in LANGUAGES] == []
    directives = [block for page in PAGES for block in pages.blocks(page) if block.language.startswith("{code")]
    assert [str(block) for block in directives if block.language != pages.EXECUTED_WHEN_BUILT] == []


def test_what_is_not_run_has_a_reason_and_is_little() -> None:
    not_run = [block for page in PAGES for block in pages.blocks(page) if block.not_run is not None]
    assert [str(block) for block in not_run if len((block.not_run or "").split()) < 3] == []
    assert len(not_run) <= MOST_NOT_RUN, [f"{block}: {block.not_run}" for block in not_run]


def test_what_other_tests_run_is_run_by_tests_that_are_there() -> None:
    found = [block for page in PAGES for block in pages.blocks(page) if block.run_by is not None]
    assert [str(block) for block in found if not is_test(block.run_by or "")] == []


# --- commands ---------------------------------------------------------------------------------------------------------

ON_PAGES = sorted({command for page in PAGES for command in pages.commands(page)})


@pytest.mark.parametrize("command", ON_PAGES)
def test_a_command_of_a_page_is_executed(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = COMMANDS.get(command)
    assert row is not None, "expected a row in tests/docs/commands.py"
    if isinstance(row, Step):
        assert row.command in (ROOT / row.file).read_text(encoding="utf-8").splitlines()
    elif isinstance(row, str):
        assert is_test(row)
    else:
        monkeypatch.chdir(tmp_path)
        row()


def test_each_row_is_a_command_of_a_page() -> None:
    assert set(COMMANDS) - set(ON_PAGES) == set()


def is_test(node: str) -> bool:
    """Tell whether there is such a test; to look is quicker than to collect."""
    path, _, name = node.partition("::")
    function = name.partition("[")[0]
    return (ROOT / path).is_file() and any(
        isinstance(each, ast.FunctionDef) and each.name == function.rpartition("::")[2]
        for each in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    )
