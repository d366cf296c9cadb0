"""Sessions with reuse and without: the same transitions and weights, in networks of many kinds, on shuffled data."""

from __future__ import annotations

import pytest

from .models import CASES
from .runs import assert_same, run

pytestmark = pytest.mark.filterwarnings("ignore:`loss_type=None` was set:UserWarning")


@pytest.mark.parametrize("name", CASES)
def test_training_with_reuse_ends_as_without(name: str) -> None:
    plain, reused = run(CASES[name], "off"), run(CASES[name], "all")
    assert_same(reused, plain)
    assert reused.reason is None
    assert reused.hits("train") >= 150  # of 216: all but the first epoch and the batches that are compared
    assert reused.hits("validation") >= 100
