"""The tutorial, which is a notebook for readers, run as the script that it is."""

from __future__ import annotations

import json
import logging
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "docs" / "tutorial.py"
PHASES = {"no schedule": 1, "generated": 4, "explicit": 3}


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the tutorial has defined at its end; it ran in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    try:
        names = runpy.run_path(str(SOURCE))
        yield names
        names["plt"].close(names["figure"])
    finally:
        lightning.setLevel(level)


@pytest.mark.slow
def test_what_the_tutorial_says_is_what_happens(names: dict[str, Any], tmp_path: Path) -> None:
    phases, losses, outcomes = names["phases"], names["losses"], names["outcomes"]
    assert {way: len(phases(way)) for way in PHASES} == PHASES
    assert {way: phases(way)[-1][2] for way in PHASES} == dict.fromkeys(PHASES, 1.0)
    for way in PHASES:  # the phases cover the run, one after the other
        epochs = [epoch for first, last, _, _ in phases(way) for epoch in range(first, last + 1)]
        assert epochs == list(losses(way)) == list(range(outcomes[way][1]))
    assert {reason for *_, reason in phases("generated")} == {"early stopping"}
    assert [(first, reason) for first, _, _, reason in phases("explicit")] == [
        (0, "max_transition_epoch"),
        (10, "max_transition_epoch"),
        (25, "early stopping"),
    ]
    assert max(PHASES, key=lambda way: outcomes[way][1]) == "generated"
    assert min(accuracy for accuracy, _, _ in outcomes.values()) > 0.9
    assert resumed_in_the_middle_of_phase_1(names)
    assert [path.name for path in tmp_path.iterdir()] == ["tutorial_runs"]


def resumed_in_the_middle_of_phase_1(names: dict[str, Any]) -> bool:
    before, after = names["losses"]("interrupted", 0), names["losses"]("interrupted", 1)
    assert list(before) == list(range(20))
    assert min(after) == 20
    assert before | after == names["losses"]("explicit")
    resumed, expected = names["final_weights"]["interrupted"], names["final_weights"]["explicit"]
    assert resumed.keys() == expected.keys()
    assert not torch.equal(expected["head.weight"], names["final_weights"]["generated"]["head.weight"])
    return all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_jupytext_makes_a_notebook_of_it(tmp_path: Path) -> None:
    pytest.importorskip("jupytext")  # of the extra `docs`
    notebook = tmp_path / "tutorial.ipynb"
    command = [sys.executable, "-m", "jupytext", "--to", "ipynb", "--output", str(notebook), str(SOURCE)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=100)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert [cell["cell_type"] for cell in cells[:2]] == ["markdown", "code"]
    assert cells[0]["source"][0] == "# Tutorial: fine-tune a small network in phases\n"
    assert not any("%%" in line for cell in cells for line in cell["source"])
