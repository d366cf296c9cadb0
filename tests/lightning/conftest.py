"""Fixtures of the Lightning tests: quiet single-process CPU trainers that write to the test's own directory."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lightning's data fetchers use a name that this torch deprecates."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"))


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the package has said so far through its logger, from INFO upwards."""
    caplog.set_level(logging.INFO, logger="finetuning_scheduler")
    name = "finetuning_scheduler"
    return lambda: [record.getMessage() for record in caplog.records if record.name.split(".")[0] == name]


@pytest.fixture
def trainer_in(tmp_path: Path) -> Callable[..., Any]:
    """A factory of trainers; keyword arguments go to Lightning's Trainer."""
    from toys import make_trainer

    return partial(make_trainer, tmp_path)
