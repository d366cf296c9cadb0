"""Whatever a file or mapping holds, the parser raises `ScheduleError` or nothing."""

import io
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from finetuning_scheduler.core.prepare import resolve
from finetuning_scheduler.core.schedule import Schedule
from finetuning_scheduler.core.schedule.names import ParameterIndex
from finetuning_scheduler.core.schedule.yaml_writer import write_schedule
from finetuning_scheduler.errors import ScheduleError

INDEX = ParameterIndex(("a.0.weight", "a.10.weight", "b", "c"), {"d": "b"}, {"c": "torch.int64"})
SETTINGS = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], database=None
)

WORDS = st.sampled_from(
    ["params", "lr", "max_transition_epoch", "max_transition_step", "new_optimizer", "optimizer_init", "class_path",
     "init_args", "new_lr_scheduler", "lr_scheduler_init", "pl_lrs_cfg", "init_pg_lrs", "a",
     "a.0.*", "b", "d", "c", "("]
)  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, -1, 10**400, 1.5, float("inf"), float("nan"), "0", "1", "1e-3"])
    | st.floats()
    | WORDS
    | st.text(max_size=6)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | SCALARS, inner, max_size=4),
    max_leaves=12,
)
PHASES = st.dictionaries(WORDS, VALUES, max_size=4) | st.builds(
    lambda params, rest: {**rest, "params": params},
    st.lists(WORDS, max_size=3),
    st.dictionaries(WORDS, VALUES, max_size=2),
)
SCHEDULES = st.dictionaries(st.integers(0, 3) | SCALARS, PHASES | VALUES, max_size=4) | VALUES
YAML_TEXT = st.lists(
    st.sampled_from(
        ["0", "1", ":", ": ", "\n", "\n  ", "\n- ", "params", "lr", "[", "]", "{", "}", ", ", "&a ", "*a", "!",
         "!!int ", "!!python/name:os.system ", "|", ">", "? ", "---\n", "...\n", "%YAML 1.1\n", "#", "'", '"', "\t",
         "\0", "\\", "<<",
         "\ufeff", "\x85", "a.0.weight", "9" * 5000, "-", "~", "@", "`"]
    ),
    max_size=16,
).map("".join)  # fmt: skip


def _only_schedule_errors(source: Any) -> None:
    problems: list[str] = []
    try:
        resolution = resolve(source, INDEX)
    except ScheduleError as error:
        problems = [str(problem) for problem in error.problems]
    else:
        assert Schedule.parse(resolution.schedule.to_dict()) == resolution.schedule
    assert [problem for problem in problems if len(problem.splitlines()) != 1] == []


def _from_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_bytes(content)
    _only_schedule_errors(path)


@settings(SETTINGS, max_examples=1000)
@given(source=SCHEDULES)
def test_mappings(source: Any) -> None:
    _only_schedule_errors(source)


@settings(SETTINGS, max_examples=1000)
@given(text=YAML_TEXT | st.text() | st.text(string.printable))
def test_text(tmp_path: Path, text: str) -> None:
    _from_file(tmp_path, text.encode("utf-8", "surrogatepass"))


@settings(SETTINGS, max_examples=60)
@given(content=st.binary())
def test_bytes(tmp_path: Path, content: bytes) -> None:
    _from_file(tmp_path, content)


@settings(SETTINGS, max_examples=60)
@given(source=SCHEDULES)
def test_json(tmp_path: Path, source: Any) -> None:
    try:
        text = json.dumps(source)
    except (TypeError, ValueError):  # keys or numbers that JSON cannot hold
        return
    _from_file(tmp_path, text.encode())


@settings(SETTINGS, max_examples=60)
@given(source=st.dictionaries(st.integers(0, 2), PHASES, max_size=3))
def test_yaml_of_another_writer(tmp_path: Path, source: Any) -> None:
    buffer = io.StringIO()
    try:
        YAML(typ="safe", pure=True).dump(source, buffer)
    except ValueError:  # numbers that Python does not write in decimal
        return
    _from_file(tmp_path, buffer.getvalue().encode("utf-8", "surrogatepass"))


@settings(SETTINGS, max_examples=60)
@given(source=st.dictionaries(st.integers(0, 2), PHASES, max_size=3))
def test_whatever_is_accepted_can_be_written_and_read(tmp_path: Path, source: Any) -> None:
    try:
        resolution = resolve(source, INDEX)
    except ScheduleError:
        return
    path = write_schedule(resolution.schedule, tmp_path / "written.yaml")
    assert len(resolve(path, INDEX).schedule) == len(resolution.schedule)


@pytest.mark.parametrize("source", [object(), b"0", 1.5, {0}, [], "", "\0", "x" * 5000])
def test_sources_of_other_types(source: Any) -> None:
    _only_schedule_errors(source)


@pytest.mark.parametrize("key", ["lr", "max_transition_epoch", "params"])
def test_numbers_python_does_not_write_in_decimal(tmp_path: Path, key: str) -> None:
    huge = 10**5000
    phase = {"params": ["a.0.weight"], key: huge}
    _only_schedule_errors(huge)
    _only_schedule_errors({0: {"params": ["b"]}, 1: phase})
    _only_schedule_errors({0: {"params": ["b"]}, -huge: phase, huge: phase})
    _only_schedule_errors(write_schedule({0: {"params": ["b"]}, 1: phase}, tmp_path / "schedule.yaml"))
