"""The commands that the documentation's pages on studies show."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

STUDIES = Path(__file__).parents[2] / "docs" / "studies"


def arguments_of(page: str, module: str) -> list[str]:
    """The arguments of the one command of a page, which starts a module of the examples."""
    [block] = re.findall(r"```console\n(.*?)```", (STUDIES / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    [command] = block.replace("\\\n", " ").strip().splitlines()
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", module]
    return words[3:]
