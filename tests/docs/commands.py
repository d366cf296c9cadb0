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


SST2 = "--train-rows 2000 --threads 1 --max-epochs 60 --batch-size 32"
SUPERGLUE = "tests/examples/test_superglue.py"
MODEL_PARALLEL = "tests/examples/test_model_parallel.py::test_a_command_goes_through_all_phases_and_ends"
WORKFLOW = ".github/workflows/ci.yml"

# The command as the pages have it: a test, a step of continuous integration, or a function that executes it.
COMMANDS: dict[str, str | Step | Callable[[], None]] = {
    "make demo": Step("make demo"),
    "make test": Step("make test"),
    "make venv": Step("      - run: make venv PYTHON=python", WORKFLOW),
    "make docs": Step("make docs"),
    "make faults": "tests/faults/test_disks.py::test_runs_killed_at_random_moments_are_resumed_bitwise",
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
    "python -m fts_examples.lp_ft --data DIR --train-rows 640 --test-rows 872 --threads 1 --output OUTPUT": (
        "tests/examples/test_lp_ft.py::test_the_command_of_the_page_runs"
    ),
    f"python -m fts_examples.text_classification --data DIR {SST2}": (
        "tests/examples/test_text_classification.py::test_the_command_of_the_study_runs"
    ),
    "python -m pytest 'NAME'": "tests/test_support_matrix.py::test_the_tests_that_it_names_are_there",
    "python fts_superglue.py fit --config config/nofts_baseline.yaml": (
        f"{SUPERGLUE}::test_the_first_commands_run_as_written"
    ),
    "python fts_superglue.py fit --config config/fts_implicit.yaml": (
        f"{SUPERGLUE}::test_the_first_commands_run_as_written"
    ),
    "python fts_superglue.py fit --config config/fts_explicit.yaml": (
        f"{SUPERGLUE}::test_the_first_commands_run_as_written"
    ),
    "python fts_superglue.py fit --config config/fts_explicit.yaml --data.init_args.data_dir=SuperGLUE "
    "--model.init_args.model_name_or_path=deberta-v3-base": f"{SUPERGLUE}::test_local_data_and_a_local_model_are_taken",
    "python fts_superglue.py fit --config config/fts_explicit.yaml --model.init_args.task_name=boolq": (
        f"{SUPERGLUE}::test_boolq_is_trained_if_the_model_names_it"
    ),
    "python fts_superglue.py fit --config config/fts_implicit.yaml --trainer.callbacks.gen_ft_sched_only=true": (
        f"{SUPERGLUE}::test_a_schedule_is_written_to_begin_with"
    ),
    "python mp_examples.py fit --config config/fts_fsdp_auto_plan.yaml": MODEL_PARALLEL,
    "python mp_examples.py fit --config config/fts_fsdp_profiling.yaml": MODEL_PARALLEL,
    "python mp_examples.py fit --config config/fts_tp_plan.yaml": MODEL_PARALLEL,
    **dict.fromkeys(
        [
            "fts new bert.safetensors --phase head --phase 'last 4' --phase rest -o schedule.yaml",
            "fts new bert.safetensors --heuristic layer-wise -o layer_wise.yaml",
            "fts check mistaken.yaml bert.safetensors",
            r"fts params bert.safetensors 'bert.encoder.layer.1[01]\..*LayerNorm.*'",
            "fts diff schedule.yaml layer_wise.yaml bert.safetensors",
            "fts check schedule.yaml bert.safetensors --json",
            "fts plan schedule.yaml bert.safetensors --precision bf16-mixed",
            "fts lr schedule.yaml bert.safetensors --epochs 6 --phase-epochs 2 --lr-scheduler ExponentialLR "
            "--lr-scheduler-init gamma=0.9",
        ],
        "tests/cli/test_page.py::test_the_page_shows_what_its_commands_print",
    ),
    **dict.fromkeys(
        ["fts check", "fts diff", "fts merge", "fts new", "fts params"],
        "tests/cli/test_command.py::test_help_has_examples_and_exit_statuses",
    ),
    "python -m finetuning_scheduler": "tests/cli/test_command.py::test_the_module_is_the_command",
}
