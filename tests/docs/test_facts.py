"""What the README and the shipped JSON Schema say is what the code does."""

import json
import re
from pathlib import Path

import pytest
import torch

import finetuning_scheduler
from finetuning_scheduler.core import json_schema

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PACKAGE = Path(finetuning_scheduler.__file__).parent


def code_blocks(section: str) -> list[str]:
    text = README.read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_plain_pytorch_example_runs_to_the_end_in_under_twenty_lines():
    torch.manual_seed(0)
    (block,) = code_blocks("Plain PyTorch")
    names: dict = {}
    exec(block, names)  # the README is ours
    assert names["runner"].finished
    assert names["runner"].phase == 1
    assert all(parameter.requires_grad for parameter in names["model"].parameters())
    assert len([line for line in block.splitlines() if line.strip()]) < 20


def test_every_constructor_argument_is_on_its_page():
    import inspect

    table = (ROOT / "docs" / "guide" / "arguments.md").read_text(encoding="utf-8")
    arguments = set(inspect.signature(finetuning_scheduler.FinetuningScheduler).parameters)
    assert arguments == set(re.findall(r"`([a-z0-9_]+)`", "\n".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))))


def test_shipped_schema_is_current():
    shipped = PACKAGE / "schedule.schema.json"
    assert json.loads(shipped.read_text(encoding="utf-8")) == json_schema(), "write json_schema() to that file"


def test_the_map_of_the_house_names_what_is_there_and_every_module_of_the_core():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## A map of the house\n")[1].split("\n## ")[0]
    named = {name.rstrip("/") for name in re.findall(r"`([\w/]+(?:\.py|/))`", text)}
    homes = (ROOT, PACKAGE, *(PACKAGE / room for room in ("core", "core/schedule", "strategy_adapters")))
    assert {name for name in named if not any((home / name).exists() for home in homes)} == set()
    core = {path.name for path in (PACKAGE / "core").iterdir() if not path.name.startswith("__")}
    assert {name for name in core if not {name, f"core/{name}"} & named} == set()


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_the_files_that_a_page_of_the_root_links_to_are_there(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []
