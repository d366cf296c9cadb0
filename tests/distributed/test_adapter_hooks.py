"""An adapter's hooks around set-up, its names and its own schedule, on two ranks of DDP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from finetuning_scheduler import ScheduleImplMixin
from finetuning_scheduler.strategy_adapters import DDPStrategyAdapter
from tests.reference import cases, harness
from tests.reference.cases import Classifier
from tests.reference.recipe import adamw


class Documented(DDPStrategyAdapter):
    """Calls parameters by other names, writes a schedule of one phase a block, and notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def on_before_init_fts(self) -> None:
        self.noted.append("before")

    def get_named_params_for_schedule_validation(self) -> Mapping[str, nn.Parameter]:
        named = self.pl_module.named_parameters()
        return {name.replace("network.", "tower."): parameter for name, parameter in named}

    def gen_ft_schedule(self, dump_loc: Any) -> Any:
        self.noted.append("generate")
        path = super().gen_ft_schedule(dump_loc)
        head, *others = ScheduleImplMixin.load_yaml_schedule(path).values()
        names = [name for phase in others for name in phase["params"]]
        lines = ["0:", "  max_transition_epoch: 1", "  params:", *(f"  - {name}" for name in head["params"])]
        lines += ["1:", "  max_transition_epoch: 2", "  lr: 0.01", "  params:", *(f"  - {name}" for name in names)]
        Path(path).write_text("\n".join(lines), encoding="utf-8")
        return path

    def validate_ft_sched(self) -> Any:
        self.noted.append("validate")
        return super().validate_ft_sched()

    def on_after_init_fts(self) -> None:
        self.noted.append("after")

    def on_before_fts_fit_start(self) -> None:
        self.noted.append("fit start")


def fit(
    root: Path, ranks: int, schedule: Any, adapters: dict[str, type[Any]] | None
) -> tuple[list[str], list[str], dict[str, Any]]:
    from finetuning_scheduler import FinetuningScheduler

    scheduler = FinetuningScheduler(schedule, custom_strategy_adapters=adapters)
    options = {"max_epochs": 5, "enable_checkpointing": True}
    trainer = cases.make_trainer(root, ranks, cases.ddp(), callbacks=[scheduler], **options)
    module = Classifier(adamw)
    trainer.fit(module)
    noted = getattr(scheduler.strategy_adapter, "noted", [])
    names = [name for phase in scheduler.ft_schedule.values() for name in phase["params"]]
    return noted, names, cases.local_weights(module)


def test_every_rank_hears_the_hooks_and_trains_what_plain_names_would(tmp_path: Path) -> None:
    order = [name for name, _ in reversed(list(Classifier(adamw).named_parameters()))]
    plain = {
        0: {"params": order[:2], "max_transition_epoch": 1},
        1: {"params": order[2:], "max_transition_epoch": 2, "lr": 0.01},
    }
    expected = harness.run_ranks(fit, 2, tmp_path / "plain", 2, plain, None)
    found = harness.run_ranks(fit, 2, tmp_path / "hooks", 2, None, {"ddp": Documented})
    for rank, ((noted, names, weights), (_, _, theirs)) in enumerate(zip(found, expected, strict=True)):
        written = ["generate"] if rank == 0 else []  # on one rank only
        assert noted == ["before", *written, "validate", "after", "fit start"]
        assert names == [name.replace("network.", "tower.") for name in order]
        assert weights.keys() == theirs.keys()
        assert [name for name, weight in theirs.items() if not weight.equal(weights[name])] == []


class Refused(DDPStrategyAdapter):
    def before_restore_model(self) -> None:
        """Never called."""


def refused(root: Path, flag: str) -> str:
    with pytest.raises(MisconfigurationException) as error:
        fit(root, 2, cases.AN_EPOCH_EACH, {flag: Refused})
    return str(error.value)


REFUSALS = {
    "ddp": "expected no `before_restore_model`, which is never called here, got one in Refused",
    "fsdp": "in `custom_strategy_adapters`, got fsdp",
}


@pytest.mark.parametrize(("flag", "message"), REFUSALS.items())
def test_every_rank_refuses(flag: str, message: str, tmp_path: Path) -> None:
    for text in harness.run_ranks(refused, 2, tmp_path, flag):
        assert message in text
