"""Which test executes which command of the documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from typer.testing import CliRunner

from fts_examples import digits


@dataclass(frozen=True)
class Step:
    """A line of a file that continuous integration executes."""

    command: str
    file: str = ".ci/run"


def digits_help() -> None:
    result = CliRunner().invoke(digits.app, ["--help"])
    assert result.exit_code == 0
    assert "--patience" in result.output


WORKFLOW = ".github/workflows/ci.yml"

# The command as the pages have it: a test, a step of continuous integration, or a function that executes it.
COMMANDS: dict[str, str | Step | Callable[[], None]] = {
    "make demo": Step("make demo"),
    "make test": Step("make test"),
    "make venv": Step("      - run: make venv PYTHON=python", WORKFLOW),
    "make docs": Step("make docs"),
    "python benchmarks/silent_failures.py": (
        "tests/docs/test_measured.py::test_what_fails_silently_without_a_schedule_does_not_with_one"
    ),
    "python docs/pictures/make_run_picture.py": (
        "tests/docs/test_measured.py::test_the_picture_shows_the_demo_s_schedule"
    ),
    "python -m fts_examples.digits --help": digits_help,
    "python -m pytest tests/core/test_gradients.py -k compiled": (
        "tests/core/test_gradients.py::test_a_compiled_model_is_judged_too"
    ),
    "python -m fts_examples.text_classification --data DIR": (
        "tests/examples/test_text_classification.py::test_all_ways_are_compared"
    ),
    "python train.py": "tests/distributed/test_pages.py::test_a_page_trains_what_one_device_would",
}
