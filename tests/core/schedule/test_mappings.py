"""Schedules and phases read like the mappings that stand in a file; schedules to and from files by documented names."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuning_scheduler.core.schedule import Phase, Schedule, ScheduleImplMixin, draft
from finetuning_scheduler.errors import ScheduleError, ScheduleFileError

SGD = {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "fused": None}}}
STEP_LR = {
    "lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
    "init_pg_lrs": [0.5, 0.25],
}
GIVEN: dict[int, dict[str, Any]] = {
    0: {"params": ["head.bias", "head.weight"], "max_transition_epoch": 3},
    1: {"params": ["body"], "lr": 0.125, "new_optimizer": SGD, "new_lr_scheduler": STEP_LR},
}
SCHEDULE = Schedule.parse(GIVEN)
DEFAULTS = {
    "max_transition_epoch": -1,
    "max_transition_step": -1,
    "lr_decay_min_scale": 0.0,
    "lr_warmup_steps": 0,
}


def test_a_schedule_reads_like_a_mapping_of_phases() -> None:
    first, second = SCHEDULE.phases
    assert isinstance(SCHEDULE, Mapping)
    assert [*SCHEDULE] == [*SCHEDULE.keys()] == [0, 1]
    assert [*SCHEDULE.values()] == [first, second]
    assert [*SCHEDULE.items()] == [(0, first), (1, second)]
    assert dict(SCHEDULE) == {0: first, 1: second}
    assert (len(SCHEDULE), 1 in SCHEDULE, SCHEDULE.get(1), SCHEDULE.get(2)) == (2, True, second, None)
    assert [number for number in (2, -1, "0", None) if number in SCHEDULE] == []


@pytest.mark.parametrize("number", [2, -1, "0", None, [0]])
def test_a_phase_that_is_not_there_is_a_key_error(number: Any) -> None:
    with pytest.raises(KeyError):
        SCHEDULE[number]


def test_a_phase_reads_like_the_mapping_in_a_file() -> None:
    first, second = SCHEDULE.values()
    assert isinstance(first, Mapping)
    assert dict(first) == DEFAULTS | GIVEN[0]
    assert {**second} == DEFAULTS | GIVEN[1]
    assert type(first["params"]) is list
    assert SCHEDULE[1]["new_optimizer"]["optimizer_init"]["init_args"]["lr"] == 0.5
    assert [*first] == [*first.keys()] == ["params", "max_transition_epoch", *list(DEFAULTS)[1:]]
    assert len(first) == 5


def test_a_key_that_is_not_set_reads_as_none_and_counts_as_missing() -> None:
    first = SCHEDULE[0]
    assert (first["lr"], first.get("lr"), first.get("lr", 0.5), first.get("max_transition_epoch", 7)) == (
        None,
        None,
        0.5,
        3,
    )
    assert [key for key in ("lr", "new_optimizer", "phases", 0) if key in first] == []
    with pytest.raises(KeyError, match="learning_rate"):
        first["learning_rate"]


def test_what_is_read_of_a_phase_is_the_readers_own() -> None:
    schedule = Schedule.parse(GIVEN)
    schedule[0]["params"].append("more")
    schedule[1]["new_optimizer"]["optimizer_init"]["init_args"]["lr"] = 1.0
    assert schedule == SCHEDULE


RETURNS: dict[str, Callable[[Schedule], object]] = {
    "dict of phases": dict,
    "dict of dicts": lambda schedule: {number: dict(phase) for number, phase in schedule.items()},
    "json": lambda schedule: json.loads(json.dumps({number: dict(phase) for number, phase in schedule.items()})),
    "yaml": lambda schedule: yaml.safe_load(yaml.safe_dump({number: dict(each) for number, each in schedule.items()})),
}


@pytest.mark.parametrize("changed", RETURNS.values(), ids=RETURNS)
def test_what_is_read_is_a_schedule_again(changed: Callable[[Schedule], Any]) -> None:
    found = draft(changed(SCHEDULE))
    assert found.problems == ()
    assert found.warnings == ()
    assert tuple(found.phases.values()) == SCHEDULE.phases


COPIES: dict[str, Callable[[Any], object]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),
    "model_copy": lambda each: each.model_copy(),
    "model_dump": lambda each: type(each).model_validate(each.model_dump()),
    "json": lambda each: type(each).model_validate_json(each.model_dump_json()),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("given", [SCHEDULE, SCHEDULE[0], SCHEDULE[1]], ids=["schedule", "phase", "installing phase"])
def test_copies_are_equal(given: Schedule | Phase, copied: Callable[[Any], object]) -> None:
    made = copied(given)
    assert made == given
    assert type(made) is type(given)
    assert repr(made) == repr(given)


WITH_DEFAULTS = {number: DEFAULTS | {"lr": None} | phase for number, phase in GIVEN.items()}


@pytest.mark.parametrize("same", [GIVEN, WITH_DEFAULTS, dict(SCHEDULE)], ids=["file", "with defaults", "phases"])
def test_a_schedule_equals_the_mapping_that_it_reads_like(same: dict[int, Any]) -> None:
    assert [one == other for one, other in ((SCHEDULE, same), (same, SCHEDULE))] == [True, True]
    assert [SCHEDULE[number] == phase and phase == SCHEDULE[number] for number, phase in same.items()] == [True, True]


OTHERS: dict[str, Any] = {
    "another rate": GIVEN | {1: GIVEN[1] | {"lr": 0.25}},
    "no rate": GIVEN | {1: {key: value for key, value in GIVEN[1].items() if key != "lr"}},
    "another key": GIVEN | {0: GIVEN[0] | {"learning_rate": 0.1}},
    "no parameters": GIVEN | {0: {"max_transition_epoch": 3}},
    "fewer phases": {0: GIVEN[0]},
    "more phases": GIVEN | {2: {"params": ["more"]}},
    "numbers as text": {str(number): phase for number, phase in GIVEN.items()},
    "a list": [*GIVEN.values()],
    "nothing": None,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_schedule_differs_from_other_mappings(other: Any) -> None:
    assert [one != two for one, two in ((SCHEDULE, other), (other, SCHEDULE))] == [True, True]


def test_other_phases_and_schedules_are_not_equal() -> None:
    assert Phase(params=("a",)) != Phase(params=("b",))
    assert hash(Phase(params=("a",))) == hash(Phase(params=("a",)))
    assert SCHEDULE.up_to(0) != SCHEDULE
    assert hash(SCHEDULE.up_to(0)) == hash(Schedule.parse({0: GIVEN[0]}))


class Holder(ScheduleImplMixin):
    """Has a schedule."""

    def __init__(self, schedule: Any) -> None:
        self.ft_schedule = schedule


def test_a_schedule_goes_to_a_file_and_back(tmp_path: Path) -> None:
    path = Holder(GIVEN).save_schedule(tmp_path / "made" / "mine.yaml")
    assert path == tmp_path / "made" / "mine.yaml"
    read = ScheduleImplMixin.load_yaml_schedule(path)
    assert read == GIVEN
    read[1]["lr"] = 0.25  # plain values, to be changed
    assert Holder(read).save_schedule(str(path)) == path
    assert Schedule.parse(path)[1].lr == 0.25


def test_a_file_can_be_copied(tmp_path: Path) -> None:
    path = Holder(SCHEDULE).save_schedule(tmp_path / "first.yaml")
    assert Schedule.parse(Holder(path).save_schedule(tmp_path / "second.yaml")) == SCHEDULE


BROKEN = {
    "not there": (None, "expected a schedule file, but it does not exist"),
    "no YAML": ("0: [", "broken.yaml"),
    "an unknown key": ("0:\n  params: [a]\n  learning_rate: 1\n", "broken.yaml:3, phase 0: expected one of the keys"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_with_its_place(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ScheduleError) as error:
        ScheduleImplMixin.load_yaml_schedule(path)
    assert message in str(error.value)


def test_there_has_to_be_a_schedule_to_save(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="expected a schedule to save, got none"):
        Holder(None).save_schedule(tmp_path / "mine.yaml")
    with pytest.raises(ScheduleError, match="expected the key `params`, got none"):
        Holder({0: {}}).save_schedule(tmp_path / "mine.yaml")
    assert [*tmp_path.iterdir()] == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "mine.yaml"):
        with pytest.raises(
            ScheduleFileError, match="expected a file that the schedule can be written to, got"
        ) as error:
            Holder(GIVEN).save_schedule(path)
        assert str(path) in str(error.value)
