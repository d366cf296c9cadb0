"""The support matrix: ways to train, what each is combined with, and the test that shows it.

``python -m tests.support.matrix`` writes the page in the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "support_matrix.md"


class Status(Enum):
    """What becomes of a combination: symbol and word, or a word."""

    SUPPORTED = "✓ yes"
    REFUSED = "✗ refused"
    ABSENT = "none"


@dataclass(frozen=True)
class Cell:
    """A combination.

    Args:
        status: What becomes of it.
        tests: Node ids of the tests that show it.
        note: Key of the footnote.
    """

    status: Status
    tests: tuple[str, ...] = ()
    note: str = ""


ALONE, RUNNER, RUNNER_DDP = "one device", "PhaseRunner", "PhaseRunner and DDP"
DDP, UNUSED, FSDP, FLAT = "ddp", "ddp find_unused_parameters", "fsdp", "fsdp use_orig_params=False"
FSDP2, TENSOR, MESH = "fsdp2", "tensor parallel", "2-d mesh"

WAYS = {
    ALONE: "one device",
    DDP: "DDP",
    UNUSED: "DDP, `find_unused_parameters`",
    FSDP: "FSDP",
    FLAT: "FSDP, `use_orig_params=False`",
    FSDP2: "FSDP2",
    TENSOR: "tensor parallel",
    MESH: "FSDP2 and tensor parallel",
    RUNNER: "`PhaseRunner`",
    RUNNER_DDP: "`PhaseRunner`, DDP",
}
SHARDED = (FSDP, FLAT, FSDP2, TENSOR, MESH)
PLAIN_AND_DISTRIBUTED = (TENSOR, MESH)
RUNNERS = (RUNNER, RUNNER_DDP)

FEATURES = {
    "schedule": "explicit schedule, limits by epoch and by step",
    "generated schedule": "generated schedule",
    "restored best": "`restore_best`",
    "resumed": "resumed in each phase",
    "sharded checkpoints": "sharded checkpoints",
    "slim checkpoints": "checkpoints that leave out what is frozen, restored",
    "transitions inside an epoch": "`intra_epoch_transitions`",
    "no_decay": "`no_decay`",
    "lr_decay": "`lr_decay`",
    "warm-up": "`lr_warmup_steps`",
    "LR scheduler by epoch": "LR scheduler by epoch",
    "LR scheduler by step": "LR scheduler by step",
    "ReduceLROnPlateau": "`ReduceLROnPlateau`",
    "new optimizer": "`new_optimizer` in a phase",
    "new LR scheduler": "`new_lr_scheduler` in a phase",
    "accumulation": "gradients accumulated",
    "clipping by norm": "gradients clipped by norm",
    "clipping by value": "gradients clipped by value",
    "bf16-mixed": "`bf16-mixed`",
    "torch.compile": "layers compiled in place (`layer.compile()`)",
    "frozen modules in eval mode": '`frozen_modules_mode="eval"`',
    "averaged weights": "`EMAWeightAveraging`",
}

NOTES = {
    "whole": "The message: *expected a checkpoint of all parameters, since a sharded model is restored whole*. It "
    "comes at the first transition that restores, since only then it is known what a file holds. With "
    "`restore_best=False` any file may be saved.",
    "flat-decay": "The message: *expected no `no_decay` list with FSDP's use_orig_params=False, which merges "
    "parameters*.",
    "norm": "The message: *expected gradients clipped by value, the only way in Lightning's FSDPStrategy, got by "
    "norm*. With `configure_gradient_clipping` overridden as the page on [FSDP](strategies/fsdp.md) shows, it works.",
    "kinds": "The message: *expected gradients that can be clipped together, got those of plain tensors or of several "
    "meshes beside distributed ones*; here some layers are left plain or are sharded over one dimension only. The page "
    "on [tensor parallel](strategies/tensor_parallel.md) shows the method to override.",
    "averaging": "The message: *expected no WeightAveraging with ..., since Lightning cannot average shards*. Listed "
    "before `FinetuningScheduler`, the callback copies the module of a `ModelParallelStrategy` first, which PyTorch "
    "refuses by itself.",
    "replicated": "There are no shards: every process holds the whole model.",
    "own-saving": "The runner keeps the best state in memory; what your loop saves is up to it.",
    "own-validation": "Your loop calls `epoch_end`, whenever it has validated.",
    "own-average": "The runner knows no callbacks; an average is up to your loop.",
}

# What a refused run says.
MESSAGES = {
    "whole": "expected a checkpoint of all parameters, since a sharded model is restored whole, got ",
    "flat-decay": "expected no `no_decay` list with FSDP's use_orig_params=False, which merges parameters, got one. ",
    "norm": "expected gradients clipped by value, the only way in Lightning's FSDPStrategy, got by norm. ",
    "kinds": "expected gradients that can be clipped together, got those of plain tensors or of several meshes beside "
    "distributed ones. ",
    "averaging": "since Lightning cannot average shards, got EMAWeightAveraging. Fix: Drop the callback, or use DDP.",
}
REFUSED: dict[tuple[str, str], str] = {
    **{(way, "slim checkpoints"): "whole" for way in SHARDED},
    **{(way, "averaged weights"): "averaging" for way in SHARDED},
    (FLAT, "no_decay"): "flat-decay",
    **{(way, "clipping by norm"): "norm" for way in (FSDP, FLAT)},
    **{(way, f"clipping by {kind}"): "kinds" for way in PLAIN_AND_DISTRIBUTED for kind in ("norm", "value")},
}
ABSENT: dict[tuple[str, str], str] = {
    **{(way, "sharded checkpoints"): "replicated" for way in (ALONE, DDP, UNUSED, *RUNNERS)},
    **{(way, "slim checkpoints"): "own-saving" for way in RUNNERS},
    **{(way, "transitions inside an epoch"): "own-validation" for way in RUNNERS},
    **{(way, "averaged weights"): "own-average" for way in RUNNERS},
}

STRATEGIES = "tests/distributed/test_strategies.py"
WHOLE_RUN = f"{STRATEGIES}::test_ranks_together_equal_one_device_and_resume_in_each_phase"
CASE_OF = {
    DDP: "ddp adamw",
    UNUSED: "ddp find_unused_parameters",
    FSDP: "fsdp",
    FLAT: "fsdp use_orig_params=False",
    FSDP2: "fsdp2 adamw",
    TENSOR: "tensor parallel",
    MESH: "2-d mesh",
}
EQUIVALENCE, CONFIGURATIONS = "tests/lightning/test_equivalence.py", "tests/lightning/test_configurations.py"
AS_USERS = "tests/lightning/test_user_configurations.py::test_a_schedule_as_users_have_it"
LOOP = "tests/core/test_loop.py"
SLIM = "tests/programs_optimizers/test_slim_checkpoints.py"
# Combinations that other tests show; `tests/distributed/test_combinations.py` shows all others.
ELSEWHERE: dict[tuple[str, str], tuple[str, ...]] = {
    **{
        (way, feature): (f"{WHOLE_RUN}[{case}-True]",)
        for way, case in CASE_OF.items()
        for feature in ("schedule", "restored best", "resumed")
    },
    **{(way, "sharded checkpoints"): (f"{WHOLE_RUN}[{CASE_OF[way]}-True]",) for way in (FLAT, FSDP2, TENSOR, MESH)},
    (FSDP, "sharded checkpoints"): (f"{WHOLE_RUN}[fsdp sgd, sharded checkpoints-True]",),
    **{
        (way, feature): (f"{STRATEGIES}::test_the_best_checkpoint_of_another_optimizer_is_restored[{way}]",)
        for way in (DDP, FSDP, FLAT, FSDP2, TENSOR)
        for feature in ("new optimizer", "new LR scheduler")
    },
    **{
        (way, "accumulation"): (f"{STRATEGIES}::test_gradients_can_be_accumulated[{way}]",)
        for way in (DDP, FSDP, FLAT, FSDP2, TENSOR)
    },
    (FSDP, "no_decay"): (
        "tests/distributed/test_fsdp.py::test_no_decay_is_right_with_original_parameters_and_refused_without",
    ),
    (FSDP, "clipping by value"): ("tests/distributed/test_fsdp.py::test_gradients_can_be_clipped[value]",),
    (FSDP2, "clipping by norm"): (
        "tests/distributed/test_model_parallel.py::test_gradients_that_are_all_distributed_can_be_clipped",
    ),
    (ALONE, "schedule"): (f"{EQUIVALENCE}::test_schedule[mixed-adamw-epoch-restore]",),
    (ALONE, "generated schedule"): (f"{EQUIVALENCE}::test_implicit_mode_thaws_pairs_from_the_last_layer_to_the_first",),
    (ALONE, "restored best"): (f"{EQUIVALENCE}::test_schedule[early-stopping-adamw-constant-restore]",),
    (ALONE, "resumed"): ("tests/lightning/test_resume.py::test_resuming_from_any_moment",),
    (ALONE, "slim checkpoints"): (f"{SLIM}::test_a_fit_with_slim_checkpoints_is_the_fit_with_whole_ones",),
    (ALONE, "transitions inside an epoch"): (f"{CONFIGURATIONS}::test_transitions_inside_an_epoch",),
    (ALONE, "no_decay"): (f"{EQUIVALENCE}::test_no_decay_parameters_get_a_group_of_their_own",),
    (ALONE, "warm-up"): ("tests/lightning/test_reinitialisation.py::test_warm_up_scales_what_the_optimizer_sees",),
    (ALONE, "LR scheduler by epoch"): (f"{EQUIVALENCE}::test_lr_scheduler[mixed-StepLR-restore]",),
    (ALONE, "LR scheduler by step"): (f"{EQUIVALENCE}::test_schedule[mixed-adamw-step-restore]",),
    (ALONE, "ReduceLROnPlateau"): (f"{EQUIVALENCE}::test_lr_scheduler[mixed-ReduceLROnPlateau-restore]",),
    (ALONE, "new optimizer"): (
        "tests/lightning/test_reinitialisation.py::test_learning_rates_when_a_phase_installs_something",
        "tests/lightning/test_optimizers.py::test_as_a_phases_optimizer",
        f"{AS_USERS}[optimizers from present learning rates]",
    ),
    (ALONE, "new LR scheduler"): (
        "tests/lightning/test_reinitialisation.py::test_what_a_phase_installs_stays_in_force_until_replaced",
        "tests/lightning/test_reinitialisation.py::test_pl_lrs_cfg_is_honoured",
        f"{AS_USERS}[optimizers from present learning rates]",
    ),
    (ALONE, "accumulation"): (f"{EQUIVALENCE}::test_gradient_accumulation",),
    (ALONE, "frozen modules in eval mode"): (f"{CONFIGURATIONS}::test_the_mode_of_frozen_modules[eval]",),
    (ALONE, "averaged weights"): (
        "tests/programs/test_weight_averaging.py::test_the_average_of_the_end_is_the_one_worked_out_by_hand[ema]",
        "tests/programs/test_weight_averaging.py::test_a_transition_brings_back_what_the_best_file_holds",
    ),
    (RUNNER, "schedule"): (f"{LOOP}::test_trains_like_the_reference_loop[whichever comes first-StepLR-AdamW]",),
    (RUNNER, "restored best"): (
        f"{LOOP}::test_trains_like_the_reference_loop[epoch limits, best in phase 0-StepLR-AdamW]",
    ),
    (RUNNER, "resumed"): (f"{LOOP}::test_a_run_resumed_after_any_epoch_ends_like_the_uninterrupted_one",),
    (RUNNER, "no_decay"): (f"{LOOP}::test_trains_like_the_reference_loop[no decay-StepLR-AdamW]",),
    (RUNNER, "LR scheduler by epoch"): (f"{LOOP}::test_trains_like_the_reference_loop[patience-StepLR-AdamW]",),
    (RUNNER, "warm-up"): (
        "tests/core/optim/test_warmup.py::test_the_optimizer_sees_the_ramp_and_the_schedulers_do_not",
    ),
}
# What works after all, where a feature is refused.
OVERRIDDEN: dict[tuple[str, str], tuple[str, ...]] = {
    (FSDP, "clipping by norm"): ("tests/distributed/test_fsdp.py::test_gradients_can_be_clipped[by itself]",),
    (TENSOR, "clipping by norm"): (
        "tests/distributed/test_pages.py::test_a_page_trains_what_one_device_would[tensor parallel, clipped]",
    ),
    (TENSOR, "clipping by value"): (
        "tests/distributed/test_model_parallel.py::test_gradients_can_be_clipped_group_by_group",
    ),
}

COMBINATIONS = "tests/distributed/test_combinations.py"


def cell(way: str, feature: str) -> Cell:
    """Tell what becomes of a combination."""
    pair = (way, feature)
    if pair in ABSENT:
        return Cell(Status.ABSENT, note=ABSENT[pair])
    if pair in REFUSED:
        test = f"{COMBINATIONS}::test_it_is_refused[{way}-{feature}]"
        return Cell(Status.REFUSED, (test, *OVERRIDDEN.get(pair, ())), REFUSED[pair])
    here = f"{COMBINATIONS}::test_it_trains_what_one_device_would[{way}-{combined(feature)}]"
    return Cell(Status.SUPPORTED, ELSEWHERE.get(pair, (here,)))


def combined(feature: str) -> str:
    """Name the run that shows a feature; a schedule with limits of both kinds is the one that is resumed."""
    return "resumed" if feature == "schedule" else feature


def to_combine(*, refused: bool) -> list[tuple[str, str]]:
    """List the combinations that `tests/distributed/test_combinations.py` has to show."""
    pairs = [(way, feature) for way in WAYS for feature in FEATURES if (way, feature) not in ABSENT]
    if refused:
        return [pair for pair in pairs if pair in REFUSED]
    shown = [(way, combined(f)) for way, f in pairs if (way, f) not in REFUSED and (way, f) not in ELSEWHERE]
    return list(dict.fromkeys(shown))


# --- the page --------------------------------------------------------------------------------------------------------

HEAD = """# What combines with what

Every cell is shown by a test, of which the second table has the name: `python -m pytest 'NAME'` runs it.

- **✓ yes**: phases, parameter groups, learning rates and, up to rounding, weights of a run on several ranks are those
  of the run on one device. What one device does is compared with a plain loop written without this package or with
  values worked out by hand; some features that the plain loop does not have, with `PhaseRunner` in a loop of its own.
- **✗ refused**: an error says why and what to do instead; the footnote has the message.
- **none**: there is no such thing here; the footnote says why.

The tests train small networks, in 2 processes on CPUs (4 for FSDP2 and tensor parallel) where there are several. GPUs
take part in none of them.
"""


def render() -> str:
    """Write the page."""
    return "\n".join([HEAD, *_table(), "", *_footnotes(), "", "## The test of each cell", "", *_tests()]) + "\n"


def _table() -> Iterator[str]:
    yield f"| | {' | '.join(WAYS.values())} |"
    yield "|---" * (len(WAYS) + 1) + "|"
    for feature, title in FEATURES.items():
        yield f"| {title} | {' | '.join(_text(cell(way, feature)) for way in WAYS)} |"


def _text(one: Cell) -> str:
    return one.status.value + (f" [^{one.note}]" if one.note else "")


def _footnotes() -> Iterator[str]:
    for key, text in NOTES.items():
        yield f"[^{key}]: {text}"


def _tests() -> Iterator[str]:
    yield "| what | with | | test |"
    yield "|---|---|---|---|"
    for feature, title in FEATURES.items():
        for way, name in WAYS.items():
            one = cell(way, feature)
            if one.tests:
                yield f"| {title} | {name} | {one.status.value} | {'<br>'.join(f'`{test}`' for test in one.tests)} |"


def cells() -> Mapping[tuple[str, str], Cell]:
    """All combinations."""
    return {(way, feature): cell(way, feature) for way in WAYS for feature in FEATURES}


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
