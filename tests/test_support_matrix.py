"""The page of the support matrix is what its table says, and every test that it names is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import matrix

ROOT = Path(__file__).parents[1]
NAMED = sorted({test for one in matrix.cells().values() for test in one.tests})


def test_the_page_is_up_to_date() -> None:
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.render(), "python -m tests.support.matrix writes it"


@pytest.mark.parametrize("status", matrix.Status)
def test_every_cell_has_what_its_status_asks_for(status: matrix.Status) -> None:
    cells = [one for one in matrix.cells().values() if one.status is status]
    assert cells
    assert all(bool(one.tests) is (status is not matrix.Status.ABSENT) for one in cells)
    assert all(bool(one.note) is (status is not matrix.Status.SUPPORTED) for one in cells)


def test_every_footnote_is_used_and_every_exception_is_of_a_cell() -> None:
    cells = matrix.cells()
    assert {one.note for one in cells.values() if one.note} == set(matrix.NOTES)
    assert set(matrix.MESSAGES) == set(matrix.REFUSED.values())
    for table in (matrix.REFUSED, matrix.ABSENT, matrix.ELSEWHERE, matrix.OVERRIDDEN):
        assert table.keys() <= cells.keys()
    assert matrix.OVERRIDDEN.keys() <= matrix.REFUSED.keys()
    assert not matrix.ELSEWHERE.keys() & (matrix.REFUSED.keys() | matrix.ABSENT.keys())


@pytest.mark.parametrize("key", matrix.MESSAGES)
def test_a_footnote_quotes_the_message(key: str) -> None:
    quoted = matrix.NOTES[key].split("*")[1]
    given = matrix.MESSAGES[key]
    assert quoted.startswith("expected ")
    assert any(part.strip(", ") in given for part in quoted.split("...") if len(part) > 20)


def test_the_tests_that_it_names_are_there() -> None:
    """Pytest collects each; one that is named without its parameters stands for all of them."""
    files = sorted({test.split("::")[0] for test in NAMED})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    collected = set(output.splitlines())
    collected |= {line.split("[")[0] for line in collected}
    assert [test for test in NAMED if test not in collected] == []
