"""What is given instead of plain Python values - text, numpy, OmegaConf, namespaces - is taken for what it means."""

import re
from collections import UserDict, UserList
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import Namespace
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from finetuning_scheduler.core.schedule import Schedule, draft, implicit
from finetuning_scheduler.errors import OptimizerError, ScheduleError

PLAIN: dict[Any, Any] = {
    0: {"params": ["head"], "max_transition_epoch": 3},
    1: {
        "params": ["body", "embed"],
        "lr": 1e-06,
        "new_optimizer": {
            "optimizer_init": {"class_path": "torch.optim.Adam", "init_args": {"lr": 2e-06, "betas": [0.9, 0.99]}}
        },
        "new_lr_scheduler": {
            "lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
            "pl_lrs_cfg": {"interval": "epoch", "frequency": 2},
            "init_pg_lrs": [2e-06],
        },
    },
}


def _phase_1(**fields: Any) -> dict[int, Any]:
    return {0: {"params": ["head"]}, 1: {"params": ["body"], **fields}}


def _optimizer(**init_args: Any) -> dict[str, Any]:
    return {"optimizer_init": {"class_path": "torch.optim.Adam", "init_args": init_args}}


def _scheduler(**fields: Any) -> dict[str, Any]:
    return {"lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.StepLR"}, **fields}


def _messages(source: Any) -> list[str]:
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(source)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("lr", "1e-06", 1e-06),
        ("lr", "1", 1.0),
        ("lr", ".5", 0.5),
        ("lr", "0x10", 16.0),
        ("lr_decay", "+9.5E-1", 0.95),
        ("lr_decay_min_scale", "0", 0.0),
        ("max_transition_epoch", "3", 3),
        ("max_transition_epoch", "-1", -1),
        ("max_transition_step", "0o17", 15),
        ("lr_warmup_steps", "012", 12),
    ],
)
def test_text_that_shows_a_number_is_taken_for_it_with_a_notice(field: str, text: str, value: float) -> None:
    drafted = draft(_phase_1(**{field: text}))
    assert drafted.problems == ()
    assert {field: getattr(drafted.phases[1], field)} == {field: value}
    assert type(getattr(drafted.phases[1], field)) is type(value)
    assert drafted.notices == (f"text was taken for the numbers that it shows: `{field}` of phase 1",)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("lr", "", "expected a number, got ''"),
        ("lr", "1_000", "expected a number, got '1_000'"),
        ("lr", " 1", "expected a number, got ' 1'"),
        ("lr", "1e", "expected a number, got '1e'"),
        ("lr", "true", "expected a number, got 'true'"),
        ("lr", "null", "expected a number, got 'null'"),
        ("lr", "-1e-3", "expected a number greater than 0, got -0.001"),
        ("lr", ".inf", "expected a finite number, got infinity"),
        ("lr", "1e999", "expected a finite number, got infinity"),
        ("max_transition_epoch", "3.0", "expected an integer, got '3.0'"),
        ("max_transition_epoch", "3e0", "expected an integer, got '3e0'"),
        ("max_transition_epoch", "True", "expected an integer, got 'True'"),
        ("max_transition_epoch", "-2", "expected -1 or more, got -2"),
        ("max_transition_epoch", True, "expected an integer, got true"),
        ("max_transition_epoch", np.True_, "expected an integer, got true"),
        ("max_transition_epoch", np.float64(3), "expected an integer, got 3.0"),
        ("lr", np.array([1e-3]), "expected a number, got [0.001]"),
        ("lr", np.datetime64("2001-01-01"), "expected a number, got datetime.date(2001, 1, 1)"),
        ("params", "1", "expected a list, got '1'"),
        ("params", ["body", np.int64(1)], "expected a string, got 1"),
    ],
)
def test_what_shows_no_fitting_number_is_a_problem(field: str, text: Any, message: str) -> None:
    (problem,) = _messages(_phase_1(**{field: text}))
    assert re.match(rf"phase 1: `{field}(\[1\])?`: {re.escape(message)}", problem)


def test_text_for_a_truth_value_is_a_problem() -> None:
    (problem,) = _messages(_phase_1(new_lr_scheduler=_scheduler(use_current_optimizer_pg_lrs="true")))
    assert problem.startswith(
        "phase 1: `new_lr_scheduler.use_current_optimizer_pg_lrs`: expected true or false, got 'true'"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-06", 1e-06), ("-3E+2", -300.0), ("1e5", 1e5)]
    + [(text, text) for text in ("1.0e-06", "3", "0.1", "true", "1e", "e-6", "1e-06 ", "1e999", ".inf", "adam")],
)
def test_of_the_text_among_the_arguments_of_a_class_only_exponents_without_a_dot_are_numbers(
    text: str, value: object
) -> None:
    drafted = draft(_phase_1(new_optimizer=_optimizer(x=text, nested=[{"y": (text,)}])))
    assert drafted.phases[1].new_optimizer is not None
    arguments = drafted.phases[1].new_optimizer.optimizer_init.init_args
    assert arguments == {"x": value, "nested": [{"y": [value]}]}
    assert type(arguments["x"]) is type(value)
    place = "new_optimizer.optimizer_init.init_args"
    notice = (
        f"text was taken for the numbers that it shows: `{place}.x` of phase 1, `{place}.nested[0].y[0]` of phase 1"
    )
    assert drafted.notices == ((notice,) if type(value) is float else ())


def test_text_elsewhere_below_a_scheduler_is_a_number_only_where_the_format_expects_one() -> None:
    settings = {"frequency": "2", "name": "1e-06"}
    drafted = draft(_phase_1(new_lr_scheduler=_scheduler(pl_lrs_cfg=settings, init_pg_lrs=["1e-06", 0, "2"])))
    assert drafted.phases[1].new_lr_scheduler is not None
    assert drafted.phases[1].new_lr_scheduler.pl_lrs_cfg == {"frequency": "2", "name": "1e-06"}
    assert drafted.phases[1].new_lr_scheduler.init_pg_lrs == (1e-06, 0.0, 2.0)


def test_a_schedule_gets_one_notice_that_names_the_first_places() -> None:
    phases = {number: {"params": [f"p{number}"], "max_transition_epoch": str(number)} for number in range(13)}
    (notice,) = draft(phases).notices
    assert notice.startswith("text was taken for the numbers that it shows: `max_transition_epoch` of phase 0, ")
    assert notice.endswith("`max_transition_epoch` of phase 9 and 3 more")


def test_the_notice_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("0: {params: [head], max_transition_epoch: '3'}\n")
    assert draft(path).notices == (
        f"{path}: text was taken for the numbers that it shows: `max_transition_epoch` of phase 0",
    )


def test_numbers_give_no_notice() -> None:
    drafted = draft(PLAIN)
    assert (drafted.problems, drafted.notices, drafted.warnings) == ((), (), ())


def test_text_in_a_renumbered_copy_stays_what_the_user_wrote() -> None:
    renumbered = draft({0: {"params": ["head"]}, 2: {"params": ["body"], "lr": "1e-06"}}).renumbered
    assert renumbered == {0: {"params": ["head"]}, 1: {"params": ["body"], "lr": "1e-06"}}


def _namespaces(value: Any) -> Any:
    if isinstance(value, dict):
        return Namespace(**{str(key): _namespaces(item) for key, item in value.items()})
    return [_namespaces(item) for item in value] if isinstance(value, list) else value


def _numpy(value: Any) -> Any:
    """The value with all its numbers, keys and lists of numbers from numpy, in several kinds."""
    if isinstance(value, dict):
        return {np.int64(key) if isinstance(key, int) else np.str_(key): _numpy(item) for key, item in value.items()}
    if isinstance(value, list):
        return np.array(value) if isinstance(value[0], float) else [_numpy(item) for item in value]
    if isinstance(value, int):
        return np.array(value, dtype=np.int32)
    return np.float64(value) if isinstance(value, float) else value


def _converted(value: Any, mapping: type, sequence: type) -> Any:
    if isinstance(value, dict):
        return mapping({key: _converted(item, mapping, sequence) for key, item in value.items()})
    return sequence([_converted(item, mapping, sequence) for item in value]) if isinstance(value, list) else value


SOURCES = {
    "tuples": _converted(PLAIN, dict, tuple),
    "abstract containers": _converted(PLAIN, UserDict, UserList),
    "numpy": _numpy(PLAIN),
    "OmegaConf": OmegaConf.create(PLAIN),
    "OmegaConf inside dicts and lists": {
        number: {key: OmegaConf.create(item) if isinstance(item, (dict, list)) else item for key, item in phase.items()}
        for number, phase in PLAIN.items()
    },
    "namespaces": _namespaces(PLAIN),
    "namespaces inside dicts": {number: _namespaces(phase) for number, phase in PLAIN.items()},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_other_containers_and_scalars_mean_what_plain_ones_do(kind: str) -> None:
    drafted = draft(SOURCES[kind])
    assert drafted.problems == ()
    assert [notice for notice in drafted.notices if "text" in notice] == []
    assert Schedule.parse(SOURCES[kind]).to_dict() == PLAIN
    assert _kinds(Schedule.parse(SOURCES[kind]).to_dict()) == {dict, list, int, float, str}


def _kinds(value: Any) -> set[type]:
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return {type(value)}.union(*map(_kinds, inner))


def test_what_pyyaml_reads_means_what_the_file_means(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(
        "0:\n  params: [head]\n1:\n  params: [body]\n  lr: 1e-06\n"
        "  new_optimizer: {optimizer_init: {class_path: torch.optim.Adam, init_args: {lr: 1e-3, eps: 1e-08}}}\n"
    )
    read = yaml.safe_load(path.read_text())
    assert read[1]["lr"] == "1e-06"
    assert Schedule.parse(read) == Schedule.parse(path)
    assert len(draft(read).notices) == 1
    assert draft(path).notices == ()


def test_interpolations_are_resolved() -> None:
    config = OmegaConf.create(
        {
            "rate": 1e-06,
            "names": ["body"],
            "schedule": {0: {"params": ["head"]}, 1: {"params": "${names}", "lr": "${rate}"}},
        }
    )
    assert Schedule.parse(config["schedule"]).to_dict() == {
        0: {"params": ["head"]},
        1: {"params": ["body"], "lr": 1e-06},
    }


UNREADABLE = "expected a value that can be read, got an error: "


@pytest.mark.parametrize(
    ("phase", "messages"),
    [
        ({"params": ["body"], "lr": "${none}"}, [f"`lr`: {UNREADABLE}Interpolation key 'none' not found"]),
        ({"params": ["body"], "lr": "???"}, [f"`lr`: {UNREADABLE}Missing mandatory value: 1.lr"]),
        ({"params": "${none}"}, [f"`params`: {UNREADABLE}Interpolation key 'none' not found"]),
        (
            {"params": ["body", "${none}"], "lr": -1},
            [
                f"`params[1]`: {UNREADABLE}Interpolation key 'none' not found",
                "`lr`: expected a number greater than 0, got -1",
            ],
        ),
        (
            {"params": ["body"], "new_optimizer": _optimizer(lr="${none}", eps="${none:1}")},
            [
                f"`new_optimizer.optimizer_init.init_args.lr`: {UNREADABLE}Interpolation key 'none' not found",
                f"`new_optimizer.optimizer_init.init_args.eps`: {UNREADABLE}Unsupported interpolation type none",
            ],
        ),
        ("${none}", [f"{UNREADABLE}Interpolation key 'none' not found"]),
        (["${none}"], [f"`[0]`: {UNREADABLE}Interpolation key 'none' not found"]),
    ],
)
def test_what_cannot_be_resolved_is_a_problem_where_it_stands(phase: Any, messages: list[str]) -> None:
    found = _messages(OmegaConf.create({0: {"params": ["head"]}, 1: phase}))
    assert [message.partition(". Fix: ")[0] for message in found] == [f"phase 1: {message}" for message in messages]


def test_a_config_that_contains_itself_is_a_problem() -> None:
    problems = _messages(OmegaConf.create({0: {"params": ["head"]}, 1: {"params": ["body"], "again": "${1}"}}))
    assert [problem for problem in problems if not problem.startswith("phase 1: ")] == []


@pytest.mark.parametrize("source", [ListConfig(["head"]), ListConfig(None), ListConfig("???"), DictConfig(None)])
def test_a_config_that_is_no_mapping_is_one_problem(source: Any) -> None:
    assert len(_messages(source)) == 1


def test_phases_without_what_cannot_be_read_are_not_renumbered() -> None:
    assert draft(OmegaConf.create({0: {"params": ["a"]}, 2: {"params": ["b"], "lr": "???"}})).renumbered is None


def test_settings_of_implicit_mode_that_cannot_be_read_are_problems() -> None:
    settings = OmegaConf.create(_optimizer(lr="${none}"))
    with pytest.raises(OptimizerError) as caught:
        implicit(nn.Linear(2, 2), settings, None)
    assert [str(problem) for problem in caught.value.problems] == [
        f"`reinit_optim_cfg.optimizer_init.init_args.lr`: {UNREADABLE}Interpolation key 'none' not found. "
        "Fix: Write the value out"
    ]


LISTED = {
    "new_optimizer": {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"params": None, "lr": 0.1}}},
    "new_lr_scheduler": {
        "lr_scheduler_init": {
            "class_path": "torch.optim.lr_scheduler.StepLR",
            "init_args": {"optimizer": None, "step_size": 1},
        }
    },
}


@pytest.mark.parametrize("listed", [True, False], ids=["listed by LightningCLI", "written by a user"])
def test_arguments_that_only_a_session_fills_in_are_left_out_of_what_a_program_has_listed(listed: bool) -> None:
    schedule = Schedule.parse(_phase_1(**(vars(_namespaces(LISTED)) if listed else LISTED)))
    assert schedule[1]["new_optimizer"]["optimizer_init"]["init_args"] == {"lr": 0.1}
    arguments = schedule[1]["new_lr_scheduler"]["lr_scheduler_init"]["init_args"]
    assert arguments == ({"step_size": 1} if listed else {"optimizer": None, "step_size": 1})


@pytest.mark.parametrize("value", [torch.tensor(1e-3), torch.ones(2), np.float32, dict, nn.Identity(), range, len])
def test_tensors_classes_and_other_objects_among_arguments_stay_what_they_are(value: object) -> None:
    schedule = Schedule.parse(_phase_1(new_optimizer=_optimizer(x=value)))
    assert schedule[1].new_optimizer is not None
    assert schedule[1].new_optimizer.optimizer_init.init_args["x"] is value


SETTINGS = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@SETTINGS
@given(
    field=st.sampled_from(["lr", "max_transition_epoch"]),
    text=st.text("0123456789+-.eExXo_infnaN", min_size=1, max_size=8)
    | st.floats().map(repr)
    | st.integers().map(str)
    | st.from_regex(r"[-+]?[0-9]{1,3}(\.[0-9]{0,3})?([eE][-+]?[0-9]{1,3})?", fullmatch=True),
)
def test_text_in_a_mapping_means_what_it_means_unquoted_in_a_file(tmp_path: Path, field: str, text: str) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(f"0: {{params: [head]}}\n1:\n  params: [body]\n  {field}: {text}\n")
    assert _outcome(_phase_1(**{field: text})) == _outcome(path)


def _outcome(source: Any) -> dict[int, Any] | str:
    try:
        return Schedule.parse(source).to_dict()
    except ScheduleError:
        return "refused"


@SETTINGS
@given(rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False), epochs=st.integers(-1, 10**9))
def test_any_number_may_be_text_or_a_numpy_scalar(rate: float, epochs: int) -> None:
    expected = Schedule.parse(_phase_1(lr=rate, max_transition_epoch=epochs))
    for lr, epoch in ((repr(rate), str(epochs)), (np.float64(rate), np.int64(epochs)), (np.array(rate), repr(epochs))):
        assert Schedule.parse(_phase_1(lr=lr, max_transition_epoch=epoch)) == expected


@SETTINGS
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["${a}", "${0.params}", "???", "1e-06"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=3),
        max_leaves=8,
    )
)
def test_a_config_is_accepted_or_refused_but_never_breaks(value: Any) -> None:
    try:
        config = OmegaConf.create({0: {"params": ["head"]}, 1: {"params": ["b"], "new_optimizer": _optimizer(x=value)}})
    except OmegaConfBaseException:  # its own grammar refuses some text
        return
    _outcome(config)
