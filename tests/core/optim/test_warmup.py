"""Phase warm-up: the optimizer sees a ramp, the LR schedulers see nothing of it.

The runs without warm-up are the reference: warm-up multiplies what the optimizer sees in a step, and nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, LRScheduler, StepLR

from finetuning_scheduler.core import PhaseRunner

STEPS_PER_EPOCH, EPOCHS = 4, 5
ENTRIES = {0: 0, 1: 4, 2: 7}  # the step at which each phase begins
BATCH = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))

SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler] | None] = {
    "none": None,
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.7),
    "LinearLR": lambda optimizer: LinearLR(optimizer, 0.25, 1.0, total_iters=15),
    "ExponentialLR": lambda optimizer: ExponentialLR(optimizer, gamma=0.9),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: Adam(parameters, lr=0.01),
    "Adam-tensor-lr": lambda parameters: Adam(parameters, lr=torch.tensor(0.01), foreach=False),
}


@dataclass(frozen=True)
class Case:
    """Steps of warm-up by phase, and other keys of phases."""

    warmup: dict[int, int] = field(default_factory=dict)
    scheduler: str = "StepLR"
    optimizer: str = "SGD"
    keys: dict[int, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def schedule(self, *, warm: bool) -> dict[int, dict[str, Any]]:
        phases: dict[int, dict[str, Any]] = {
            0: {"params": ["2.*"], "max_transition_step": ENTRIES[1]},
            1: {"params": ["1.*"], "lr": 0.05, "max_transition_step": ENTRIES[2]},
            2: {"params": ["0.*"], "lr": 0.02},
        }
        for number, keys in self.keys.items():
            phases[number].update(keys)
        for number, steps in self.warmup.items() if warm else ():
            phases[number]["lr_warmup_steps"] = steps
        return phases

    def scale(self, step: int, phase: int) -> float:
        """The factor on the learning rates of the groups that a phase adds, in a step counted from the start."""
        steps, done = self.warmup.get(phase, 0), step - ENTRIES[phase]
        return done / steps if done < steps else 1.0


CASES = {
    "phase-1": Case({1: 6}),
    "phase-1-linear": Case({1: 6}, "LinearLR"),
    "phase-1-exponential": Case({1: 6}, "ExponentialLR"),
    "without-scheduler": Case({1: 6}, "none"),
    "one-step": Case({1: 1, 2: 1}),
    "phase-0": Case({0: 3}),
    "phase-0-longer-than-the-phase": Case({0: 9}),
    "overlapping": Case({1: 8, 2: 5}, "LinearLR"),
    "overlapping-all": Case({0: 10, 1: 8, 2: 3}, "ExponentialLR", "Adam"),
    "never-ends": Case({2: 100}),
    "adam": Case({1: 6}, optimizer="Adam"),
    "tensor-lr": Case({0: 3, 1: 6}, "ExponentialLR", "Adam-tensor-lr"),
    "no-restore": Case({1: 8, 2: 5}, options={"restore_best": False}),
    "several-groups": Case({1: 6, 2: 4}, optimizer="SGD", options={"no_decay": ["bias"]}),
    "new-optimizer-mid-ramp": Case(
        {1: 8, 2: 3},
        keys={2: {"new_optimizer": {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {}}}}},
    ),
    "new-scheduler-mid-ramp": Case(
        {1: 8, 2: 3},
        keys={
            2: {
                "new_lr_scheduler": {
                    "lr_scheduler_init": {
                        "class_path": "torch.optim.lr_scheduler.ExponentialLR",
                        "init_args": {"gamma": 0.9},
                    }
                }
            }
        },
    ),
}


@dataclass
class Step:
    """The learning rates in one optimizer step, and before and after it."""

    phase: int
    before: tuple[float, ...]
    during: tuple[float, ...]
    after: tuple[float, ...]


def rates(optimizer: Optimizer) -> tuple[float, ...]:
    return tuple(float(group["lr"]) for group in optimizer.param_groups)


class Loop:
    """A hand-written loop over :class:`PhaseRunner`; the LR scheduler steps with the optimizer."""

    def __init__(self, case: Case, *, warm: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
        optimizer = OPTIMIZERS[case.optimizer](self.model[2].parameters())
        make = SCHEDULERS[case.scheduler]
        lr_schedulers = [] if make is None else [make(optimizer)]
        schedule = case.schedule(warm=warm)
        self.runner = PhaseRunner(self.model, optimizer, schedule, lr_schedulers=lr_schedulers, **case.options)
        self.steps: list[Step] = []

    def step(self) -> None:
        optimizer = self.runner.optimizer
        phase, before = self.runner.phase, rates(optimizer)
        seen: list[tuple[float, ...]] = []
        handle = optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(rates(optimizer)))
        optimizer.zero_grad()
        (self.model(BATCH) - BATCH.sum(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()
        handle.remove()
        self.steps.append(Step(phase, before, seen[0], rates(optimizer)))
        for scheduler in self.runner.lr_schedulers:
            scheduler.step()
        self.runner.step()

    def run(self, until: int = EPOCHS * STEPS_PER_EPOCH) -> Loop:
        for number in range(len(self.steps), until):
            self.step()
            if (number + 1) % STEPS_PER_EPOCH == 0:
                self.runner.epoch_end(metric=5.0 - number if number != 7 else 10.0)
        return self

    @property
    def last_rates(self) -> list[Any]:
        return [scheduler.get_last_lr() for scheduler in self.runner.lr_schedulers]

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = {
            "model": self.model.state_dict(),
            "runner": self.runner.state_dict(),
            "optimizer": self.runner.optimizer.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.runner.lr_schedulers],
        }
        torch.save(parts, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> Loop:
        parts = torch.load(file, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.runner.load_state_dict(parts["runner"])
        self.runner.optimizer.load_state_dict(parts["optimizer"])
        for scheduler, state in zip(self.runner.lr_schedulers, parts["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        return self


def phase_of_groups(case: Case, count: int) -> list[int]:
    """The phase that added each of the first groups."""
    each = 2 if "no_decay" in case.options else 1
    return ([0] * each + [1] * each + [2] * each)[:count]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_optimizer_sees_the_ramp_and_the_schedulers_do_not(case: Case) -> None:
    cold, warm = Loop(case, warm=False).run(), Loop(case, warm=True).run()
    assert [step.phase for step in warm.steps] == [step.phase for step in cold.steps]
    for number, (plain, scaled) in enumerate(zip(cold.steps, warm.steps, strict=True)):
        assert (scaled.before, scaled.after) == (plain.before, plain.after), f"step {number}"
        phases = phase_of_groups(case, len(plain.during))
        expected = [
            lr if (factor := case.scale(number, phase)) == 1.0 else lr * factor
            for lr, phase in zip(plain.during, phases, strict=True)
        ]
        assert scaled.during == pytest.approx(expected, rel=1e-6 if "tensor" in case.optimizer else 0, abs=0)
    assert warm.last_rates == cold.last_rates


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_first_step_of_a_ramp_moves_nothing(case: Case) -> None:
    loop = Loop(case, warm=True)
    for phase in sorted(case.warmup):
        loop.run(until=ENTRIES[phase])
        before = [p.detach().clone() for p in loop.model[2 - phase].parameters()]
        loop.run(until=ENTRIES[phase] + 1)
        if ENTRIES[phase] + 1 != ENTRIES.get(phase + 1):
            assert all(torch.equal(old, p) for old, p in zip(before, loop.model[2 - phase].parameters(), strict=True))


@pytest.mark.parametrize("at", [1, 2, 4, 5, 7, 8, 10, 12, 15])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_saved_and_resumed_in_any_step(case: Case, at: int) -> None:
    whole = Loop(case, warm=True).run()
    saved = Loop(case, warm=True).run(until=at).saved()
    resumed = Loop(case, warm=True).load(saved)
    resumed.steps = whole.steps[:at]
    resumed.run()
    assert resumed.steps == whole.steps
    weights = whole.model.state_dict()
    assert [name for name, tensor in resumed.model.state_dict().items() if not torch.equal(weights[name], tensor)] == []


def test_an_exception_in_a_step_leaves_learning_rates_right_in_what_is_saved() -> None:
    case = CASES["overlapping"]
    loop, reference = Loop(case, warm=True).run(until=9), Loop(case, warm=True).run(until=9)

    def failing() -> float:
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        loop.runner.optimizer.step(failing)
    saved = loop.saved()
    assert rates(loop.runner.optimizer) == rates(reference.runner.optimizer)
    resumed = Loop(case, warm=True).load(saved)
    resumed.steps = reference.steps[:]
    assert resumed.run().steps == reference.run().steps


def test_the_loop_goes_on_after_an_exception_in_a_step() -> None:
    case = CASES["overlapping"]
    loop, reference = Loop(case, warm=True).run(until=9), Loop(case, warm=True).run()

    def failing() -> float:
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        loop.runner.optimizer.step(failing)
    loop.runner.settle()
    assert loop.run().steps == reference.steps


def test_entering_several_phases_at_once_starts_all_their_ramps() -> None:
    case = CASES["overlapping"]
    loop = Loop(case, warm=True)
    loop.runner.thaw_to(2)
    loop.step()
    loop.step()
    _, *added = [during / before for during, before in zip(loop.steps[1].during, loop.steps[1].before, strict=True)]
    assert added == pytest.approx([1 / 8, 1 / 5])
