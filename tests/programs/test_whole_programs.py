"""Programs as somebody in a hurry writes them, each run as a process of its own; see ``scripts``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .processes import outcome_of, run_script

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def in_directory(path: Path) -> Path:
    path.mkdir()
    return path


def test_score_then_fit(tmp_path: Path) -> None:
    scored = outcome_of("score_then_fit.py", directory=in_directory(tmp_path / "scored"))
    unscored = outcome_of("score_then_fit.py", "--no-score", directory=in_directory(tmp_path / "unscored"))
    assert scored["phase"] == unscored["phase"] == 1
    assert scored["after"] < scored["before"]
    assert {name: scored[name] for name in ("after", "weights")} == {
        name: unscored[name] for name in ("after", "weights")
    }


def test_five_folds(tmp_path: Path) -> None:
    together = in_directory(tmp_path / "together")
    alone = in_directory(tmp_path / "alone")
    folds = outcome_of("five_folds.py", "0", "1", "2", "3", "4", directory=together)
    fold = outcome_of("five_folds.py", "3", directory=alone)["3"]
    assert {result["phase"] for result in folds.values()} == {1}
    assert {name: folds["3"][name] for name in ("weights", "score")} == {
        name: fold[name] for name in ("weights", "score")
    }
    for name, result in folds.items():
        assert f"fold-{name}" in result["file"]
    assert folds["3"]["file"].replace(str(together), "") == fold["file"].replace(str(alone), "")


def test_a_learning_rate_finder_and_a_fit(tmp_path: Path) -> None:
    found = outcome_of("learning_rate_finder.py", directory=in_directory(tmp_path / "found"))
    by_hand = outcome_of("learning_rate_finder.py", repr(found["lr"]), directory=in_directory(tmp_path / "by-hand"))
    assert found["lr"] != 0.02
    assert found == by_hand | {"phase": 1}


def test_an_average_of_weights_in_a_killed_and_resumed_run(tmp_path: Path) -> None:
    uninterrupted = outcome_of("ema.py", "run", directory=in_directory(tmp_path / "uninterrupted"))
    directory = in_directory(tmp_path / "killed")
    assert run_script("ema.py", "killed", directory=directory).returncode == 9
    assert (directory / "checkpoints" / "last.ckpt").exists()
    resumed = outcome_of("ema.py", "resume", directory=directory)
    assert resumed == uninterrupted | {"phase": 1}


def test_two_checkpoints_and_a_csv_logger(tmp_path: Path) -> None:
    """A schedule of one phase over everything changes neither a file's name nor a figure in the log."""
    scheduled = outcome_of("two_checkpoints.py", "scheduled", directory=in_directory(tmp_path / "scheduled"))
    plain = outcome_of("two_checkpoints.py", "plain", directory=in_directory(tmp_path / "plain"))
    assert len(plain["files"]) == 5
    assert scheduled == plain


def test_a_notebook_whose_cells_are_run_again(tmp_path: Path) -> None:
    outcome = outcome_of("notebook.py", directory=tmp_path)
    first = outcome["first"]
    assert first["phases"] == [0, 0, 0, 1, 1]
    assert outcome["the cell again, on the same model"]["phases"] == [0, 0, 0, 1, 1]
    assert outcome["the cell again, on the same model"]["weights"] != first["weights"]
    assert outcome["all cells again"] == first
    assert outcome["a little longer"]["phases"] == [1, 1]
    assert outcome["interrupted before its end"]["phases"] == [0, 0]
    assert outcome["all cells once more"] == first
