"""What the README shows of runs is what its scripts measure."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.pages import ROOT
from tests.reference import harness


def script(path: str) -> ModuleType:
    """Import a script that is no part of the package."""
    name = Path(path).stem
    specification = importlib.util.spec_from_file_location(name, ROOT / path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def drift() -> list[float]:
    """Measured in one of two processes."""
    failures = script("benchmarks/silent_failures.py")
    try:
        return [failures.drift(failures.by_lightning), failures.drift(failures.by_schedule)]
    finally:
        failures.dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore:.*`sync_dist=True`.* when logging")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_fails_silently_without_a_schedule_does_not_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = script("benchmarks/silent_failures.py")
    measured, _ = harness.run_ranks(drift, 2)
    assert measured[0] > 0.01
    assert measured[1] == 0
    monkeypatch.setattr(failures, "drift_of_two_processes", lambda: measured)
    monkeypatch.setattr(failures, "quiet", lambda: None)  # it changes this process for good
    rows: list[Any] = []
    monkeypatch.setattr(failures.Table, "add_row", lambda table, *row: rows.append(row))
    failures.main()
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| what happens |")[1].split("\n\n")[0]
    shown = [line.strip("| ").split(" | ")[1:] for line in table.splitlines()[2:]]
    assert [[without, with_schedule] for _, without, with_schedule in rows] == shown


def test_the_picture_shows_the_demo_s_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = script("docs/pictures/make_run_picture.py")
    with (picture.HERE / "run.csv").open(encoding="utf-8", newline="") as file:
        drawn = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    with picture.without_advice():
        rows = picture.run(tmp_path, max_epochs=11)
    monkeypatch.setattr(picture, "HERE", tmp_path)
    picture.draw(rows)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert [row["phase"] for row in rows] == [0.0] * 10 + [1.0]
    for row, shown in zip(rows, drawn, strict=False):
        assert {**row, "val_loss": 0, "trainable": pytest.approx(row["trainable"], rel=1e-4)} == {
            **shown,
            "val_loss": 0,
        }
