"""`FinetuningScheduler.plan` tells what a fit of the same trainer, model and data does, and changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR

from finetuning_scheduler import FinetuningScheduler
from tests.reference.networks import HEAD, SECOND, THIRD
from tests.reference.recipe import simple_recipe
from tests.reference.toys import Toy, ToyData, make_trainer

SCHEDULE: dict[int, dict[str, Any]] = {
    0: {"params": [*HEAD], "max_transition_epoch": 1},
    1: {"params": [*THIRD], "lr": 0.05, "max_transition_epoch": 2},
    2: {"params": [*SECOND], "lr": 0.02},
}


class Meeting(Toy):
    """Notes what its method meets, and asks its trainer for something."""

    met: tuple[int, int]

    def configure_optimizers(self) -> Any:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.met = (len(trainable), int(self.trainer.max_epochs or 0))
        optimizer = AdamW(trainable, lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": ExponentialLR(optimizer, 0.9)}


class Groups(Callback):
    def __init__(self, scheduler: FinetuningScheduler) -> None:
        self.scheduler = scheduler
        self.seen: dict[int, list[tuple[str, int, float]]] = {}
        self.trained: dict[int, int] = {}
        self.bytes: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        phase = self.scheduler.curr_depth
        groups = trainer.optimizers[0].param_groups
        self.seen.setdefault(phase, [(g["name"], len(g["params"]), g["lr"]) for g in groups])
        self.trained[phase] = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        held = trainer.optimizers[0].state.values()
        self.bytes[self.scheduler.curr_depth] = sum(t.nbytes for s in held for t in s.values())


@pytest.mark.parametrize("implicit", [False, True], ids=["a schedule", "generated"])
@pytest.mark.parametrize("data", [None, ToyData], ids=["the model's data", "a datamodule"])
def test_a_fit_does_what_was_planned(implicit: bool, data: Any, tmp_path: Path) -> None:
    scheduler = FinetuningScheduler(None if implicit else SCHEDULE, max_depth=2, log_dir=tmp_path)
    observed = Groups(scheduler)
    module = Meeting(simple_recipe(no_decay=("bias",), scores=(1.0,) * 40))
    trainer = make_trainer(tmp_path, callbacks=[scheduler, observed], max_epochs=40)
    before = copy.deepcopy(module.state_dict())
    datamodule = None if data is None else data()
    report = scheduler.plan(trainer, module, datamodule)
    assert module.met == (2, 40)
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(RuntimeError, match="not attached"):
        _ = module.trainer
    assert not list(tmp_path.rglob("*.yaml"))
    assert report.costs_from == "flops", report.notes
    assert report.precision == "32-true"
    trainer.fit(module, datamodule=datamodule)
    assert [phase.phase for phase in report.phases] == sorted(observed.seen)
    for phase in report.phases:
        seen = observed.seen[phase.phase]
        planned = [(group.name, group.tensors, group.learning_rate) for group in phase.new_groups]
        assert seen[len(seen) - len(planned) :] == planned
        assert len(seen) == phase.groups
        assert phase.trainable_parameters == observed.trained[phase.phase]
        assert phase.memory.optimizer_state == observed.bytes[phase.phase]


def test_a_plan_is_a_table_and_a_page(tmp_path: Path) -> None:
    report = FinetuningScheduler(SCHEDULE).plan(make_trainer(tmp_path), Toy(simple_recipe()))
    lines = str(report).splitlines()
    assert lines[0].startswith("Toy: 91 parameters, 25 of them in no phase, 3 phases")
    assert max(map(len, lines)) <= 80
    html = report._repr_html_()
    assert "phase2" in html
    assert "http" not in html


def test_without_data_costs_are_estimates(tmp_path: Path) -> None:
    class NoData(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.1)

    report = FinetuningScheduler({0: {"params": [".*"]}}).plan(make_trainer(tmp_path), NoData())
    assert report.costs_from == "parameters"
    assert "estimates" in report.notes[-1]


def test_layers_of_configure_model_and_a_precision(tmp_path: Path) -> None:
    class Late(Toy):
        def configure_model(self) -> None:
            if not hasattr(self, "late"):
                self.late = nn.Linear(1, 1)

    report = FinetuningScheduler({0: {"params": ["late.*"]}}).plan(
        make_trainer(tmp_path, precision="bf16-true"), Late()
    )
    assert report.phases[0].thaws == ["late.*"]
    assert report.full_memory.weights == 2 * report.parameters


WRONG: dict[str, tuple[Any, str]] = {
    "a selector": ({0: {"params": ["nothing.*"]}}, "nothing"),
    "a rate of the first phase's groups": (
        {0: SCHEDULE[0], 1: {**SCHEDULE[1], "new_lr_scheduler": {"lr_scheduler_init": {"class_path": "torch.nope"}}}},
        "torch.nope",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_as_before_a_fit(name: str, tmp_path: Path) -> None:
    schedule, told = WRONG[name]
    with pytest.raises(MisconfigurationException, match=told):
        FinetuningScheduler(schedule).plan(make_trainer(tmp_path), Toy(simple_recipe()))


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    class Two(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [SGD(self.parameters(), lr=0.1), SGD(self.parameters(), lr=0.1)]

    with pytest.raises(MisconfigurationException, match="expected one optimizer, got 2"):
        FinetuningScheduler(SCHEDULE).plan(make_trainer(tmp_path), Two())


class Counting(Toy):
    """As programs with a warm-up over all steps do."""

    steps: float

    def configure_optimizers(self) -> Any:
        self.steps = self.trainer.estimated_stepping_batches
        return SGD(self.parameters(), lr=1 / self.steps)


@pytest.mark.parametrize("data", [None, ToyData], ids=["the model's data", "a datamodule"])
def test_optimizers_are_told_the_number_of_steps(data: Any, tmp_path: Path) -> None:
    module, trainer, datamodule = Counting(), make_trainer(tmp_path, max_epochs=5), None if data is None else data()
    report = FinetuningScheduler(SCHEDULE).plan(trainer, module, datamodule)
    assert module.steps == 20
    assert report.phases[0].new_groups[0].learning_rate == 1 / 20
    assert trainer.lightning_module is None
    assert getattr(trainer, "datamodule", None) is None


def test_what_only_a_fit_brings_about_is_told(tmp_path: Path) -> None:
    class Failing(Toy):
        def configure_optimizers(self) -> Any:
            raise RuntimeError("no process group")

    with pytest.raises(MisconfigurationException, match="outside a fit, got RuntimeError: no process group"):
        FinetuningScheduler(SCHEDULE).plan(make_trainer(tmp_path), Failing())
