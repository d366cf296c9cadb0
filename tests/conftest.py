"""Settings, marks and fixtures of all tests: one thread a process, no network."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# before any test imports them
pytest.register_assert_rewrite("tests.reference", "tests.programs.toy_programs", "tests.programs.processes")

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

MARK_OF_ROOM = {"core": pytest.mark.quick, "distributed": pytest.mark.distributed}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of some rooms, which are the folders here."""
    tests = Path(__file__).parent
    for item in items:
        if tests in item.path.parents and (mark := MARK_OF_ROOM.get(item.path.relative_to(tests).parts[0])):
            item.add_marker(mark)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the package has said so far through its logger, from INFO upwards."""
    caplog.set_level(logging.INFO, logger="finetuning_scheduler")
    name = "finetuning_scheduler"
    return lambda: [record.getMessage() for record in caplog.records if record.name.split(".")[0] == name]


@pytest.fixture
def from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the best checkpoint read from disk at transitions, as if nothing of it were in memory."""
    from finetuning_scheduler.strategy_adapters import StrategyAdapter

    monkeypatch.setattr(StrategyAdapter, "why_from_disk", lambda self: "a test asks for it")


@pytest.fixture(params=["memory", "disk"])
def restored_from(request: pytest.FixtureRequest) -> str:
    """Where the best checkpoint is restored from: the test runs with both."""
    if request.param == "disk":
        request.getfixturevalue("from_disk")
    source: str = request.param
    return source
