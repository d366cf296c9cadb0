"""Lightning's LearningRateMonitor, wherever it is listed, logs what each step trains with, from a group's first on."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import StepLR

from finetuning_scheduler import FinetuningScheduler
from tests.reference.networks import HEAD, SECOND, THIRD
from tests.reference.recipe import adamw, simple_recipe
from tests.reference.toys import Toy, make_trainer

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003, "betas": [0.8, 0.9], "weight_decay": 0.2}}
HALVING = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
THEIRS = {"new_optimizer": {"optimizer_init": ADAMW}}
ITS_OWN = {"new_lr_scheduler": {"lr_scheduler_init": HALVING, "pl_lrs_cfg": {"name": "halved"}}}
# An epoch has four steps.
SCHEDULE: dict[Any, Any] = {
    0: {"params": [*HEAD], "max_transition_epoch": 1},
    1: {"params": [*THIRD], "lr": 0.05, "max_transition_step": 6},
    2: {"params": [*SECOND], "lr": 0.02},
}


class Groups(Callback):
    """Notes, by step, what the optimizer's groups are when it steps; by halves, if each phase adds two."""

    def __init__(self, halves: bool = False) -> None:
        self.halves = halves
        self.seen: dict[int, dict[str, float]] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        groups = optimizer.param_groups
        (name,) = {config.name for config in trainer.lr_scheduler_configs} or {None}
        name = name or f"lr-{type(optimizer).__name__}"
        values = {}
        for number, group in enumerate(groups):
            phase, exempt = divmod(number, 2) if self.halves else (number, 0)
            place = f"{name}/phase{phase}" + ("/no_decay" if exempt else "")
            momentum = group["betas"][0] if "betas" in group else group["momentum"]
            values |= {
                place: group["lr"],
                f"{place}-momentum": momentum,
                f"{place}-weight_decay": group["weight_decay"],
            }
        self.seen[trainer.global_step] = values


@dataclass(frozen=True)
class Case:
    """A program whose learning rates are logged.

    Args:
        interval: When the monitor logs; ``None`` leaves it to the LR scheduler.
        scheduled: The interval of the user's LR scheduler; ``None`` if there is none.
        phase: What phase 2 installs.
        no_decay: Fragments of names whose parameters get groups without weight decay.
    """

    interval: str | None = "step"
    scheduled: str | None = "epoch"
    phase: Mapping[str, Any] | None = None
    no_decay: tuple[str, ...] = ()

    @property
    def epochs_only(self) -> bool:
        return "epoch" in (self.interval, self.scheduled if self.interval is None else None)


CASES = {
    "step": Case(),
    "step, stepped": Case(scheduled="step"),
    "step, no scheduler": Case(scheduled=None),
    "step, no_decay": Case(no_decay=("bias",)),
    "step, new optimizer": Case(phase=THEIRS),
    "step, new scheduler": Case(phase=ITS_OWN),
    "step, both new": Case(phase=THEIRS | ITS_OWN),
    "epoch": Case("epoch"),
    "epoch, both new": Case("epoch", phase=THEIRS | ITS_OWN),
    "as the scheduler, epoch": Case(None),
    "as the scheduler, step": Case(None, "step"),
}


def trainer_of(case: Case, monitor_first: bool, root: Path, groups: Groups, epochs: int) -> pl.Trainer:
    schedule = {**SCHEDULE, 2: SCHEDULE[2] | dict(case.phase or {})}
    scheduler = FinetuningScheduler(schedule, restore_best=False, log_dir=root / "schedules")
    monitor = LearningRateMonitor(case.interval, log_momentum=True, log_weight_decay=True)
    order = [monitor, scheduler] if monitor_first else [scheduler, monitor]
    return make_trainer(root, callbacks=[*order, groups], max_epochs=epochs, logger=CSVLogger(root))


def module_of(case: Case) -> Toy:
    recipe = simple_recipe(no_decay=case.no_decay)
    if case.scheduled is not None:
        recipe = simple_recipe(
            no_decay=case.no_decay, scheduler=lambda optimizer: StepLR(optimizer, 1, 0.9), interval=case.scheduled
        )
    return Toy(recipe)


def logged(trainer: pl.Trainer) -> dict[int, dict[str, float]]:
    """What the file of metrics says of groups, by step."""
    with (Path(str(trainer.log_dir)) / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = ("lr-", "halved")
    found = [(int(row["step"]), {k: float(v) for k, v in row.items() if v and k.startswith(kept)}) for row in rows]
    return {step: values for step, values in found if values}


def expected(case: Case, groups: Groups) -> dict[int, dict[str, float]]:
    """The same by hand; what is logged as an epoch starts is of its first step."""
    return {step: values for step, values in groups.seen.items() if not case.epochs_only or step % 4 == 0}


@pytest.mark.parametrize("monitor_first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("name", CASES)
def test_each_group_is_logged_from_its_first_step(name: str, monitor_first: bool, tmp_path: Path) -> None:
    case, groups = CASES[name], Groups(halves=bool(CASES[name].no_decay))
    trainer = trainer_of(case, monitor_first, tmp_path, groups, epochs=4)
    trainer.fit(module_of(case))
    assert len(groups.seen) == 16
    assert max(len(values) for values in groups.seen.values()) == 3 * (6 if case.no_decay else 3)
    assert logged(trainer) == expected(case, groups)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, of its own checkpoints
@pytest.mark.parametrize("monitor_first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("interval", ["step", "epoch", None])
@pytest.mark.parametrize("epochs", [1, 2, 3], ids=["in phase 0", "in phase 2", "later"])
def test_a_resumed_run_logs_the_same(epochs: int, interval: str | None, monitor_first: bool, tmp_path: Path) -> None:
    case, groups = Case(interval, phase=THEIRS | ITS_OWN), Groups()
    trainer = trainer_of(case, monitor_first, tmp_path / "first", groups, epochs)
    trainer.fit(module_of(case))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = trainer_of(case, monitor_first, tmp_path / "resumed", groups, epochs=4)
    resumed.fit(module_of(case), ckpt_path=tmp_path / "saved.ckpt")
    assert len(groups.seen) == 16
    assert logged(trainer) | logged(resumed) == expected(case, groups)


class Reading(Callback):
    """Notes what it meets as epochs and batches start."""

    def __init__(self, scheduler: FinetuningScheduler) -> None:
        self.scheduler = scheduler
        self.at_epochs: list[tuple[int, int, int]] = []
        self.at_batches: list[tuple[int, int, int]] = []

    def state(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[int, int, int]:
        trained = sum(parameter.requires_grad for parameter in module.parameters())
        return self.scheduler.curr_depth, trained, len(trainer.optimizers[0].param_groups)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at_epochs.append(self.state(trainer, pl_module))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.at_batches.append(self.state(trainer, pl_module))


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_callbacks_meet_the_phase_that_begins(first: bool, tmp_path: Path) -> None:
    """Transitions are after 4 and 6 steps."""
    scheduler = FinetuningScheduler(SCHEDULE, restore_best=False)
    reading = Reading(scheduler)
    callbacks = [reading, scheduler] if first else [scheduler, reading]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_epochs=3)
    trainer.fit(Toy(simple_recipe(optimizer=adamw)))
    assert reading.at_epochs == [(0, 2, 1), (1, 4, 2), (2, 6, 3)]
    assert reading.at_batches == 4 * [(0, 2, 1)] + 2 * [(1, 4, 2)] + 6 * [(2, 6, 3)]


def test_the_accumulation_of_an_epoch_counts_for_its_transitions(tmp_path: Path) -> None:
    """From epoch 1 on two batches make a step: a phase that ends after step 5 ends at batch 2 of that epoch."""
    accumulate = GradientAccumulationScheduler({0: 1, 1: 2})
    schedule = {0: {"params": [*HEAD], "max_transition_step": 5}, 1: {"params": [*THIRD]}}
    scheduler = FinetuningScheduler(schedule, restore_best=False)
    reading = Reading(scheduler)
    make_trainer(tmp_path, callbacks=[accumulate, scheduler, reading], max_epochs=3).fit(Toy())
    assert [phase for phase, *_ in reading.at_batches] == 4 * [0] + 2 * [0] + 6 * [1]


class TornDown(Callback):
    """Counts what it is told of."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.told: list[str] = []

    @property
    def state_key(self) -> str:
        return self.name

    def setup(self, *_: Any, **__: Any) -> None:
        self.told.append("setup")

    def on_exception(self, *_: Any) -> None:
        self.told.append("exception")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.name == "last" and trainer.current_epoch == 1:
            raise ZeroDivisionError

    def teardown(self, *_: Any, **__: Any) -> None:
        self.told.append("teardown")


def test_the_users_order_of_callbacks_comes_back_and_none_is_left_out(tmp_path: Path) -> None:
    scheduler = FinetuningScheduler(SCHEDULE, restore_best=False, epoch_transitions_only=True, max_depth=0)
    given = [TornDown("first"), TornDown("second"), scheduler, TornDown("last")]
    trainer = make_trainer(tmp_path, callbacks=given, max_epochs=1, enable_checkpointing=False)
    for fits in (1, 2):  # the second fails
        if fits == 2:
            trainer.fit_loop.max_epochs = 2
            with pytest.raises(ZeroDivisionError):
                trainer.fit(Toy())
        else:
            trainer.fit(Toy())
        assert trainer.callbacks == given
    trainer.validate(Toy())
    assert trainer.callbacks == given
    fit, failed, validated = ["setup", "teardown"], ["setup", "exception"], ["setup", "teardown"]
    for callback in given:
        if isinstance(callback, TornDown):
            assert callback.told == fit + failed + validated
