"""Optimizer groups have names that say which phase has added them; they stay through transitions and resumes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from finetuning_scheduler.core import PhaseRunner

SGD_OF_PHASE_1 = {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}}
BATCH = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 1))


def schedule(**changes: Any) -> dict[int, dict[str, Any]]:
    return {
        0: {"params": ["3.*"], "max_transition_epoch": 1},
        1: {"params": ["2.*"], "lr": 0.02, "max_transition_epoch": 2, **changes},
        2: {"params": ["0.*", "1.*"], "lr": 0.01},
    }


def runner(
    make: Callable[[nn.Module], Optimizer] = lambda model: Adam(model.parameters(), lr=0.1),
    phases: dict[int, dict[str, Any]] | None = None,
    **options: Any,
) -> PhaseRunner:
    model = network()
    optimizer = make(model)
    options = {"lr_schedulers": [ExponentialLR(optimizer, 0.9)], "restore_best": True, **options}
    return PhaseRunner(model, optimizer, phases or schedule(), **options)


def labels(runner: PhaseRunner) -> list[str]:
    return [group["name"] for group in runner.optimizer.param_groups]


def train(runner: PhaseRunner, epochs: int) -> None:
    for _ in range(epochs):
        runner.optimizer.zero_grad()
        runner.model(BATCH).square().mean().backward()
        runner.optimizer.step()
        runner.step()
        runner.lr_schedulers[0].step()
        runner.epoch_end(metric=1.0)


def two_groups(model: nn.Module, *, names: tuple[str | None, str | None], decay: float = 0.0) -> Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in model.named_parameters() if n.endswith("weight")]},
        {"params": [p for n, p in model.named_parameters() if n.endswith("bias")], "weight_decay": decay},
    ]
    for group, name in zip(groups, names, strict=True):
        if name is not None:
            group["name"] = name
    return SGD(groups, lr=0.1, weight_decay=0.1)


EXPECTED: dict[str, tuple[Callable[[], PhaseRunner], list[str]]] = {
    "one group a phase": (runner, ["phase0", "phase1", "phase2"]),
    "no_decay": (
        lambda: runner(lambda model: SGD(model.parameters(), lr=0.1, weight_decay=0.1), no_decay=["bias"]),
        ["phase0", "phase0/no_decay", "phase1", "phase1/no_decay", "phase2", "phase2/no_decay"],
    ),
    "a new optimizer": (lambda: runner(phases=schedule(new_optimizer=SGD_OF_PHASE_1)), ["phase0", "phase1", "phase2"]),
    "groups of the user without names": (
        lambda: runner(lambda model: two_groups(model, names=(None, None))),
        ["phase0", "phase0/no_decay", "phase1", "phase1/no_decay", "phase2", "phase2/no_decay"],
    ),
    "the user's own names": (
        lambda: runner(lambda model: two_groups(model, names=("matrices", "phase1"), decay=0.3)),
        ["matrices", "phase1", "phase1/2", "phase1/3", "phase2", "phase2/2"],
    ),
    "a named group that is split": (
        lambda: runner(
            lambda model: SGD([{"params": list(model.parameters()), "name": "all"}], lr=0.1, weight_decay=0.1),
            no_decay=["bias"],
        ),
        ["all", "all/no_decay", "phase1", "phase1/no_decay", "phase2", "phase2/no_decay"],
    ),
    "one name twice": (
        lambda: runner(lambda model: two_groups(model, names=("a", "a"), decay=0.3)),
        ["a", "a/2", "phase1", "phase1/2", "phase2", "phase2/2"],
    ),
    "layer by layer": (
        lambda: runner(phases=schedule() | {2: {"params": ["0.*", "1.*"], "lr": 0.01, "lr_decay": 0.5}}),
        ["phase0", "phase1", "phase2", "phase2/2"],
    ),
    "not enforced": (
        lambda: runner(lambda model: Adam(model[3].parameters(), lr=0.1), enforce_phase0_params=False),
        ["phase0", "phase1", "phase2"],
    ),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_groups_are_called_by_their_phase(case: str) -> None:
    make, expected = EXPECTED[case]
    session = make()
    planned = [group.label for group in session.plan.phases[-1].groups]
    train(session, 3)
    assert session.phase == 2
    assert labels(session) == expected == planned
    assert len(set(expected)) == len(expected)  # as Lightning's LearningRateMonitor demands


@pytest.mark.parametrize("epochs", [0, 1, 2])
@pytest.mark.parametrize("named", [True, False], ids=["with names", "without names"])
def test_a_resumed_run_has_them_whatever_the_checkpoint_has(named: bool, epochs: int) -> None:
    whole, first, second = runner(), runner(), runner()
    train(whole, 3)
    train(first, epochs)
    saved = copy.deepcopy(
        {
            "runner": first.state_dict(),
            "model": first.model.state_dict(),
            "optimizer": first.optimizer.state_dict(),
            "schedulers": [each.state_dict() for each in first.lr_schedulers],
        }
    )
    for group in saved["optimizer"]["param_groups"] if not named else ():
        assert group.pop("name").startswith("phase")
    second.load_state_dict(saved["runner"])
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    for scheduler, state in zip(second.lr_schedulers, saved["schedulers"], strict=True):
        scheduler.load_state_dict(state)
    assert labels(second) == labels(first)
    train(second, 3 - epochs)
    assert labels(second) == labels(whole) == ["phase0", "phase1", "phase2"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_failed_transition_leaves_the_names_as_they_were() -> None:
    class Refusing(SGD):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            if param_group.get("name") == "phase1":
                raise ZeroDivisionError
            super().add_param_group(param_group)

    session = runner(lambda model: Refusing(model.parameters(), lr=0.1))
    with pytest.raises(ZeroDivisionError):
        session.thaw_to(1)
    assert labels(session) == ["phase0"]
