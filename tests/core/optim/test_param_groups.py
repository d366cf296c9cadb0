"""Groups by parameter name, and LR schedulers that keep up with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler

from finetuning_scheduler.core.optim.param_groups import (
    PlannedGroup,
    add_groups,
    arrange,
    group_names,
    learning_rates,
)
from finetuning_scheduler.core.optim.states import reorder_groups, state_by_name, with_state
from finetuning_scheduler.errors import CheckpointError


def halve(_: int) -> float:
    return 0.5


def inverse(epoch: int) -> float:
    return 1 / (1 + epoch)


# How to make each scheduler, and the factor on a group's first learning rate after its n-th step (n from 1).
SCHEDULERS: dict[type[LRScheduler], tuple[Callable[[Optimizer], LRScheduler], Callable[[int], float]]] = {
    schedulers.StepLR: (lambda o: schedulers.StepLR(o, 2, gamma=0.5), lambda n: 0.5 ** (n // 2)),
    schedulers.MultiStepLR: (
        lambda o: schedulers.MultiStepLR(o, [1, 4], gamma=0.5),
        lambda n: 0.5 ** ((n >= 1) + (n >= 4)),
    ),
    schedulers.ExponentialLR: (lambda o: schedulers.ExponentialLR(o, 0.5), lambda n: 0.5**n),
    schedulers.ConstantLR: (
        lambda o: schedulers.ConstantLR(o, factor=0.5, total_iters=4),
        lambda n: 0.5 if n < 4 else 1.0,
    ),
    schedulers.LinearLR: (
        lambda o: schedulers.LinearLR(o, start_factor=0.5, total_iters=8),
        lambda n: 0.5 + 0.5 * min(n, 8) / 8,
    ),
    schedulers.CosineAnnealingLR: (
        lambda o: schedulers.CosineAnnealingLR(o, 9),
        lambda n: (1 + math.cos(math.pi * n / 9)) / 2,
    ),
    schedulers.CosineAnnealingWarmRestarts: (
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
        lambda n: (1 + math.cos(math.pi * (n % 4) / 4)) / 2,
    ),
    schedulers.ReduceLROnPlateau: (
        lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
        lambda n: 0.5 ** ((n - 1) // 2),
    ),
    schedulers.LambdaLR: (lambda o: schedulers.LambdaLR(o, inverse), inverse),
    schedulers.MultiplicativeLR: (lambda o: schedulers.MultiplicativeLR(o, halve), lambda n: 0.5**n),
}
# Their state is the closed form of the base learning rate, or a function given for each group.
CLOSED_FORM = (schedulers.CosineAnnealingWarmRestarts, schedulers.LambdaLR)
EACH_SCHEDULER = pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)


def make_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in ("first", "middle", "head")})


def named(model: nn.Module, *prefixes: str) -> list[tuple[str, nn.Parameter]]:
    return [pair for pair in model.named_parameters() if pair[0].startswith(prefixes)]


def parameters(model: nn.Module, *prefixes: str) -> list[nn.Parameter]:
    return [parameter for _, parameter in named(model, *prefixes)]


def add_group(
    optimizer: Optimizer,
    lr_schedulers: Sequence[LRScheduler],
    named: Sequence[tuple[str, nn.Parameter]],
    *,
    lr: float,
    overrides: Mapping[str, Any] | None = None,
    apply_lambdas: bool = False,
) -> None:
    group = PlannedGroup(tuple(name for name, _ in named), lr, overrides or {})
    groups = [group] if named else []
    add_groups(optimizer, lr_schedulers, dict(named), groups, apply_lambdas=apply_lambdas)


def keep_only(optimizer: Optimizer, lr_schedulers: Sequence[LRScheduler], kept: Sequence[nn.Parameter]) -> None:
    """Arrange the groups so that they hold nothing but these parameters."""
    names = {parameter: str(number) for number, parameter in enumerate(kept)}
    for group in optimizer.param_groups:
        known = zip(group["params"], group.get("param_names", ()), strict=False)
        names |= {parameter: name for parameter, name in known if parameter in names}
    held = [[names[p] for p in group["params"] if p in names] for group in optimizer.param_groups]
    groups = [PlannedGroup(tuple(group), 0.0, source=index) for index, group in enumerate(held) if group]
    arrange(optimizer, lr_schedulers, {name: parameter for parameter, name in names.items()}, groups)


def train(model: nn.ModuleDict, optimizer: Optimizer, scheduler: LRScheduler | None = None, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.ones(1, 2)
        for layer in model.values():
            x = torch.tanh(layer(x))
        x.sum().backward()
        optimizer.step()
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


def new_groups_factor(kind: type[LRScheduler], added_after: int, step: int) -> float:
    """How a group added after some steps has changed by a later one."""
    factor = SCHEDULERS[kind][1]
    return factor(step) if issubclass(kind, CLOSED_FORM) else factor(step) / factor(added_after)


@EACH_SCHEDULER
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_a_new_group_starts_at_its_lr_and_is_scheduled_from_the_next_step(
    kind: type[LRScheduler], tensor_lr: bool
) -> None:
    make, factor = SCHEDULERS[kind]
    model = make_model()
    optimizer = AdamW(parameters(model, "head"), lr=torch.tensor(0.5, dtype=torch.float64) if tensor_lr else 0.5)
    scheduler = make(optimizer)
    train(model, optimizer, scheduler, steps=3)

    add_group(optimizer, [scheduler], named(model, "middle"), lr=0.125)
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[1]["initial_lr"] == 0.125
    assert learning_rates(optimizer)[0] == pytest.approx(0.5 * factor(3))

    for step in range(4, 10):
        train(model, optimizer, scheduler)
        expected = [0.5 * factor(step), 0.125 * new_groups_factor(kind, 3, step)]
        assert learning_rates(optimizer) == pytest.approx(expected)
        assert [float(lr) for lr in scheduler.get_last_lr()] == pytest.approx(expected)
    assert {isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups} == {tensor_lr}


@EACH_SCHEDULER
def test_a_grown_schedulers_state_loads_into_one_grown_alike(kind: type[LRScheduler]) -> None:
    def grown() -> tuple[nn.ModuleDict, Optimizer, LRScheduler]:
        model = make_model()
        optimizer = SGD(parameters(model, "head"), lr=0.5)
        scheduler = SCHEDULERS[kind][0](optimizer)
        add_group(optimizer, [scheduler], named(model, "middle"), lr=0.125)
        return model, optimizer, scheduler

    model, optimizer, scheduler = grown()
    train(model, optimizer, scheduler, steps=3)
    loaded_model, loaded_optimizer, loaded_scheduler = grown()
    loaded_optimizer.load_state_dict(optimizer.state_dict())
    loaded_scheduler.load_state_dict(scheduler.state_dict())
    train(model, optimizer, scheduler, steps=3)
    train(loaded_model, loaded_optimizer, loaded_scheduler, steps=3)
    assert learning_rates(loaded_optimizer) == learning_rates(optimizer)


@pytest.mark.parametrize(
    ("make", "start", "after_a_step"),
    [
        pytest.param(lambda o: schedulers.LambdaLR(o, [halve, inverse]), 0.25, 0.2, id="LambdaLR"),
        pytest.param(lambda o: schedulers.MultiplicativeLR(o, [inverse, halve]), 0.5, 0.25, id="MultiplicativeLR"),
    ],
)
def test_with_apply_lambdas_a_new_group_takes_the_last_lambda_at_its_present_value(
    make: Callable[[Optimizer], LRScheduler], start: float, after_a_step: float
) -> None:
    model = make_model()
    optimizer = SGD([{"params": parameters(model, "head")}, {"params": parameters(model, "middle")}], lr=0.5)
    scheduler = make(optimizer)
    train(model, optimizer, scheduler, steps=3)
    add_group(optimizer, [scheduler], named(model, "first"), lr=1.0, apply_lambdas=True)
    assert learning_rates(optimizer)[2] == start
    assert optimizer.param_groups[2]["initial_lr"] == 1.0
    train(model, optimizer, scheduler)
    assert learning_rates(optimizer)[2] == pytest.approx(after_a_step)


def test_every_scheduler_of_an_optimizer_is_extended() -> None:
    model = make_model()
    optimizer = SGD(parameters(model, "head"), lr=1.0)
    both = [schedulers.ExponentialLR(optimizer, 0.5), schedulers.LambdaLR(optimizer, halve)]
    train(model, optimizer)
    add_group(optimizer, both, named(model, "middle"), lr=0.25)
    for scheduler in both:
        scheduler.step()
        assert len(scheduler.get_last_lr()) == 2


def test_a_group_without_parameters_is_not_added() -> None:
    model = make_model()
    optimizer = SGD(parameters(model, "head"), lr=0.5)
    scheduler = schedulers.StepLR(optimizer, 1)
    add_group(optimizer, [scheduler], [], lr=0.125)
    assert len(optimizer.param_groups) == len(scheduler.get_last_lr()) == 1


def test_a_new_group_has_the_optimizers_defaults_and_the_overrides() -> None:
    model = make_model()
    optimizer = SGD(parameters(model, "head"), lr=0.5, momentum=0.9, weight_decay=0.1)
    add_group(optimizer, [], named(model, "middle"), lr=0.125, overrides={"weight_decay": 0.0})
    added = optimizer.param_groups[1]
    assert {key: added[key] for key in ("lr", "momentum", "weight_decay")} == {
        "lr": 0.125,
        "momentum": 0.9,
        "weight_decay": 0.0,
    }


def test_an_optimizer_made_of_named_parameters_keeps_names_in_every_group() -> None:
    model = make_model()
    optimizer = AdamW(named(model, "head", "middle"), lr=0.5)
    add_group(optimizer, [], named(model, "first"), lr=0.125)
    keep_only(optimizer, [], [model["head"].bias, *model["first"].parameters()])
    stored = [["head.bias"], ["first.bias", "first.weight"]]
    reorder_groups(optimizer, dict(model.named_parameters()), stored)
    train(model, optimizer)
    assert [group["param_names"] for group in optimizer.state_dict()["param_groups"]] == stored
    assert group_names(optimizer, dict(model.named_parameters())) == stored


# --- keep_only -------------------------------------------------------------------------------------------------------


def three_groups(model: nn.Module) -> Optimizer:
    rates = {"first": 0.5, "middle": 0.25, "head": 0.125}
    return SGD([{"params": parameters(model, name), "lr": lr} for name, lr in rates.items()], momentum=0.9)


@EACH_SCHEDULER
def test_kept_groups_are_scheduled_as_if_the_others_had_never_been(kind: type[LRScheduler]) -> None:
    make, factor = SCHEDULERS[kind]
    model = make_model()
    optimizer = three_groups(model)
    scheduler = make(optimizer)
    train(model, optimizer, scheduler)
    keep_only(optimizer, [scheduler], [*model["first"].parameters(), model["head"].bias])
    for step in range(2, 8):
        train(model, optimizer, scheduler)
        expected = [0.5 * factor(step), 0.125 * factor(step)]
        assert learning_rates(optimizer) == pytest.approx(expected)
        assert scheduler.get_last_lr() == pytest.approx(expected)


def test_kept_groups_keep_their_own_lambda_and_minimum() -> None:
    model = make_model()
    optimizer = three_groups(model)
    scheduler = schedulers.LambdaLR(optimizer, [halve, lambda _: 0.25, lambda _: 0.125])
    plateau = schedulers.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, min_lr=[0.2, 0.1, 0.005])
    train(model, optimizer)
    keep_only(optimizer, [scheduler, plateau], [*model["first"].parameters(), *model["head"].parameters()])
    scheduler.step()
    assert learning_rates(optimizer) == [0.5 * 0.5, 0.125 * 0.125]
    plateau.step(1.0)
    plateau.step(1.0)
    assert learning_rates(optimizer) == [0.2, 0.005]


def test_keep_only_takes_parameters_and_their_state_out_and_leaves_the_rest() -> None:
    model = make_model()
    optimizer = three_groups(model)
    train(model, optimizer)
    first_group = optimizer.param_groups[0]
    kept = [model["first"].weight, *model["head"].parameters()]
    keep_only(optimizer, [], kept)
    assert group_names(optimizer, dict(model.named_parameters())) == [
        ["first.weight"],
        ["head.weight", "head.bias"],
    ]
    assert set(optimizer.state) == set(kept)
    assert optimizer.param_groups[0] is first_group
    assert learning_rates(optimizer) == [0.5, 0.125]


# --- names and state -------------------------------------------------------------------------------------------------


def test_groups_are_brought_into_the_stored_order() -> None:
    model = make_model()
    optimizer = three_groups(model)
    stored = [["first.bias", "first.weight"], ["middle.weight", "middle.bias"], ["head.bias", "head.weight"]]
    reorder_groups(optimizer, dict(model.named_parameters()), stored)
    assert group_names(optimizer, dict(model.named_parameters())) == stored


FIX = r" Fix: Resume with the schedule, model and optimizer groups that wrote the checkpoint\."


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        pytest.param(
            [["head.weight", "head.bias"]],
            rf"expected 1 parameter groups as in the checkpoint, got 3\.{FIX}",
            id="another number",
        ),
        pytest.param(
            [["first.weight", "first.bias"], ["middle.weight"], ["head.weight", "head.bias", "gone"]],
            r"2 problems found:\n"
            r"1\. parameter group 1 differs from the checkpoint's: missing \[\], not expected \['middle\.bias'\]\."
            rf"{FIX}\n"
            rf"2\. parameter group 2 differs from the checkpoint's: missing \['gone'\], not expected \[\]\.{FIX}",
            id="other members",
        ),
    ],
)
def test_groups_that_differ_from_the_stored_ones_are_refused(stored: Sequence[Sequence[str]], message: str) -> None:
    model = make_model()
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        reorder_groups(three_groups(model), dict(model.named_parameters()), stored)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda groups: SGD(groups, lr=0.1, momentum=0.9), id="SGD"),
        pytest.param(lambda groups: AdamW(groups, lr=0.1, amsgrad=True), id="AdamW"),
        pytest.param(lambda groups: AdamW(groups, lr=torch.tensor(0.1)), id="AdamW with a tensor lr"),
    ],
)
def test_state_goes_by_name_into_other_groups_and_training_continues_the_same(
    make: Callable[[list[dict[str, object]]], Optimizer],
) -> None:
    def build(*groups: str) -> tuple[nn.ModuleDict, Optimizer]:
        model = make_model()
        return model, make([{"params": parameters(model, name)} for name in groups])

    model, optimizer = build("first", "middle", "head")
    train(model, optimizer, steps=3)
    names = group_names(optimizer, dict(model.named_parameters()))
    states = state_by_name(optimizer.state_dict(), names)
    assert set(states) == {name for name, _ in model.named_parameters()}

    other_model, other = build("head", "first", "middle")
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(with_state(other, dict(other_model.named_parameters()), states)))
    train(model, optimizer, steps=2)
    train(other_model, other, steps=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(other_model.get_parameter(name), parameter), name


def test_with_state_keeps_learning_rates_and_gives_unnamed_parameters_a_fresh_start() -> None:
    model = make_model()
    optimizer = three_groups(model)
    train(model, optimizer)
    state = {"head.bias": {"momentum_buffer": torch.full((2,), 7.0)}}
    optimizer.load_state_dict(with_state(optimizer, dict(model.named_parameters()), state))
    assert learning_rates(optimizer) == [0.5, 0.25, 0.125]
    assert {parameter is model["head"].bias for parameter in optimizer.state} == {True}
    assert torch.equal(optimizer.state[model["head"].bias]["momentum_buffer"], torch.full((2,), 7.0))
