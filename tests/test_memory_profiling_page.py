"""The documentation's page on memory profiling: its blocks run as they stand, and its figures come out."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from fts_examples.profiling import MemProfilerCfg

PAGE = (Path(__file__).parent.parent / "docs" / "memory_profiling.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def run(*programs: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for program in programs:
        exec(program, names)  # the page is ours
    return names


def test_the_blocks_run_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(*blocks("python"))
    printed = [line for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"[01] \d+", line)]
    assert printed == [f"{phase} {size}" for size, phase in re.findall(r"(\d+)(?: bytes)? for phase (\d)", PAGE)]
    assert len(printed) == 2
    assert names["fsdp_cfg"].track_fsdp_mem
    assert {path.name for path in (tmp_path / "phases").iterdir()} == {"memory_fit_rank_0.yaml"}


def test_the_configuration_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = blocks("python")[0].split("profiler = ")[0]
    names = run(program)
    (config,) = blocks("yaml")
    Path("config.yaml").write_text(config, encoding="utf-8")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.yaml", "--trainer.logger", "false"])
    cli = LightningCLI(names["Classifier"], run=False, seed_everything_default=1, save_config_callback=None)
    cli.trainer.fit(cli.model, names["loader"](1), names["loader"](2))
    assert "rss_diff_bytes" in Path("memory/memory_fit_rank_0.yaml").read_text(encoding="utf-8")


def test_every_setting_is_in_the_table() -> None:
    table = PAGE.split("| field of `MemProfilerCfg` |")[1].split("\n\n")[0]
    first = "\n".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first)) == {field.name for field in fields(MemProfilerCfg)}
