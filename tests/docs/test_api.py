"""The API reference names everything that is public, each once, by a name that can be imported."""

from __future__ import annotations

import importlib
import re
from collections import Counter

import pytest

import finetuning_scheduler
from finetuning_scheduler import core, fts_supporters, strategy_adapters, types
from tests.docs.pages import DOCS

pytestmark = pytest.mark.quick


def documented() -> list[object]:
    """What the reference's directives make pages of."""
    found: list[object] = []
    for path in sorted((DOCS / "api").glob("*.md")):
        text, module = path.read_text(encoding="utf-8"), ""
        for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)$", text, flags=re.MULTILINE):
            if kind in ("currentmodule", "automodule", "module"):
                module = name
            elif kind.startswith("auto"):
                home, _, attribute = (name if "." in name else f"{module}.{name}").rpartition(".")
                found.append(getattr(importlib.import_module(home), attribute))
        for names in re.findall(r"automodule:: finetuning_scheduler\.errors\n   :members:((?:[^:])+)\n", text):
            found += [getattr(finetuning_scheduler.errors, name) for name in re.findall(r"\w+", names)]
    return found


@pytest.mark.parametrize("module", [finetuning_scheduler, core, fts_supporters, strategy_adapters, types])
def test_every_public_name_is_in_the_reference(module: object) -> None:
    there = {id(each) for each in documented()}
    assert [name for name in module.__all__ if id(getattr(module, name)) not in there] == []  # type: ignore[attr-defined]


def test_every_error_is_in_the_reference() -> None:
    errors = finetuning_scheduler.errors
    public = {name for name, each in vars(errors).items() if getattr(each, "__module__", "") == errors.__name__}
    there = {id(each) for each in documented()}
    assert {name for name in public if not name.startswith("_") and id(getattr(errors, name)) not in there} == set()


def test_nothing_is_in_the_reference_twice() -> None:
    assert [each for each, count in Counter(map(repr, documented())).items() if count > 1] == []
