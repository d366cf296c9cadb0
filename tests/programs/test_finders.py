"""Lightning's searches for a learning rate and a batch size: they try phase 0, and the session does not notice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from .toy_programs import (
    HEAD,
    PATIENT,
    Net,
    Program,
    Record,
    assert_same_epochs,
    checkpoint_answers,
    different_weights,
    files_below,
    patient,
    program,
    scheduler,
    weights_of,
)

RATES: dict[str, Any] = {"min_lr": 1e-3, "early_stop_threshold": None}
SIZES: dict[str, Any] = {"steps_per_trial": 2, "init_val": 2, "max_trials": 2}


class Watched(Net):
    """Notes which parameters a search changes, which Lightning runs with other callbacks than the session's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"lr": 0.01, "batch_size": 2} | options))
        self.before = weights_of(self)
        self.searched: set[str] = set()
        self.given_to_searches: set[str] = set()

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if not any(isinstance(callback, Record) for callback in self.trainer.callbacks):
            self.searched |= different_weights(weights_of(self), self.before)
            name_of = {id(parameter): name for name, parameter in self.named_parameters()}
            groups = self.trainer.optimizers[0].param_groups
            self.given_to_searches |= {name_of[id(parameter)] for group in groups for parameter in group["params"]}


class Decays(Watched):
    """Halves its learning rate after each epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


class WithAdamW(Watched):
    """An optimizer with a state for each parameter."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class HeadAlone(Net):
    """What phase 0 trains, in plain Lightning."""

    def configure_optimizers(self) -> Any:
        for name, parameter in self.named_parameters():
            parameter.requires_grad = name in HEAD
        return torch.optim.SGD(self.head.parameters(), lr=self.lr, momentum=self.momentum)


def rate_finder() -> LearningRateFinder:
    return LearningRateFinder(num_training_steps=16, **RATES)


class AtTheFirstEpoch(LearningRateFinder):
    """Searches at the start of an epoch, as Lightning's documentation shows for fine-tuning."""

    def __init__(self, epoch: int) -> None:
        super().__init__(num_training_steps=16, **RATES)
        self.epoch = epoch

    def on_fit_start(self, *_: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.lr_find(trainer, pl_module)


def find_rate(run: Program) -> None:
    found = Tuner(run.trainer).lr_find(run.model, num_training=16, **RATES)
    assert found.suggestion() == run.model.lr


def find_size(run: Program) -> None:
    assert Tuner(run.trainer).scale_batch_size(run.model, **SIZES) == run.model.batch_size


def find_size_of_validation(run: Program) -> None:
    """Of the validation's loader, whose size the training does not use."""
    Tuner(run.trainer).scale_batch_size(run.model, method="validate", batch_arg_name="val_batch_size", **SIZES)


def find_both(run: Program) -> None:
    find_size(run)
    find_rate(run)


def nothing(run: Program) -> None:
    """No search before the fit."""


@dataclass(frozen=True)
class Search:
    """Callbacks that search inside the fit, or calls that search before it."""

    callbacks: Callable[[], Sequence[Callback]] = field(default=tuple)
    before: Callable[[Program], None] = nothing
    finds: frozenset[str] = frozenset()


SEARCHES: dict[str, Search] = {
    "rate-in-the-fit": Search(lambda: (rate_finder(),), finds=frozenset({"lr"})),
    "rate-in-the-first-epoch": Search(lambda: (AtTheFirstEpoch(0),), finds=frozenset({"lr"})),
    "rate-before": Search(before=find_rate, finds=frozenset({"lr"})),
    "size-in-the-fit": Search(lambda: (BatchSizeFinder(**SIZES),), finds=frozenset({"batch_size"})),
    "size-before": Search(before=find_size, finds=frozenset({"batch_size"})),
    "both-in-the-fit": Search(lambda: (BatchSizeFinder(**SIZES), rate_finder()), finds=frozenset({"batch_size", "lr"})),
    "both-before": Search(before=find_both, finds=frozenset({"batch_size", "lr"})),
}


def searched(
    search: Search,
    root: Path,
    ours: Sequence[Callback],
    listed: str = "finder-first",
    model: type[Watched] = Watched,
    **options: Any,
) -> Program:
    found = list(search.callbacks())
    callbacks = [*found, *ours] if listed == "finder-first" else [*ours, *found]
    run = program(root, callbacks, model(), **options)
    search.before(run)
    return run.fit()


def by_hand(
    search: Search, run: Program, root: Path, ours: Sequence[Callback], model: type[Watched] = Watched, **options: Any
) -> Program:
    """A fit with what was found set in the program's text."""
    found = {name: getattr(run.model, name) for name in search.finds}
    unfound = Watched()
    assert {name for name in found if found[name] != getattr(unfound, name)} == search.finds
    return program(root, ours, model(**found), **options).fit()


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_in_plain_lightning_a_fit_after_a_search_is_the_fit_with_what_was_found(search: Search, tmp_path: Path) -> None:
    """The tests below ask no more of a schedule than this."""
    run = searched(search, tmp_path / "searched", [])
    assert_same_epochs(run.epochs, by_hand(search, run, tmp_path / "by-hand", []).epochs)


LISTED = {
    f"{name}-{listed}": (search, listed)
    for name, search in SEARCHES.items()
    for listed in (("finder-first", "finder-last") if search.callbacks() else ("finder-first",))
}


@pytest.mark.parametrize(("search", "listed"), LISTED.values(), ids=LISTED)
def test_a_scheduled_fit_after_a_search_is_the_fit_with_what_was_found(
    search: Search, listed: str, tmp_path: Path
) -> None:
    run = searched(search, tmp_path / "searched", [scheduler(), patient()], listed)
    hand = by_hand(search, run, tmp_path / "by-hand", [scheduler(), patient()])
    assert run.phases == [0, 0, 1, 1, 1]
    assert_same_epochs(run.epochs, hand.epochs)
    assert files_below(run.root) == files_below(hand.root) != []
    hidden = [path.name for path in run.root.rglob(".*")]
    assert hidden == []


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_a_search_trains_what_phase_0_trains(search: Search, tmp_path: Path) -> None:
    run = searched(search, tmp_path, [scheduler(), patient()])
    assert run.model.searched == HEAD
    assert run.model.given_to_searches == HEAD


RATE_SEARCHES = {name: SEARCHES[name] for name in ("rate-in-the-fit", "rate-in-the-first-epoch", "rate-before")}


def losses_tried(search: Search, run: Program) -> list[float]:
    """The losses of a search for a rate, before the fit or in it."""
    if search.before is find_rate:
        losses = Tuner(run.trainer).lr_find(run.model, num_training=16, **RATES).results["loss"]
    else:
        run.fit()
        (finder,) = (callback for callback in run.trainer.callbacks if isinstance(callback, LearningRateFinder))
        losses = finder.optimal_lr.results["loss"]
    assert len(losses) == 16
    return list(losses)


@pytest.mark.parametrize("search", RATE_SEARCHES.values(), ids=RATE_SEARCHES)
def test_the_losses_that_a_search_for_a_rate_sees_are_those_of_phase_0(search: Search, tmp_path: Path) -> None:
    """Plain Lightning sees the same for a model of which nothing but the head can be trained."""
    ours = [*search.callbacks(), scheduler(), patient()]
    tried = losses_tried(search, program(tmp_path / "ours", ours, Watched()))
    head = losses_tried(search, program(tmp_path / "head", search.callbacks(), HeadAlone(lr=0.01, batch_size=2)))
    everything = losses_tried(search, program(tmp_path / "everything", search.callbacks(), Watched()))
    assert tried == head != everything


KEPT: dict[str, tuple[str, type[Watched]]] = {
    "rate-in-the-fit-step-lr": ("rate-in-the-fit", Decays),
    "rate-before-step-lr": ("rate-before", Decays),
    "rate-before-adamw": ("rate-before", WithAdamW),
    "size-in-the-fit-step-lr": ("size-in-the-fit", Decays),
    "size-in-the-fit-adamw": ("size-in-the-fit", WithAdamW),
    "size-before-adamw": ("size-before", WithAdamW),
}


@pytest.mark.parametrize(("name", "model"), KEPT.values(), ids=KEPT)
def test_a_search_leaves_optimizer_and_lr_scheduler_as_they_were(
    name: str, model: type[Watched], tmp_path: Path
) -> None:
    search = SEARCHES[name]
    run = searched(search, tmp_path / "searched", [scheduler(), patient()], model=model)
    hand = by_hand(search, run, tmp_path / "by-hand", [scheduler(), patient()], model=model)
    assert_same_epochs(run.epochs, hand.epochs)


@pytest.mark.parametrize("search", RATE_SEARCHES.values(), ids=RATE_SEARCHES)
def test_a_later_phase_that_takes_phase_0s_rate_takes_the_one_that_was_found(search: Search, tmp_path: Path) -> None:
    """``base_max_lr=None``."""
    schedule = {0: {"params": ["head.*"], "max_transition_epoch": 2}, 1: {"params": ["body.*", "neck.*"]}}
    run = searched(search, tmp_path, [scheduler(schedule, base_max_lr=None), patient()], max_epochs=3)
    assert run.phases == [0, 0, 1]
    assert run.epochs[2].learning_rates == (run.model.lr, run.model.lr)


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_a_search_leaves_patience_and_the_best_file_as_they_were(search: Search, tmp_path: Path) -> None:
    """Phases that end by patience, on scripted scores, with a checkpoint callback of the user's own."""
    outcomes = {}
    for name, chosen in {"searched": search, "by-hand": Search()}.items():
        save = ModelCheckpoint(monitor="val_accuracy", mode="max", save_top_k=2)
        stop = pl.callbacks.EarlyStopping("val_accuracy", mode="max", patience=1)
        run = searched(chosen, tmp_path / name, [scheduler(PATIENT), stop, save], model=Scripted, max_epochs=6)
        if chosen.finds:
            assert run.model.searched
        outcomes[name] = {"phases": run.phases, "answers": checkpoint_answers(save, run.root)}
    assert outcomes["by-hand"]["phases"] == [0, 0, 0, 1, 1, 2]
    # A larger batch makes fewer steps, which stand in the files' names.
    if "batch_size" in search.finds:
        for outcome in outcomes.values():
            outcome["answers"] = outcome["answers"]["best_model_score"]
    assert outcomes["searched"] == outcomes["by-hand"]


class Scripted(Watched):
    """Its accuracy is best in epochs 1 and 3."""

    def __init__(self, **options: Any) -> None:
        super().__init__(accuracies=(0.4, 0.5, 0.4, 0.6, 0.5, 0.5), **options)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_search_that_finds_nothing_in_a_later_epoch_changes_nothing(epoch: int, tmp_path: Path) -> None:
    """Lightning's own search gets no points past epoch 0, but saves and restores the whole session on the way."""
    sought = program(tmp_path / "sought", [AtTheFirstEpoch(epoch), scheduler(), patient()], Watched()).fit()
    plain = program(tmp_path / "plain", [scheduler(), patient()], Watched()).fit()
    assert sought.phases == [0, 0, 1, 1, 1]
    assert_same_epochs(sought.epochs, plain.epochs)


class WithValidationSize(Watched):
    """The size of the validation's batches is an attribute, too."""

    val_batch_size = 8


@pytest.mark.filterwarnings("ignore:Found 4 module.s. in eval mode")  # Lightning's search leaves them so
def test_a_search_for_the_size_of_validation_batches_before_the_fit(tmp_path: Path) -> None:
    run = program(tmp_path / "searched", [scheduler(), patient()], WithValidationSize())
    find_size_of_validation(run)
    run.fit()
    fresh = program(tmp_path / "fresh", [scheduler(), patient()], WithValidationSize()).fit()
    assert run.phases == [0, 0, 1, 1, 1]
    assert_same_epochs(run.epochs, fresh.epochs)


def test_a_search_between_two_fits_of_one_trainer(tmp_path: Path) -> None:
    """The second fit goes on in its phase."""
    run = program(tmp_path, [scheduler(), patient()], Watched(momentum=0.0), max_epochs=3).fit()
    before = weights_of(run.model)
    run.trainer.fit_loop.max_epochs = 5
    find_size(run)
    assert different_weights(weights_of(run.model), before) == set()
    run.fit()
    assert [epoch.number for epoch in run.epochs] == [0, 1, 2, 3, 4]
    assert run.phases == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", ["rate-in-the-fit", "size-in-the-fit"])
def test_that_a_search_in_a_resumed_run_begins_at_epoch_0_again_is_told(
    name: str, messages: Callable[[int], list[str]], tmp_path: Path
) -> None:
    """Plain Lightning does so, and says nothing."""

    def run() -> Program:
        saving = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
        return program(tmp_path, [*SEARCHES[name].callbacks(), scheduler(), patient(), saving], Watched(), max_epochs=3)

    def told() -> list[str]:
        return [message for message in messages(logging.WARNING) if "from 0 again" in message]

    run().fit()
    assert told() == []
    resumed = run().fit(ckpt_path=tmp_path / "last.ckpt")
    assert [epoch.number for epoch in resumed.epochs] == [0, 1, 2]
    (message,) = told()
    assert str(tmp_path / "last.ckpt") in message


def test_one_trainer_searches_and_another_fits(tmp_path: Path) -> None:
    """One list of callbacks for both, as in a notebook."""
    callbacks = [scheduler(), patient()]
    searching = program(tmp_path / "searching", callbacks, Watched())
    find_rate(searching)
    fitting = program(tmp_path / "fitting", callbacks, searching.model).fit()
    fresh = program(tmp_path / "fresh", [scheduler(), patient()], Watched(lr=searching.model.lr)).fit()
    assert_same_epochs(fitting.epochs, fresh.epochs)
    assert searching.model.searched == HEAD
