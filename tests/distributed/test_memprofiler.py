"""The memory profiler on two ranks: a file for each, FSDP2's tracker against the bytes of the shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fts_examples.profiling import MemProfiler, MemProfilerCfg, MemProfilerFuncs
from tests.examples.memprofiled import BATCH_BYTES, FLOAT, HIDDEN, HIDDEN_BYTES, INPUTS, Measured, read, trainer
from tests.reference import cases, harness

pytestmark = pytest.mark.distributed

# Of five and two rows the first of two ranks holds three and one; the other pads its shards to that.
SHARD_BYTES = (3 * INPUTS + 3 + 1 * HIDDEN + 1) * FLOAT
NAMES = {f"memory_fit_rank_{rank}" for rank in range(2)}


class Sharded(Measured):
    """Each layer a unit of its own, and a root around them that has no parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(self.body, torch.nn.ReLU(), self.head)
        del self.body, self.head

    def configure_model(self) -> None:
        for part in (self.network[0], self.network[2], self.network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def local_bytes(self) -> int:
        return sum(part.to_local().nbytes for part in self.parameters() if isinstance(part, DTensor))


class TwoRoots(Sharded):
    def configure_model(self) -> None:
        for part in (self.network[0], self.network[2]):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def run(root: Path, strategy: Strategy, module: Measured, cfg: MemProfilerCfg) -> tuple[dict[str, Any], int]:
    profiler = MemProfiler(cfg)
    trainer(root, profiler, devices=2, strategy=strategy, limit_val_batches=1, max_epochs=2).fit(module)
    return profiler.snapshots, module.local_bytes() if isinstance(module, Sharded) else 0


def run_ddp(root: Path) -> tuple[dict[str, Any], int]:
    return run(root, cases.ddp(), Measured(), MemProfilerCfg())


def run_fsdp2(root: Path, kind: type[Sharded], name: str = "") -> tuple[dict[str, Any], int]:
    funcs = MemProfilerFuncs(fsdp={"training_step", "validation_step"})
    cfg = MemProfilerCfg(
        collect_funcs=funcs,
        track_fsdp_mem=True,
        fsdp_mem_tracker_tabulate=True,
        fsdp_mem_tracker_units="B",
        fsdp_mem_tracker_root_module=name,
    )
    return run(root, cases.fsdp2(), kind(), cfg)


def test_each_rank_of_ddp_writes_its_own_file(tmp_path: Path) -> None:
    for rank, (snapshots, _) in enumerate(harness.run_ranks(run_ddp, 2, tmp_path)):
        content = read(tmp_path / f"memory_fit_rank_{rank}.yaml")
        assert content == {"about": {"stage": "fit", "rank": rank, "world_size": 2}, "snapshots": snapshots}
        key = f"rank_{rank}.epoch_0.iter_0.training_step.end"
        assert snapshots[key]["saved_for_backward_bytes"] == BATCH_BYTES + HIDDEN_BYTES
        assert {key.partition(".")[0] for key in snapshots} == {f"rank_{rank}"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.yaml" for name in NAMES}


def test_fsdp2s_tracker_and_bytes_kept_for_the_backward_pass(tmp_path: Path) -> None:
    for rank, (snapshots, local_bytes) in enumerate(harness.run_ranks(run_fsdp2, 2, tmp_path, Sharded)):
        first = snapshots[f"rank_{rank}.epoch_0.iter_0.training_step.batch_end"]["fsdp"]
        second = snapshots[f"rank_{rank}.epoch_1.iter_1.training_step.batch_end"]["fsdp"]
        validation = snapshots[f"rank_{rank}.epoch_0.iter_0.validation_step.end"]["fsdp"]
        assert (local_bytes == SHARD_BYTES) is (rank == 0)
        for tracked in (first, second, validation):
            assert tracked["now_bytes"]["cpu"]["Sharded Param"] == SHARD_BYTES
            assert tracked["peak_bytes"]["cpu"]["Sharded Param"] == SHARD_BYTES
            assert tracked["now_bytes"]["cpu"]["Inputs"] == BATCH_BYTES
            assert tracked["peak_bytes"]["cpu"]["Total"] >= tracked["now_bytes"]["cpu"]["Total"]
            assert set(tracked["modules_total_bytes"]) == {"network.0", "network.2"}
        # Adam keeps two tensors of a shard's size, and a step of 4 bytes for each of the four parameters.
        assert [each["now_bytes"]["cpu"]["OptState"] for each in (first, second)] == [2 * local_bytes + 16] * 2
        assert first["now_bytes"]["cpu"]["Sharded Grad"] == SHARD_BYTES
        # Parameters that are gathered for the forward pass do not count.
        end = snapshots[f"rank_{rank}.epoch_0.iter_0.training_step.end"]
        assert end["saved_for_backward_bytes"] == BATCH_BYTES + HIDDEN_BYTES
        text = (tmp_path / f"memory_fit_rank_{rank}_fsdp.txt").read_text(encoding="utf-8")
        assert f"rank_{rank}.epoch_1.iter_1.training_step\n" in text
        assert re.search(rf"\b{SHARD_BYTES} B\b", text)
        assert "network.0" in text
    endings = (".yaml", "_fsdp.txt")
    assert {path.name for path in tmp_path.iterdir()} == {name + ending for name in NAMES for ending in endings}


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (TwoRoots, "", "expected one outermost module under `fully_shard`, got network.0, network.2. Fix: name one"),
        (Sharded, "network.1", "got 'network.1', a module that is not sharded. Did you mean 'network."),
        (Sharded, "netwrk", "got 'netwrk', no module of the model. Did you mean 'network'?"),
    ],
    ids=["two roots", "not sharded", "misspelt"],
)
def test_what_the_tracker_cannot_follow_is_told(kind: type[Sharded], name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        harness.run_ranks(run_fsdp2, 2, tmp_path, kind, name)
    assert message in str(caught.value)


def test_a_root_that_is_named_is_the_one_that_is_tracked(tmp_path: Path) -> None:
    for rank, (snapshots, _) in enumerate(harness.run_ranks(run_fsdp2, 2, tmp_path, TwoRoots, "network.2")):
        tracked = snapshots[f"rank_{rank}.epoch_0.iter_0.training_step.batch_end"]["fsdp"]
        assert set(tracked["modules_total_bytes"]) == {"network.2"}
