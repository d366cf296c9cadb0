"""Under every strategy, what no gradient reaches on any rank is named; what trains, be it on one rank only, is not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.reference import cases, harness
from tests.reference.cases import FIRST, HEAD, NORM, SECOND, THIRD, Classifier

pytestmark = pytest.mark.distributed

SPARE = ("network.spare.bias", "network.spare.weight")
SCHEDULE: dict[int, dict[str, Any]] = {
    0: {"params": [*HEAD], "max_transition_epoch": 1},
    1: {"params": [*THIRD, *SECOND, *SPARE], "lr": 0.01, "max_transition_epoch": 2},
    2: {"params": [*NORM, *FIRST], "lr": 0.01, "max_transition_epoch": 3},
}
FLAT = partial(cases.fsdp, use_orig_params=False, state_dict_type="sharded")


class WithSpare(Classifier):
    """A layer that forward skips."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.network.spare = nn.Linear(16, 16)


class ShardedWithSpare(WithSpare):
    def configure_model(self) -> None:
        for layer in self.network.children():
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


class UsedOnRankOne(WithSpare):
    """The data of one rank alone go through the layer."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().training_step(batch)
        return loss + self.network.spare.weight.sum() + self.network.spare.bias.sum() if self.global_rank == 1 else loss


UNUSED_ALLOWED = partial(cases.ddp, find_unused_parameters=True)
SHARDING: dict[str, tuple[Callable[[], Any], Callable[[Any], Classifier]]] = {
    "ddp": (UNUSED_ALLOWED, WithSpare),
    "fsdp": (cases.fsdp, WithSpare),
    "fsdp without original parameters": (FLAT, WithSpare),
    "fsdp2": (cases.fsdp2, ShardedWithSpare),
}


def warnings_of_fit(root: Path, *arguments: Any, **options: Any) -> list[str]:
    """The warnings that a rank has logged; those that every rank agrees on come from rank zero."""
    said: list[str] = []
    ear = logging.Handler(logging.WARNING)
    ear.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("finetuning_scheduler")
    logger.addHandler(ear)
    cases.fit(root, 2, *arguments, max_epochs=3, **options)
    logger.removeHandler(ear)
    return said


@pytest.mark.parametrize(("strategy", "module"), SHARDING.values(), ids=SHARDING.keys())
def test_a_layer_that_forward_skips_is_named_once(
    strategy: Callable[[], Any], module: Callable[[Any], Classifier], tmp_path: Path
) -> None:
    said, others = harness.run_ranks(partial(warnings_of_fit, schedule=SCHEDULE), 2, tmp_path, strategy, module)
    assert others == []
    assert len(said) == 1, said
    assert "network.spare.*" in said[0]
    assert not any(f"network.{layer}" in said[0] for layer in ("second", "third", "first", "norm", "head"))


TRAINED: dict[str, tuple[Callable[[], Any], Callable[[Any], Classifier], dict[int, dict[str, Any]]]] = {
    "ddp": (cases.ddp, Classifier, cases.AN_EPOCH_EACH),
    "ddp, a layer that one rank uses": (UNUSED_ALLOWED, UsedOnRankOne, SCHEDULE),
    "fsdp": (cases.fsdp, Classifier, cases.AN_EPOCH_EACH),
    "fsdp, one unit": (partial(cases.fsdp, auto_wrap_policy=None), Classifier, cases.AN_EPOCH_EACH),
    "fsdp without original parameters": (FLAT, Classifier, cases.AN_EPOCH_EACH),
    "fsdp2": (cases.fsdp2, cases.Sharded, cases.AN_EPOCH_EACH),
    "tensor parallel": (cases.tensor_parallel, cases.TensorParallel, cases.AN_EPOCH_EACH),
}


@pytest.mark.parametrize(("strategy", "module", "schedule"), TRAINED.values(), ids=TRAINED.keys())
def test_no_warning_where_everything_thawed_is_trained(
    strategy: Callable[[], Any],
    module: Callable[[Any], Classifier],
    schedule: dict[int, dict[str, Any]],
    tmp_path: Path,
) -> None:
    fits = harness.run_ranks(partial(warnings_of_fit, schedule=schedule), 2, tmp_path, strategy, module)
    assert fits == [[], []]
