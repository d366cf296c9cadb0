"""``no_decay`` holds in phase 0 of a `PhaseRunner` too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer, Rprop

from .loops import BATCHES, HEAD, UPPER, UPPER_LR, Loop, Model, copied, differing, loop_of, phases, thaw

DECAY, EPOCHS = 0.1, 4


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.1, weight_decay=DECAY)


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=DECAY)


def start(optimizer_over: Callable[[Any], Optimizer], **phase_0: Any) -> Loop:
    model = Model()
    schedule = phases(2)
    schedule[0].update(phase_0)
    return loop_of(model, optimizer_over(model.parameters()), schedule, no_decay=["bias"])


def pair(named: dict[str, nn.Parameter], names: tuple[str, ...], lr: float) -> list[dict[str, Any]]:
    weight, bias = thaw(named, names)
    return [{"params": [weight], "lr": lr}, {"params": [bias], "lr": lr, "weight_decay": 0.0}]


@pytest.mark.parametrize("optimizer_over", [adamw, sgd])
def test_biases_of_phase_0_do_not_decay_as_by_hand(optimizer_over: Callable[[Any], Optimizer]) -> None:
    hand = Model()
    hand.requires_grad_(False)
    named = dict(hand.named_parameters())
    optimizer = optimizer_over(pair(named, HEAD, 0.1))
    loop = start(optimizer_over)
    for epoch in range(EPOCHS):
        if epoch == 2:
            for group in pair(named, UPPER, UPPER_LR):
                optimizer.add_param_group(group)
        for index, batch in enumerate(BATCHES):
            optimizer.zero_grad()
            hand.loss(batch, index).backward()
            optimizer.step()
        loop.epoch()
    assert [group["weight_decay"] for group in loop.runner.optimizer.param_groups] == [DECAY, 0.0, DECAY, 0.0]
    assert differing(copied(loop.model), copied(hand)) == set()


def test_biases_of_phase_0_do_not_decay_under_a_later_optimizer_if_the_first_one_has_no_weight_decay() -> None:
    model, schedule = Model(), phases(2)
    init = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": DECAY}}
    schedule[1]["new_optimizer"] = {"optimizer_init": init}
    runner = loop_of(model, Rprop(model.parameters(), lr=0.1), schedule, no_decay=["bias"]).runner
    assert [len(group["params"]) for group in runner.optimizer.param_groups] == [1, 1]
    assert all("weight_decay" not in group for group in runner.optimizer.param_groups)
    runner.thaw_to(1)
    assert [group["weight_decay"] for group in runner.optimizer.param_groups] == [DECAY, 0.0, DECAY, 0.0]


@pytest.mark.parametrize("later", [{}, {"new_optimizer": {"optimizer_init": {"class_path": "torch.optim.SGD"}}}])
def test_an_optimizer_that_takes_one_group_is_not_split(later: dict[str, Any]) -> None:
    model, schedule = Model(), phases(2)
    schedule = {0: schedule[0], 1: schedule[1] | later} if later else {0: schedule[0]}
    runner = loop_of(model, LBFGS(model.parameters()), schedule, no_decay=["bias"]).runner
    assert [len(group["params"]) for group in runner.optimizer.param_groups] == [2]


def test_a_warm_up_of_phase_0_is_over_both_parts() -> None:
    loop = start(sgd, lr_warmup_steps=4)
    seen: list[set[float]] = []
    loop.runner.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append({group["lr"] for group in optimizer.param_groups})
    )
    loop.epoch()
    assert seen == [{0.0}, {0.025}, {0.05}, {0.07500000000000001}]


@pytest.mark.parametrize("epochs", [1, 3], ids=["in phase 0", "in phase 1"])
def test_a_run_with_a_split_head_resumes_bitwise(epochs: int) -> None:
    whole, first, resumed = start(adamw), start(adamw), start(adamw)
    for _ in range(EPOCHS):
        whole.epoch(1.0)
    for _ in range(epochs):
        first.epoch(1.0)
    saved = [copy.deepcopy(part.state_dict()) for part in (first.model, first.runner, first.runner.optimizer)]
    for part, state in zip((resumed.model, resumed.runner, resumed.runner.optimizer), saved, strict=True):
        part.load_state_dict(state)
    for _ in range(EPOCHS - epochs):
        resumed.epoch(1.0)
    assert differing(copied(resumed.model), copied(whole.model)) == set()
    assert len(whole.runner.optimizer.param_groups) == 4
