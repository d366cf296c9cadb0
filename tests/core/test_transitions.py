"""When a phase ends."""

import math

import pytest

from finetuning_scheduler.core.monitor import Patience
from finetuning_scheduler.core.schedule import Phase
from finetuning_scheduler.core.transitions import Moment, Progress, Reason, decide


@pytest.mark.parametrize(
    ("limits", "entered", "now", "reason"),
    [
        pytest.param({}, {}, {"epoch": 99, "step": 999}, None, id="without limits a phase goes on"),
        pytest.param({"max_transition_epoch": 3}, {}, {"epoch": 2}, None, id="before the epoch"),
        pytest.param({"max_transition_epoch": 3}, {}, {"epoch": 3}, Reason.EPOCH, id="at the epoch"),
        pytest.param({"max_transition_epoch": 3}, {}, {"epoch": 7}, Reason.EPOCH, id="after the epoch"),
        pytest.param(
            {"max_transition_epoch": 3},
            {},
            {"epoch": 3, "between_epochs": False},
            None,
            id="the epoch limit counts between epochs only",
        ),
        pytest.param(
            {"max_transition_epoch": 3},
            {"entry_epoch": 3},
            {"epoch": 3},
            None,
            id="entered at its limit, a phase goes on",
        ),
        pytest.param(
            {"max_transition_epoch": 3},
            {"entry_epoch": 5},
            {"epoch": 6},
            Reason.EPOCH,
            id="entered past its limit, a phase lasts one epoch",
        ),
        pytest.param({"max_transition_epoch": 0}, {}, {"epoch": 0}, None, id="limit 0 does not end phase 0 at once"),
        pytest.param({"max_transition_epoch": 0}, {}, {"epoch": 1}, Reason.EPOCH, id="limit 0 is a limit"),
        pytest.param({"max_transition_step": 10}, {}, {"step": 9}, None, id="before the step"),
        pytest.param({"max_transition_step": 10}, {}, {"step": 10}, Reason.STEP, id="at the step"),
        pytest.param(
            {"max_transition_step": 10},
            {},
            {"step": 12, "between_epochs": False},
            Reason.STEP,
            id="the step limit counts inside an epoch",
        ),
        pytest.param(
            {"max_transition_step": 10},
            {"entry_step": 12},
            {"step": 12},
            None,
            id="entered past its step limit, a phase goes on",
        ),
        pytest.param(
            {"max_transition_step": 10},
            {"entry_step": 12},
            {"step": 13},
            Reason.STEP,
            id="entered past its step limit, a phase lasts one step",
        ),
        pytest.param({}, {}, {"out_of_patience": True}, Reason.PATIENCE, id="patience alone"),
        pytest.param(
            {"max_transition_epoch": 9, "max_transition_step": 90},
            {},
            {"epoch": 1, "step": 5, "out_of_patience": True},
            Reason.PATIENCE,
            id="patience before either limit",
        ),
        pytest.param(
            {"max_transition_epoch": 9, "max_transition_step": 10},
            {},
            {"epoch": 1, "step": 10},
            Reason.STEP,
            id="the step before the epoch",
        ),
        pytest.param(
            {"max_transition_epoch": 1, "max_transition_step": 10},
            {},
            {"epoch": 1, "step": 5},
            Reason.EPOCH,
            id="the epoch before the step",
        ),
    ],
)
def test_phase_ends(
    limits: dict[str, int], entered: dict[str, int], now: dict[str, int], reason: Reason | None
) -> None:
    present = {"epoch": 0, "step": 0, "between_epochs": True} | now
    decision = decide(Phase(params=("weight",), **limits), Progress(**entered), Moment(**present))
    assert decision.reason is reason
    assert decision.advance is (reason is not None)


@pytest.mark.parametrize(
    ("options", "scores", "improvements", "exhausted"),
    [
        pytest.param({"limit": 2}, [3, 2, 1], "+++", "...", id="lower is better"),
        pytest.param({"limit": 2, "mode": "max"}, [1, 2, 3], "+++", "...", id="higher is better"),
        pytest.param({"limit": 2}, [1, 2, 3, 0.5], "+--+", "..x.", id="an improvement restarts the count"),
        pytest.param({"limit": 1}, [1, 1], "+-", ".x", id="the same score is no improvement"),
        pytest.param({"limit": 1, "min_delta": 0.5}, [2, 1.5, 1.25], "+-+", ".x.", id="by min_delta is not enough"),
        pytest.param(
            {"limit": 1, "min_delta": 0.5, "mode": "max"}, [1, 1.5, 1.75], "+-+", ".x.", id="min_delta upwards"
        ),
        pytest.param({"limit": 0}, [1, 0.5, 1], "++-", "..x", id="no patience ends at the first miss, not before"),
        pytest.param({"limit": 2, "best": 1.0}, [2, 2], "--", ".x", id="a best score carried over must be beaten"),
        pytest.param({"limit": 1}, [1, math.nan], "+-", ".x", id="nan is no improvement"),
    ],
)
def test_patience_counts_checks_without_improvement(
    options: dict[str, float], scores: list[float], improvements: str, exhausted: str
) -> None:
    patience = Patience(**options)
    seen_improvements = seen_exhausted = ""
    for score in scores:
        seen_improvements += "+" if patience.update(score) else "-"
        seen_exhausted += "x" if patience.exhausted else "."
    assert seen_improvements == improvements
    assert seen_exhausted == exhausted


def test_patience_remembers_the_best_score() -> None:
    patience = Patience(limit=5, mode="max")
    for score in (1.0, 4.0, 2.0):
        patience.update(score)
    assert patience.best == 4.0
    assert patience.waited == 1
