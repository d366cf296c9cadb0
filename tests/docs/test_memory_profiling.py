"""The documentation's page on memory profiling: its configuration runs, and its table has every setting."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from fts_examples.profiling import MemProfilerCfg
from tests.docs import pages
from tests.docs.pages import ROOT

PAGE = "docs/memory_profiling.md"


def test_the_configuration_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = pages.blocks(PAGE, "python")[0].text.split("profiler = ")[0]
    names: dict[str, Any] = {}
    exec(program, names)  # the page is ours
    (config,) = pages.blocks(PAGE, "yaml")
    Path("config.yaml").write_text(config.text, encoding="utf-8")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.yaml", "--trainer.logger", "false"])
    cli = LightningCLI(names["Classifier"], run=False, seed_everything_default=1, save_config_callback=None)
    cli.trainer.fit(cli.model, names["loader"](1), names["loader"](2))
    assert "rss_diff_bytes" in Path("memory/memory_fit_rank_0.yaml").read_text(encoding="utf-8")


def test_every_setting_is_in_the_table() -> None:
    table = (ROOT / PAGE).read_text(encoding="utf-8").split("| field of `MemProfilerCfg` |")[1].split("\n\n")[0]
    first = "\n".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first)) == {field.name for field in fields(MemProfilerCfg)}
