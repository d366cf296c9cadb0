"""What the page on programs says is refused is refused with its words, before the first batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import LBFGS, SGD, Muon, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, Phase, Schedule
from finetuning_scheduler._checks import slim_problems
from finetuning_scheduler.strategy_adapters.limits import averaged_weights, stateless_optimizers
from finetuning_scheduler.strategy_adapters.registry import untested_strategy
from tests.docs import pages, running
from tests.docs.pages import ROOT

PAGE = "docs/programs.md"

TWO_PHASES: dict[int, dict[str, Any]] = {
    0: {"params": ["head.*"], "max_transition_epoch": 1},
    1: {"params": ["body.*"], "lr": 0.01},
}


class TwoRates(SGD):
    """Wants one rate, as optimizers do that find it by themselves."""

    def step(self, closure: Any = None) -> Any:
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("expected one learning rate")
        return super().step(closure)


class RelativeSteps(SGD):
    """Has an ``lr`` of ``None``."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.defaults["lr"] = self.param_groups[0]["lr"] = None


class WithoutRate(Optimizer):
    """Knows no learning rate at all."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})


class SchedulerOfOnesOwn(LRScheduler):
    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


def sgd(module: nn.Module) -> Optimizer:
    return SGD(module.parameters(), lr=0.1, momentum=0.9)


def two_optimizers(module: Any) -> list[Optimizer]:
    module.automatic_optimization = False
    return [sgd(module.body), sgd(module.head)]


def overlapping(module: nn.Module) -> Optimizer:
    optimizer = sgd(module)
    optimizer._overlap_with_ddp = True  # type: ignore[attr-defined]  # of ZeroRedundancyOptimizer, which needs ranks
    return optimizer


def own_scheduler(module: nn.Module) -> Any:
    optimizer = sgd(module)
    return [optimizer], [SchedulerOfOnesOwn(optimizer)]


def with_new(class_path: str) -> dict[int, dict[str, Any]]:
    new = {"optimizer_init": {"class_path": class_path, "init_args": {}}}
    return {0: TWO_PHASES[0], 1: {**TWO_PHASES[1], "new_optimizer": new}}


class Untested(SingleDeviceStrategy):
    """Counts as untested by its name, as the one for TPUs does."""


Untested.__name__ = "SingleDeviceXLAStrategy"


@dataclass(frozen=True)
class Refused:
    """A program; ``optimizers`` is what its module configures."""

    optimizers: Callable[[Any], Any] = sgd
    callbacks: Callable[[], Sequence[Callback]] = tuple
    schedule: Mapping[int, Any] = field(default_factory=lambda: TWO_PHASES)
    options: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    resumes: bool = False


def saves(kind: type[ModelCheckpoint] = ModelCheckpoint, **options: Any) -> Refused:
    return Refused(callbacks=lambda: [kind(**options)])


def all_matrices(module: nn.Module) -> Optimizer:
    return Muon([parameter for parameter in module.parameters() if parameter.dim() == 2], lr=0.1)


REFUSED: dict[str, Refused] = {
    "several optimizers": Refused(two_optimizers),
    "an optimizer that knows no `lr`": Refused(lambda module: WithoutRate(module.parameters())),
    "`overlap_with_ddp`": Refused(overlapping),
    "`ZeroRedundancyOptimizer` as a": Refused(schedule=with_new("torch.distributed.optim.ZeroRedundancyOptimizer")),
    "`LBFGS`": Refused(lambda module: LBFGS(module.parameters())),
    "`SparseAdam`": Refused(lambda module: SparseAdam(module.parameters())),
    "`Muon`": Refused(all_matrices),
    "one rate for all": Refused(lambda module: TwoRates(module.parameters(), lr=0.1)),
    "`lr` for an optimizer without one": Refused(lambda module: RelativeSteps(module.parameters())),
    "other LR schedulers": Refused(own_scheduler),
    "`StochasticWeightAveraging`": Refused(callbacks=lambda: [StochasticWeightAveraging(swa_lrs=0.1)]),
    "`ModelPruning`": Refused(callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.5)]),
    "`save_weights_only`": saves(monitor="val_loss", save_weights_only=True),
    "`save_top_k=0`": saves(monitor="val_loss", save_top_k=0),
    "`FTSCheckpoint` without `monitor`": saves(FTSCheckpoint),
    "`reinit_optim_cfg`": Refused(options={"reinit_optim_cfg": {"optimizer_init": {"class_path": "torch.optim.SGD"}}}),
    "`epoch_transitions_only`": Refused(options={"epoch_transitions_only": True}),
    "resuming from a checkpoint of plain Lightning": Refused(resumes=True),
    "other strategies": Refused(trainer={"strategy": Untested("cpu")}),
}


def rows() -> dict[str, str]:
    """The message of each row of the page's table, by what it is about."""
    lines = (ROOT / PAGE).read_text(encoding="utf-8").split("## What is not supported")[1].split("\n| ")[2:]
    cells = [re.split(r" \| ", line) for line in lines]
    return {about: message for about, message, _ in cells}


def message_of(beginning: str) -> str:
    """The message of the only row that begins so, as a regular expression."""
    (message,) = (message for about, message in rows().items() if about.startswith(beginning))
    return ".*".join(re.escape(part.strip()) for part in message.split("..."))


def classifier(optimizers: Callable[[Any], Any]) -> pl.LightningModule:
    module: pl.LightningModule = running.run(pages.blocks(PAGE, "python")[:1], {})["Classifier"]()
    module.configure_optimizers = lambda: optimizers(module)  # type: ignore[method-assign]
    return module


def trainer_in(root: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=root, max_epochs=2, callbacks=list(callbacks), **(quiet | options))


@pytest.mark.filterwarnings("ignore:.torch.jit")  # by the import of ZeroRedundancyOptimizer
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")  # of a default checkpoint
@pytest.mark.parametrize("beginning", REFUSED)
def test_what_the_page_says_is_refused_is_refused_before_the_first_batch(beginning: str, tmp_path: Path) -> None:
    refused = REFUSED[beginning]
    module, checkpoint = classifier(refused.optimizers), None
    if refused.resumes:
        plain = trainer_in(tmp_path)
        plain.fit(classifier(sgd))
        checkpoint = tmp_path / "plain.ckpt"
        plain.save_checkpoint(checkpoint)
    scheduler = FinetuningScheduler(dict(refused.schedule), **refused.options)
    trainer = trainer_in(tmp_path, scheduler, *refused.callbacks(), **refused.trainer)
    with pytest.raises(MisconfigurationException, match=re.compile(message_of(beginning), re.DOTALL)):
        trainer.fit(module, ckpt_path=checkpoint)
    assert trainer.global_step == 0


def two_packages() -> str:
    """Said by a trainer whose class is of the other package; two real ones stand in the tests of programs."""
    from finetuning_scheduler._lightning import refuse_other_package

    other = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer", "callbacks": []})
    with pytest.raises(MisconfigurationException) as caught:
        refuse_other_package(other())  # type: ignore[arg-type]
    return str(caught.value)


def without_state() -> str:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[ModelCheckpoint()], optimizers=[optimizer])
    (problem,) = stateless_optimizers(trainer, Schedule(phases=(Phase(params=("head.*",)),)))
    return str(problem)


def averages_of_shards() -> str:
    strategy = FSDPStrategy.__new__(FSDPStrategy)
    trainer: Any = SimpleNamespace(callbacks=[EMAWeightAveraging()], strategy=strategy)
    (problem,) = averaged_weights(trainer)
    return str(problem)


def slim_checkpoints_of_shards() -> str:
    saving = FTSCheckpoint(monitor="val_loss", save_frozen_weights=False)
    trainer: Any = SimpleNamespace(callbacks=[saving], strategy=FSDPStrategy.__new__(FSDPStrategy))
    (problem,) = slim_problems(trainer)
    return str(problem)


OTHERS: dict[str, Callable[[], str | None]] = {  # what takes several devices, packages or processes to meet
    "`lightning` and `pytorch_lightning`": two_packages,
    "`WeightAveraging` with": averages_of_shards,
    "`save_frozen_weights=False`": slim_checkpoints_of_shards,
    "DeepSpeed": lambda: untested_strategy(DeepSpeedStrategy.__new__(DeepSpeedStrategy)),
    "SGD without momentum": without_state,
}


@pytest.mark.parametrize("beginning", OTHERS)
def test_what_takes_several_devices_to_meet_is_refused_with_the_pages_words(beginning: str) -> None:
    assert re.match(message_of(beginning), OTHERS[beginning]() or "")


def test_each_row_of_the_table_is_tried() -> None:
    tried = [*REFUSED, *OTHERS]
    by_row = {about: [beginning for beginning in tried if about.startswith(beginning)] for about in rows()}
    assert {about for about, found in by_row.items() if len(found) != 1} == set()
    assert len(by_row) == len(tried)
