"""Schedules that want to take forever: each is accepted or refused in bounded time and memory, and says which it is."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetuning_scheduler.core.prepare import read
from finetuning_scheduler.core.schedule.expression import Clock, compiled
from finetuning_scheduler.core.schedule.names import ParameterIndex
from finetuning_scheduler.errors import MAX_PROBLEMS, ScheduleError, joined

REALISTIC = ParameterIndex(
    (
        "model.bert.encoder.layer.11.attention.output.LayerNorm_of_the_last_of_all_layers.weight",
        *(f"model.bert.encoder.layer.{i}.attention.self.{kind}.weight" for i in range(12) for kind in ("query", "key")),
    )
)

SLOW = {
    "any name of any name": r"(.*)*biasX",
    "a repeat of a repeat": r"(\w|\w\w)+X",
    "a repeat of words": r"([a-z]+\.?)+X",
    "two ways to repeat": r"(.*)*(.*)*(.*)*X\1",
    "many wildcards": "[a-zA-Z.]*" * 12 + "X",
    "many optional characters": ".?" * 60 + "." * 60 + "X",
    "a reference": r"(\w+)*\1X",
    "a look-ahead": r"(?=(\w+\.?)+X).*",
    "sets around a repeat": r"[?:]*(.+)+X[?:]*",
    "sets that look like a look-ahead": r"[(?!\d)]*(.+)+X[^x]*",
    "a parenthesis that looks like a look-ahead": r"(.+|\(?!\d)+X",
    "a parenthesis that looks like a look-behind": r"(.+|\(?<!\d)+X",
}


@pytest.mark.parametrize("selector", SLOW.values(), ids=SLOW)
def test_no_selector_takes_long(selector: str) -> None:
    clock = Clock(seconds=1.0)
    start = time.thread_time()
    try:
        found = compiled(selector, clock).whole(REALISTIC.names)
    except TimeoutError:
        found = []
    assert found == []
    assert time.thread_time() - start < 2.0


def test_what_is_slow_to_compile_is_counted() -> None:
    clock = Clock(seconds=0.5)
    start = time.thread_time()
    selectors = ["(?i)" + r"[\u0000-\uffff]" * 100 + str(number) for number in range(20)]
    with pytest.raises(TimeoutError):
        [compiled(selector, clock) for selector in selectors]
    assert time.thread_time() - start < 3.0


@pytest.mark.parametrize("selector", ["(?=.)(?:foo){e}", "(a|b)*(foo){s<=1:[a-z]}", "(?=b)[[:alpha:]]+", "(?=a)a{i}"])
def test_what_regex_would_read_otherwise_is_refused(selector: str) -> None:
    with pytest.raises(re.error, match="escape it"):
        compiled(selector)


@pytest.mark.parametrize(
    ("selector", "name"),
    [
        ("(?i)a{i}", "A{i}"),
        (r"(?=a)a\{e\}", "a{e}"),
        ("(?i)i.*", "\u0130x"),
        ("(?i)", ""),
        (r"(?=.)\N{DIGIT ONE}", "1"),
    ],
)
def test_what_re_would_match_is_matched(selector: str, name: str) -> None:
    assert compiled(selector).whole(["other", name]) == [name]


def test_a_selector_that_takes_too_long_is_named_and_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning_scheduler.core.schedule.expression.SECONDS", 0.4)
    monkeypatch.setattr("finetuning_scheduler.core.schedule.resolve.Clock", lambda: Clock(seconds=0.4))
    takes_long = r"(?:\w|\w\w)+[^\w]"
    names = ParameterIndex((*REALISTIC.names, *(f"{'ab' * 400}{i}" for i in range(300)), "head.bias"))
    with pytest.raises(ScheduleError) as error:
        raise joined(read({0: {"params": [takes_long]}, 1: {"params": ["head.*", "nothing.here"]}}, names).errors)
    assert [problem.selector for problem in error.value.problems] == [takes_long, "nothing.here"]
    assert str(error.value.problems[0]) == (
        f"phase 0, selector '{takes_long}': expected selectors that can be tried on all names within 0.4 seconds, got "
        "one that takes longer. Fix: Repeat no group that itself repeats, as `(.*)*` does"
    )


INVALID = {
    "a comment without end": ("x(?#" + "(" * 100_000, "more than 10,000 characters"),
    "a comment of open sets": ("x(?#*" + "[" * 100_000, "more than 10,000 characters"),
    "a shorter one": ("x(?#" + "[" * 9_000, "unterminated comment"),
    "brackets": ("(" * 5_000, "maximum recursion depth exceeded"),
    "repeats inside one another": ("(?:(?:(?:a{999}){999}){999})", "more than 10,000 repeats inside one another"),
    "a large repeat": ("a{70000}", "more than 10,000 repeats inside one another"),
}


@pytest.mark.parametrize(("selector", "reason"), INVALID.values(), ids=INVALID)
def test_an_expression_larger_than_any_model_needs_is_refused(selector: str, reason: str) -> None:
    start = time.thread_time()
    resolution = read({0: {"params": [selector]}}, REALISTIC)
    assert time.thread_time() - start < 3.0
    [problem] = joined(resolution.errors).problems
    assert reason in problem.message
    assert len(str(problem)) < 20_000


def test_what_stands_behind_an_open_set_in_a_comment_counts() -> None:
    resolution = read({0: {"params": ["(?#[)(?:(?:a{999}){999}){999}"]}}, REALISTIC)
    [problem] = joined(resolution.errors).problems
    assert "more than 10,000 repeats inside one another" in problem.message


def test_every_selector_of_a_large_model_is_tried_in_time() -> None:
    """40,000 names, and 100 selectors, half of which begin with anything."""
    names = ("a.weight", "a.bias", "b.weight", "b.bias")
    index = ParameterIndex(tuple(f"layers.{number}.{name}" for number in range(10_000) for name in names))
    phases = {
        number: {"params": [rf"layers\.{number}\..*", rf".*\.{9_000 + number}\.(a|b)\.weight"]} for number in range(50)
    }
    start = time.thread_time()
    resolution = read(phases, index)
    assert time.thread_time() - start < 2.0
    assert [len(phase.params) for phase in resolution.schedule.phases] == [6] * 50


def aliased() -> str:
    names = ", ".join(f"layer.{i}.x" for i in range(1_000))
    return "\n".join([f"0: {{params: &all [{names}]}}", *(f"{i}: {{params: *all}}" for i in range(1, 1_000))])


def milestones() -> str:
    init = f"{{milestones: {list(range(10_000))}, gamma: [1]}}"
    scheduler = f"{{class_path: torch.optim.lr_scheduler.MultiStepLR, init_args: {init}}}"
    return f"0: {{params: [x]}}\n1: {{params: [y.weight], new_lr_scheduler: {{lr_scheduler_init: {scheduler}}}}}\n"


FILES: dict[str, tuple[Callable[[], str], str]] = {
    "a list repeated by aliases": (aliased, "expected aliases of at most 50,000 values, got more"),
    "very many values": (lambda: f"0: {{params: [{'x,' * 400_000}]}}", "expected at most 250,000 values, got more"),
    "very many wrong values": (lambda: f"0: {{params: [{'1,' * 100_000}]}}", "expected a string, got 1"),
    "very many selectors of nothing": (
        lambda: "0:\n  params:\n" + "".join(f"  - nothing.{i}.at.all\n" for i in range(100_000)),
        "expected to match a parameter, but matches none",
    ),
    "very many expressions of nothing": (
        lambda: "0:\n  params:\n" + "".join(f"  - .*nothing{i}.*x.*\n" for i in range(50_000)),
        "expected to match a parameter, but matches none",
    ),
    "many comments of open sets": (
        lambda: "0:\n  params:\n" + "".join(f"  - 'x(?#{'[' * 9_900})nothing{i}'\n" for i in range(100)),
        "expected to match a parameter, but matches none",
    ),
    "many comments of open sets that end in an escape": (
        lambda: "0:\n  params:\n" + "".join(f"  - 'x(?#{'[' * 9_900}\\])nothing{i}'\n" for i in range(100)),
        "expected to match a parameter, but matches none",
    ),
    "very many phases": (
        lambda: "".join(f"{2 * i}: {{params: [x]}}\n" for i in range(20_000)),
        "expected phase numbers from 0 without gaps",
    ),
    "duplicate keys": (lambda: "0: {params: [x]}\n" * 100_000, "expected each key once"),
    "one long word": (lambda: f"0: {{params: [{'x' * 2_000_000}]}}", "more than 10,000 characters"),
    "many lines of one word": (lambda: "0: {params: [" + "word\n" * 100_000 + "]}", "more than 10,000 characters"),
    "escapes": (lambda: '0: {params: ["' + r"\x41" * 200_000 + '"]}', "more than 10,000 characters"),
    "open brackets": (lambda: "[" * 500_000, "nested levels"),
    "many anchors": (lambda: f"0: {{params: [{','.join(f'&a{i} n{i}' for i in range(100_000))}]}}", "match"),
    "many milestones": (milestones, "does not take `init_args`"),
    "a too large file": (lambda: "#" * (16 * 2**20 + 1), "expected a file of at most 16,777,216 bytes"),
}
CHILD = """
import resource, sys, time
from finetuning_scheduler.core.prepare import read
from finetuning_scheduler.core.schedule.names import ParameterIndex
from finetuning_scheduler.errors import joined
index = ParameterIndex(("x", "y.weight"))
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
error = joined(read(sys.argv[1], index).errors)
text = str(error)
seconds = time.process_time() - start
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, len(text), len(error.problems))
print(error.problems[0].message[:300], error.problems[-1].message[:300])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resource limits and their units are Linux's")
@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_refused_in_seconds_and_little_memory(kind: str, tmp_path: Path) -> None:
    content, message = FILES[kind]
    path = tmp_path / "schedule.yaml"
    path.write_text(content(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=110, check=True
    )
    first, last = done.stdout.splitlines()[:2]
    seconds, megabytes, characters, problems = map(float, first.split())
    assert message in last
    assert problems <= 2 * MAX_PROBLEMS
    assert characters < 1_000_000
    assert megabytes < 300
    assert seconds < 5 * max(1, path.stat().st_size / 2**20)
