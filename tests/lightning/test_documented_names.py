"""What programs for the 2.x package of this name read, call and pass: schedule, depth, paths, scalars."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.reference.history import assert_same_run
from tests.reference.networks import FIRST, HEAD, SECOND, THIRD
from tests.reference.recipe import schedule_of, simple_recipe
from tests.reference.toys import Session, ToyOverAll, make_trainer

IMPORTS = [
    ("finetuning_scheduler", "FinetuningScheduler FTSEarlyStopping FTSCheckpoint Schedule Phase ScheduleImplMixin"),
    ("finetuning_scheduler.fts", "FinetuningScheduler"),
    ("finetuning_scheduler.fts_supporters", "FTSEarlyStopping FTSCheckpoint ScheduleImplMixin"),
    (
        "finetuning_scheduler.strategy_adapters",
        "StrategyAdapter FSDPStrategyAdapter ModelParallelStrategyAdapter",
    ),
    ("finetuning_scheduler.types", "ScheduleSource Heuristic FrozenModulesMode Mode Report"),
]


@pytest.mark.parametrize(("module", "names"), IMPORTS)
def test_documented_imports(module: str, names: str) -> None:
    imported = importlib.import_module(module)
    assert [name for name in names.split() if not hasattr(imported, name)] == []


class Reads(Callback):
    """Reads the schedule while a fit runs, as users do."""

    def __init__(self) -> None:
        self.read: list[tuple[int, list[str], int]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        scheduler: Any = trainer.callbacks[0]  # type: ignore[attr-defined]
        phase = scheduler.ft_schedule[scheduler.curr_depth]
        assert scheduler.curr_depth in scheduler.ft_schedule
        self.read.append((scheduler.curr_depth, phase["params"], phase["max_transition_epoch"]))


def test_the_schedule_is_read_as_a_mapping_during_a_fit_and_after_it(tmp_path: Path) -> None:
    reads = Reads()
    schedule = Session(simple_recipe(), tmp_path, extra_callbacks=(reads,)).fit().scheduler.ft_schedule
    given = schedule_of(simple_recipe())
    expected = [(0, [*HEAD], 2)] * 2 + [(1, [*THIRD], 4)] * 2 + [(2, [*SECOND], -1)] * 2
    assert reads.read == expected
    assert isinstance(schedule, Mapping)
    assert [*schedule] == [*schedule.keys()] == [0, 1, 2]
    assert {number: set(phase["params"]) for number, phase in schedule.items()} == {
        number: set(phase["params"]) for number, phase in given.items()
    }
    assert [phase.get("lr") for phase in schedule.values()] == [None, 0.05, 0.02]


def test_what_was_read_runs_again_and_trains_the_same(tmp_path: Path) -> None:
    first = Session(simple_recipe(), tmp_path / "first").fit()
    for name, given in {
        "schedule": first.scheduler.ft_schedule,
        "phases": dict(first.scheduler.ft_schedule),
        "plain": {str(number): dict(phase) for number, phase in first.scheduler.ft_schedule.items()},
        "file": first.scheduler.save_schedule(tmp_path / "saved.yaml"),
        "loaded": first.scheduler.load_yaml_schedule(tmp_path / "saved.yaml"),
    }.items():
        again = Session(simple_recipe(), tmp_path / name, scheduler_options={"ft_schedule": given}).fit()
        assert_same_run(again.history, first.history)
        assert again.scheduler.ft_schedule == first.scheduler.ft_schedule


def test_a_generated_schedule_is_saved_once_a_fit_has_begun(tmp_path: Path) -> None:
    session = Session(simple_recipe(), tmp_path, explicit=False)
    with pytest.raises(ValueError, match="expected a schedule to save, got none"):
        session.scheduler.save_schedule(tmp_path / "mine.yaml")
    session.fit()
    saved = session.scheduler.load_yaml_schedule(session.scheduler.save_schedule(tmp_path / "mine.yaml"))
    assert [phase["params"] for phase in saved.values()] == [[*pair] for pair in (HEAD, THIRD, SECOND, FIRST)]


class FreezesAndThaws(Callback):
    """Freezes the whole module at the start of an epoch, and thaws it to the present depth."""

    def __init__(self, *depth: int | None) -> None:
        self.depth = depth
        self.thawed: list[set[str]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in pl_module.parameters():
            parameter.requires_grad = False
        trainer.callbacks[0].thaw_to_depth(*self.depth)  # type: ignore[attr-defined]
        self.thawed.append({name for name, parameter in pl_module.named_parameters() if parameter.requires_grad})


@pytest.mark.parametrize("depth", [(), (None,)], ids=["no argument", "none"])
def test_thawing_without_a_depth_means_the_present_one(depth: tuple[None, ...], tmp_path: Path) -> None:
    thaws = FreezesAndThaws(*depth)
    session = Session(simple_recipe(), tmp_path / "by hand", extra_callbacks=(thaws,)).fit()
    phases = [{*HEAD}, {*HEAD, *THIRD}, {*HEAD, *THIRD, *SECOND}]
    assert thaws.thawed == [phase for phase in phases for _ in range(2)]
    plain = Session(simple_recipe(), tmp_path / "plain").fit()
    assert_same_run(session.history, plain.history)


ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "depth": ({"max_depth": np.int64(1)}, {"max_depth": 1}),
    "no depth": ({"max_depth": None}, {"max_depth": -1}),
    "learning rate": ({"base_max_lr": np.float32(0.125)}, {"base_max_lr": 0.125}),
    "switch": ({"restore_best": np.bool_(False)}, {"restore_best": False}),
    "switch of the callback": ({"allow_untested": np.bool_(True)}, {"allow_untested": True}),
    "level": ({"logging_level": np.int64(logging.INFO)}, {"logging_level": logging.INFO}),
    "level by name": ({"logging_level": "info"}, {"logging_level": logging.INFO}),
    "no level": ({"logging_level": None}, {"logging_level": logging.INFO}),
}


@pytest.mark.parametrize(("given", "plain"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_scalars_of_other_kinds_are_taken_for_what_they_mean(
    given: dict[str, Any], plain: dict[str, Any], tmp_path: Path
) -> None:
    def train(name: str, options: dict[str, Any]) -> Session:
        return Session(simple_recipe(epochs=3), tmp_path / name, ToyOverAll, scheduler_options=options, explicit=False)

    found, expected = train("given", given).fit(), train("plain", plain).fit()
    assert found.scheduler.max_depth == expected.scheduler.max_depth
    assert logging.getLogger("finetuning_scheduler").level == logging.INFO
    assert [epoch.lrs for epoch in found.history.epochs] == [epoch.lrs for epoch in expected.history.epochs]


@pytest.mark.parametrize("level", ["loud", True, 1.5, []])
def test_a_level_that_is_none_is_refused(level: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="expected `logging_level` to be a level of logging, got"):
        Session(simple_recipe(), tmp_path, scheduler_options={"logging_level": level}).fit()


def test_the_callback_is_what_documented_mixins_are() -> None:
    from finetuning_scheduler import FinetuningScheduler, ScheduleImplMixin

    scheduler = FinetuningScheduler()
    assert isinstance(scheduler, ScheduleImplMixin)
    assert make_trainer(Path(), callbacks=[scheduler]).callbacks[0] is scheduler  # type: ignore[attr-defined]
