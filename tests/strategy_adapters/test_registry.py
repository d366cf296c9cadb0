"""Adapters as an extension point: named by path or entry point, configured, and refused where they cannot serve."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.reference.recipe import simple_recipe
from tests.reference.toys import Session

pytestmark = pytest.mark.quick

THIRD_PARTY = '''
from finetuning_scheduler.strategy_adapters import StrategyAdapter


class Counting(StrategyAdapter):
    """Counts the thaws."""

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.thaws = start

    def on_phase_thawed(self) -> None:
        self.thaws += 1


class NoAdapter:
    """Something else."""


class Leaving(StrategyAdapter):
    """Leaves the program."""

    def __init__(self) -> None:
        raise SystemExit(3)
'''
ENTRY_POINTS = "[finetuning_scheduler.strategy_adapters]\ncounting = third_party_adapters:Counting\n"


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny package, installed as far as Python can tell."""
    site = tmp_path / "site"
    metadata = site / "third_party_adapters-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "third_party_adapters.py").write_text(THIRD_PARTY, encoding="utf-8")
    (site / "leaves_on_import.py").write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    (site / "breaks_on_import.py").write_text("raise RuntimeError('no device')\n", encoding="utf-8")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-adapters\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "third_party_adapters", raising=False)


def session(tmp_path: Path, **options: Any) -> Session:
    return Session(simple_recipe(), tmp_path, scheduler_options=options)


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize(
    "name",
    ["counting", "third_party_adapters:Counting", "third_party_adapters.Counting"],
    ids=["entry", "colon", "dot"],
)
@pytest.mark.parametrize("flag", ["single_device", "SingleDeviceStrategy"])
def test_a_third_party_adapter_is_used_and_configured(name: str, flag: str, tmp_path: Path) -> None:
    options = {"custom_strategy_adapters": {flag: name}, "strategy_adapter_cfg": {"start": 10}}
    fitted = session(tmp_path, **options).fit()
    assert type(fitted.scheduler.strategy_adapter).__name__ == "Counting"
    assert fitted.scheduler.strategy_adapter.thaws == 13  # three phases


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"custom_strategy_adapters": {"single_device": "nowhere"}}, "'nowhere' cannot be imported"),
        ({"custom_strategy_adapters": {"single_device": "nowhere.at:All"}}, "'nowhere.at:All' cannot be imported"),
        (
            {"custom_strategy_adapters": {"single_device": "third_party_adapters:NoAdapter"}},
            "expected a subclass of StrategyAdapter, got 'third_party_adapters:NoAdapter'",
        ),
        (
            {"custom_strategy_adapters": {"single_device": "leaves_on_import:Adapter"}},
            r"'leaves_on_import:Adapter' cannot be imported \(it calls sys.exit\(3\)\)",
        ),
        (
            {"custom_strategy_adapters": {"single_device": "breaks_on_import:Adapter"}},
            r"'breaks_on_import:Adapter' cannot be imported \(no device\)",
        ),
        (
            {"custom_strategy_adapters": {"single_device": "third_party_adapters:Leaving"}},
            "Leaving does not take `strategy_adapter_cfg`",
        ),
        ({"strategy_adapter_cfg": {"wheels": 4}}, "does not take `strategy_adapter_cfg`"),
    ],
)
def test_an_adapter_that_cannot_be_made_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        session(tmp_path, **options).fit()


def test_deepspeed_is_refused_with_the_reason() -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    from finetuning_scheduler.strategy_adapters import untested_strategy

    reason = untested_strategy(DeepSpeedStrategy.__new__(DeepSpeedStrategy))
    assert reason is not None
    assert "thawed later never train" in reason
    assert "keep drifting under AdamW" in reason


class SingleDeviceXLAStrategy(SingleDeviceStrategy):
    """Known to Lightning by this name only where XLA is installed; no schedule has been tested under it."""


def test_an_untested_strategy_is_refused_unless_it_is_allowed(
    tmp_path: Path, messages: Callable[[], list[str]]
) -> None:
    reason = "SingleDeviceXLAStrategy has not been tested with schedules"
    options: dict[str, Any] = {"strategy": SingleDeviceXLAStrategy("cpu")}
    with pytest.raises(MisconfigurationException) as error:
        Session(simple_recipe(), tmp_path / "refused", **options).fit()
    assert str(error.value) == f"{reason}. Fix: Set `allow_untested=True` to try it."
    options = {"strategy": SingleDeviceXLAStrategy("cpu"), "scheduler_options": {"allow_untested": True}}
    allowed = Session(simple_recipe(), tmp_path / "allowed", **options).fit()
    assert allowed.scheduler.curr_depth == 2
    assert f"{reason}; going on since `allow_untested` is set." in messages()
