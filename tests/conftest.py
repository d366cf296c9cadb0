"""Settings and fixtures of all tests: one thread a process, no network."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import pytest
import torch

pytest.register_assert_rewrite("tests.reference")  # before any test imports it

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the package has said so far through its logger, from INFO upwards."""
    caplog.set_level(logging.INFO, logger="finetuning_scheduler")
    name = "finetuning_scheduler"
    return lambda: [record.getMessage() for record in caplog.records if record.name.split(".")[0] == name]
