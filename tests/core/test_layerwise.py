"""Layer-wise learning rates: each group's is the phase's, times the decay to the power of its block's distance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from finetuning_scheduler.core import PhaseRunner, generate, resolve

LR = 0.1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


class Model(nn.Module):
    """Blocks from the output: the head is 0, ``layers.3`` is 1, ..., ``layers.0`` is 4, the embedding is 5."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 2)
        self.layers = nn.ModuleList([Block() for _ in range(4)])
        self.head = nn.Linear(2, 1)


def layer(number: int) -> tuple[str, ...]:
    names = ("linear.weight", "linear.bias", "norm.weight", "norm.bias")
    return tuple(f"layers.{number}.{name}" for name in names)


def split(number: int) -> list[tuple[str, ...]]:
    """A layer's parameters with and without weight decay."""
    linear_weight, *others = layer(number)
    return [(linear_weight,), tuple(others)]


EMBEDDING = ("embedding.weight",)
NO_DECAY = ("bias", "norm")


@dataclass(frozen=True)
class Case:
    """What phases 1, 2, ... say, and the names and learning rates of the groups that they add."""

    phases: list[dict[str, Any]]
    groups: list[list[tuple[tuple[str, ...], float]]]
    rates: str  # of the last phase, as the plan shows them
    options: dict[str, Any] = field(default_factory=dict)

    def schedule(self) -> dict[int, dict[str, Any]]:
        return dict(enumerate([{"params": ["head.*"]}, *self.phases]))


CASES = {
    "one-block": Case(
        [{"params": ["layers.3.*"], "lr": LR, "lr_decay": 0.5}],
        [[(layer(3), LR)]],
        "[0.1]",
    ),
    "the-rest-at-once": Case(
        [{"params": ["layers.*", "embedding.*"], "lr": LR, "lr_decay": 0.5}],
        [
            [
                (layer(3), LR),
                (layer(2), LR * 0.5),
                (layer(1), LR * 0.5**2),
                (layer(0), LR * 0.5**3),
                (EMBEDDING, LR * 0.5**4),
            ]
        ],
        "[0.1, 0.05, 0.025, 0.0125, 0.00625]",
    ),
    "min-scale": Case(
        [{"params": ["layers.*", "embedding.*"], "lr": LR, "lr_decay": 0.5, "lr_decay_min_scale": 0.2}],
        [
            [
                (layer(3), LR),
                (layer(2), LR * 0.5),
                (layer(1), LR * 0.5**2),
                (layer(0), LR * 0.2),
                (EMBEDDING, LR * 0.2),
            ]
        ],
        "[0.1, 0.05, 0.025, 0.02, 0.02]",
    ),
    "distance-from-the-phases-own-top": Case(
        [
            {"params": ["layers.3.*", "layers.2.*"], "lr": LR, "lr_decay": 0.8},
            {"params": ["layers.1.*", "layers.0.*"], "lr": 0.01, "lr_decay": 0.9},
        ],
        [[(layer(3), LR), (layer(2), LR * 0.8)], [(layer(1), 0.01), (layer(0), 0.01 * 0.9)]],
        "[0.01, 0.009]",
    ),
    "a-gap-counts": Case(
        [{"params": ["layers.3.*", "layers.0.*"], "lr": LR, "lr_decay": 0.5}],
        [[(layer(3), LR), (layer(0), LR * 0.5**3)]],
        "[0.1, 0.0125]",
    ),
    "parts-of-blocks-in-any-order": Case(
        [{"params": ["layers.1.norm.bias", "layers.2.linear.weight", "layers.1.linear.bias"], "lr_decay": 0.5}],
        [[(("layers.2.linear.weight",), 0.25), (("layers.1.norm.bias", "layers.1.linear.bias"), 0.125)]],
        "[0.25, 0.125]",
        {"base_max_lr": 0.25},
    ),
    "rate-of-phase-0": Case(
        [{"params": ["layers.2.*", "layers.1.*"], "lr_decay": 0.5}],
        [[(layer(2), 0.5), (layer(1), 0.25)]],
        "[0.5, 0.25]",
        {"base_max_lr": None},
    ),
    "decay-of-one": Case(
        [{"params": ["layers.1.*", "layers.0.*"], "lr": LR, "lr_decay": 1.0}],
        [[(layer(1), LR), (layer(0), LR)]],
        "[0.1, 0.1]",
    ),
    "no-decay-no-split": Case(
        [{"params": ["layers.1.*", "layers.0.*"], "lr": LR, "lr_decay_min_scale": 0.5}],
        [[((*layer(1), *layer(0)), LR)]],
        "[0.1]",
    ),
    "with-no_decay": Case(
        [{"params": ["layers.1.*", "layers.0.*", "embedding.*"], "lr": LR, "lr_decay": 0.5}],
        [
            [
                *((names, LR) for names in split(1)),
                *((names, LR * 0.5) for names in split(0)),
                (EMBEDDING, LR * 0.25),
            ]
        ],
        "[0.1, 0.1, 0.05, 0.05, 0.025]",
        {"no_decay": NO_DECAY},
    ),
}


def runner_of(case: Case) -> PhaseRunner:
    model = Model()
    optimizer = AdamW(model.head.parameters(), lr=0.5, weight_decay=0.01)
    return PhaseRunner(model, optimizer, case.schedule(), **case.options)


def test_the_blocks_of_the_model() -> None:
    blocks = [set(phase.params) for phase in generate(Model(), "blocks").phases]
    layers = [set(layer(number)) for number in (3, 2, 1, 0)]
    assert blocks == [{"head.weight", "head.bias"}, *layers, set(EMBEDDING)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_plan_says_each_groups_learning_rate(case: Case) -> None:
    planned = runner_of(case).plan.phases[1:]
    assert [[(group.names, group.lr) for group in phase.new_groups] for phase in planned] == case.groups


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_plan_shows_them(case: Case) -> None:
    plan = runner_of(case).plan
    share = plan.phases[plan.last_phase].trainable_count / plan.model_parameter_count
    expected = f"Phase {plan.last_phase}: {share:.2%} of the parameters trainable, "
    assert plan.lines()[-1] == f"{expected}adds groups at learning rates {case.rates}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_optimizer_gets_the_planned_groups(case: Case) -> None:
    runner = runner_of(case)
    runner.thaw_to(runner.plan.last_phase)
    name_of = {parameter: name for name, parameter in runner.model.named_parameters()}
    expected = [group for groups in case.groups for group in groups]
    added = runner.optimizer.param_groups[-len(expected) :]
    assert [(tuple(name_of[p] for p in group["params"]), group["lr"]) for group in added] == expected
    assert [group["initial_lr"] for group in added] == [lr for _, lr in expected]


def test_groups_without_weight_decay_are_those_of_no_decay() -> None:
    runner = runner_of(CASES["with-no_decay"])
    runner.thaw_to(1)
    name_of = {parameter: name for name, parameter in runner.model.named_parameters()}
    for group in runner.optimizer.param_groups[1:]:
        for parameter in group["params"]:
            exempt = any(fragment in name_of[parameter] for fragment in NO_DECAY)
            assert group["weight_decay"] == (0.0 if exempt else 0.01), name_of[parameter]


def test_a_model_without_repeated_blocks_decays_by_pairs() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 1))
    phases = {0: {"params": ["2.*"]}, 1: {"params": ["1.*", "0.*"], "lr": LR, "lr_decay": 0.5}}
    runner = PhaseRunner(model, SGD(model[2].parameters(), lr=0.5), phases)
    groups = runner.plan.phases[1].new_groups
    assert [(group.names, group.lr) for group in groups] == [
        (("1.weight", "1.bias"), LR),
        (("0.weight", "0.bias"), LR * 0.5),
    ]


@pytest.mark.parametrize(("key", "value"), [("lr_decay", 0.5), ("lr_decay_min_scale", 0.5)])
def test_dropped_in_phase_0(key: str, value: float) -> None:
    resolution = resolve({0: {"params": ["head.*"], key: value}}, Model())
    assert list(resolution.warnings) == [
        f"phase 0: `{key}` is dropped: the initial optimizer sets the learning rate of phase 0"
    ]


def test_training_uses_them() -> None:
    """With gradients of one, plain SGD moves each parameter by its learning rate."""
    case = CASES["min-scale"]
    model = Model()
    runner = PhaseRunner(model, SGD(model.head.parameters(), lr=0.5), case.schedule())
    runner.thaw_to(1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    runner.optimizer.step()
    for names, lr in case.groups[0]:
        for name in names:
            torch.testing.assert_close(model.get_parameter(name).detach(), before[name] - lr)
