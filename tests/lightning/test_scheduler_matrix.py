"""Learning rates under every supported scheduler: at every optimizer step those of a scheduler built by hand.

`by_hand` below uses nothing of the package: it makes a stand-in optimizer, adds a group at each transition, extends the
scheduler's per-group entries itself, and notes what each optimizer step would see.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from finetuning_scheduler.core import PhaseRunner
from finetuning_scheduler.core.optim.schedulers import SUPPORTED_LR_SCHEDULERS
from tests.reference.networks import BATCHES_PER_EPOCH, HEAD, SECOND, THIRD, Wrapped, build_network, mlp
from tests.reference.recipe import PhaseSpec, Recipe
from tests.reference.toys import SaveAt, Session

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch.callbacks import Callback

EPOCHS = 5
# Phase 1 begins between epochs, phase 2 inside one. The best epoch before each is not the last one.
PHASE_1_EPOCH, PHASE_2_STEP = 2, 14
PHASE_LRS = {1: 0.05, 2: 0.02}
METRICS = (4.0, 5.0, 3.0, 3.5, 3.25)
# The first group holds nothing of phase 0, so that each scheduler loses its first entry when that phase is enforced.
DROPPED_LR, WEIGHT_LR, BIAS_LR = 0.3, 0.1, 0.04
FACTORS = (0.9, 0.5, 1.25, 0.8, 1.1)

Group = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What an optimizer step sees: the learning rate and the momentum of each group."""

    lrs: tuple[float, ...]
    momenta: tuple[float, ...]

    @classmethod
    def of(cls, optimizer: Optimizer) -> Seen:
        groups = optimizer.param_groups
        return cls(tuple(float(g["lr"]) for g in groups), tuple(float(g["momentum"]) for g in groups))


# --- the schedulers, and by hand, what each needs for another group ---------------------------------------------------


def factor(count: int) -> float:
    return FACTORS[count % len(FACTORS)]


def one(_: int) -> float:
    return 1.0


def base_lr_only(scheduler: Any, group: Group, first: Group) -> None:
    scheduler.base_lrs.append(group["initial_lr"])


def with_lambda(function: Callable[[int], float]) -> Callable[[Any, Group, Group], None]:
    def extend(scheduler: Any, group: Group, first: Group) -> None:
        scheduler.base_lrs.append(group["initial_lr"])
        scheduler.lr_lambdas.append(function)

    return extend


def with_minimum(scheduler: Any, group: Group, first: Group) -> None:
    scheduler.min_lrs.append(scheduler.min_lrs[-1])


def one_cycle(scheduler: Any, group: Group, first: Group) -> None:
    scheduler.base_lrs.append(group["initial_lr"])
    ratio = group["initial_lr"] / first["initial_lr"]
    group.update(max_lr=first["max_lr"] * ratio, min_lr=first["min_lr"] * ratio)
    group.update({key: first[key] for key in ("max_momentum", "base_momentum", "momentum")})


def cyclic(scheduler: Any, group: Group, first: Group) -> None:
    ratio = group["initial_lr"] / scheduler.base_lrs[0]
    scheduler.base_lrs.append(group["initial_lr"])
    scheduler.max_lrs.append(scheduler.max_lrs[0] * ratio)
    scheduler.base_momentums.append(scheduler.base_momentums[0])
    scheduler.max_momentums.append(scheduler.max_momentums[0])
    group["momentum"] = first["momentum"]


def averaging(scheduler: Any, group: Group, first: Group) -> None:
    scheduler.base_lrs.append(group["initial_lr"])
    group["swa_lr"] = first["swa_lr"] * (group["initial_lr"] / first["initial_lr"])


def inner(*extend: Callable[[Any, Group, Group], None]) -> Callable[[Any, Group, Group], None]:
    def extend_all(scheduler: Any, group: Group, first: Group) -> None:
        for each, extend_one in zip(scheduler._schedulers, extend, strict=True):
            extend_one(each, group, first)

    return extend_all


@dataclass(frozen=True)
class Row:
    """A scheduler over the user's three groups, and as a phase installs it over the two existing ones."""

    kind: type[LRScheduler]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    extend: Callable[[Any, Group, Group], None] = base_lr_only
    reinit: Mapping[str, Any] | None = field(default_factory=dict)  # changed arguments; None: not plain values
    factory: Callable[[Optimizer], LRScheduler] | None = None

    def make(self, optimizer: Optimizer) -> LRScheduler:
        return self.kind(optimizer, **self.arguments) if self.factory is None else self.factory(optimizer)

    @property
    def reinit_arguments(self) -> dict[str, Any]:
        return {**self.arguments, **(self.reinit or {})}

    def remake(self, optimizer: Optimizer) -> LRScheduler:
        return self.kind(optimizer, **self.reinit_arguments)


def sequence(optimizer: Optimizer) -> LRScheduler:
    """Phase 1 begins under the first inner scheduler or the second, phase 2 under the second or the third."""
    parts = [
        schedulers.LinearLR(optimizer, 0.5, 1.0, total_iters=2),
        schedulers.CosineAnnealingLR(optimizer, T_max=9, eta_min=1e-3),
        schedulers.LambdaLR(optimizer, factor),
    ]
    return schedulers.SequentialLR(optimizer, parts, milestones=[3, 11])


def chain(optimizer: Optimizer) -> LRScheduler:
    parts = [
        schedulers.ConstantLR(optimizer, 0.5, total_iters=3),
        schedulers.MultiplicativeLR(optimizer, factor),
        schedulers.ExponentialLR(optimizer, 0.9),
    ]
    return schedulers.ChainedScheduler(parts, optimizer=optimizer)


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
            with_minimum,
            {"min_lr": [0.03, 0.011]},
        ),
        Row(schedulers.LambdaLR, {"lr_lambda": [one, factor, factor]}, with_lambda(one), None),
        Row(schedulers.ConstantLR, {"factor": 0.5, "total_iters": 4}),
        Row(schedulers.LinearLR, {"start_factor": 0.5, "total_iters": 9}),
        Row(schedulers.ExponentialLR, {"gamma": 0.8}),
        Row(schedulers.CosineAnnealingLR, {"T_max": 7, "eta_min": 1e-4}),
        Row(schedulers.MultiplicativeLR, {"lr_lambda": [one, factor, factor]}, with_lambda(one), None),
        Row(schedulers.PolynomialLR, {"total_iters": 15, "power": 2.0}),
        Row(
            schedulers.OneCycleLR,
            {"max_lr": [0.9, 0.4, 0.2], "total_steps": 24},
            one_cycle,
            {"max_lr": [0.5, 0.3], "three_phase": True},
        ),
        Row(
            schedulers.CyclicLR,
            {"base_lr": [0.3, 0.01, 0.02], "max_lr": [0.9, 0.1, 0.08], "step_size_up": 3},
            cyclic,
            {"base_lr": [0.02, 0.01], "max_lr": [0.2, 0.05], "mode": "triangular2"},
        ),
        Row(schedulers.SequentialLR, {}, inner(base_lr_only, base_lr_only, with_lambda(one)), None, sequence),
        Row(schedulers.ChainedScheduler, {}, inner(base_lr_only, with_lambda(one), base_lr_only), None, chain),
        Row(
            SWALR,
            {"swa_lr": [0.9, 0.02, 0.01], "anneal_epochs": 6},
            averaging,
            {"swa_lr": [0.03, 0.05], "anneal_strategy": "linear"},
        ),
    )
}
NESTED = Row(
    schedulers.ChainedScheduler,
    {},
    inner(inner(inner(base_lr_only, base_lr_only), base_lr_only), base_lr_only, with_lambda(one)),
    None,
    sequence_of_chains,
)


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
            kind = self.row.kind
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


# --- by hand ----------------------------------------------------------------------------------------------------------


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
                self.scheduler = self.case.row.remake(self.optimizer)
            self.add_group(PHASE_LRS[1])
        if len(self.seen) == PHASE_2_STEP:
            self.add_group(PHASE_LRS[2])

    def add_group(self, lr: float) -> None:
        self.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": lr, "initial_lr": lr})
        first, group = self.optimizer.param_groups[0], self.optimizer.param_groups[-1]
        self.case.row.extend(self.scheduler, group, first)
        if self.case.apply_lambdas:
            group["lr"] = lr * factor(self.scheduler.last_epoch)

    def step_scheduler(self, epoch: int) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(METRICS[epoch])
        else:
            self.scheduler.step()


def by_hand(case: Case) -> list[Seen]:
    return ByHand(case).execute()


# --- by the package ---------------------------------------------------------------------------------------------------


def by_runner(case: Case) -> list[Seen]:
    model = Wrapped(build_network(mlp))
    optimizer = user_optimizer(list(model.parameters()))
    runner = PhaseRunner(
        model,
        optimizer,
        case.schedule(),
        lr_schedulers=[case.row.make(optimizer)],
        restore_best=case.restore_best,
        apply_lambdas_new_pgs=case.apply_lambdas,
    )
    seen = []
    for epoch in range(EPOCHS):
        for _ in range(BATCHES_PER_EPOCH):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
            seen.append(Seen.of(runner.optimizer))
            runner.optimizer.step()
            if case.interval == "step":
                step(runner, epoch)
            runner.step()
        if case.interval == "epoch":
            step(runner, epoch)
        runner.epoch_end(METRICS[epoch])
    return seen


def step(runner: PhaseRunner, epoch: int) -> None:
    (scheduler,) = runner.lr_schedulers
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(METRICS[epoch])
    else:
        scheduler.step()


def session_of(case: Case, root: Path, *callbacks: Callback) -> Session:
    recipe = Recipe(
        phases=(PhaseSpec(HEAD),),
        epochs=EPOCHS,
        optimizer=lambda parameters: user_optimizer(list(parameters)),
        scheduler=case.row.make,
        interval=case.interval,
        scores=METRICS,
        restore_best=case.restore_best,
        apply_lambdas=case.apply_lambdas,
    )
    options = {"ft_schedule": case.schedule(), "logging_level": logging.WARNING}
    checkpoint = {"save_top_k": -1}
    return Session(recipe, root, scheduler_options=options, checkpoint=checkpoint, extra_callbacks=callbacks)


def seen_lrs(session: Session) -> list[tuple[float, ...]]:
    return [step.lrs for step in session.history.steps]


# --- tests ------------------------------------------------------------------------------------------------------------


def test_every_supported_scheduler_has_a_row() -> None:
    assert ROWS.keys() == {kind.__name__ for kind in SUPPORTED_LR_SCHEDULERS}


REINITIALISED = [name for name, row in ROWS.items() if row.reinit is not None]
MATRIX = {
    f"{name}-{interval}-{'restore' if restore else 'continue'}-{'reinit' if reinit else 'keep'}": Case(
        ROWS[name], interval, restore, reinit
    )
    for name, interval, restore, reinit in product(ROWS, ("epoch", "step"), (True, False), (True, False))
    if not reinit or name in REINITIALISED
}
# Not in Lightning: ReduceLROnPlateau in every step needs a metric that validation logs later.
LIGHTNING = {
    name: case
    for name, case in MATRIX.items()
    if case.restore_best and not (case.row.kind is ReduceLROnPlateau and case.interval == "step")
}


@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX.keys())
def test_learning_rates_are_those_of_a_scheduler_built_by_hand(case: Case) -> None:
    assert by_runner(case) == by_hand(case)


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval':RuntimeWarning")
@pytest.mark.parametrize("case", LIGHTNING.values(), ids=LIGHTNING.keys())
def test_learning_rates_in_lightning_are_those_of_a_scheduler_built_by_hand(case: Case, tmp_path: Path) -> None:
    assert seen_lrs(session_of(case, tmp_path).fit()) == [seen.lrs for seen in by_hand(case)]


RESUMED = {name: case for name, case in LIGHTNING.items() if case.reinitialised or case.row.reinit is None}


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval':RuntimeWarning")
@pytest.mark.parametrize("case", RESUMED.values(), ids=RESUMED.keys())
def test_learning_rates_go_on_when_resumed_in_each_phase(case: Case, tmp_path: Path) -> None:
    saver = SaveAt("on_train_epoch_end", tmp_path)
    uninterrupted = seen_lrs(session_of(case, tmp_path, saver).fit())
    for checkpoint in list(saver.files)[1:4]:
        resumed = seen_lrs(session_of(case, tmp_path).fit(ckpt_path=checkpoint))
        assert resumed == uninterrupted[saver.steps[checkpoint] :]


@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX.keys())
def test_a_new_group_starts_at_exactly_the_learning_rate_of_its_phase(case: Case) -> None:
    seen = by_runner(case)
    starts = {len(step.lrs): step.lrs[-1] for step in reversed(seen)}
    assert starts[3] == PHASE_LRS[1]
    assert starts[4] == PHASE_LRS[2]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ROWS)
def test_a_new_optimizer_alone_changes_no_learning_rate(name: str, interval: str) -> None:
    case = Case(ROWS[name], interval, new_optimizer={"momentum": 0.9})
    assert [seen.lrs for seen in by_runner(case)] == [seen.lrs for seen in by_hand(case)]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ROWS)
def test_a_new_optimizer_with_a_learning_rate_leaves_those_of_existing_groups(name: str, interval: str) -> None:
    case = Case(ROWS[name], interval, new_optimizer={"momentum": 0.9, "lr": 0.7})
    assert [seen.lrs[:2] for seen in by_runner(case)] == [seen.lrs[:2] for seen in by_hand(case)]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ROWS)
def test_the_matrix_is_no_constant(name: str, interval: str) -> None:
    """A check of the test's own teeth: the scheduler acts on groups of each phase."""
    seen = by_hand(Case(ROWS[name], interval))
    assert len({step.lrs[0] for step in seen}) > 1
    constant = (schedulers.LambdaLR, schedulers.MultiplicativeLR, schedulers.ConstantLR, schedulers.SequentialLR)
    assert ROWS[name].kind in constant or len({step.lrs[2] for step in seen if len(step.lrs) > 2}) > 1


# PyTorch itself warns where a SequentialLR makes its first scheduler, a chain, start anew.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_nested_composition(interval: str) -> None:
    assert by_runner(Case(NESTED, interval)) == by_hand(Case(NESTED, interval))


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("kind", [schedulers.LambdaLR, schedulers.MultiplicativeLR])
def test_new_groups_take_the_last_lambda_if_asked(kind: type[LRScheduler], interval: str) -> None:
    row = Row(kind, {"lr_lambda": [one, one, factor]}, with_lambda(factor))
    case = Case(row, interval, apply_lambdas=True)
    assert by_runner(case) == by_hand(case)


FACTORIES: dict[str, dict[str, Any]] = {
    "get_constant_schedule": {},
    "get_constant_schedule_with_warmup": {"num_warmup_steps": 6},
    "get_linear_schedule_with_warmup": {"num_warmup_steps": 6, "num_training_steps": 20},
    "get_cosine_schedule_with_warmup": {"num_warmup_steps": 6, "num_training_steps": 20},
    "get_cosine_with_hard_restarts_schedule_with_warmup": {
        "num_warmup_steps": 6,
        "num_training_steps": 20,
        "num_cycles": 2,
    },
    "get_polynomial_decay_schedule_with_warmup": {"num_warmup_steps": 6, "num_training_steps": 20, "power": 2.0},
    "get_inverse_sqrt_schedule": {"num_warmup_steps": 6},
    "get_wsd_schedule": {"num_warmup_steps": 6, "num_stable_steps": 6, "num_decay_steps": 8},
    "get_cosine_with_min_lr_schedule_with_warmup": {"num_warmup_steps": 6, "num_training_steps": 20, "min_lr": 0.01},
}


@pytest.mark.parametrize("apply_lambdas", [True, False])
@pytest.mark.parametrize("name", FACTORIES)
def test_schedule_factories_of_transformers(name: str, apply_lambdas: bool) -> None:
    """They return a LambdaLR; a new group's entry is the last lambda if asked, else the constant 1."""
    transformers = pytest.importorskip("transformers")

    def make(optimizer: Optimizer) -> LRScheduler:
        return getattr(transformers.optimization, name)(optimizer, **FACTORIES[name])

    if apply_lambdas:
        present = {"lambda": make(SGD([nn.Parameter(torch.zeros(1))], lr=0.5)).lr_lambdas[0]}
    else:
        present = {"lambda": one}

    class Factories(ByHand):
        def add_group(self, lr: float) -> None:
            super().add_group(lr)
            self.optimizer.param_groups[-1]["lr"] = lr * present["lambda"](self.scheduler.last_epoch)

    row = Row(schedulers.LambdaLR, {}, with_lambda(present["lambda"]), None, make)
    assert by_runner(Case(row, "step", apply_lambdas=apply_lambdas)) == Factories(Case(row, "step")).execute()
