"""The numbers behind the documentation's pictures of learning rates are those of runs made today."""

from __future__ import annotations

import runpy
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
PICTURED = SimpleNamespace(**runpy.run_path(str(PICTURES / "learning_rates.py")))


@pytest.mark.parametrize("picture", PICTURED.PANELS)
def test_a_picture_shows_what_its_runs_do_today(picture: str, tmp_path: Path) -> None:
    drawn = [rate for rate in PICTURED.read() if rate.picture == picture]
    for panel, arguments in PICTURED.PANELS[picture].items():
        lines = [rate for rate in drawn if rate.panel == panel]
        expected = [[rate.rate for rate in epoch] for _, epoch in groupby(lines, key=lambda rate: rate.epoch)]
        measured = PICTURED.rates_of(arguments, str(tmp_path))
        assert [len(rates) for rates in measured] == [len(rates) for rates in expected]
        for rates, shown in zip(measured, expected, strict=True):
            assert rates == pytest.approx(shown, rel=1e-5)
    assert {rate.panel for rate in drawn} == set(PICTURED.PANELS[picture])
    assert (PICTURES / f"{picture}.png").exists()
