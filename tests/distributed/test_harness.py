from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.reference.harness import rank, run_ranks, world_size


def describe(prefix: str) -> tuple[str, int, int, int]:
    return prefix + os.environ["LOCAL_RANK"], rank(), world_size(), torch.get_num_threads()


def total() -> torch.Tensor:
    dist.init_process_group("gloo")
    value = torch.tensor(float(rank() + 1))
    dist.all_reduce(value)
    return value


def print_then_fail_on_the_last(value: int) -> None:
    print(f"rank {rank()} was here")
    if rank() == world_size() - 1:
        raise ValueError(f"value is {value}")


def wait_for_a_rank_that_has_failed() -> None:
    dist.init_process_group("gloo")
    if rank() == 0:
        raise ValueError("rank zero has had enough")
    dist.barrier()


def hang_on_the_last(seconds: float) -> None:
    if rank() == world_size() - 1:
        time.sleep(seconds)


def die() -> None:
    os._exit(3)


def start_a_process_and_hang(pid_file: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pid_file.write_text(str(process.pid))
    process.wait()


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_with_ddp(root: Path) -> torch.Tensor:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size(),
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=root,
    )
    module = Line()
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2))
    return module.layer.weight.detach()


def test_results_come_in_rank_order() -> None:
    assert run_ranks(describe, 3, "r") == [(f"r{number}", number, 3, 1) for number in range(3)]


def test_one_rank_has_a_process_of_its_own() -> None:
    assert run_ranks(os.getpid, 1) != [os.getpid()]


def test_ranks_find_each_other() -> None:
    assert run_ranks(total, 2) == [torch.tensor(3.0), torch.tensor(3.0)]


def test_ranks_have_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_CALLER", "1")
    assert run_ranks(os.getenv, 1, "FROM_CALLER") == ["1"]
    assert run_ranks(os.getenv, 1, "FROM_CALLER", environment={"FROM_CALLER": "2"}) == ["2"]


def test_a_failing_ranks_traceback_and_log_are_in_the_message() -> None:
    with pytest.raises(AssertionError) as raised:
        run_ranks(print_then_fail_on_the_last, 2, 7)
    message = str(raised.value)
    assert "print_then_fail_on_the_last on 2 ranks:" in message
    assert "--- rank 0 returned" in message
    assert "--- rank 1: raised" in message
    assert 'raise ValueError(f"value is {value}")\nValueError: value is 7' in message
    assert "log of rank 1: rank 1 was here" in message


def test_arguments_can_be_bound_beforehand() -> None:
    assert run_ranks(functools.partial(describe, prefix="p"), 1) == [("p0", 0, 1, 1)]
    with pytest.raises(AssertionError, match="print_then_fail_on_the_last on 2 ranks:"):
        run_ranks(functools.partial(print_then_fail_on_the_last, value=7), 2)


def test_the_others_are_killed_soon_after_one_has_failed() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match="rank zero has had enough"):
        run_ranks(wait_for_a_rank_that_has_failed, 2)
    assert time.monotonic() - start < 10


def test_a_hanging_rank_is_killed_and_says_where_it_hung() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError) as raised:
        run_ranks(hang_on_the_last, 2, 60.0, timeout=3)
    assert time.monotonic() - start < 8
    assert "--- rank 0 returned" in str(raised.value)
    assert "in hang_on_the_last" in str(raised.value)


def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match="rank 0: died without a report, exit code 3"):
        run_ranks(die, 1)


def test_what_a_hanging_rank_has_started_is_killed_too(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="start_a_process_and_hang"):
        run_ranks(start_a_process_and_hang, 1, tmp_path / "pid", timeout=3)
    pid = int((tmp_path / "pid").read_text())
    status = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} still runs")


def test_fits_are_quick_and_alike_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(os.getpid, 1)  # starts the server
    start = time.monotonic()
    first, second = run_ranks(fit_with_ddp, 2, tmp_path)
    seconds = time.monotonic() - start
    assert torch.equal(first, second)
    assert seconds < 10  # about 0.2 on an idle machine; without the server each rank imports for 3 seconds first
