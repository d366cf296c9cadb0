"""What each phase will do, computed before anything is trained."""

import pytest
from torch import nn

from finetuning_scheduler.core.plan import GroupRules, Plan
from finetuning_scheduler.core.schedule import Schedule
from finetuning_scheduler.core.view import ModelView

LAYERS = ("head", "middle", "first")


def make_plan(
    *limits: dict[str, float], default_lr: float = 0.5, no_decay: tuple[str, ...] = (), max_depth: int = -1
) -> Plan:
    """Plan one layer of 2 * 2 weights and 2 biases to a phase; an unscheduled layer of 2 is left."""
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in LAYERS} | {"rest": nn.Linear(1, 1)})
    phases = {
        number: {"params": [f"{layer}.weight", f"{layer}.bias"]} | options
        for number, (layer, options) in enumerate(zip(LAYERS, limits, strict=False))
    }
    return Plan.of(
        Schedule.parse(phases),
        ModelView.of(model).sizes,
        GroupRules(default_lr, no_decay),
        max_depth=max_depth,
    )


def test_a_phase_adds_one_group_with_its_own_learning_rate_or_the_default() -> None:
    plan = make_plan({}, {"lr": 0.125}, {})
    assert [group.lr for phase in plan.phases[1:] for group in phase.new_groups] == [0.125, 0.5]
    assert [phase.limits.params for phase in plan.phases] == [(f"{layer}.weight", f"{layer}.bias") for layer in LAYERS]


def test_no_decay_splits_a_phase_in_two_groups_that_share_its_learning_rate() -> None:
    decays, exempt = make_plan({}, {"lr": 0.125}, no_decay=("bias",)).phases[1].new_groups
    assert decays.names == ("middle.weight",)
    assert dict(decays.options) == {}
    assert exempt.names == ("middle.bias",)
    assert dict(exempt.options) == {"weight_decay": 0.0}
    assert decays.lr == exempt.lr == 0.125


@pytest.mark.parametrize("fragments", [("nowhere",), ("middle",)], ids=["none is exempt", "all are exempt"])
def test_no_decay_adds_no_empty_group(fragments: tuple[str, ...]) -> None:
    (group,) = make_plan({}, {}, no_decay=fragments).phases[1].new_groups
    assert group.names == ("middle.weight", "middle.bias")


@pytest.mark.parametrize(("max_depth", "last"), [(-1, 2), (0, 0), (1, 1), (2, 2), (9, 2)])
def test_max_depth_cuts_the_plan(max_depth: int, last: int) -> None:
    plan = make_plan({}, {}, {}, max_depth=max_depth)
    assert plan.last_phase == last
    assert len(plan.phases) == last + 1


def test_trainable_parameters_add_up_over_phases() -> None:
    plan = make_plan({}, {}, {})
    assert [plan.phases[phase].trainable_count for phase in range(3)] == [6, 12, 18]
    assert plan.model_parameter_count == 20


def epochs(*limits: int) -> list[dict[str, int]]:
    return [{"max_transition_epoch": limit} for limit in limits]


def steps(*limits: int) -> list[dict[str, int]]:
    return [{"max_transition_step": limit} for limit in limits]


@pytest.mark.parametrize(
    ("limits", "overdue"),
    [
        (epochs(1, 2, 3), []),
        (epochs(-1, -1, -1), []),
        (epochs(3, 3, 4), [1]),
        (epochs(3, -1, 2), [2]),
        (epochs(4, 1, 2), [1, 2]),
        (epochs(0, 0), [1]),
    ],
)
def test_phases_whose_epoch_limit_is_past_on_entry_are_overdue(
    limits: list[dict[str, int]], overdue: list[int]
) -> None:
    assert make_plan(*limits).overdue_phases() == overdue


@pytest.mark.parametrize(
    ("limits", "ceilings", "unreachable"),
    [
        pytest.param(epochs(2, 4, -1), {"max_epochs": 5}, [], id="in reach"),
        pytest.param(epochs(2, 4, -1), {"max_epochs": 4}, [2], id="the last epoch ends where the phase would begin"),
        pytest.param(epochs(2, 4, -1), {"max_epochs": 2}, [1, 2], id="the phases after an unreachable one too"),
        pytest.param(epochs(2, 4, -1), {"max_epochs": -1}, [], id="-1 is no ceiling"),
        pytest.param(epochs(2, 4, -1), {"max_epochs": None}, [], id="None is no ceiling"),
        pytest.param(epochs(2, 4, 9), {"max_epochs": 5}, [], id="the last phase's own limit enters no phase"),
        pytest.param(epochs(-1, -1, -1), {"max_epochs": 1}, [], id="phases that end by patience are not judged"),
        pytest.param(epochs(-1, 4, -1), {"max_epochs": 3}, [2], id="after a phase that ends by patience"),
        pytest.param(steps(10, 20), {"max_steps": 11}, [], id="steps in reach"),
        pytest.param(steps(10, 20), {"max_steps": 10}, [1], id="steps out of reach"),
        pytest.param(steps(10, 20), {"max_epochs": 1}, [], id="steps are not judged by epochs"),
        pytest.param(
            [{"max_transition_epoch": 9, "max_transition_step": 10}, {}],
            {"max_epochs": 5, "max_steps": 20},
            [],
            id="one limit in reach is enough",
        ),
        pytest.param(
            [{"max_transition_epoch": 9, "max_transition_step": 30}, {}],
            {"max_epochs": 5, "max_steps": 20},
            [1],
            id="both limits out of reach",
        ),
        pytest.param(
            epochs(3, 2, -1), {"max_epochs": 4}, [2], id="an overdue phase lasts one epoch, 3 to 4, before the next"
        ),
    ],
)
def test_phases_beyond_a_ceiling_are_named(
    limits: list[dict[str, int]], ceilings: dict[str, int], unreachable: list[int]
) -> None:
    assert make_plan(*limits).unreachable_phases(**ceilings) == unreachable
