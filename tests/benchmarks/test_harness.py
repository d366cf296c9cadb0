"""The table of the benchmarks says what they measured, and how much it varied."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.docs.pages import ROOT
from tests.docs.test_measured import script


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script("benchmarks/_common.py")


@pytest.fixture
def run(common: ModuleType) -> ModuleType:
    return script("benchmarks/run.py")


def test_a_figure_is_the_median_and_the_quartiles(common: ModuleType) -> None:
    figure = common.Figure.of("faster", [5.0, 1.0, 2.0, 4.0, 3.0], ">= 3", limit=6)
    assert (figure.value, figure.low, figure.high, figure.runs, figure.met) == (3, 2, 4, 5, True)
    assert figure.line() == "faster: 3x (2-4), 5 runs, limit 6x; goal >= 3x met"


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [
        (1.9, ">= 1.9", True), (1.89, ">= 1.9", False), (1.15, "<= 1.15", True), (1.16, "<= 1.15", False),
        (0.0, "== 0", True), (1.0, "== 0", False),
    ],
)  # fmt: skip
def test_goals(value: float, goal: str, met: bool, common: ModuleType) -> None:
    figure = common.Figure.of("it", [value], goal, unit="")
    assert figure.met is met
    assert ("missed" in figure.line()) is not met


@pytest.mark.parametrize(
    ("number", "text"),
    [(1.91456, "1.91"), (0.98765, "0.988"), (13.26, "13.3"), (1234.5, "1234"), (0.0123456, "0.0123"), (3.0, "3"),
     (0, "0"), (0.0000001, "0.000000"), (40000, "40000")],
)  # fmt: skip
def test_numbers_have_three_digits(number: float, text: str, common: ModuleType) -> None:
    assert common.shown(number) == text


@pytest.mark.parametrize(("unit", "text"), [("x", "2x (1-3)"), ("s", "2 s (1-3)"), ("", "2 (1-3)")])
def test_units(unit: str, text: str, common: ModuleType) -> None:
    assert common.Figure.of("it", [1.0, 2.0, 3.0, 0.5, 3.5], ">= 1", unit=unit).measured == text


def test_things_alternate_and_another_is_first_each_time(common: ModuleType) -> None:
    calls: list[str] = []
    numbers = iter(range(100))

    def thing(name: str) -> Callable[[], float]:
        def called() -> float:
            calls.append(name)
            return next(numbers)

        return called

    turns = common.alternate(thing("a"), thing("b"), thing("c"), pairs=2, warm_up=1)
    assert "".join(calls) == "abcbcacab"
    assert turns == [(5, 3, 4), (7, 8, 6)]


def test_the_clock_of_the_processor_does_not_count_waiting(common: ModuleType) -> None:
    import time

    waiting = lambda: time.sleep(0.2)  # noqa: E731
    assert common.timed(waiting) < 0.1
    assert common.timed(waiting, wall=True) >= 0.2


RESULTS: dict[str, Any] = {
    "head_only": {
        "date": "2030-01-02",
        "machine": "a processor, 2 threads",
        "load": "0.1",
        "versions": "Python 3.11, torch 2.13, Lightning 2.6",
        "figures": [
            {"claim": "faster", "value": 5.0, "low": 4.0, "high": 6.0, "runs": 5, "goal": ">= 7", "limit": 9.5,
             "unit": "x", "note": "steps are short"},
        ],
    },
}  # fmt: skip


def test_a_table_says_what_was_missed_and_where_it_was_measured(run: ModuleType) -> None:
    lines = run.table(RESULTS, run.BENCHMARKS).splitlines()
    assert lines[2:] == ["| [faster](head_only.py) | 5x (4-6) | 9.50x | >= 7x | missed |"]
    notes = run.footnotes(RESULTS, run.BENCHMARKS)
    assert notes.startswith("- faster: steps are short.")
    assert notes.endswith("Measured: 2030-01-02, a processor, 2 threads, Python 3.11, torch 2.13, Lightning 2.6.")


def test_a_page_is_changed_between_its_marks_only(run: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    for text in ("new", "newer"):
        assert run.write(page, text)
        assert page.read_text() == f"before\n{run.BEGIN}\n\n{text}\n\n{run.END}\nafter\n"
    page.write_text("without marks")
    assert not run.write(page, "new")
    assert page.read_text() == "without marks"


def test_some_benchmarks_run_and_the_other_rows_stay(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HERE", "RESULTS"):
        monkeypatch.setattr(run, name, tmp_path / "benchmarks" / ("" if name == "HERE" else "results.json"))
    (tmp_path / "benchmarks").mkdir()
    marks = f"{run.BEGIN}\n{run.END}\n"
    for page in (tmp_path / "README.md", tmp_path / "benchmarks" / "README.md"):
        page.write_text(marks)
    (tmp_path / "benchmarks" / "results.json").write_text(json.dumps(RESULTS))
    figure = {**RESULTS["head_only"]["figures"][0], "claim": "step", "goal": "<= 7"}
    (tmp_path / "benchmarks" / "ddp_step.py").write_text(f"import json\nprint('hello')\nprint(json.dumps({figure}))\n")
    (tmp_path / "benchmarks" / "lp_ft.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr("sys.argv", ["run.py", "ddp_step", "lp_ft"])
    assert run.main() == 1
    assert sorted(json.loads((tmp_path / "benchmarks" / "results.json").read_text())) == ["ddp_step", "head_only"]
    table = (tmp_path / "benchmarks" / "README.md").read_text()
    assert "| [faster](head_only.py) | 5x (4-6) | 9.50x | >= 7x | missed |" in table
    assert "| [step](ddp_step.py) | 5x (4-6) | 9.50x | <= 7x |  |" in table
    assert "(benchmarks/ddp_step.py)" in (tmp_path / "README.md").read_text()
    said = capsys.readouterr()
    assert "lp_ft: exit status 3" in said.out


def test_unknown_names_are_refused(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "nothing"])
    with pytest.raises(SystemExit):
        run.main()


def test_the_pages_show_what_was_measured(run: ModuleType) -> None:
    results = json.loads(run.RESULTS.read_text(encoding="utf-8"))
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert f"{run.table(results, run.BENCHMARKS)}\n\n{run.footnotes(results, run.BENCHMARKS)}\n\n{run.END}" in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if run.BEGIN in readme:
        assert run.table(results, run.IN_README).replace("](", "](benchmarks/") in readme


def test_every_benchmark_has_its_row(run: ModuleType) -> None:
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"run"}
    alone = {"gradient_watch", "silent_failures"}
    assert {name for name in programs if not name.startswith("_")} - alone == set(run.BENCHMARKS)
    assert set(run.IN_README) <= set(run.BENCHMARKS)


@pytest.fixture
def small(common: ModuleType) -> Iterator[Any]:
    threads = torch.get_num_threads()
    yield common.Options(pairs=1, threads=1, tiny=True, device=torch.device("cpu"))
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # as the programs do, which say their figures and nothing else
@pytest.mark.parametrize(
    "name",
    [
        "gradual_unfreezing",
        "head_only",
        "validation_heavy",
        "lp_ft",
        "dynamic_padding",
        "callback_overhead",
        "ddp_step",
    ],
)
def test_a_benchmark_measures_what_its_row_says(name: str, small: Any, run: ModuleType) -> None:
    figures = list(script(f"benchmarks/{name}.py").figures(small))
    assert figures
    assert all(figure.value > 0 for figure in figures)
    if measured := json.loads(run.RESULTS.read_text(encoding="utf-8")).get(name):
        assert [figure.claim for figure in figures] == [line["claim"] for line in measured["figures"]]
