"""Schedules from mappings: what is accepted, converted, dropped and refused."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from finetuning_scheduler.core.schedule import Phase, Schedule, draft, json_schema
from finetuning_scheduler.errors import Problem, ScheduleError, ScheduleFormatError, SelectorError

FULL = {
    0: {"params": ["head"], "max_transition_epoch": 3},
    1: {
        "params": ["pooler.*", "embeddings"],
        "max_transition_step": 0,
        "lr": 1e-06,
        "new_optimizer": {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"lr": 2e-3}}},
        "new_lr_scheduler": {
            "lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
            "pl_lrs_cfg": {"interval": "epoch"},
            "init_pg_lrs": [2e-6, 0],
            "use_current_optimizer_pg_lrs": True,
        },
    },
}


def _message(source: Any) -> str:
    with pytest.raises(ScheduleFormatError) as caught:
        Schedule.parse(source)
    return str(caught.value)


def test_every_field_is_read() -> None:
    schedule = Schedule.parse(FULL)
    first, second = schedule.phases
    assert (len(schedule), schedule[0], schedule[1]) == (2, first, second)
    assert first == Phase(params=("head",), max_transition_epoch=3)
    assert second.max_transition_step == 0
    assert second.lr == 1e-06
    assert second.new_optimizer is not None
    assert second.new_optimizer.optimizer_init.init_args == {"lr": 2e-3}
    assert second.new_lr_scheduler is not None
    assert second.new_lr_scheduler.init_pg_lrs == (2e-6, 0.0)
    assert second.new_lr_scheduler.pl_lrs_cfg == {"interval": "epoch"}
    assert second.new_lr_scheduler.use_current_optimizer_pg_lrs is True


def test_to_dict_gives_back_what_was_set_as_plain_values() -> None:
    data = Schedule.parse(FULL).to_dict()
    assert data == FULL
    assert type(data[1]["params"]) is list
    assert Schedule.parse(data) == Schedule.parse(FULL)


def test_parse_leaves_its_source_alone_and_shares_nothing_with_it() -> None:
    source = copy.deepcopy(FULL)
    schedule = Schedule.parse(source)
    assert source == FULL
    source[1]["new_optimizer"]["optimizer_init"]["init_args"]["lr"] = 9.0
    assert schedule.to_dict() == FULL


def test_a_schedule_is_accepted_as_source() -> None:
    schedule = Schedule.parse(FULL)
    assert Schedule.parse(schedule) == schedule


def test_schedules_cannot_be_changed() -> None:
    schedule = Schedule.parse(FULL)
    with pytest.raises(ValidationError, match="frozen"):
        schedule[0].lr = 1.0


def test_convertible_keys_are_converted_with_one_notice() -> None:
    drafted = draft({"1": {"params": ["b"]}, 0.0: {"params": ["a"]}})
    assert drafted.problems == ()
    assert drafted.notices == ("phase keys were converted to integers: '1' to 1, 0.0 to 0",)
    assert Schedule.parse({"1": {"params": ["b"]}, 0.0: {"params": ["a"]}}).to_dict() == {
        0: {"params": ["a"]},
        1: {"params": ["b"]},
    }


def test_integer_keys_give_no_notice_whatever_their_order() -> None:
    drafted = draft({1: {"params": ["b"]}, 0: {"params": ["a"]}})
    assert (drafted.notices, drafted.warnings, drafted.problems) == ((), (), ())
    assert list(drafted.phases) == [0, 1]


def test_repeated_selectors_are_used_once_with_a_notice() -> None:
    drafted = draft({0: {"params": ["b", "a", "b", "a", "c"]}})
    assert drafted.phases[0].params == ("b", "a", "c")
    assert drafted.notices == ("phase 0: selectors listed more than once are used once: 'b', 'a'",)


def test_lr_of_phase_0_is_dropped_with_a_warning() -> None:
    drafted = draft({0: {"params": ["a"], "lr": 0.1}})
    assert drafted.phases[0].lr is None
    assert drafted.warnings == ("phase 0: `lr` is dropped: the initial optimizer sets the learning rate of phase 0",)


def test_gaps_come_with_a_renumbered_copy_of_what_the_user_wrote() -> None:
    source = {2: {"params": ["b"], "lr": 1}, "7": {"params": ["c"]}, 0: {"params": ("a",)}}
    with pytest.raises(ScheduleFormatError) as caught:
        Schedule.parse(source)
    assert str(caught.value) == (
        "expected phase numbers from 0 without gaps, got 0, 2, 7; phase 1 is missing. Fix: Renumber the phases from 0"
    )
    assert caught.value.renumbered == {
        0: {"params": ["a"]},
        1: {"params": ["b"], "lr": 1},
        2: {"params": ["c"]},
    }


def test_no_renumbered_copy_without_a_gap() -> None:
    with pytest.raises(ScheduleFormatError) as caught:
        Schedule.parse({0: {"params": []}})
    assert caught.value.renumbered is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "expected a mapping of phase numbers to phases, got nothing. Fix: Write `0:` with `params:` below it"),
        ([{"params": ["a"]}], "expected a mapping of phase numbers to phases, got [{'params': [...]}]. "
         "Fix: Write `0:` with `params:` below it"),
        (3, "expected a mapping of phase numbers to phases, got 3. Fix: Write `0:` with `params:` below it"),
        ({}, "expected a mapping of phase numbers to phases, got an empty mapping. "
         "Fix: Write `0:` with `params:` below it"),
        ({0: {"params": ["a"]}, True: {"params": ["b"]}},
         "expected a phase number (0, 1, 2, ...) as key, got true. Fix: Number the phases from 0"),
        ({0: {"params": ["a"]}, 10**400: {"params": ["b"]}},
         "expected a phase number (0, 1, 2, ...) as key, got a number of more than 75 digits. "
         "Fix: Number the phases from 0"),
        ({0: {"params": ["a"]}, float("nan"): {"params": ["b"]}},
         "expected a phase number (0, 1, 2, ...) as key, got not-a-number. Fix: Number the phases from 0"),
        ({0: {"params": ["a"]}, (1,): {"params": ["b"]}},
         "expected a phase number (0, 1, 2, ...) as key, got [1]. Fix: Number the phases from 0"),
        ({0: {"params": {"a"}}}, "phase 0: `params`: expected a list, got {'a'}. Fix: Write a list"),
        (
            {0: {"params": ["a\ud800"]}},
            r"phase 0: `params[0]`: expected Unicode text, got 'a\ud800'. Fix: Remove the halves of surrogate pairs",
        ),
        ({0: {"params": [b"a"]}},
         "phase 0: `params[0]`: expected a string, got b'a'. Fix: Write text, in quotes if it looks like a number"),
    ],
)  # fmt: skip
def test_message(source: Any, message: str) -> None:
    assert _message(source) == message


def test_a_structure_that_contains_itself_is_refused() -> None:
    arguments: dict[str, Any] = {}
    arguments["again"] = arguments
    phase = {"params": ["b"], "new_optimizer": {"optimizer_init": {"class_path": "a.B", "init_args": arguments}}}
    assert _message({0: {"params": ["a"]}, 1: phase}) == (
        "phase 1: expected at most 100 nested levels, got more. Fix: Flatten it"
    )


def test_all_problems_of_all_phases_are_reported_together() -> None:
    message = _message({0: {"params": "a", "lr": "x"}, 1: {"parms": ["b"]}, 3: {"params": ["c"], "lr": -1, "zz": 0}})
    assert message.splitlines()[0] == "6 problems found:"
    for part in ("phase 2 is missing", "Make it a list: `params: [a]`", "Add `params`", "Did you mean `params`?",
                 "phase 3: `lr`: expected a number greater than 0, got -1", "got `zz`"):  # fmt: skip
        assert part in message


def test_a_phase_keeps_the_fields_that_are_right() -> None:
    drafted = draft({0: {"params": ["a"], "max_transition_epoch": 2, "max_transition_step": "x"}})
    assert len(drafted.problems) == 1
    assert drafted.phases == {0: Phase(params=("a",), max_transition_epoch=2)}


def test_draft_of_a_file_knows_the_line_of_each_selector(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("0:\n  params:\n  - a\n  - b\n  - a\n'1':\n  params: [c]\n")
    drafted = draft(path)
    assert drafted.lines == {(0, "a"): 3, (0, "b"): 4, (1, "c"): 7}
    assert drafted.source == str(path)


def test_json_schema_describes_a_file() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["patternProperties"] == {r"^\d+$": {"$ref": "#/$defs/Phase"}}
    phase = schema["$defs"]["Phase"]
    assert phase["required"] == ["params"]
    assert phase["additionalProperties"] is False
    assert phase["properties"]["params"]["minItems"] == 1
    assert phase["properties"]["max_transition_epoch"]["minimum"] == -1


def test_every_field_of_the_schema_is_described() -> None:
    schema = json_schema()
    undescribed = [
        f"{model}.{name}"
        for model, definition in schema["$defs"].items()
        for name, field in definition["properties"].items()
        if not field.get("description")
    ]
    assert undescribed == []


def test_a_problem_is_one_line_whatever_it_quotes() -> None:
    problem = Problem("expected x,\ngot \x00", "do y", "a\nb.yaml", 3, 1, "s\u2028")
    assert str(problem) == r"a\nb.yaml:3, phase 1, selector 's\u2028': expected x,\ngot \x00. Fix: Do y"


def test_errors_survive_pickling_and_list_their_problems() -> None:
    error = SelectorError([Problem("first"), Problem("second", phase=2)], "bad schedule", {0: {"params": ["a"]}})
    loaded = pickle.loads(pickle.dumps(error))
    assert type(loaded) is SelectorError
    assert loaded.problems == error.problems
    assert loaded.renumbered == {0: {"params": ["a"]}}
    assert str(loaded) == "bad schedule:\n1. first\n2. phase 2: second"


def test_an_error_with_one_problem_is_one_line() -> None:
    assert str(ScheduleError(Problem("first", "fix it"))) == "first. Fix: Fix it"
    assert str(ScheduleError(Problem("first"), "bad schedule")) == "bad schedule: first"
