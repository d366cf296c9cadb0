"""A hand-written loop over a case, with reuse and without, and what both have to agree on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetuning_scheduler.core import PhaseRunner, Transition
from finetuning_scheduler.core.prefix.accounts import PrefixAccount

from .models import ROWS, Case, Data

BATCH = 8
EPOCHS = 3  # of each phase


@dataclass
class Run:
    """What a session leaves behind."""

    weights: dict[str, Tensor]
    losses: list[float]
    scores: list[float]
    transitions: list[Transition]
    accounts: list[PrefixAccount]
    reason: str | None

    def hits(self, stage: str) -> int:
        return sum(account.hits for account in self.accounts if account.stage == stage)


def run(
    case: Case,
    mode: str = "all",
    *,
    seed: int = 0,
    shuffled: bool = True,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    epochs: int = EPOCHS,
    accumulate: int = 1,
    batch_of: Callable[[Data, Tensor], Data] = lambda data, rows: {name: each[rows] for name, each in data.items()},
    **settings: Any,
) -> Run:
    torch.manual_seed(seed)
    model = case.build()
    prepare(model)
    data = case.data(torch.Generator().manual_seed(seed + 1))
    stepping = optimizer(model.parameters(), lr=0.01)
    schedule = {
        phase: {"params": [pattern], "lr": 0.01, "max_transition_epoch": epochs * (phase + 1)}
        for phase, pattern in enumerate(case.phases)
    }
    settings = {"frozen_modules_mode": "eval", "restore_best": False, "frozen_prefix": mode, **settings}
    runner = PhaseRunner(model, stepping, schedule, **settings)
    order = torch.Generator().manual_seed(seed + 2)
    outcome = Run({}, [], [], [], [], None)

    def step(batch: Data) -> Tensor:
        with context():
            return case.loss(model, batch)

    while not runner.finished:
        model.train()
        runner.apply_module_modes()
        rows = torch.randperm(ROWS, generator=order) if shuffled else torch.arange(ROWS)
        for number, chosen in enumerate(rows.split(BATCH)):
            loss = runner.prefix.train(step, batch_of(data, chosen))
            loss.backward()
            outcome.losses.append(loss.item())
            if (number + 1) % accumulate == 0:
                stepping.step()
                stepping.zero_grad()
                note(outcome, runner.step())
        model.eval()
        with torch.no_grad():
            scores = [runner.prefix.validate(step, batch_of(data, part)) for part in torch.arange(ROWS).split(BATCH)]
        outcome.scores.append(float(torch.stack(scores).mean()))
        note(outcome, runner.epoch_end(outcome.scores[-1]))
    runner.release_module_modes()
    outcome.weights = {name: each.detach().clone() for name, each in model.state_dict().items()}
    outcome.accounts, outcome.reason = runner.prefix.accounts, runner.prefix.reason
    return outcome


def note(outcome: Run, transition: Transition | None) -> None:
    if transition is not None:
        outcome.transitions.append(transition)


def assert_same(actual: Run, expected: Run, tolerance: float = 1e-5) -> None:
    assert actual.transitions == expected.transitions
    assert actual.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        scale = float(value.abs().max()) if value.numel() else 0.0
        off = float((actual.weights[name] - value).abs().max()) if value.numel() else 0.0
        assert off <= tolerance * max(scale, 1e-3), f"{name} is off by {off} of {scale}"
    assert torch.allclose(torch.tensor(actual.losses), torch.tensor(expected.losses), rtol=1e-5, atol=1e-6)
    assert torch.allclose(torch.tensor(actual.scores), torch.tensor(expected.scores), rtol=1e-5, atol=1e-6)
