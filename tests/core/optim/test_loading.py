"""The state of an optimizer of many groups is loaded as PyTorch does, in linear time."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from finetuning_scheduler.core import PhaseRunner
from finetuning_scheduler.core.optim.loading import MANY_GROUPS, load_linearly

KINDS: dict[str, Any] = {
    "adam": lambda groups: Adam(groups, lr=0.1, amsgrad=True),
    "adamw-fused": lambda groups: AdamW(groups, lr=0.1, fused=True),
    "sgd": lambda groups: SGD(groups, lr=0.1, momentum=0.9),
    "adagrad": lambda groups: Adagrad(groups, lr=0.1),
}


def grouped(kind: str, groups: int = MANY_GROUPS + 1, dtype: torch.dtype = torch.float32) -> Optimizer:
    tensors = [[nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(1 + i % 2)] for i in range(groups)]
    optimizer: Optimizer = KINDS[kind]([{"params": each, "lr": 0.1 * i} for i, each in enumerate(tensors)])
    return optimizer


def stepped(optimizer: Optimizer) -> Optimizer:
    for number, parameter in enumerate(parameters(optimizer)):
        parameter.grad = torch.full_like(parameter, 1.0 + number) if number % 3 else None
    optimizer.step()
    return optimizer


def parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def linear(optimizer: Optimizer) -> Optimizer:
    before = len(optimizer._optimizer_load_state_dict_pre_hooks)
    load_linearly(optimizer)
    load_linearly(optimizer)  # what is known already stays
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == before + 1
    return optimizer


def assert_same(left: Any, right: Any) -> None:
    assert left["param_groups"] == right["param_groups"]
    assert list(left["state"]) == list(right["state"])
    for key, state in left["state"].items():
        if not isinstance(key, int):
            assert state == right["state"][key]
            continue
        assert state.keys() == right["state"][key].keys()
        for name, value in state.items():
            other = right["state"][key][name]
            assert torch.equal(value, other)
            assert value.dtype == other.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_loaded_as_pytorch_loads_it(kind: str, dtype: torch.dtype) -> None:
    saved = copy.deepcopy(stepped(grouped(kind)).state_dict())
    saved["state"]["of no parameter"] = {"kept": 3}
    usual, ours = grouped(kind, dtype=dtype), linear(grouped(kind, dtype=dtype))
    usual.load_state_dict(copy.deepcopy(saved))
    ours.load_state_dict(copy.deepcopy(saved))
    assert_same(ours.state_dict(), usual.state_dict())
    stepped(usual)
    stepped(ours)
    assert all(torch.equal(*pair) for pair in zip(parameters(ours), parameters(usual), strict=True))


def test_other_hooks_meet_the_state() -> None:
    saved = copy.deepcopy(stepped(grouped("adam")).state_dict())
    optimizer, met = grouped("adam"), []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "state": dict(list(state["state"].items())[:7])}
    )
    optimizer.register_load_state_dict_post_hook(lambda loaded: met.append(len(loaded.state)))
    linear(optimizer).load_state_dict(saved)
    assert met == [7]


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    optimizer = linear(stepped(grouped("sgd")))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(grouped("sgd", MANY_GROUPS + 2).state_dict())
    assert_same(optimizer.state_dict(), before)
    optimizer.load_state_dict(grouped("sgd").state_dict())
    assert not optimizer.state_dict()["state"]  # and not what the failure left


def test_few_groups_and_methods_of_their_own_are_left_alone() -> None:
    class Own(SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)

    own = Own([{"params": group["params"]} for group in grouped("sgd").param_groups], lr=0.1)
    for optimizer in (grouped("sgd", MANY_GROUPS), own):
        load_linearly(optimizer)
        assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_copies_know_nothing_of_it() -> None:
    optimizer = linear(grouped("sgd"))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        copied.load_state_dict(stepped(grouped("sgd")).state_dict())
        assert copied.state_dict()["state"]


def test_a_session_of_many_phases_loads_linearly() -> None:
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(MANY_GROUPS + 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    runner = PhaseRunner(model, optimizer, None)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    runner.thaw_to(MANY_GROUPS + 1)
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
