"""Fixtures of the Lightning tests: quiet single-process CPU trainers that write to the test's own directory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def trainer_in(tmp_path: Path) -> Callable[..., Any]:
    """A factory of trainers; keyword arguments go to Lightning's Trainer."""
    from tests.reference.toys import make_trainer

    return partial(make_trainer, tmp_path)
