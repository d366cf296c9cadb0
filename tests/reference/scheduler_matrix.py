"""Every supported LR scheduler, over several groups of which one is dropped and two are added, and by hand its rates.

`by_hand` uses nothing of the package: it makes a stand-in optimizer, adds a group at each transition, extends the
scheduler's per-group entries itself, and notes what each optimizer step would see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from .growth import grow
from .networks import BATCHES_PER_EPOCH, HEAD, SECOND, THIRD

EPOCHS = 5
# Phase 1 begins between epochs, phase 2 inside one. The best epoch before each is not the last one.
PHASE_1_EPOCH, PHASE_2_STEP = 2, 14
PHASE_LRS = {1: 0.05, 2: 0.02}
METRICS = (4.0, 5.0, 3.0, 3.5, 3.25)
# The first group holds nothing of phase 0, so that each scheduler loses its first entry when that phase is enforced.
DROPPED_LR, WEIGHT_LR, BIAS_LR = 0.3, 0.1, 0.04
FACTORS = (0.9, 0.5, 1.25, 0.8, 1.1)


@dataclass(frozen=True)
class Seen:
    """What an optimizer step sees: the learning rate and the momentum of each group."""

    lrs: tuple[float, ...]
    momenta: tuple[float, ...]

    @classmethod
    def of(cls, optimizer: Optimizer) -> Seen:
        groups = optimizer.param_groups
        return cls(tuple(float(g["lr"]) for g in groups), tuple(float(g["momentum"]) for g in groups))


def one(_: int) -> float:
    return 1.0


def factor(count: int) -> float:
    return FACTORS[count % len(FACTORS)]


def late_factor(count: int) -> float:
    return 0.75**count


@dataclass(frozen=True)
class Row:
    """A scheduler over the user's three groups, and as phase 1 installs it over the two existing ones and its own."""

    kind: type[LRScheduler]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reinit: Mapping[str, Any] = field(default_factory=dict)  # changed arguments
    factory: Callable[[Optimizer], LRScheduler] | None = None
    reinit_kind: type[LRScheduler] | None = None  # a subclass, where the arguments are schedulers

    def make(self, optimizer: Optimizer) -> LRScheduler:
        return self.kind(optimizer, **self.arguments) if self.factory is None else self.factory(optimizer)

    @property
    def reinit_arguments(self) -> dict[str, Any]:
        return {**self.arguments, **self.reinit}

    @property
    def installed(self) -> type[LRScheduler]:
        return self.reinit_kind or self.kind

    def remake(self, optimizer: Optimizer) -> LRScheduler:
        return self.installed(optimizer, **self.reinit_arguments)


def sequence_parts(optimizer: Optimizer) -> list[LRScheduler]:
    return [
        schedulers.LinearLR(optimizer, 0.5, 1.0, total_iters=2),
        schedulers.CosineAnnealingLR(optimizer, T_max=9, eta_min=1e-3),
        schedulers.LambdaLR(optimizer, factor),
    ]


def sequence(optimizer: Optimizer) -> LRScheduler:
    """Phase 1 begins under the first inner scheduler or the second, phase 2 under the second or the third."""
    return schedulers.SequentialLR(optimizer, sequence_parts(optimizer), milestones=[3, 11])


class Sequence(schedulers.SequentialLR):
    """What a schedule can name: its arguments are plain values."""

    def __init__(self, optimizer: Optimizer, milestones: list[int]) -> None:
        super().__init__(optimizer, sequence_parts(optimizer), milestones=milestones)


def chain_parts(optimizer: Optimizer) -> list[LRScheduler]:
    return [
        schedulers.ConstantLR(optimizer, 0.5, total_iters=3),
        schedulers.MultiplicativeLR(optimizer, factor),
        schedulers.ExponentialLR(optimizer, 0.9),
    ]


def chain(optimizer: Optimizer) -> LRScheduler:
    return schedulers.ChainedScheduler(chain_parts(optimizer), optimizer=optimizer)


class Chain(schedulers.ChainedScheduler):
    """What a schedule can name."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(chain_parts(optimizer), optimizer=optimizer)


def sequence_of_chains(optimizer: Optimizer) -> LRScheduler:
    first = [schedulers.LinearLR(optimizer, 0.5, 1.0, total_iters=4), schedulers.StepLR(optimizer, 2, 0.7)]
    second = [schedulers.ConstantLR(optimizer, 0.5, total_iters=2), schedulers.LambdaLR(optimizer, factor)]
    parts = [
        schedulers.SequentialLR(
            optimizer,
            [schedulers.ChainedScheduler(first), schedulers.ExponentialLR(optimizer, 0.9)],
            milestones=[2],
        ),
        *second,
    ]
    return schedulers.ChainedScheduler(parts)


ROWS = {
    row.kind.__name__: row
    for row in (
        Row(schedulers.StepLR, {"step_size": 2, "gamma": 0.7}),
        Row(schedulers.MultiStepLR, {"milestones": [1, 3, 4, 9], "gamma": 0.5}),
        Row(schedulers.CosineAnnealingWarmRestarts, {"T_0": 3, "eta_min": 1e-4}),
        Row(
            ReduceLROnPlateau,
            {"factor": 0.5, "patience": 0, "min_lr": [0.07, 0.03, 0.012]},
            {"min_lr": [0.03, 0.011, 0.02]},
        ),
        Row(schedulers.LambdaLR, {"lr_lambda": [one, factor, factor]}, {"lr_lambda": [factor, one, late_factor]}),
        Row(schedulers.ConstantLR, {"factor": 0.5, "total_iters": 4}),
        Row(schedulers.LinearLR, {"start_factor": 0.5, "total_iters": 9}),
        Row(schedulers.ExponentialLR, {"gamma": 0.8}),
        Row(schedulers.CosineAnnealingLR, {"T_max": 7, "eta_min": 1e-4}),
        Row(
            schedulers.MultiplicativeLR,
            {"lr_lambda": [one, factor, factor]},
            {"lr_lambda": [factor, one, late_factor]},
        ),
        Row(schedulers.PolynomialLR, {"total_iters": 15, "power": 2.0}),
        Row(
            schedulers.OneCycleLR,
            {"max_lr": [0.9, 0.4, 0.2], "total_steps": 24},
            {"max_lr": [0.5, 0.3, 0.2], "three_phase": True},
        ),
        Row(
            schedulers.CyclicLR,
            {"base_lr": [0.3, 0.01, 0.02], "max_lr": [0.9, 0.1, 0.08], "step_size_up": 3},
            {"base_lr": [0.02, 0.01, 0.04], "max_lr": [0.2, 0.05, 0.3], "mode": "triangular2"},
        ),
        Row(schedulers.SequentialLR, {}, {"milestones": [2, 5]}, sequence, Sequence),
        Row(schedulers.ChainedScheduler, factory=chain, reinit_kind=Chain),
        Row(
            SWALR,
            {"swa_lr": [0.9, 0.02, 0.01], "anneal_epochs": 6},
            {"swa_lr": [0.03, 0.05, 0.01], "anneal_strategy": "linear"},
        ),
    )
}
NESTED = Row(schedulers.ChainedScheduler, factory=sequence_of_chains)
# One value for all groups, the phase's own included.
NUMBERS = {
    row.kind.__name__: row
    for row in (
        Row(ReduceLROnPlateau, {"factor": 0.5, "patience": 0, "min_lr": 0.015}),
        Row(schedulers.LambdaLR, {"lr_lambda": factor}),
        Row(schedulers.MultiplicativeLR, {"lr_lambda": factor}),
        Row(schedulers.OneCycleLR, {"max_lr": 0.4, "total_steps": 24}),
        Row(schedulers.CyclicLR, {"base_lr": 0.02, "max_lr": 0.2, "step_size_up": 3}),
        Row(SWALR, {"swa_lr": 0.03, "anneal_epochs": 6}),
    )
}


@dataclass(frozen=True)
class Case:
    row: Row
    interval: str
    restore_best: bool = True
    reinitialised: bool = False
    apply_lambdas: bool = False
    new_optimizer: Mapping[str, Any] | None = None  # the arguments of an SGD that phase 1 installs

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"interval": self.interval}
        return settings | ({"monitor": "val_loss"} if issubclass(self.row.kind, ReduceLROnPlateau) else {})

    def schedule(self) -> dict[int, dict[str, Any]]:
        phases: dict[int, dict[str, Any]] = {
            0: {"params": list(HEAD), "max_transition_epoch": PHASE_1_EPOCH},
            1: {"params": list(THIRD), "lr": PHASE_LRS[1], "max_transition_step": PHASE_2_STEP},
            2: {"params": list(SECOND), "lr": PHASE_LRS[2]},
        }
        if self.reinitialised:
            kind = self.row.installed
            init = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": self.row.reinit_arguments}
            phases[1]["new_lr_scheduler"] = {"lr_scheduler_init": init, "pl_lrs_cfg": self.settings()}
        if self.new_optimizer is not None:
            init = {"class_path": "torch.optim.SGD", "init_args": dict(self.new_optimizer)}
            phases[1]["new_optimizer"] = {"optimizer_init": init}
        return phases


def user_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """Three groups: the last two hold the weight and the bias of the head."""
    *others, weight, bias = parameters
    groups = [
        {"params": others, "lr": DROPPED_LR},
        {"params": [weight], "lr": WEIGHT_LR},
        {"params": [bias], "lr": BIAS_LR},
    ]
    return SGD(groups, lr=0.5, momentum=0.9)


class ByHand:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.optimizer = user_optimizer([nn.Parameter(torch.zeros(1)) for _ in range(3)])
        self.scheduler = case.row.make(self.optimizer)
        self.drop_first_group(self.scheduler)
        del self.optimizer.param_groups[0]
        self.seen: list[Seen] = []

    def drop_first_group(self, scheduler: Any) -> None:
        for part in getattr(scheduler, "_schedulers", ()):
            self.drop_first_group(part)
        for name in ("base_lrs", "min_lrs", "max_lrs", "lr_lambdas", "base_momentums", "max_momentums"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(scheduler, name)[1:])

    def execute(self) -> list[Seen]:
        for epoch in range(EPOCHS):
            for batch in range(BATCHES_PER_EPOCH):
                self.begin_phase(epoch if batch == 0 else None)
                self.seen.append(Seen.of(self.optimizer))
                self.optimizer.step()
                if self.case.interval == "step":
                    self.step_scheduler(epoch)
            if self.case.interval == "epoch":
                self.step_scheduler(epoch)
        return self.seen

    def begin_phase(self, epoch: int | None) -> None:
        if epoch == PHASE_1_EPOCH:
            if self.case.reinitialised:
                for group in self.optimizer.param_groups:
                    group["lr"] = group.get("initial_lr", group["lr"])  # ReduceLROnPlateau sets none
                self.install(PHASE_LRS[1])
            else:
                self.add_group(PHASE_LRS[1])
        if len(self.seen) == PHASE_2_STEP:
            self.add_group(PHASE_LRS[2])

    def install(self, lr: float) -> None:
        """Make the scheduler over all groups; then let the new one start at its own rate."""
        new = {"params": [nn.Parameter(torch.zeros(1))], "lr": lr, "initial_lr": lr}
        self.optimizer.add_param_group(new)
        self.scheduler = self.case.row.remake(self.optimizer)
        new.update(lr=lr, initial_lr=lr)
        if self.case.apply_lambdas:
            new["lr"] = lr * self.scheduler.lr_lambdas[-1](0)
        self.scheduler._last_lr[-1] = new["lr"]

    def add_group(self, lr: float) -> None:
        self.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": lr, "initial_lr": lr})
        grow(self.scheduler, self.optimizer, self.case.apply_lambdas)

    def step_scheduler(self, epoch: int) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(METRICS[epoch])
        else:
            self.scheduler.step()


def by_hand(case: Case) -> list[Seen]:
    return ByHand(case).execute()


MATRIX = {
    f"{name}-{interval}-{'restore' if restore else 'continue'}-{'reinit' if reinit else 'keep'}": Case(
        ROWS[name], interval, restore, reinit
    )
    for name, interval, restore, reinit in product(ROWS, ("epoch", "step"), (True, False), (True, False))
}
