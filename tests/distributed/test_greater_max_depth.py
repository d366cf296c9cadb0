"""On several ranks, too, a session that has ended goes on to the phases that a greater `max_depth` adds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.reference import cases, harness
from tests.reference.cases import Recorder
from tests.reference.history import Epoch, assert_same_epochs
from tests.reference.networks import FIRST, HEAD, NORM, SECOND, THIRD
from tests.reference.recipe import adamw

PATIENCE: dict[int, dict[str, Any]] = {
    0: {"params": [*HEAD]},
    1: {"params": [*THIRD, *SECOND], "lr": 0.05},
    2: {"params": [*NORM, *FIRST], "lr": 0.02},
}
LIMITS: dict[int, dict[str, Any]] = {
    0: {**PATIENCE[0], "max_transition_epoch": 1},
    1: {**PATIENCE[1], "max_transition_step": 12},
    2: PATIENCE[2],
}


def fit(
    root: Path, strategy: Any, module: Any, schedule: Any, max_depth: int, resume_from: Path | None = None
) -> list[Epoch]:
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping

    scheduler = FinetuningScheduler(schedule, max_depth)
    recorder = Recorder(lambda: scheduler.curr_depth)
    saving = FTSCheckpoint(root / "saved", monitor="val_loss", save_top_k=-1, save_last=True)
    callbacks = [scheduler, FTSEarlyStopping("val_loss", patience=2), saving, recorder]
    trainer = cases.make_trainer(root, 2, strategy(), callbacks=callbacks, enable_checkpointing=True, max_epochs=7)
    trainer.fit(module(adamw), ckpt_path=resume_from)
    return recorder.epochs


def in_one_go_and_in_two(root: Path, *arguments: Any) -> tuple[list[Epoch], list[Epoch], list[Epoch]]:
    whole = fit(root / "whole", *arguments, -1)
    first = fit(root / "two", *arguments, 1)
    return whole, first, fit(root / "two", *arguments, -1, root / "two" / "saved" / "last.ckpt")


STRATEGIES = {
    "ddp": (cases.ddp, cases.Worsening),
    "fsdp": (cases.fsdp, cases.Worsening),
    "fsdp use_orig_params=False": (
        partial(cases.fsdp, use_orig_params=False, state_dict_type="sharded"),
        cases.Worsening,
    ),
    "fsdp2": (cases.fsdp2, cases.WorseningSharded),
}


@pytest.mark.parametrize(("schedule", "ended"), [(PATIENCE, 5), (LIMITS, 3)], ids=["patience", "limits"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_it_goes_on_as_if_the_phases_had_been_there(name: str, schedule: Any, ended: int, tmp_path: Path) -> None:
    for whole, first, then in harness.run_ranks(in_one_go_and_in_two, 2, tmp_path, *STRATEGIES[name], schedule):
        assert [epoch.phase for epoch in first] == [epoch.phase for epoch in whole[:ended]]
        assert {epoch.phase for epoch in then} == {2}
        assert_same_epochs([*first, *then], whole)
