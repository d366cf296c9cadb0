"""Ranks agree on transitions, stops and restored checkpoints; rank zero alone reads and writes schedules."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference import cases, harness
from tests.reference.cases import Classifier
from tests.reference.networks import FIRST, HEAD, NORM, SECOND, THIRD

PHASES = {
    0: {"params": [*HEAD]},
    1: {"params": [*THIRD, *SECOND], "lr": 0.05},
    2: {"params": [*NORM, *FIRST], "lr": 0.02},
}


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Unsynchronised(Classifier):
    """Rank 0 improves in every epoch; rank 1 never does."""

    def validation_step(self, batch: Any) -> None:
        improvement = -self.trainer.current_epoch if harness.rank() == 0 else 1.0
        self.log("val_loss", torch.tensor(float(improvement)), sync_dist=False)


class LastBits(Classifier):
    """The monitored value stops improving after two epochs, but for last bits in which the ranks differ."""

    def validation_step(self, batch: Any) -> None:
        value = torch.tensor(max(1.0, 3.0 - self.trainer.current_epoch), dtype=torch.float64)
        self.log("val_loss", value + 1e-12 * harness.rank() * (-1) ** self.trainer.current_epoch, sync_dist=False)


class NotFiniteOnOne(Classifier):
    """From the fourth epoch on, rank 1's monitored value is not a number."""

    def validation_step(self, batch: Any) -> None:
        broken = harness.rank() == 1 and self.trainer.current_epoch >= 3
        value = torch.nan if broken else -float(self.trainer.current_epoch)
        self.log("val_loss", torch.tensor(value), sync_dist=False)


STRATEGIES: dict[str, Callable[[], Any]] = {"ddp": cases.ddp, "fsdp": cases.fsdp, "fsdp2": cases.fsdp2}
PLAN = {"fsdp_plan": {"network.(first|norm|second|third|head)": None, "network": None}}


def fit(root: Path, module: type[Classifier], strategy: str) -> tuple[list[int], list[str], dict[str, torch.Tensor]]:
    from finetuning_scheduler import FinetuningScheduler, FTSEarlyStopping

    heard = Heard()
    logging.getLogger("finetuning_scheduler").addHandler(heard)
    scheduler = FinetuningScheduler(PHASES, strategy_adapter_cfg=PLAN if strategy == "fsdp2" else None)
    recorder = cases.Recorder(lambda: scheduler.curr_depth)
    trainer = cases.make_trainer(
        root,
        2,
        STRATEGIES[strategy](),
        callbacks=[scheduler, FTSEarlyStopping("val_loss", patience=2), recorder],
        enable_checkpointing=True,
        max_epochs=12,
    )
    trainer.fit(module(cases.adamw))
    return [epoch.phase for epoch in recorder.epochs], heard.lines, recorder.epochs[-1].weights


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("module", [Unsynchronised, LastBits])
def test_ranks_move_together_when_the_metric_is_not_synchronised(
    module: type[Classifier], strategy: str, tmp_path: Path
) -> None:
    (phases, lines, weights), (others, silence, other_weights) = harness.run_ranks(fit, 2, tmp_path, module, strategy)
    assert phases == others
    assert phases[-1] == 2
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert len([line for line in lines if "sync_dist=True" in line]) == 1
    assert silence == []  # only rank zero speaks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_stop_together_when_one_of_them_has_a_reason(strategy: str, tmp_path: Path) -> None:
    (phases, _, weights), (others, _, other_weights) = harness.run_ranks(fit, 2, tmp_path, NotFiniteOnOne, strategy)
    assert phases == others == [0, 0, 0, 0]
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def fit_from_file(root: Path) -> tuple[int, list[str]]:
    """Rank 0 alone has the schedule file."""
    from finetuning_scheduler import FinetuningScheduler

    mine = root / f"rank-{harness.rank()}"
    mine.mkdir(parents=True)
    scheduler = FinetuningScheduler(mine / "schedule.yaml", restore_best=False, log_dir=mine / "logs")
    if harness.rank() == 0:
        text = f"0: {{params: [{HEAD[0]}, {HEAD[1]}], max_transition_epoch: 1}}\n1: {{params: ['network.third.*']}}\n"
        (mine / "schedule.yaml").write_text(text, encoding="utf-8")
    trainer = cases.make_trainer(root, 2, cases.ddp(), callbacks=[scheduler], max_epochs=2)
    trainer.fit(Classifier())
    return scheduler.curr_depth, sorted(str(path.relative_to(root)) for path in mine.rglob("*.yaml"))


def test_rank_zero_reads_and_writes_schedules_for_all(tmp_path: Path) -> None:
    (depth, files), (other_depth, other_files) = harness.run_ranks(fit_from_file, 2, tmp_path)
    assert depth == other_depth == 1
    assert files == ["rank-0/logs/Classifier_ft_schedule.yaml", "rank-0/schedule.yaml"]
    assert other_files == []


def fit_with_a_mistake(root: Path) -> str:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from finetuning_scheduler import FinetuningScheduler

    trainer = cases.make_trainer(root, 2, cases.ddp(), callbacks=[FinetuningScheduler({0: {"params": ["nowhere"]}})])
    with pytest.raises(MisconfigurationException) as error:
        trainer.fit(Classifier())
    return str(error.value)


def test_a_mistake_in_the_schedule_is_an_error_on_every_rank(tmp_path: Path) -> None:
    first, second = harness.run_ranks(fit_with_a_mistake, 2, tmp_path)
    assert first == second
    assert "nowhere" in first


def fit_with_a_gap(root: Path) -> str:
    """The renumbered copy cannot be written, since a file is in the directory's place."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from finetuning_scheduler import FinetuningScheduler

    schedule = {0: {"params": [*HEAD]}, 2: {"params": [*THIRD]}}
    scheduler = FinetuningScheduler(schedule, log_dir=root / "file")
    with pytest.raises(MisconfigurationException) as error:
        cases.make_trainer(root, 2, cases.ddp(), callbacks=[scheduler]).fit(Classifier())
    return str(error.value)


def test_a_copy_that_cannot_be_written_is_told_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = harness.run_ranks(fit_with_a_gap, 2, tmp_path)
    assert first == second
    assert "no copy with the phases renumbered from 0 could be written" in first


def fit_with_a_module_that_leaves(root: Path, options: dict[str, Any]) -> str:
    """A module that schedule or arguments name leaves the program when it is imported."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from finetuning_scheduler import FinetuningScheduler

    folder = root / str(harness.rank())
    folder.mkdir()
    (folder / "may_leave.py").write_text("import sys\nsys.exit(3)\n")
    sys.path.insert(0, str(folder))
    scheduler = FinetuningScheduler(**{"ft_schedule": PHASES, "restore_best": False, **options})
    with pytest.raises(MisconfigurationException) as error:
        cases.make_trainer(root, 2, cases.ddp(), callbacks=[scheduler]).fit(Classifier())
    return str(error.value)


NAMES_A_MODULE: dict[str, dict[str, Any]] = {
    "an adapter": {"custom_strategy_adapters": {"DDPStrategy": "may_leave:Adapter"}},
    "a schedule": {
        "ft_schedule": {
            0: {"params": [*HEAD]},
            1: {"params": [*THIRD], "new_optimizer": {"optimizer_init": {"class_path": "may_leave.Optimizer"}}},
        }
    },
}


@pytest.mark.parametrize("options", NAMES_A_MODULE.values(), ids=NAMES_A_MODULE)
def test_a_module_that_leaves_the_program_is_told_on_every_rank(options: dict[str, Any], tmp_path: Path) -> None:
    for message in harness.run_ranks(fit_with_a_module_that_leaves, 2, tmp_path, options):
        assert "it calls sys.exit(3)" in message


def fit_with_a_module_of_one_rank(root: Path, leaves: int) -> str:
    """The module of a schedule's class leaves the program on one rank only."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from finetuning_scheduler import FinetuningScheduler

    folder = root / str(harness.rank())
    folder.mkdir()
    code = "import sys\nsys.exit(3)\n" if harness.rank() == leaves else "from torch.optim import SGD as Optimizer\n"
    (folder / "may_leave.py").write_text(code)
    sys.path.insert(0, str(folder))
    scheduler = FinetuningScheduler(restore_best=False, **NAMES_A_MODULE["a schedule"])
    with pytest.raises(MisconfigurationException) as error:
        cases.make_trainer(root, 2, cases.ddp(), callbacks=[scheduler]).fit(Classifier())
    return str(error.value)


def test_a_module_that_leaves_the_program_on_one_rank_ends_the_others(tmp_path: Path) -> None:
    first, second = harness.run_ranks(fit_with_a_module_of_one_rank, 2, tmp_path, 1, timeout=60)
    assert "expected all ranks to import the classes of the schedule" in first
    assert "it calls sys.exit(3)" in second


def fail_surprisingly(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("nobody thinks of it")


def fit_with_a_surprise(root: Path) -> str:
    """What rank zero alone does, here writing the schedule, fails in a way nobody thinks of."""
    from finetuning_scheduler import FinetuningScheduler, _source

    if harness.rank() == 0:
        _source.save_schedule = fail_surprisingly
    scheduler = FinetuningScheduler(PHASES, restore_best=False)
    with pytest.raises((ZeroDivisionError, RuntimeError)) as error:
        cases.make_trainer(root, 2, cases.ddp(), callbacks=[scheduler]).fit(Classifier())
    return f"{type(error.value).__name__}: {error.value}"


def test_any_failure_of_rank_zero_ends_the_others(tmp_path: Path) -> None:
    assert harness.run_ranks(fit_with_a_surprise, 2, tmp_path, timeout=30) == [
        "ZeroDivisionError: nobody thinks of it",
        "RuntimeError: ZeroDivisionError: nobody thinks of it",
    ]


def generate_only(root: Path) -> object:
    from finetuning_scheduler import FinetuningScheduler

    callback = FinetuningScheduler(gen_ft_sched_only=True, log_dir=root)
    with pytest.raises(SystemExit) as stop:
        cases.make_trainer(root, 2, cases.ddp(), callbacks=[callback]).fit(Classifier())
    return stop.value.code


def test_generating_a_schedule_ends_every_rank(tmp_path: Path) -> None:
    assert harness.run_ranks(generate_only, 2, tmp_path) == [0, 0]
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["Classifier_ft_schedule.yaml"]
