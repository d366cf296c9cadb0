"""Compiled modules in a fit: gradients are right, nothing runs eagerly, settings come back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo import config
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler
from tests.core_programs.test_compiled import Block, Count, Net, blocks_in_place, whole_in_place
from tests.reference.toys import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
BLOCKS = 8


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(BLOCKS)

    def training_step(self, batch: Any) -> Any:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def schedule() -> dict[int, Any]:
    phases = [[r"net\.head\..*"], *([rf"net\.blocks\.{number}\..*"] for number in reversed(range(BLOCKS)))]
    return {phase: {"params": params, "max_transition_epoch": phase + 1} for phase, params in enumerate(phases)}


def fit(root: Path, module: Any) -> Module:
    data = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(data), batch_size=4)
    scheduler = FinetuningScheduler(schedule(), base_max_lr=0.01, restore_best=False, epoch_transitions_only=True)
    trainer = make_trainer(root, callbacks=[scheduler], max_epochs=BLOCKS + 1, enable_checkpointing=False)
    trainer.fit(module, loader, loader)
    assert scheduler.curr_depth == BLOCKS
    assert [each.untrained for each in scheduler.judgements] == [()] * (BLOCKS + 1)
    return trainer.lightning_module


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch.compiler.reset()
    gc.collect()  # runners of other tests give back what they have added when they are collected
    Block.eager_calls, before = 0, config.recompile_limit
    yield
    torch.compiler.reset()
    assert config.recompile_limit == before


@pytest.mark.parametrize("way", ["blocks", "net", "module"])
def test_a_compiled_fit_is_an_eager_one(way: str, tmp_path: Path) -> None:
    expected = fit(tmp_path / "eager", Module())
    module: Any = Module()
    backend, Block.eager_calls = Count(), 0
    if way == "module":
        module = torch.compile(module, backend=backend)
    else:
        (blocks_in_place if way == "blocks" else whole_in_place)(module.net, backend)
    found = fit(tmp_path / "compiled", module)
    assert Block.eager_calls == 0
    most = {"blocks": 5, "net": 2 * (BLOCKS + 1), "module": 2 * (BLOCKS + 1) + 2}  # validation has graphs of its own
    assert 0 < backend.graphs <= most[way]
    for mine, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_limits_come_back_after_an_exception(tmp_path: Path) -> None:
    class Fails(Module):
        def training_step(self, batch: Any) -> Any:
            if self.trainer.current_epoch == 2:
                assert config.recompile_limit > initial
                raise ZeroDivisionError
            return super().training_step(batch)

    initial = config.recompile_limit
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Fails())
    assert config.recompile_limit == initial
