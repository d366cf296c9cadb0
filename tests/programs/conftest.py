"""What the package says while a program runs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

LOGGER = "finetuning_scheduler"


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[str]]:
    """What the package's logger has said so far at one level."""
    caplog.set_level(logging.INFO, logger=LOGGER)

    def said(level: int) -> list[str]:
        records = [record for record in caplog.records if record.name.split(".")[0] == LOGGER]
        return [record.getMessage() for record in records if record.levelno == level]

    return said
