"""On two ranks a transition restores from rank zero's memory what all of them would read from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint
from tests.reference import cases, harness
from tests.reference.recipe import adamw

SCHEDULE = {
    0: {"params": [*cases.HEAD], "max_transition_epoch": 2},
    1: {"params": [*cases.THIRD], "lr": 0.01, "max_transition_epoch": 4},
    2: {"params": [*cases.SECOND], "lr": 0.01},
}


class Statistics(cases.Worsening):
    """Has running statistics, and a table that is no parameter's, which differ from rank to rank."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("table", torch.zeros(2, dtype=torch.int64))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.norm(batch[0] + self.global_rank)
        self.table += 1 + self.global_rank


class Serves(Callback):
    """Keeps a state that differs from rank to rank; it has the shapes of weights."""

    def __init__(self) -> None:
        self.weights: Mapping[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights = {name: each.detach() + trainer.global_rank for name, each in pl_module.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = state_dict["weights"]


class Observe(Callback):
    """All that trains on a rank at the first batch of each epoch, when transitions are over."""

    def __init__(self, serves: Serves | None) -> None:
        self.serves = serves
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            tensors = dict(pl_module.state_dict())
            (optimizer,) = trainer.optimizers
            inner = getattr(optimizer, "optim", optimizer)  # a rank's part of what is spread over ranks
            for name, parameter in pl_module.named_parameters():
                state = inner.state.get(parameter, {}).items()
                tensors |= {f"{name}/{key}": each for key, each in state if isinstance(each, Tensor)}
            if self.serves is not None:
                tensors |= {f"kept {name}": each for name, each in self.serves.weights.items()}
            self.seen.append({name: each.detach().clone() for name, each in tensors.items()})


def zero(parameters: Any) -> Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of a deprecation when it is imported

    return ZeroRedundancyOptimizer(parameters, AdamW, lr=0.01)


def serving() -> tuple[Callback, ...]:
    return (Serves(),)


def averaging() -> tuple[Callback, ...]:
    return (EMAWeightAveraging(decay=0.5),)


@dataclass(frozen=True)
class Case:
    """A fit on two ranks."""

    optimizer: Callable[..., Any] = adamw
    strategy: Callable[[], Any] = cases.ddp
    callbacks: Callable[[], tuple[Callback, ...]] = tuple
    saving: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "adamw": Case(),
    "buffers that are not sent": Case(strategy=partial(cases.ddp, broadcast_buffers=False)),
    "a sharded optimizer": Case(zero),
    "a callback's weights": Case(callbacks=serving),
    "an average": Case(callbacks=averaging),
    "slim files": Case(saving={"save_frozen_weights": False}),
}


def fit(root: Path, ranks: int, case: Case, from_disk: bool) -> tuple[list[dict[str, Tensor]], int]:
    from finetuning_scheduler.strategy_adapters import DDPStrategyAdapter, StrategyAdapter

    usual, reads = StrategyAdapter.restore, []

    def restore(self: StrategyAdapter, *arguments: Any) -> None:
        reads.append(1)
        usual(self, *arguments)

    if from_disk:
        DDPStrategyAdapter.why_from_disk = lambda self: "a test asks for it"  # type: ignore[method-assign]
    StrategyAdapter.restore = restore  # type: ignore[method-assign]
    extra = case.callbacks()
    observe = Observe(next((each for each in extra if isinstance(each, Serves)), None))
    saving = FTSCheckpoint(root / "checkpoints", monitor="val_loss", **case.saving)
    callbacks = [FinetuningScheduler(SCHEDULE), saving, *extra, observe]
    trainer = cases.make_trainer(
        root, ranks, case.strategy(), callbacks=callbacks, max_epochs=6, enable_checkpointing=True
    )
    trainer.fit(Statistics(case.optimizer))
    return observe.seen, len(reads)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_goes_on_as_from_disk(name: str, tmp_path: Path) -> None:
    memory = harness.run_ranks(fit, 2, tmp_path / "memory", 2, CASES[name], False)
    disk = harness.run_ranks(fit, 2, tmp_path / "disk", 2, CASES[name], True)
    for (mine, read), (theirs, theirs_read) in zip(memory, disk, strict=True):
        assert (read, theirs_read) == (0, 2)
        assert len(mine) == len(theirs) == 6
        for epoch, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            assert one.keys() == other.keys()
            assert [key for key in one if not torch.equal(one[key], other[key])] == [], f"in epoch {epoch}"


STRATEGIES: dict[str, tuple[Callable[..., Any], type[cases.Classifier]]] = {
    "fsdp": (cases.fsdp, cases.Worsening),
    "fsdp2": (cases.fsdp2, cases.Sharded),
}


def refused(root: Path, ranks: int, strategy: Callable[[], Any], module: type[cases.Classifier]) -> str:
    saving = FTSCheckpoint(root / "checkpoints", monitor="val_loss", save_frozen_weights=False)
    callbacks = [FinetuningScheduler(SCHEDULE), saving]
    trainer = cases.make_trainer(root, ranks, strategy(), callbacks=callbacks, max_epochs=6, enable_checkpointing=True)
    try:
        trainer.fit(module(adamw))
    except MisconfigurationException as error:
        return str(error)
    return "fitted"


@pytest.mark.parametrize("name", STRATEGIES)
def test_slim_files_are_refused_where_the_model_is_sharded(name: str, tmp_path: Path) -> None:
    for message in harness.run_ranks(refused, 2, tmp_path, 2, *STRATEGIES[name]):
        assert "expected save_frozen_weights=True" in message
