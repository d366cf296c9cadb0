"""``lightning`` and ``pytorch_lightning`` in one program: it works, or one error says what is mixed; by process."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from .processes import outcome_of

if TYPE_CHECKING:
    from pathlib import Path

MIXTURES: dict[str, tuple[str, ...]] = {
    "lightning-was-first": ("lightning.pytorch", "finetuning_scheduler", "--", "pytorch_lightning"),
    "pytorch-lightning-was-first": ("pytorch_lightning", "finetuning_scheduler", "--", "lightning.pytorch"),
    "the-scheduler-was-first": ("finetuning_scheduler", "--", "pytorch_lightning"),
    "both-and-untested-allowed": ("lightning.pytorch", "--", "pytorch_lightning", "allow_untested"),
    "only-a-callback-is-of-the-other": ("lightning.pytorch", "--", "lightning.pytorch", "pytorch_lightning"),
}


@pytest.mark.slow
@pytest.mark.parametrize("words", MIXTURES.values(), ids=MIXTURES)
def test_two_lightning_packages_work_together_or_are_named_in_one_error(words: tuple[str, ...], tmp_path: Path) -> None:
    outcome = outcome_of("two_packages.py", *words, directory=tmp_path)
    error = outcome.get("error")
    if error is None:
        assert outcome["phase"] == 1
        assert outcome["epochs"] == 3
        return
    assert outcome["batches"] == 0
    assert "pytorch_lightning" in error
    assert re.search(r"\blightning(\.pytorch)?\b", error)
    assert re.search(r"\bimport\b", error)
    assert "allow_untested" not in error
    assert "problems found" not in error
