"""What the page on moving over says one gets for what one wrote is what one gets, in its words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping
from finetuning_scheduler.strategy_adapters import StrategyAdapter
from tests.docs import pages, running
from tests.docs.pages import ROOT

PAGE = "docs/moving_over.md"
FIRST = {"params": ["head"], "max_transition_epoch": 1}
REST = {"params": ["blocks"]}


def step_lr(**keys: Any) -> dict[str, Any]:
    """A new LR scheduler, with further keys beside its class."""
    init_args = {"step_size": 1, **keys.pop("init_args", {})}
    return {"lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": init_args}, **keys}


@dataclass(frozen=True)
class Wrote:
    """What one wrote: a schedule, arguments of the callback, callbacks; ``prepare`` gets the module."""

    schedule: Mapping[Any, Any] | None = field(default_factory=lambda: {0: FIRST, 1: REST})
    options: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], Sequence[Callback]] = tuple
    prepare: Callable[[Any], object] = lambda module: None
    resumes: bool = False


def second(**keys: Any) -> Wrote:
    return Wrote({0: FIRST, 1: REST | keys})


PLATEAU = {"lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"}}
WROTE: dict[str, Wrote] = {
    "`params: [bias]`": second(params=["bias"]),
    "`params: [head]` and later": second(params=[".*"]),
    "`max_transition_epochs: 2`": Wrote({0: {"params": ["head"], "max_transition_epochs": 2}, 1: REST}),
    "phases from 1": Wrote({1: FIRST, 2: REST}),
    '`"0"` for a phase': Wrote({"0": FIRST, "1": REST | {"lr": "1e-3"}}),
    "`lr` in phase 0": Wrote({0: FIRST | {"lr": 0.1}, 1: REST}),
    "`new_lr_scheduler` in phase 0": Wrote({0: FIRST | {"new_lr_scheduler": step_lr()}, 1: REST}),
    "`max_transition_epoch` in the last phase": second(max_transition_epoch=2),
    "a limit that is not above": second(max_transition_epoch=1),
    "`epoch_transitions_only: true`": Wrote(options={"epoch_transitions_only": True}),
    "`init_pg_lrs` of another length": second(new_lr_scheduler=step_lr(init_pg_lrs=[0.1, 0.1])),
    "`init_pg_lrs` in `reinit_lr_cfg`": Wrote(None, {"reinit_lr_cfg": step_lr(init_pg_lrs=[0.1])}),
    "`reinit_lr_cfg` with `ft_schedule`": Wrote(options={"reinit_lr_cfg": step_lr()}),
    "`verbose: true`": second(new_lr_scheduler=step_lr(init_args={"verbose": True})),
    "`ReduceLROnPlateau` without `monitor`": second(new_lr_scheduler=PLATEAU),
    "`FTSCheckpoint()` without `monitor`": Wrote(callbacks=lambda: [FTSCheckpoint()]),
    "`monitor: loss`": Wrote(callbacks=lambda: [FTSEarlyStopping("loss")]),
    "`strategy_adapter_cfg` of FSDP": Wrote(options={"strategy_adapter_cfg": {"awp_overrides": ["head"]}}),
    "`custom_strategy_adapters`": Wrote(options={"custom_strategy_adapters": {"ddp": "pkg.mod:Adapter"}}),
    "a parameter that is frozen before": Wrote(None, prepare=lambda module: module.blocks.requires_grad_(False)),
    "a schedule that leaves parameters out": Wrote({0: FIRST}),
    "`ckpt_path` of a run without the callback": Wrote(resumes=True),
}


@dataclass(frozen=True)
class Row:
    """A row of the page's table."""

    wrote: str
    get: str
    message: str

    @property
    def pattern(self) -> str:
        return ".*".join(re.escape(part.strip()) for part in self.message.split("..."))

    @property
    def is_error(self) -> bool:
        return self.get.startswith("an error")


def cells_below(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, row by row."""
    section = (ROOT / PAGE).read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ") for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def rows() -> list[Row]:
    return [Row(*cells) for cells in cells_below("You wrote, you get")]


def row_of(beginning: str) -> Row:
    (row,) = (row for row in rows() if row.wrote.startswith(beginning))
    return row


def program() -> tuple[pl.LightningModule, Any, Any]:
    """The page's module, and loaders for training and validation."""
    names = running.run(pages.blocks(PAGE, "python")[:1], {})
    return names["Classifier"](), names["loader"](1), names["loader"](2)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")  # of a default checkpoint
@pytest.mark.parametrize("beginning", WROTE)
def test_one_gets_what_the_page_says(beginning: str, tmp_path: Path) -> None:
    row, wrote = row_of(beginning), WROTE[beginning]
    torch.manual_seed(0)
    with running.somewhere_quiet(tmp_path):
        module, train, validate = program()
        wrote.prepare(module)
        checkpoint = None
        if wrote.resumes:
            plain = pl.Trainer(max_epochs=1)
            plain.fit(module, train, validate)
            plain.save_checkpoint(checkpoint := tmp_path / "plain.ckpt")
        scheduler = FinetuningScheduler(wrote.schedule, **wrote.options)
        trainer = pl.Trainer(max_epochs=3, callbacks=[scheduler, *wrote.callbacks()])
        with running.heard() as output:
            if row.is_error:
                with pytest.raises(MisconfigurationException) as refused:
                    trainer.fit(module, train, validate, ckpt_path=checkpoint)
                print(refused.value)
            else:
                trainer.fit(module, train, validate)
    assert re.search(row.pattern, output.getvalue(), re.DOTALL), output.getvalue()
    trained = 4 if "after the first validation" in row.get else 0  # batches of an epoch
    assert trainer.global_step == trained if row.is_error else trainer.global_step > trained


def test_each_row_is_tried() -> None:
    tried = {row.wrote: [beginning for beginning in WROTE if row.wrote.startswith(beginning)] for row in rows()}
    assert {wrote for wrote, found in tried.items() if len(found) != 1} == set()
    assert len(tried) == len(WROTE)


# --- methods of one's own ---------------------------------------------------------------------------------------------

METHODS = cells_below("Methods of your own")
CALLED = [(method, where) for where, here in METHODS if here == "called" for method in re.findall(r"`(\w+)`", where)]
NEVER_CALLED = [(re.findall(r"`(\w+)`", where)[0], where, fix) for where, fix in METHODS if fix != "called"]


def with_method(method: str, where: str, function: Any) -> FinetuningScheduler:
    """A callback that defines a method, or whose adapter does."""
    if not where.startswith("of an adapter"):
        return type("Mine", (FinetuningScheduler,), {method: function})({0: FIRST, 1: REST})
    adapter = type("Mine", (StrategyAdapter,), {method: function})
    return FinetuningScheduler({0: FIRST, 1: REST}, custom_strategy_adapters={"SingleDeviceStrategy": adapter})


def _does_nothing(self: object, *arguments: object, **options: object) -> None:
    """Called by nobody."""


@pytest.mark.parametrize(("method", "where", "fix"), NEVER_CALLED)
def test_a_method_that_nothing_calls_is_refused(method: str, where: str, fix: str, tmp_path: Path) -> None:
    scheduler = with_method(method, where, _does_nothing)
    with running.somewhere_quiet(tmp_path):
        module, train, validate = program()
        trainer = pl.Trainer(max_epochs=1, callbacks=[scheduler])
        message = re.escape(f"expected no `{method}`, which is never called here, got one in Mine. Fix: {fix}")
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(module, train, validate)
    assert trainer.global_step == 0


@pytest.mark.parametrize(("method", "where"), CALLED)
def test_a_method_that_the_page_says_is_called_is_called(method: str, where: str, tmp_path: Path) -> None:
    called = []
    of_the_package = getattr(StrategyAdapter if where.startswith("of an adapter") else FinetuningScheduler, method)

    def mine(self: Any, *arguments: Any, **options: Any) -> Any:
        called.append(method)
        return of_the_package(self, *arguments, **options)

    scheduler = with_method(method, where, mine)
    if method == "gen_ft_schedule":
        scheduler.ft_schedule = None
    with running.somewhere_quiet(tmp_path):
        module, train, validate = program()
        pl.Trainer(max_epochs=2, callbacks=[scheduler]).fit(module, train, validate)
    assert called


def test_names_that_are_gone_have_others() -> None:
    assert not issubclass(FinetuningScheduler, BaseFinetuning)
    module, *_ = program()
    BaseFinetuning.freeze(module)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    stopping, scheduler = FTSEarlyStopping("val_loss"), FinetuningScheduler()
    assert not any(hasattr(stopping, name) for name in ("es_phase_complete", "final_phase"))
    assert (stopping.phase_exhausted, scheduler.depth_remaining) == (False, 0)
