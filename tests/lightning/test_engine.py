"""The engine inside Lightning: asked once, told once, and nothing left behind."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping
from finetuning_scheduler.strategy_adapters import StrategyAdapter
from tests.reference.networks import FIRST, HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, schedule_of, simple_recipe
from tests.reference.toys import SaveAt, Session, Toy

LOGGER = logging.getLogger("finetuning_scheduler")
STEP_LR = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}


class CountingAdapter(StrategyAdapter):
    """Counts what the ranks are asked, and what the replicas are compared for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.compared: list[int] = []

    def any_rank(self, flag: bool) -> bool:
        self.asked.append("any")
        return super().any_rank(flag)

    def every_rank(self, flag: bool) -> bool:
        self.asked.append("every")
        return super().every_rank(flag)

    def check_replicas(self, parameters: Any) -> None:
        self.compared.append(len(list(parameters)))


def counting_session(tmp_path: Path, kind: type[Any] = FinetuningScheduler, **options: Any) -> Session:
    scheduler_options = {"custom_strategy_adapters": {"single_device": f"{__name__}:CountingAdapter"}}
    recipe = simple_recipe(
        phases=(PhaseSpec(HEAD), PhaseSpec(THIRD), PhaseSpec(SECOND), PhaseSpec(FIRST)),
        scores=(3.0, *(4.0 + epoch for epoch in range(20))),
        **options,
    )
    return Session(recipe, tmp_path, scheduler_options=scheduler_options, scheduler_class=kind)


class Asking(FinetuningScheduler):
    """Notes what the ranks are asked for each decision, and whether anyone is out of patience."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.decisions: list[list[str]] = []

    def should_transition(self, trainer: Any) -> bool:
        asked = self.strategy_adapter.asked
        before = len(asked)
        due = super().should_transition(trainer)
        self.decisions.append(asked[before:])
        return due


def test_the_ranks_are_asked_once_for_each_decision(tmp_path: Path) -> None:
    session = counting_session(tmp_path, Asking, patience=1, epochs=3).fit()
    # Nobody is out of patience before epochs 0 and 1; phase 1 begins in epoch 2.
    assert session.scheduler.decisions == [["any"], ["any"], ["any", "every"]]
    assert session.scheduler.strategy_adapter.asked.count("every") == 1
    assert [epoch.phase for epoch in session.history.epochs] == [0, 0, 1]


class ThawAt(Callback):
    """Enters a phase at the start of an epoch."""

    def __init__(self, epoch: int, depth: int) -> None:
        self.epoch, self.depth = epoch, depth
        self.scheduler: Any = None

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.scheduler.thaw_to_depth(self.depth)


def test_thawing_to_a_depth_restarts_the_wait_and_compares_replicas(tmp_path: Path) -> None:
    session = counting_session(tmp_path, patience=3, epochs=6)
    thaw = ThawAt(epoch=3, depth=2)  # two epochs without improvement lie behind
    thaw.scheduler = session.scheduler
    session.trainer.callbacks.insert(1, thaw)
    session.fit()
    assert [epoch.phase for epoch in session.history.epochs] == [0, 0, 0, 2, 2, 2]
    assert session.scheduler.strategy_adapter.compared == [2, 6]  # tensors in training after each change


def test_warnings_about_reinitialisation_are_told_once(messages: Callable[[], list[str]], tmp_path: Path) -> None:
    schedule = schedule_of(simple_recipe())
    schedule[1]["new_lr_scheduler"] = {"lr_scheduler_init": STEP_LR, "pl_lrs_cfg": {"intervall": "step"}}
    Session(simple_recipe(), tmp_path, scheduler_options={"ft_schedule": schedule}).fit()
    told = messages()
    assert len([text for text in told if "unknown key 'intervall'" in text]) == 1
    assert sorted({text for text in told if told.count(text) > 1}) == []


def test_problems_of_every_kind_come_in_one_message(tmp_path: Path) -> None:
    schedule = schedule_of(simple_recipe())
    schedule[1]["new_lr_scheduler"] = {"lr_scheduler_init": STEP_LR, "init_pg_lrs": [0.1, 0.2]}
    schedule[2]["lr"] = -1
    schedule[3] = {"params": ["nowhere"]}
    options = {"ft_schedule": schedule, "max_depth": -5, "allow_untested": "no", "reinit_lr_cfg": {}}
    session = Session(simple_recipe(), tmp_path, scheduler_options=options, checkpoint={"save_top_k": 0})
    with pytest.raises(MisconfigurationException) as error:
        session.fit()
    parts = (
        "expected `max_depth` to be -1 or a phase, got -5",
        "expected `allow_untested` to be True or False, got 'no'",
        "expected `init_pg_lrs` to have 1 values",
        "phase 2: `lr`: expected a number greater than 0",
        "selector 'nowhere'",
        "expected `reinit_lr_cfg` without `ft_schedule` only",
        "got save_top_k=0",
    )
    assert [part for part in parts if part not in str(error.value)] == []
    assert str(error.value).startswith(f"{len(parts)} problems found:")
    assert all(parameter.requires_grad for parameter in session.module.parameters())


UNUSABLE: dict[str, tuple[dict[int, Any] | None, str]] = {
    "no schedule": (None, "got one of which all are frozen"),
    "phase 0 selects nothing": ({0: {"params": ["nowhere"]}}, "selector 'nowhere'"),
    "phase 0 has no parameters": ({0: {"params": []}, 1: {"params": ["*"]}}, "phase 0: `params`"),
}


@pytest.mark.parametrize(("schedule", "expected"), UNUSABLE.values(), ids=UNUSABLE)
def test_the_reason_is_told_where_a_model_that_came_frozen_leaves_the_optimizer_without_parameters(
    schedule: dict[int, Any] | None, expected: str, tmp_path: Path
) -> None:
    session = Session(simple_recipe(), tmp_path, scheduler_options={"ft_schedule": schedule})
    session.module.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=re.escape(expected)):
        session.fit()


def test_a_resumed_run_does_not_tell_of_replacements(messages: Callable[[], list[str]], tmp_path: Path) -> None:
    schedule = schedule_of(simple_recipe())
    schedule[1] |= {"new_optimizer": {"optimizer_init": SGD}, "new_lr_scheduler": {"lr_scheduler_init": STEP_LR}}
    options = {"ft_schedule": schedule}
    save = SaveAt("on_train_epoch_end", tmp_path)
    Session(simple_recipe(), tmp_path, scheduler_options=options, extra_callbacks=(save,)).fit()
    before = len(messages())
    Session(simple_recipe(), tmp_path / "resumed", scheduler_options=options).fit(ckpt_path=list(save.files)[3])
    assert [text for text in messages()[before:] if "replaces" in text] == []


def test_the_end_of_the_session_is_told_once(messages: Callable[[], list[str]], tmp_path: Path) -> None:
    """The trainer asks again after each batch and epoch that `min_epochs` makes it go on for."""
    first, *others = simple_recipe().phases
    recipe = simple_recipe(phases=(replace(first, max_epoch=-1, max_step=6), *others), max_depth=0)
    session = Session(recipe, tmp_path, min_epochs=4).fit()
    assert [epoch.number for epoch in session.history.epochs] == [0, 1, 2, 3]
    ends = [message for message in messages() if "ended" in message]
    assert ends == ["Phase 0, the last, ended (max_transition_step)."]


def test_asking_for_the_state_changes_nothing(tmp_path: Path) -> None:
    session = Session(simple_recipe(), tmp_path).fit()
    first = copy.deepcopy(session.scheduler.state_dict())
    assert session.scheduler.state_dict() == first


class PatientEarlyStopping(FTSEarlyStopping):
    """Takes other arguments than its base class."""

    def __init__(self, how_long: int) -> None:
        super().__init__(monitor="val_loss", patience=how_long)


class NamedCheckpoint(FTSCheckpoint):
    """Takes other arguments than its base class."""

    def __init__(self, directory: Path) -> None:
        super().__init__(dirpath=directory, monitor="val_loss")


def test_subclasses_with_arguments_of_their_own_forget_another_module(tmp_path: Path, trainer_in: Any) -> None:
    stopping, saving = PatientEarlyStopping(5), NamedCheckpoint(tmp_path / "files")
    scheduler = FinetuningScheduler(ft_schedule=schedule_of(simple_recipe()))
    trainer = trainer_in(callbacks=[scheduler, stopping, saving], max_epochs=2)
    good, bad = (Toy(simple_recipe(scores=scores)) for scores in ((1.0,) * 4, (9.0,) * 4))
    trainer.fit(good)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(bad)
    assert stopping.best_score == 9.0
    assert saving.best_model_score == 9.0
    assert Path(saving.best_model_path).exists()


class Failing(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise ConnectionAbortedError


@pytest.mark.parametrize("fails", [False, True])
def test_no_handler_stays_at_the_logger(fails: bool, trainer_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    during: list[int] = []

    class Look(Callback):
        def on_train_start(self, *_: Any) -> None:
            during.append(len(LOGGER.handlers))

    trainer = trainer_in(callbacks=[FinetuningScheduler(), Look(), *([Failing()] if fails else [])], max_epochs=1)
    if fails:
        with pytest.raises(ConnectionAbortedError):
            trainer.fit(Toy())
    else:
        trainer.fit(Toy())
    assert during == [1]
    assert LOGGER.handlers == []


def test_arguments_stay_what_the_user_gave(tmp_path: Path) -> None:
    schedule = schedule_of(simple_recipe())
    session = Session(simple_recipe(), tmp_path, scheduler_options={"ft_schedule": schedule, "max_depth": 1})
    assert session.scheduler.ft_schedule is schedule
    session.fit()
    assert session.scheduler.max_depth == 1
    other = Session(simple_recipe(), tmp_path / "other")
    other.trainer.callbacks[0] = session.scheduler
    session.scheduler.max_depth = -1
    assert session.scheduler.max_depth == -1
    other.fit()
    assert session.scheduler.max_depth == 2
    assert session.scheduler.curr_depth == 2


def test_what_gradients_have_reached_can_be_read(tmp_path: Path) -> None:
    session = Session(simple_recipe(), tmp_path)
    assert list(session.scheduler.judgements) == []
    session.fit()
    assert [(judgement.phase, set(judgement.trained)) for judgement in session.scheduler.judgements] == [
        (0, set(HEAD)),
        (1, set(THIRD)),
        (2, set(SECOND)),
    ]


def test_thawing_to_the_present_depth_changes_nothing(tmp_path: Path, messages: Callable[[], list[str]]) -> None:
    session = counting_session(tmp_path, patience=2, epochs=3)
    thaw = ThawAt(epoch=2, depth=0)
    thaw.scheduler = session.scheduler
    session.trainer.callbacks.insert(1, thaw)
    session.fit()
    assert [epoch.phase for epoch in session.history.epochs] == [0, 0, 0]
    assert [text for text in messages() if "0 -> 0" in text] == []
