"""Frozen-prefix reuse on two ranks: each replays its own rows, and replicas stay equal to a run without reuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.reference import cases, harness

SCHEDULE: dict[int, dict[str, Any]] = {
    0: {"params": [r"network\.head\..*"], "max_transition_epoch": 4},
    1: {"params": [r"network\.third\..*"], "max_transition_epoch": 8},
}
ROWS, EPOCHS = 32, 8
Outcome = tuple[dict[str, Tensor], int, list[str]]


class Shuffled(cases.Classifier):
    """Each rank gets other rows in each epoch."""

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(ROWS, 8, generator=generator)
        data = TensorDataset(x, torch.randint(4, (ROWS,), generator=generator))
        return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, seed=3))

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.sampler.set_epoch(self.current_epoch)


def fit(root: Path, mode: str) -> Outcome:
    from finetuning_scheduler import FinetuningScheduler

    scheduler = FinetuningScheduler(
        SCHEDULE, restore_best=False, frozen_modules_mode="eval", frozen_prefix=mode, prefix_dir=root / mode
    )
    torch.manual_seed(1)
    module = Shuffled()
    cases.make_trainer(root, 2, cases.ddp(), callbacks=[scheduler], max_epochs=EPOCHS).fit(module)
    hits = sum(account.hits for account in scheduler.prefix_accounts if account.stage == "train")
    reasons = [str(account.reason) for account in scheduler.prefix_accounts if account.reason is not None]
    return cases.local_weights(module), hits, reasons


def both_fits(root: Path) -> tuple[Outcome, Outcome]:
    return fit(root, "off"), fit(root, "all")


def assert_same(outcomes: list[tuple[Outcome, Outcome]]) -> None:
    for plain, reused in outcomes:
        assert plain[0].keys() == reused[0].keys()
        for name, value in plain[0].items():
            torch.testing.assert_close(reused[0][name], value, rtol=1e-5, atol=1e-6)


def test_ddp_with_lightning(tmp_path: Path) -> None:
    outcomes = harness.run_ranks(both_fits, 2, tmp_path, timeout=120.0)
    assert_same(outcomes)
    for _, (_, hits, reasons) in outcomes:
        assert hits > 0
        assert reasons == []


def loop(mode: str, communicates: bool) -> Outcome:
    """A loop by hand around a replicated model."""
    from finetuning_scheduler.core import PhaseRunner
    from tests.reference.networks import Residual

    torch.manual_seed(1)
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = {0: {"params": [r"head\..*"]}}
    runner = PhaseRunner(model, optimizer, schedule, frozen_modules_mode="eval", frozen_prefix=mode)
    replicated = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(5 + harness.rank())
    x, y = torch.randn(16, 8, generator=generator), torch.randint(4, (16,), generator=generator)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(replicated(x), y)
        if communicates:
            other = loss.detach().clone()
            torch.distributed.all_reduce(other)
            loss = loss * other
        return loss

    for _ in range(5):
        model.train()
        runner.apply_module_modes()
        for rows in torch.randperm(16, generator=generator).split(4):
            loss = runner.prefix.train(step, x[rows], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            runner.step()
        runner.epoch_end()
    hits = sum(account.hits for account in runner.prefix.accounts if account.stage == "train")
    reasons = [str(account.reason) for account in runner.prefix.accounts if account.reason is not None]
    runner.release_module_modes()
    return {name: value.clone() for name, value in model.state_dict().items()}, hits, reasons


def loops(communicates: bool) -> tuple[Outcome, Outcome]:
    torch.distributed.init_process_group("gloo")
    try:
        return loop("off", communicates), loop("all", communicates)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("communicates", [False, True])
def test_ddp_by_hand(communicates: bool) -> None:
    outcomes = harness.run_ranks(loops, 2, communicates)
    assert_same(outcomes)
    for _, (_, hits, reasons) in outcomes:
        assert (hits == 0) == communicates
        assert communicates == any("communicates with other processes" in reason for reason in reasons)


def sharded() -> list[str]:
    from finetuning_scheduler.core import PhaseRunner
    from tests.reference.networks import Residual

    torch.distributed.init_process_group("gloo")
    try:
        model = Residual()
        fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        runner = PhaseRunner(model, optimizer, {0: {"params": ["head.*"]}}, frozen_prefix="validation")
        return [str(runner.prefix.reason)]
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_models_are_refused() -> None:
    for reasons in harness.run_ranks(sharded, 2):
        assert reasons == ["the model is sharded by FSDP"]


def sharded_fit(root: Path, kind: str) -> list[str]:
    from finetuning_scheduler import FinetuningScheduler

    strategy, module = {
        "fsdp": (cases.fsdp, cases.Classifier),
        "fsdp2": (cases.fsdp2, cases.Sharded),
        "tensor parallel": (cases.tensor_parallel, cases.TensorParallel),
    }[kind]
    scheduler = FinetuningScheduler(
        cases.AN_EPOCH_EACH, restore_best=False, frozen_modules_mode="eval", frozen_prefix="all"
    )
    cases.make_trainer(root, 2, strategy(), callbacks=[scheduler], max_epochs=2).fit(module())
    return [str(account.reason) for account in scheduler.prefix_accounts if account.hits == 0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("fsdp", "the model is sharded by FSDP"),
        ("fsdp2", "the model is sharded by FSDP"),
        ("tensor parallel", "parameters are distributed tensors"),
    ],
)
def test_fits_of_sharded_models_go_on_without_reuse(kind: str, reason: str, tmp_path: Path) -> None:
    for reasons in harness.run_ranks(sharded_fit, 2, tmp_path, kind):
        assert reasons != []
        assert set(reasons) == {reason}
