"""A plain loop driven by `PhaseRunner` computes, bit for bit, what a loop written out by hand computes.

`by_hand` below uses nothing of the package: it sets `requires_grad`, adds groups, steps learning rates, and saves and
restores the best state itself.
"""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler

from finetuning_scheduler.core import PhaseRunner, Reason, Schedule, Transition
from finetuning_scheduler.errors import CheckpointError, ScheduleError

BATCHES = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1)).unbind()
STEP_SIZE, GAMMA = 3, 0.5
LATER_LR = 0.02

OPTIMIZERS: dict[str, Callable[[Iterable[Any]], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: AdamW(parameters, lr=0.1, weight_decay=0.1),
}

HEAD = ["head.weight", "head.bias"]
UPPER = ["upper.weight", "upper.bias"]
LOWER = ["norm.weight", "norm.bias", "lower.weight", "lower.bias"]


@dataclass(frozen=True)
class PhaseLimits:
    epoch: int | None = None
    step: int | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Run:
    """One session: a phase for each of HEAD, UPPER and LOWER, and the metric after each epoch."""

    limits: tuple[PhaseLimits, ...]
    metrics: tuple[float, ...]
    patience: int | None = None
    mode: str = "min"
    min_delta: float = 0.0
    restore_best: bool = True
    no_decay: tuple[str, ...] = ()
    max_depth: int = -1
    optimizer: str = "SGD"
    scheduled: bool = False

    def schedule(self) -> dict[int, dict[str, Any]]:
        phases: dict[int, dict[str, Any]] = {}
        for number, (names, limits) in enumerate(zip((HEAD, UPPER, LOWER), self.limits, strict=False)):
            keys = {"max_transition_epoch": limits.epoch, "max_transition_step": limits.step, "lr": limits.lr}
            phases[number] = {"params": list(names)} | {key: value for key, value in keys.items() if value is not None}
        return phases


@dataclass
class Outcome:
    """What a session leaves behind; `history` has a line for each epoch: phase, groups and learning rates."""

    weights: dict[str, torch.Tensor]
    optimizer_state: dict[str, dict[str, Any]]
    history: list[str] = field(default_factory=list)


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("lower", nn.Linear(3, 4))
    model.add_module("norm", nn.BatchNorm1d(4))
    model.add_module("upper", nn.Linear(4, 4))
    model.add_module("tanh", nn.Tanh())
    model.add_module("head", nn.Linear(4, 1))
    return model


def train_batch(model: nn.Module, optimizer: Optimizer, batch: torch.Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean().backward()
    optimizer.step()


def outcome_of(model: nn.Module, optimizer: Optimizer, history: list[str]) -> Outcome:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    return Outcome(weights, copy.deepcopy(states), history)


def describe(phase: int, model: nn.Module, optimizer: Optimizer) -> str:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [(sorted(names[p] for p in group["params"]), group["lr"]) for group in optimizer.param_groups]
    decay = [group["weight_decay"] for group in optimizer.param_groups]
    trainable = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return f"phase {phase}, groups {groups}, decay {decay}, trainable {trainable}"


# --- the loop written out by hand ------------------------------------------------------------------------------------


class ByHand:
    """A session without the package."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model = make_model()
        self.named = dict(self.model.named_parameters())
        for name, parameter in self.named.items():
            parameter.requires_grad = name in HEAD
        self.optimizer = OPTIMIZERS[run.optimizer]([self.named[name] for name in HEAD])
        self.phases = [HEAD, UPPER, LOWER][: len(run.limits)]
        if run.max_depth >= 0:
            self.phases = self.phases[: run.max_depth + 1]
        self.phase = self.step = self.epoch = self.waited = 0
        self.entered_step = self.entered_epoch = 0
        self.best: float | None = None
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.best_state: dict[str, Any] = {}
        self.finished = False

    def execute(self) -> Outcome:
        history: list[str] = []
        for metric in self.run.metrics:
            for batch in BATCHES:
                train_batch(self.model, self.optimizer, batch)
                self.step += 1
                self.check_step_limit()
                if self.finished:
                    return outcome_of(self.model, self.optimizer, history)
            self.epoch += 1
            if self.run.scheduled and self.epoch % STEP_SIZE == 0:
                for group in self.optimizer.param_groups:
                    group["lr"] *= GAMMA
            self.check_metric(metric)
            history.append(describe(self.phase, self.model, self.optimizer))
            if self.finished:
                break
        return outcome_of(self.model, self.optimizer, history)

    def check_step_limit(self) -> None:
        limit = self.run.limits[self.phase].step
        if limit is not None and self.step >= limit and self.step > self.entered_step:
            self.end_phase()

    def check_metric(self, metric: float) -> None:
        sign = -1 if self.run.mode == "max" else 1
        if self.best is None or sign * metric < sign * self.best - self.run.min_delta:
            self.best, self.waited = metric, 0
            if self.run.restore_best:
                self.best_weights = copy.deepcopy(self.model.state_dict())
                held = [name for name, p in self.named.items() if p in self.optimizer.state]
                self.best_state = {name: copy.deepcopy(self.optimizer.state[self.named[name]]) for name in held}
        else:
            self.waited += 1
        limit = self.run.limits[self.phase].epoch
        out_of_patience = self.run.patience is not None and self.waited >= self.run.patience
        if out_of_patience or (limit is not None and self.epoch >= limit and self.epoch > self.entered_epoch):
            self.end_phase()
        else:
            self.check_step_limit()

    def end_phase(self) -> None:
        if self.phase == len(self.phases) - 1:
            self.finished = True
            return
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
            self.optimizer.state.clear()
            for name, state in self.best_state.items():
                self.optimizer.state[self.named[name]] = copy.deepcopy(state)
        self.phase += 1
        self.entered_step, self.entered_epoch, self.waited = self.step, self.epoch, 0
        lr = self.run.limits[self.phase].lr
        for names, decays in self.split(self.phases[self.phase]):
            group: dict[str, Any] = {"params": [self.named[name] for name in names]}
            group["lr"] = LATER_LR if lr is None else lr
            if not decays:
                group["weight_decay"] = 0.0
            self.optimizer.add_param_group(group)
        for name in self.phases[self.phase]:
            self.named[name].requires_grad = True

    def split(self, names: list[str]) -> list[tuple[list[str], bool]]:
        exempt = [name for name in names if any(fragment in name for fragment in self.run.no_decay)]
        decaying = [name for name in names if name not in exempt]
        return [pair for pair in ((decaying, True), (exempt, False)) if pair[0]]


# --- the loop driven by the runner -----------------------------------------------------------------------------------


@dataclass
class Session:
    """A session with the package; `checkpoints` holds what `torch.save` wrote after each epoch."""

    run: Run
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    runner: PhaseRunner
    transitions: list[Transition] = field(default_factory=list)
    checkpoints: list[bytes] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        run: Run,
        *,
        seed: int = 0,
        make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        **options: Any,
    ) -> Session:
        model = make_model(seed)
        optimizer = OPTIMIZERS[run.optimizer](model.parameters())
        if make_scheduler is None and run.scheduled:
            make_scheduler = step_lr
        scheduler = None if make_scheduler is None else make_scheduler(optimizer)
        runner = PhaseRunner(
            model,
            optimizer,
            run.schedule(),
            lr_schedulers=[] if scheduler is None else [scheduler],
            base_max_lr=LATER_LR,
            patience=run.patience,
            mode=run.mode,
            min_delta=run.min_delta,
            restore_best=run.restore_best,
            no_decay=run.no_decay,
            max_depth=run.max_depth,
            **options,
        )
        return cls(run, model, optimizer, scheduler, runner)

    def execute(self, metrics: Iterable[float] | None = None) -> Outcome:
        history: list[str] = []
        for metric in self.run.metrics if metrics is None else metrics:
            for batch in BATCHES:
                train_batch(self.model, self.optimizer, batch)
                self.note(self.runner.step())
                if self.runner.finished:
                    return outcome_of(self.model, self.optimizer, history)
            if isinstance(self.scheduler, schedulers.ReduceLROnPlateau):
                self.scheduler.step(metric)
            elif self.scheduler is not None:
                self.scheduler.step()
            self.note(self.runner.epoch_end(metric))
            history.append(describe(self.runner.phase, self.model, self.optimizer))
            self.checkpoints.append(self.save())
            if self.runner.finished:
                break
        return outcome_of(self.model, self.optimizer, history)

    def note(self, transition: Transition | None) -> None:
        if transition is not None:
            self.transitions.append(transition)

    def parts(self) -> dict[str, Any]:
        """In the order in which a resumed run loads them."""
        parts = {"model": self.model, "runner": self.runner, "optimizer": self.optimizer}
        return parts if self.scheduler is None else parts | {"scheduler": self.scheduler}

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> None:
        states = torch.load(io.BytesIO(checkpoint), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(states[name])


def step_lr(optimizer: Optimizer) -> LRScheduler:
    return schedulers.StepLR(optimizer, STEP_SIZE, gamma=GAMMA)


def assert_same(actual: Outcome, expected: Outcome) -> None:
    assert actual.history == expected.history
    assert actual.weights.keys() == expected.weights.keys()
    differing = [name for name, value in expected.weights.items() if not torch.equal(actual.weights[name], value)]
    assert differing == []
    assert actual.optimizer_state.keys() == expected.optimizer_state.keys()
    for name, state in expected.optimizer_state.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(actual.optimizer_state[name][key]), torch.as_tensor(value)), (name, key)


def limits(*phases: Mapping[str, Any]) -> tuple[PhaseLimits, ...]:
    return tuple(PhaseLimits(**phase) for phase in phases)


FALLING = (9.0, 8.0, 7.0, 6.0, 5.0, 4.0)
BEST_FIRST = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
BEST_AMID = (5.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0)

RUNS = {
    "epoch limits": Run(limits({"epoch": 2}, {"epoch": 3}, {}), FALLING),
    "epoch limits, best in phase 0": Run(limits({"epoch": 2}, {"epoch": 4}, {}), BEST_FIRST),
    "epoch limits, nothing restored": Run(limits({"epoch": 2}, {"epoch": 4}, {}), BEST_FIRST, restore_best=False),
    "epoch limits in the past last one epoch": Run(limits({"epoch": 3}, {"epoch": 1}, {"epoch": 2}), FALLING),
    "step limits inside epochs": Run(limits({"step": 6}, {"step": 11}, {}), BEST_FIRST),
    "step limits before the first metric": Run(limits({"step": 1}, {"step": 2}, {"step": 10}), FALLING),
    "step limits in the past last one step": Run(limits({"step": 6}, {"step": 2}, {}), BEST_FIRST[:3]),
    "patience": Run(limits({}, {}, {}), BEST_AMID, patience=2),
    "patience, nothing restored": Run(limits({}, {}, {}), BEST_AMID, patience=1, restore_best=False),
    "patience upwards by a least gain": Run(
        limits({}, {}, {}), (1.0, 3.0, 3.5, 3.25, 5.0, 5.0, 4.0), patience=2, mode="max", min_delta=0.75
    ),
    "whichever comes first": Run(limits({"epoch": 5, "step": 6}, {"epoch": 9}, {"step": 26}), BEST_AMID, patience=2),
    "learning rate of each phase": Run(limits({"epoch": 1}, {"epoch": 3, "lr": 0.05}, {"lr": 0.003}), BEST_AMID),
    "no decay": Run(limits({"epoch": 1}, {"epoch": 3}, {}), BEST_AMID, no_decay=("bias", "norm")),
    "max depth": Run(limits({"epoch": 1}, {"epoch": 4}, {}), BEST_AMID, max_depth=1),
    "max depth of phase 0": Run(limits({"epoch": 2}, {}, {}), FALLING, max_depth=0),
    "max depth beyond the schedule": Run(limits({"epoch": 1}, {"epoch": 2}), FALLING, max_depth=7),
}
OVER_OPTIMIZERS = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@OVER_OPTIMIZERS
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "StepLR"])
@pytest.mark.parametrize("case", RUNS)
def test_trains_like_the_loop_written_out_by_hand(case: str, optimizer: str, scheduled: bool) -> None:
    run = replace(RUNS[case], optimizer=optimizer, scheduled=scheduled)
    session, by_hand = Session.of(run), ByHand(run)
    assert_same(session.execute(), by_hand.execute())
    assert session.runner.finished == by_hand.finished
    assert session.runner.phase == by_hand.phase
    assert session.runner.phases_remaining == len(by_hand.phases) - 1 - by_hand.phase


@OVER_OPTIMIZERS
@pytest.mark.parametrize("case", RUNS)
def test_a_run_resumed_after_any_epoch_ends_like_the_uninterrupted_one(case: str, optimizer: str) -> None:
    run = replace(RUNS[case], optimizer=optimizer, scheduled=True)
    uninterrupted = Session.of(run)
    expected = uninterrupted.execute()
    for done, checkpoint in enumerate(uninterrupted.checkpoints[:-1], start=1):
        resumed = Session.of(run, seed=done)
        resumed.load(checkpoint)
        assert_same(resumed.execute(run.metrics[done:]), replace(expected, history=expected.history[done:]))
        assert resumed.runner.finished == uninterrupted.runner.finished


SCHEDULER_OPTIONS: dict[type[LRScheduler], dict[str, Any]] = {
    schedulers.StepLR: {"step_size": 2},
    schedulers.MultiStepLR: {"milestones": [1, 4]},
    schedulers.CosineAnnealingWarmRestarts: {"T_0": 3},
    schedulers.ReduceLROnPlateau: {"patience": 0},
    schedulers.LambdaLR: {"lr_lambda": lambda epoch: 1 / (1 + epoch)},
    schedulers.ConstantLR: {},
    schedulers.LinearLR: {},
    schedulers.ExponentialLR: {"gamma": 0.5},
    schedulers.CosineAnnealingLR: {"T_max": 5},
    schedulers.MultiplicativeLR: {"lr_lambda": lambda _: 0.5},
}


@pytest.mark.parametrize("apply_lambdas", [False, True], ids=["", "apply lambdas"])
@pytest.mark.parametrize("kind", SCHEDULER_OPTIONS, ids=lambda kind: kind.__name__)
def test_every_scheduler_resumes_bitwise(kind: type[LRScheduler], apply_lambdas: bool) -> None:
    run = RUNS["epoch limits, best in phase 0"]

    def start(seed: int) -> Session:
        return Session.of(
            run,
            seed=seed,
            make_scheduler=lambda optimizer: kind(optimizer, **SCHEDULER_OPTIONS[kind]),
            apply_lambdas_new_pgs=apply_lambdas,
        )

    uninterrupted = start(seed=0)
    expected = uninterrupted.execute()
    for done in (1, 3, 5):
        resumed = start(seed=done)
        resumed.load(uninterrupted.checkpoints[done - 1])
        assert_same(resumed.execute(run.metrics[done:]), replace(expected, history=expected.history[done:]))


def test_a_finished_run_is_still_finished_when_it_is_loaded() -> None:
    session = Session.of(RUNS["max depth of phase 0"])
    session.execute()
    assert session.runner.finished
    loaded = Session.of(session.run)
    loaded.load(session.checkpoints[-1])
    assert loaded.runner.finished


def test_a_loaded_state_is_not_changed_by_training_on() -> None:
    run = RUNS["epoch limits, best in phase 0"]
    session = Session.of(run)
    session.execute(run.metrics[:1])
    state = torch.load(io.BytesIO(session.checkpoints[0]), weights_only=True)["runner"]
    untouched = copy.deepcopy(state)
    resumed = Session.of(run)
    resumed.runner.load_state_dict(state)
    resumed.execute(run.metrics[1:])
    assert str(state) == str(untouched)


# --- what a transition does ------------------------------------------------------------------------------------------


def test_later_phases_are_undone_by_restoring_an_earlier_best_and_learning_rates_are_not() -> None:
    run = Run(limits({"epoch": 1}, {"epoch": 3}, {}), BEST_FIRST, optimizer="AdamW", scheduled=True)
    session = Session.of(run)
    pretrained = make_model().state_dict()
    session.execute(run.metrics[:2])
    upper = session.model.get_parameter("upper.weight")
    assert not torch.equal(upper, pretrained["upper.weight"])
    session.execute(run.metrics[2:3])
    assert session.runner.phase == 2
    assert torch.equal(upper, pretrained["upper.weight"])
    assert upper not in session.optimizer.state
    assert session.runner.progress.best_phase == 0
    assert [group["lr"] for group in session.optimizer.param_groups] == [0.1 * GAMMA, LATER_LR * GAMMA, LATER_LR]


def test_transitions_tell_what_happened() -> None:
    messages: list[tuple[int, str]] = []
    run = Run(limits({"step": 5}, {"epoch": 3}, {}), BEST_AMID, patience=3)
    session = Session.of(run, report=lambda level, text: messages.append((level, text)))
    session.execute()
    assert [(t.left, t.entered, t.reason) for t in session.transitions] == [
        (0, 1, Reason.STEP),
        (1, 2, Reason.EPOCH),
    ]
    lines = [
        "Phase 0 -> 1 (max_transition_step) at epoch 1, step 5: 25 parameters trainable (51.02%), "
        "learning rates [0.1, 0.02]",
        "Phase 1 -> 2 (max_transition_epoch) at epoch 3, step 12: 49 parameters trainable (100.00%), "
        "learning rates [0.1, 0.02, 0.02]",
    ]
    assert messages == [(logging.INFO, line) for line in lines]
    assert [str(transition) for transition in session.transitions] == lines


def test_on_thawed_is_called_at_the_start_and_at_each_transition() -> None:
    calls: list[int] = []
    run = RUNS["epoch limits"]
    session = Session.of(run, on_thawed=lambda: calls.append(1))
    assert len(calls) == 1
    session.execute()
    assert len(calls) == 1 + len(session.transitions) == 3


@pytest.mark.parametrize("metric", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_ends_the_session(metric: float) -> None:
    session = Session.of(Run(limits({"epoch": 1}, {}), FALLING, patience=1))
    assert session.runner.epoch_end(metric) is None
    assert session.runner.finished
    assert session.runner.phase == 0


def test_without_a_metric_epoch_limits_still_count() -> None:
    session = Session.of(RUNS["epoch limits"])
    entered = [session.runner.epoch_end() for _ in range(3)]
    assert [transition is not None for transition in entered] == [False, True, True]


def test_a_phase_trains_before_it_ends() -> None:
    session = Session.of(Run(limits({"step": len(BATCHES)}, {"epoch": 1}, {}), FALLING))
    session.execute(FALLING[:1])
    assert session.runner.phase == 1


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_modules_follow_the_asked_mode_until_they_are_thawed_or_released(mode: str) -> None:
    session = Session.of(RUNS["epoch limits"], frozen_modules_mode=mode)
    session.runner.apply_module_modes()
    assert session.model.get_submodule("norm").training is (mode == "train")
    session.runner.thaw_to(2)
    assert session.model.get_submodule("norm").training

    session = Session.of(RUNS["epoch limits"], frozen_modules_mode=mode)
    session.runner.release_module_modes()
    assert all(module.training for module in session.model.modules())


def test_frozen_statistics_stand_still_when_asked_and_move_again_with_their_phase() -> None:
    run = RUNS["epoch limits, nothing restored"]
    session = Session.of(run, frozen_bn_track_running_stats=False)
    batches_tracked = session.model.get_buffer("norm.num_batches_tracked")
    session.execute(run.metrics[:4])
    assert batches_tracked == 0
    session.execute(run.metrics[4:5])
    assert batches_tracked == len(BATCHES)


# --- phase 0 and the user's optimizer --------------------------------------------------------------------------------


HELD = {
    "all parameters": [*LOWER, *UPPER, *HEAD],
    "phase 0's own": HEAD,
    "some of phase 0's and others": ["head.weight", *LOWER],
    "none of phase 0's": LOWER,
}
SCHEDULES = {
    "no scheduler": None,
    "StepLR": step_lr,
    "LinearLR": lambda optimizer: schedulers.LinearLR(optimizer, start_factor=0.25, total_iters=3),
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: (1 + epoch) / 4),
}


def rates_over_three_epochs(held: list[str], make_scheduler: Callable[[Optimizer], LRScheduler] | None) -> list[set]:
    """The learning rate of phase 0's parameters in each epoch."""
    model = make_model()
    optimizer = SGD([model.get_parameter(name) for name in held], lr=0.5, momentum=0.9)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    runner = PhaseRunner(
        model, optimizer, {0: {"params": HEAD}}, lr_schedulers=[] if scheduler is None else [scheduler]
    )
    rates = []
    for _ in range(3):
        rates.append({group["lr"] for group in optimizer.param_groups})
        train_batch(model, optimizer, BATCHES[0])
        runner.step()
        if scheduler is not None:
            scheduler.step()
    assert {p for group in optimizer.param_groups for p in group["params"]} == {model.head.weight, model.head.bias}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("held", HELD)
def test_an_optimizer_over_other_parameters_is_rebuilt_for_phase_0(held: str, schedule: str) -> None:
    expected = rates_over_three_epochs(HEAD, SCHEDULES[schedule])
    assert rates_over_three_epochs(HELD[held], SCHEDULES[schedule]) == expected


@pytest.mark.parametrize("held", HELD)
def test_a_rebuilt_optimizer_keeps_parameter_names_and_a_tensor_lr(held: str) -> None:
    model = make_model()
    optimizer = AdamW([(name, model.get_parameter(name)) for name in HELD[held]], lr=torch.tensor(0.5))
    PhaseRunner(model, optimizer, {0: {"params": HEAD}, 1: {"params": UPPER}}).thaw_to(1)
    names = [name for group in optimizer.param_groups for name in group.get("param_names", [])]
    assert sorted(names) == sorted([*HEAD, *UPPER])
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)


@pytest.mark.parametrize("held", HELD)
def test_a_rebuilt_optimizer_keeps_the_hyper_parameters_of_its_groups(held: str) -> None:
    model = make_model()
    group = {"params": [model.get_parameter(name) for name in HELD[held]], "momentum": 0.5, "weight_decay": 0.25}
    optimizer = SGD([group], lr=0.5)
    PhaseRunner(model, optimizer, {0: {"params": HEAD}})
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.25}


def test_unless_enforced_the_optimizer_is_left_alone_and_its_differences_are_told() -> None:
    model = make_model()
    optimizer = SGD([model.get_parameter(name) for name in ["head.weight", *UPPER]], lr=0.5)
    told: list[tuple[int, str]] = []
    runner = PhaseRunner(
        model,
        optimizer,
        {0: {"params": HEAD}, 1: {"params": [*UPPER, *LOWER]}},
        enforce_phase0_params=False,
        report=lambda level, text: told.append((level, text)),
    )
    message = (
        "The optimizer does not hold exactly phase 0's parameters: missing ['head.bias'], "
        "also held ['upper.bias', 'upper.weight']."
    )
    assert told == [(logging.WARNING, message)]
    assert len(optimizer.param_groups[0]["params"]) == 3
    runner.thaw_to(1)
    added = set(optimizer.param_groups[1]["params"])
    assert added == {model.get_parameter(name) for name in LOWER}


@pytest.mark.parametrize(
    ("base_max_lr", "lr", "expected"),
    [
        pytest.param(1e-5, None, 1e-5, id="the default"),
        pytest.param(None, None, 0.5, id="none: the optimizer's initial lr"),
        pytest.param(1e-5, 0.125, 0.125, id="the phase's own"),
    ],
)
def test_a_phases_group_starts_at(base_max_lr: float | None, lr: float | None, expected: float) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    phases = {0: {"params": HEAD}, 1: {"params": UPPER} | ({} if lr is None else {"lr": lr})}
    runner = PhaseRunner(model, optimizer, phases, lr_schedulers=[scheduler], base_max_lr=base_max_lr)
    train_batch(model, optimizer, BATCHES[0])
    scheduler.step()
    runner.thaw_to(1)
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[1]["initial_lr"] == expected


def test_without_a_schedule_the_default_one_is_executed() -> None:
    model = make_model()
    runner = PhaseRunner(model, SGD(model.parameters(), lr=0.5))
    assert runner.phases_remaining == 3
    assert [name for name, p in model.named_parameters() if p.requires_grad] == HEAD


def test_parameters_in_no_phase_stay_frozen_which_is_told_once() -> None:
    told: list[str] = []
    model = make_model()
    runner = PhaseRunner(
        model,
        SGD(model.parameters(), lr=0.5),
        Schedule.parse({0: {"params": HEAD}, 1: {"params": UPPER}}),
        report=lambda _, text: told.append(text),
    )
    runner.thaw_to(1)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [*UPPER, *HEAD]
    assert len([text for text in told if "4 parameters are in no phase" in text]) == 1


# --- errors ----------------------------------------------------------------------------------------------------------


FIRST, SECOND = RUNS["epoch limits"], RUNS["no decay"]


@pytest.mark.parametrize(
    ("writer", "phase", "changes", "reader", "message"),
    [
        pytest.param(
            FIRST,
            0,
            {"version": 2},
            FIRST,
            r"expected checkpoint state of format 1 or older, got format 2\. "
            r"Fix: Resume with the newer release that wrote the checkpoint\.",
            id="newer version",
        ),
        pytest.param(
            FIRST,
            2,
            {},
            replace(FIRST, max_depth=1),
            r"expected a checkpoint of a phase up to 1, got one of phase 2\. "
            r"Fix: Resume with a schedule and `max_depth` that reach that phase\.",
            id="phase beyond max_depth",
        ),
        pytest.param(
            SECOND,
            1,
            {},
            FIRST,
            r"expected 3 parameter groups as in the checkpoint, got 2\. "
            r"Fix: Resume with the schedule, model and optimizer groups that wrote the checkpoint\.",
            id="other groups",
        ),
        pytest.param(
            FIRST,
            0,
            {"parameter_groups": [["head.weight", "lower.bias"]]},
            FIRST,
            r"parameter group 0 differs from the checkpoint's: "
            r"missing \['lower\.bias'\], not expected \['head\.bias'\]\. "
            r"Fix: Resume with the schedule, model and optimizer groups that wrote the checkpoint\.",
            id="other schedule",
        ),
    ],
)
def test_a_state_that_cannot_be_continued_is_refused(
    writer: Run, phase: int, changes: dict[str, Any], reader: Run, message: str
) -> None:
    written = Session.of(writer)
    written.runner.thaw_to(phase)
    state = written.runner.state_dict() | changes
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        Session.of(reader).runner.load_state_dict(state)


@pytest.mark.parametrize("phase", [0, 3, -1])
def test_phases_can_only_be_entered_in_order(phase: int) -> None:
    runner = Session.of(FIRST).runner
    runner.thaw_to(1)
    message = (
        rf"^expected a phase from 1 \(the present one\) to 2, got {phase}\. Fix: Phases can only be entered in order\.$"
    )
    with pytest.raises(ScheduleError, match=message):
        runner.thaw_to(phase)
    assert runner.phase == 1
