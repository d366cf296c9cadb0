"""What is planned and simulated is what a run then does: groups, parameters, learning rates, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR, LRScheduler, OneCycleLR

from finetuning_scheduler import FinetuningScheduler
from finetuning_scheduler.core import ModelView, PhaseRunner, Settings, prepare
from finetuning_scheduler.core.optim.build import SchedulerSettings
from finetuning_scheduler.core.simulation import Pace, Simulation
from finetuning_scheduler.report.costs import from_parameters
from finetuning_scheduler.report.plan import plan_report
from finetuning_scheduler.report.shapes import PlanReport
from tests.reference.networks import FIRST, HEAD, SECOND, THIRD
from tests.reference.recipe import momentum_sgd, simple_recipe
from tests.reference.toys import Toy, make_trainer

EPOCHS, STEPS = 6, 4  # the steps that an epoch of the toys has
ADAMW = {"optimizer_init": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003, "weight_decay": 0.2}}}
HALVING: dict[str, Any] = {
    "lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
}
COSINE: dict[str, Any] = {
    "lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 9}},
    "pl_lrs_cfg": {"interval": "step", "frequency": 2},
}


def schedule(**further: Mapping[str, Any]) -> dict[int, Any]:
    one, two, three = (further.get(phase, {}) for phase in ("one", "two", "three"))
    return {
        0: {"params": [*HEAD], "max_transition_epoch": 1},
        1: {"params": [*THIRD], "lr": 0.05, "max_transition_step": 6, **one},
        2: {"params": [*SECOND], "max_transition_epoch": 3, **two},
        3: {"params": [*FIRST], "lr": 0.02, **three},
    }


@dataclass(frozen=True)
class Case:
    """A program: its schedule, its optimizer and LR scheduler, and arguments of the callback."""

    schedule: dict[int, Any] = field(default_factory=schedule)
    optimizer: Callable[[Any], Optimizer] = momentum_sgd
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    interval: str = "epoch"
    frequency: int = 1
    no_decay: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return Settings(no_decay=self.no_decay, restore_best=False, **self.options)


CASES = {
    "plain": Case(),
    "no_decay": Case(no_decay=("bias",)),
    "a scheduler by epoch": Case(scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9)),
    "a scheduler by step": Case(scheduler=lambda optimizer: CosineAnnealingLR(optimizer, 7), interval="step"),
    "every third step": Case(scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9), interval="step", frequency=3),
    "one cycle": Case(scheduler=lambda optimizer: OneCycleLR(optimizer, 0.3, total_steps=40), interval="step"),
    "lambdas": Case(
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
        options={"apply_lambdas_new_pgs": True},
    ),
    "the first rate": Case(
        optimizer=lambda parameters: Adam(parameters, lr=0.007),
        scheduler=lambda optimizer: LinearLR(optimizer, 0.1, total_iters=4),
        options={"base_max_lr": None},
    ),
    "a new optimizer": Case(schedule(two={"new_optimizer": ADAMW}), no_decay=("bias",)),
    "a new scheduler": Case(
        schedule(one={"new_lr_scheduler": HALVING}, three={"new_lr_scheduler": COSINE}),
        scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9),
    ),
    "rates for a new scheduler": Case(schedule(two={"new_lr_scheduler": HALVING | {"init_pg_lrs": [0.3, 0.4]}})),
    "present rates": Case(
        schedule(two={"new_lr_scheduler": HALVING | {"use_current_optimizer_pg_lrs": True}}),
        scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9),
    ),
    "both new": Case(
        schedule(one={"new_optimizer": ADAMW}, two={"new_optimizer": ADAMW, "new_lr_scheduler": COSINE}),
        optimizer=lambda parameters: AdamW(parameters, lr=0.01),
    ),
    "layer by layer": Case(
        {0: schedule()[0], 1: {"params": [*THIRD, *SECOND, *FIRST], "lr": 0.1, "lr_decay": 0.5}}, no_decay=("bias",)
    ),
    "warm-up": Case(
        schedule(one={"lr_warmup_steps": 2}, three={"lr_warmup_steps": 20}),
        scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9),
        interval="step",
    ),
    "an end of its own": Case(schedule(three={"max_transition_step": 17})),
    "fewer phases": Case(options={"max_depth": 1}),
    "two groups of the user's": Case(
        optimizer=lambda parameters: AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "name": "matrices"},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=0.01,
        )
    ),
}


class Program(Toy):
    """All parameters go to the optimizer, as in most programs."""

    case: Case

    def configure_optimizers(self) -> Any:
        optimizer = self.case.optimizer(list(self.parameters()))
        if self.case.scheduler is None:
            return optimizer
        settings = {"interval": self.case.interval, "frequency": self.case.frequency}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.case.scheduler(optimizer), **settings}}


class Observer(Callback):
    """Notes rates in each step, and what there is when a phase begins."""

    def __init__(self, scheduler: FinetuningScheduler) -> None:
        self.scheduler = scheduler
        self.steps: list[tuple[int, int, tuple[float, ...]]] = []
        self.phases: dict[int, dict[str, Any]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.scheduler.curr_depth not in self.phases:
            optimizer = trainer.optimizers[0]
            self.phases[self.scheduler.curr_depth] = {
                "trained": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
                "optimizer": type(optimizer).__name__,
                "groups": [
                    (g["name"], len(g["params"]), sum(p.numel() for p in g["params"]), g["lr"], g["weight_decay"])
                    for g in optimizer.param_groups
                ],
            }

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        self.steps.append((trainer.current_epoch, self.scheduler.curr_depth, rates))


def module_of(case: Case) -> Program:
    module = Program(simple_recipe(no_decay=case.no_decay))
    module.case = case
    return module


def run(case: Case, root: Path) -> Observer:
    options = {"restore_best": False, "epoch_transitions_only": True, **case.options}
    schedule = case.schedule
    last = max(schedule)
    if set(schedule[last]).isdisjoint({"max_transition_epoch", "max_transition_step"}):
        schedule = {**schedule, last: {**schedule[last], "max_transition_epoch": 100}}
    scheduler = FinetuningScheduler(schedule, log_dir=root, **options)
    observer = Observer(scheduler)
    trainer = make_trainer(root, callbacks=[scheduler, observer], max_epochs=EPOCHS, enable_checkpointing=False)
    trainer.fit(module_of(case))
    return observer


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_learning_rates_of_every_step_and_plans_of_every_phase(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    observed = run(case, tmp_path)
    simulation = Simulation(
        case.schedule,
        ModelView.of(module_of(case)),
        lambda parameters: case.optimizer(list(parameters)),
        case.settings,
        make_lr_scheduler=case.scheduler,
        scheduler_settings=SchedulerSettings(interval=case.interval, frequency=case.frequency),
    )
    steps = [(step.epoch, step.phase, step.learning_rates) for step in simulation.run(Pace(EPOCHS, STEPS))]
    assert steps == observed.steps
    last = observed.phases[max(observed.phases)]
    assert simulation.present_labels() == simulation.labels == [group[0] for group in last["groups"]]
    assert_planned(report_of(case), observed.phases, case)


def report_of(case: Case, **options: Any) -> PlanReport:
    module = module_of(case)
    view, optimizer = ModelView.of(module), case.optimizer(list(module.parameters()))
    prepared = prepare(case.schedule, view, optimizer, case.settings)
    return plan_report(prepared, view, optimizer, case.settings, from_parameters(prepared.plan, view), **options)


def assert_planned(report: PlanReport, phases: Mapping[int, Mapping[str, Any]], case: Case) -> None:
    assert [phase.phase for phase in report.phases] == sorted(phases)
    names: list[str] = []
    for phase in report.phases:
        was = phases[phase.phase]
        assert phase.trainable_parameters == was["trained"]
        assert phase.optimizer == was["optimizer"]
        new = was["groups"][len(names) :]
        planned = [(g.name, g.tensors, g.parameters, g.learning_rate) for g in phase.new_groups]
        if not (case.options.get("apply_lambdas_new_pgs") or (phase.phase == 0 and case.scheduler)):
            assert planned == [group[:4] for group in new]
        else:  # the LR scheduler has set the first rate
            assert [group[:3] for group in planned] == [group[:3] for group in new]
        for group, (*_, weight_decay) in zip(phase.new_groups, new, strict=True):
            assert group.options.get("weight_decay", weight_decay) == weight_decay
        if phase.restart_learning_rates is not None:
            assert phase.restart_learning_rates == [group[3] for group in was["groups"][: len(names)]]
        names += [group.name for group in phase.new_groups]
        assert phase.groups == len(names)
        assert names == [group[0] for group in was["groups"]]


def test_a_phase_without_limit_lasts_as_long_as_it_is_said_to() -> None:
    endless = {0: {"params": [*HEAD]}, 1: {"params": [*THIRD], "max_transition_epoch": 4}, 2: {"params": [*SECOND]}}

    def phases(epochs_per_phase: int | None) -> list[int]:
        view = ModelView.of(Toy(simple_recipe()))
        simulation = Simulation(endless, view, lambda parameters: momentum_sgd(list(parameters)), Settings())
        return [step.phase for step in simulation.run(Pace(7, 1, epochs_per_phase))]

    assert phases(None) == [0] * 7
    assert phases(3) == [0, 0, 0, 1, 2, 2, 2]
    assert phases(1) == [0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", ["plain", "no_decay", "a new optimizer", "warm-up", "layer by layer"])
def test_a_loop_written_by_hand_has_the_same(name: str) -> None:
    case = CASES[name]
    module = module_of(case)
    optimizer = case.optimizer(list(module.parameters()))
    runner = PhaseRunner(module, optimizer, case.schedule, no_decay=case.no_decay, restore_best=False)
    report = report_of(case)
    for phase in report.phases:
        runner.thaw_to(phase.phase)
        groups = runner.optimizer.param_groups
        new = groups[phase.groups - len(phase.new_groups) :]
        assert [(g["name"], len(g["params"]), g["lr"]) for g in new] == [
            (g.name, g.tensors, g.learning_rate) for g in phase.new_groups
        ]
        assert phase.trainable_parameters == sum(p.numel() for p in module.parameters() if p.requires_grad)
