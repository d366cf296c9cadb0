"""`PhaseRunner` with optimizers without a learning rate, with one rate for all groups, and around another optimizer."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from finetuning_scheduler.core import PhaseRunner
from finetuning_scheduler.errors import ScheduleError

from .hearing import listening
from .loops import (
    BATCHES,
    HEAD,
    LOWER,
    OPTIMIZERS,
    UPPER,
    UPPER_LR,
    Loop,
    Model,
    Schedule,
    by_hand,
    copied,
    differing,
    loop_of,
    momentum_sgd,
    phases,
    trainable,
)
from .optimizers import WITHOUT_RATE, OneRate, Wrapper

EPOCHS = 6


def without_rates(schedule: Schedule) -> Schedule:
    return {number: {key: value for key, value in phase.items() if key != "lr"} for number, phase in schedule.items()}


def installing(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"optimizer_init": {"class_path": class_path, "init_args": arguments}}


# --- no learning rate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_max_lr", [1e-5, None])
@pytest.mark.parametrize("optimizer_over", WITHOUT_RATE.values(), ids=WITHOUT_RATE.keys())
def test_new_groups_of_an_optimizer_without_learning_rate_have_none_either(
    optimizer_over: Callable[..., Optimizer], base_max_lr: float | None
) -> None:
    schedule = without_rates(phases(2, 4))
    hand = Model()
    by_hand(hand, optimizer_over, schedule, epochs=EPOCHS)
    model = Model()
    with listening() as said:
        loop = loop_of(model, optimizer_over(model.parameters()), schedule, base_max_lr=base_max_lr)
        for _ in range(EPOCHS):
            loop.epoch()
    assert differing(copied(model), copied(hand)) == set()
    assert loop.rates[-1] == (None, None, None)
    assert [(transition.left, transition.entered) for transition in loop.transitions] == [(0, 1), (1, 2)]
    assert sum("Phase 0 -> 1" in each.text for each in said) == 1


def test_groups_exempt_from_weight_decay_have_no_learning_rate_either() -> None:
    model = Model()
    optimizer = WITHOUT_RATE["Relative"](model.parameters())
    loop = loop_of(model, optimizer, without_rates(phases(1)), no_decay=["bias"])
    loop.epoch().epoch()
    assert {group["lr"] for group in optimizer.param_groups} == {None}
    assert len(optimizer.param_groups) >= 3


@pytest.mark.parametrize("best", [0, 2], ids=["best in phase 0", "best in phase 1"])
def test_the_best_state_comes_back_under_an_optimizer_without_learning_rate(best: int) -> None:
    model = Model()
    loop = loop_of(model, WITHOUT_RATE["Relative"](model.parameters()), without_rates(phases(2, 4)))
    kept: list[dict[str, torch.Tensor]] = []
    for epoch in range(4):
        for index, batch in enumerate(BATCHES):
            loop.batch(batch, index)
        kept.append(copied(model))
        loop.runner.epoch_end(0.0 if epoch == best else 1.0 + epoch)
    assert loop.runner.phase == 2
    assert differing(copied(model), kept[best]) == set()


def test_a_run_of_an_optimizer_without_learning_rate_resumes_bitwise() -> None:
    def start() -> Loop:
        model = Model()
        return loop_of(model, WITHOUT_RATE["Relative"](model.parameters()), without_rates(phases(2, 4)))

    whole, first, resumed = start(), start(), start()
    for _ in range(EPOCHS):
        whole.epoch(1.0)
    for _ in range(3):
        first.epoch(1.0)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (first.model, first.runner, first.runner.optimizer)], file)
    file.seek(0)
    model_state, runner_state, optimizer_state = torch.load(file, weights_only=True)
    resumed.model.load_state_dict(model_state)
    resumed.runner.load_state_dict(runner_state)
    resumed.runner.optimizer.load_state_dict(optimizer_state)
    for _ in range(3):
        resumed.epoch(1.0)
    assert differing(copied(resumed.model), copied(whole.model)) == set()


def test_an_optimizer_that_takes_a_learning_rate_trains_at_the_phases() -> None:
    """The same class with a number as learning rate is an optimizer like any other."""
    import transformers

    def fixed(parameters: Any) -> Optimizer:
        return transformers.Adafactor(parameters, lr=0.01, relative_step=False, scale_parameter=False)

    hand, model = Model(), Model()
    by_hand(hand, fixed, phases(2), epochs=4)
    loop = loop_of(model, fixed(model.parameters()), phases(2))
    for _ in range(4):
        loop.epoch()
    assert differing(copied(model), copied(hand)) == set()
    assert loop.rates[-1] == (0.01, UPPER_LR)


@dataclass(frozen=True)
class Refused:
    """Keys of phase 1, the optimizer of phase 0, and what the error has to name."""

    keys: dict[str, Any]
    optimizer_over: Callable[..., Optimizer]
    names: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


RELATIVE = "tests.core_programs.optimizers.Relative"
REFUSED_RATES = {
    "a phase's lr": Refused({"lr": 0.05}, WITHOUT_RATE["Relative"], ("Relative", "lr")),
    "a phase's lr under Adafactor": Refused({"lr": 0.05}, WITHOUT_RATE["Adafactor"], ("Adafactor", "lr")),
    "a phase's lr over an optimizer that it installs": Refused(
        {"lr": 0.05, "new_optimizer": installing(RELATIVE)}, momentum_sgd, ("Relative", "lr")
    ),
}


def assert_refused(refused: Refused, phase: int = 1) -> None:
    model = Model()
    optimizer = refused.optimizer_over(model.parameters())
    weights, required = copied(model), trainable(model)
    schedule = without_rates(phases(2, 4))
    schedule[phase].update(refused.keys)
    with pytest.raises(ScheduleError, match=f"phase {phase}") as caught:
        PhaseRunner(model, optimizer, schedule, **refused.options)
    assert [name for name in refused.names if not re.search(rf"\b{name}\b", str(caught.value))] == []
    assert differing(copied(model), weights) == set()
    assert trainable(model) == required
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("refused", REFUSED_RATES.values(), ids=REFUSED_RATES.keys())
def test_a_learning_rate_for_an_optimizer_without_one_is_an_error_before_training(refused: Refused) -> None:
    assert_refused(refused)


def test_an_optimizer_with_a_learning_rate_that_follows_one_without_brings_its_own() -> None:
    schedule = without_rates(phases(2))
    schedule[1].update(new_optimizer=installing("torch.optim.SGD", lr=0.25), lr=UPPER_LR)
    model = Model()
    loop = loop_of(model, WITHOUT_RATE["Relative"](model.parameters()), schedule)
    for _ in range(3):
        loop.epoch()
    assert loop.rates[0] == (None,)
    assert loop.rates[-1] == (0.25, UPPER_LR)


# --- one learning rate for all groups ---------------------------------------------------------------------------------

ONE_RATE = "tests.core_programs.optimizers.OneRate"


def one_rate(parameters: Any) -> Optimizer:
    return OneRate(parameters, lr=0.1, momentum=0.9)


REFUSED_GROUPS = {
    "a phase's lr": Refused({"lr": 0.05}, one_rate, ("OneRate",), {"base_max_lr": 0.1}),
    "the default rate of later phases": Refused({}, one_rate, ("OneRate",)),
    "a warm-up of the new group alone": Refused(
        {"lr": 0.1, "lr_warmup_steps": 4}, one_rate, ("OneRate",), {"base_max_lr": 0.1}
    ),
    "an optimizer that the phase installs": Refused(
        {"lr": 0.05, "new_optimizer": installing(ONE_RATE, lr=0.1)}, momentum_sgd, ("OneRate",), {"base_max_lr": 0.1}
    ),
}


@pytest.mark.parametrize("refused", REFUSED_GROUPS.values(), ids=REFUSED_GROUPS.keys())
def test_rates_that_an_optimizer_with_one_for_all_would_refuse_are_found_before_training(refused: Refused) -> None:
    assert_refused(refused)


def test_rates_that_decay_from_block_to_block_are_found_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    schedule = {0: {"params": [r"2\..*"]}, 1: {"params": [r"0\..*", r"1\..*"], "lr": 0.1, "lr_decay": 0.5}}
    with pytest.raises(ScheduleError, match="phase 1"):
        PhaseRunner(model, one_rate(model.parameters()), schedule)


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({"lr": 0.1}, {"base_max_lr": 0.1}),
        ({}, {"base_max_lr": None}),
        ({"lr": 0.1, "new_optimizer": installing("torch.optim.SGD", lr=0.05)}, {"base_max_lr": 0.02}),
        ({}, {"max_depth": 0}),
    ],
    ids=["the same lr", "the initial lr", "another optimizer by then", "a phase that is not executed"],
)
def test_an_optimizer_with_one_rate_for_all_trains_where_the_rates_are_equal(
    keys: dict[str, Any], options: dict[str, Any]
) -> None:
    model = Model()
    schedule = without_rates(phases(1, 2))
    schedule[1].update(keys)
    loop = loop_of(model, one_rate(model.parameters()), schedule, **options)
    before = copied(model)
    for _ in range(3):
        loop.epoch()
    trained = HEAD if "max_depth" in options else (*HEAD, *UPPER, *LOWER)
    assert differing(copied(model), before) == set(trained)


# --- wrappers ---------------------------------------------------------------------------------------------------------


def wrapped_twice(optimizer: Optimizer) -> Optimizer:
    return Wrapper(Wrapper(optimizer))


WRAPPERS: dict[str, Callable[[Optimizer], Optimizer]] = {"wrapped": Wrapper, "wrapped twice": wrapped_twice}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("optimizer_over", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_wrapped_optimizer_trains_as_the_one_inside(
    optimizer_over: Callable[..., Optimizer], wrap: Callable[[Optimizer], Optimizer]
) -> None:
    hand, model = Model(), Model()
    by_hand(hand, optimizer_over, phases(2, 4), epochs=EPOCHS)
    inner = optimizer_over(model.parameters())
    loop = loop_of(model, wrap(inner), phases(2, 4))
    for _ in range(EPOCHS):
        loop.epoch()
    assert differing(copied(model), copied(hand)) == set()
    assert held(inner) == [set(HEAD), set(UPPER), set(LOWER)], "the groups of the optimizer inside"


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_wrapped_optimizer_warms_up_as_the_one_inside(wrap: Callable[[Optimizer], Optimizer], phase: int) -> None:
    def trained(warmup_steps: int, wrap: Callable[[Optimizer], Optimizer] = lambda optimizer: optimizer) -> Model:
        model, schedule = Model(), phases(2, 4)
        schedule[phase]["lr_warmup_steps"] = warmup_steps
        loop = loop_of(model, wrap(momentum_sgd(model.parameters())), schedule)
        for _ in range(EPOCHS):
            loop.epoch()
        return model

    assert differing(copied(trained(5, wrap)), copied(trained(5))) == set()
    assert differing(copied(trained(0)), copied(trained(5))) != set(), "the warm-up matters"


def held(optimizer: Optimizer) -> list[set[str]]:
    """The names of what an optimizer over `Model` holds, by shape: no two layers have equal ones."""
    shapes = {parameter.shape: name for name, parameter in Model().named_parameters() if "weight" in name}
    biases = {"lower.weight": "lower.bias", "upper.weight": "upper.bias", "head.weight": "head.bias"}
    names = [shapes[p.shape] for group in optimizer.param_groups for p in group["params"] if p.shape in shapes]
    return [{name, biases[name]} for name in names]


@dataclass(frozen=True)
class Kept:
    """What an optimizer holds, to be compared later."""

    groups: list[tuple[list[int], float]]
    state: dict[int, dict[str, Any]]

    @classmethod
    def of(cls, optimizer: Optimizer) -> Kept:
        groups = [([id(parameter) for parameter in g["params"]], g["lr"]) for g in optimizer.param_groups]
        return cls(groups, {id(p): copy.deepcopy(dict(state)) for p, state in optimizer.state.items()})


@pytest.mark.parametrize("restored", [False, True], ids=["nothing restored", "best in phase 0"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_phase_with_an_optimizer_of_its_own_leaves_the_wrapped_one_as_it_was(
    wrap: Callable[[Optimizer], Optimizer], restored: bool
) -> None:
    schedule = phases(2, 4)
    schedule[1]["new_optimizer"] = installing("torch.optim.AdamW", lr=0.01)
    model = Model()
    inner = momentum_sgd(model.parameters())
    outer = wrap(inner)
    loop = loop_of(model, outer, schedule)
    loop.epoch(1.0 if restored else None)
    for index, batch in enumerate(BATCHES):
        loop.batch(batch, index)
    before = Kept.of(inner)
    loop.note(loop.runner.epoch_end(2.0 if restored else None))
    for _ in range(3):
        loop.epoch(3.0 if restored else None)
    assert type(loop.runner.optimizer) is AdamW
    assert loop.runner.phase == 2
    assert Kept.of(inner).groups == before.groups
    assert [len(group["params"]) for group in outer.param_groups] == [2]
    if not restored:  # a restore gives the optimizer in force its state back
        assert str(Kept.of(inner).state) == str(before.state)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, *WRAPPERS.values()], ids=["bare", *WRAPPERS.keys()])
def test_an_optimizer_that_replaces_a_wrapped_one_trains_as_by_hand(wrap: Callable[[Optimizer], Optimizer]) -> None:
    schedule = phases(2)
    schedule[1]["new_optimizer"] = installing("torch.optim.AdamW", lr=0.01)
    hand, model = Model(), Model()
    by_hand(hand, momentum_sgd, phases(2), epochs=2)
    named = dict(hand.named_parameters())
    for name in UPPER:
        named[name].requires_grad = True
    second = AdamW(
        [
            {"params": [named[name] for name in HEAD], "lr": 0.1},
            {"params": [named[name] for name in UPPER], "lr": UPPER_LR},
        ],
        lr=0.01,
    )
    for _ in range(2):
        for index, batch in enumerate(BATCHES):
            second.zero_grad()
            hand.loss(batch, index).backward()
            second.step()
    loop = loop_of(model, wrap(momentum_sgd(model.parameters())), schedule)
    for _ in range(4):
        loop.epoch()
    assert differing(copied(model), copied(hand)) == set()


def test_a_run_of_a_wrapped_optimizer_resumes_bitwise() -> None:
    def start() -> Loop:
        model = Model()
        return loop_of(model, Wrapper(SGD(model.parameters(), lr=0.1, momentum=0.9)), phases(2, 4))

    whole, first, resumed = start(), start(), start()
    for _ in range(EPOCHS):
        whole.epoch(1.0)
    for _ in range(3):
        first.epoch(1.0)
    for part, saved in zip(
        (resumed.model, resumed.runner, resumed.runner.optimizer),
        [copy.deepcopy(part.state_dict()) for part in (first.model, first.runner, first.runner.optimizer)],
        strict=True,
    ):
        part.load_state_dict(saved)
    for _ in range(3):
        resumed.epoch(1.0)
    assert differing(copied(resumed.model), copied(whole.model)) == set()
