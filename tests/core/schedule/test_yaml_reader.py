"""Reading YAML with line numbers, and writing what reads back the same."""

import math
import os
import stat
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning_scheduler.core.schedule import Schedule
from finetuning_scheduler.core.schedule.yaml_reader import read_document
from finetuning_scheduler.core.schedule.yaml_writer import write_schedule
from finetuning_scheduler.errors import ScheduleFileError

PLAIN_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        ["yes", "NULL", "1e-06", "0o7", "~", "", "#", "- a", "a: b", "x\u2028y", "<<", "\ud800", "\U0001f600"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
SELECTORS = st.text(min_size=1, max_size=12) | st.text(string.ascii_letters + ".*\\[]()|0", min_size=1)
RATES = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
INITS = st.fixed_dictionaries(
    {"class_path": st.text(min_size=1)}, optional={"init_args": st.dictionaries(st.text(), PLAIN_VALUES, max_size=3)}
)
FIRST_PHASES = st.fixed_dictionaries(
    {"params": st.lists(SELECTORS, min_size=1, max_size=4, unique=True)},
    optional={"max_transition_epoch": st.integers(min_value=-1), "max_transition_step": st.integers(0, 10)},
)
LATER_PHASES = st.fixed_dictionaries(
    {"params": st.lists(SELECTORS, min_size=1, max_size=4, unique=True)},
    optional={
        "max_transition_epoch": st.integers(min_value=-1),
        "lr": RATES,
        "new_optimizer": st.fixed_dictionaries({"optimizer_init": INITS}),
        "new_lr_scheduler": st.fixed_dictionaries(
            {"lr_scheduler_init": INITS},
            optional={
                "pl_lrs_cfg": st.dictionaries(st.text(), PLAIN_VALUES, max_size=2),
                "init_pg_lrs": st.lists(RATES, min_size=1, max_size=3),
                "use_current_optimizer_pg_lrs": st.booleans(),
            },
        ),
    },
)
SCHEDULES = st.tuples(FIRST_PHASES, st.lists(LATER_PHASES, max_size=3)).map(
    lambda phases: dict(enumerate([phases[0], *phases[1]]))
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=SCHEDULES, comments=st.none() | st.lists(st.text(), max_size=4))
def test_written_schedule_reads_back_the_same(
    tmp_path: Path, data: dict[int, object], comments: list[str] | None
) -> None:
    schedule = Schedule.parse(data)
    path = write_schedule(schedule, tmp_path / "schedule.yaml", comments)
    assert Schedule.parse(path) == schedule


def test_written_file_is_block_style_with_a_comment_on_each_phase(tmp_path: Path) -> None:
    schedule = Schedule.parse(
        {
            0: {"params": ["head.weight", r"head\..*"], "max_transition_epoch": 3},
            1: {
                "params": ["yes", "a, b"],
                "lr": 1e-06,
                "new_optimizer": {
                    "optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"betas": (0.9, 1)}}
                },
            },
        }
    )
    path = write_schedule(schedule, tmp_path / "schedule.yaml", ["2 tensors", 'the "rest"\nof the model'])
    assert path.read_text(encoding="utf-8") == (
        "# 2 tensors\n"
        "0:\n"
        "  params:\n"
        "  - head.weight\n"
        "  - head\\..*\n"
        "  max_transition_epoch: 3\n"
        '# the "rest" of the model\n'
        "1:\n"
        "  params:\n"
        '  - "yes"\n'
        '  - "a, b"\n'
        "  lr: 1.0e-06\n"
        "  new_optimizer:\n"
        "    optimizer_init:\n"
        "      class_path: torch.optim.SGD\n"
        "      init_args:\n"
        "        betas:\n"
        "        - 0.9\n"
        "        - 1\n"
    )


def test_writing_replaces_the_file_at_once_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "schedule.yaml"
    write_schedule({0: {"params": ["a"]}}, path)
    monkeypatch.setattr(Path, "replace", _disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_schedule({0: {"params": ["b"]}}, path)
    assert [file.name for file in path.parent.iterdir()] == ["schedule.yaml"]
    assert read_document(path).data == {0: {"params": ["a"]}}


def _disk_full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    path = write_schedule({0: {"params": ["a"]}}, tmp_path / "schedule.yaml")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_values_yaml_cannot_hold_are_written_as_text(tmp_path: Path) -> None:
    path = write_schedule({0: {"params": ["a"], "x": {"dtype": complex(1, 2)}}}, tmp_path / "schedule.yaml")
    assert read_document(path).data[0]["x"] == {"dtype": "(1+2j)"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-06", 1e-06),
        ("1.0e-3", 1.0e-3),
        ("+.5", 0.5),
        ("-.inf", -math.inf),
        ("0o17", 15),
        ("0xfF", 255),
        ("-12", -12),
        ("012", 12),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("! 1", "1"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("!!int '7'", 7),
        ("2001-01-01", "2001-01-01"),
        ("1:30", "1:30"),
        ("<<", "<<"),
        (r'"\ud83d\ude00"', "\U0001f600"),
        (r'"\ud83d"', "\ud83d"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "scalar.yaml"
    path.write_text(f"%YAML 1.2\n---\na: {text}\n", encoding="utf-8")
    document = read_document(path)
    assert document.data == {"a": value}
    assert type(document.data["a"]) is type(value)
    assert document.problems == ()


@pytest.mark.parametrize("tag", ["!!int", "!!float"])
def test_a_truth_value_tagged_as_number_is_refused(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "scalar.yaml"
    path.write_text(f"a: {tag} true\n", encoding="utf-8")
    messages = [problem.message for problem in read_document(path).problems]
    assert messages == [f"expected a value of the YAML type `{tag}`, got 'true'"]


def test_lines_of_keys_and_items(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("# comment\n0:\n  params:\n  - a\n  -\n    b\n  lr:\n    1.0\n1: {params: [c,\n d]}\n")
    assert read_document(path).lines == {
        (0,): 2,
        (0, "params"): 3,
        (0, "params", 0): 4,
        (0, "params", 1): 6,
        (0, "lr"): 7,
        (1,): 9,
        (1, "params"): 9,
        (1, "params", 0): 9,
        (1, "params", 1): 10,
    }


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_bytes(b"\xef\xbb\xbf0:\r\n  params:\r\n  - a\r\n")
    document = read_document(os.fsencode(path))
    assert document.data == {0: {"params": ["a"]}}
    assert document.lines[0, "params", 0] == 3


def test_aliases_are_followed_and_an_anchor_may_be_used_again(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("a: &x [1]\nb: *x\nc: &x 2\nd: *x\n")
    assert read_document(path).data == {"a": [1], "b": [1], "c": 2, "d": 2}


def test_aliases_that_grow_without_measure_are_refused(tmp_path: Path) -> None:
    levels = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 10)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(["x0: &x0 [1]", *levels]))
    with pytest.raises(ScheduleFileError, match=r"expected aliases of at most 50,000 values, got more"):
        read_document(path)


def test_every_duplicate_and_tag_is_reported_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("a: 1\nb: !x 2\na: 3\nc: {d: 1, d: 2}\n1: x\n1.0: y\n")
    messages = [problem.message for problem in read_document(path).problems]
    assert messages == [
        "expected plain YAML, got the tag `!x`",
        "expected each key once, got 'a' on line 1 and again on line 3",
        "expected each key once, got 'd' on line 4 and again on line 4",
        "expected each key once, got 1.0 on line 5 and again on line 6",
    ]


def test_problems_found_before_a_syntax_error_are_reported_with_it(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("a: 1\na: 2\nb: ]\n")
    with pytest.raises(ScheduleFileError) as caught:
        read_document(path)
    assert [problem.line for problem in caught.value.problems] == [2, 3]
    assert caught.value.__cause__ is not None
