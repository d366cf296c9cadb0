"""Learning rates in Lightning under every supported scheduler: those of a scheduler built by hand, resumed too."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tests.reference.networks import HEAD
from tests.reference.recipe import PhaseSpec, Recipe
from tests.reference.scheduler_matrix import EPOCHS, MATRIX, METRICS, Case, by_hand, user_optimizer
from tests.reference.toys import SaveAt, Session

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch.callbacks import Callback

# The part of the matrix that restores the best; the whole is run with `PhaseRunner`.
# Not in Lightning: ReduceLROnPlateau in every step needs a metric that validation logs later.
LIGHTNING = {
    name: case
    for name, case in MATRIX.items()
    if case.restore_best and not (case.row.kind is ReduceLROnPlateau and case.interval == "step")
}


def session_of(case: Case, root: Path, *callbacks: Callback) -> Session:
    recipe = Recipe(
        phases=(PhaseSpec(HEAD),),
        epochs=EPOCHS,
        optimizer=lambda parameters: user_optimizer(list(parameters)),
        scheduler=case.row.make,
        interval=case.interval,
        scores=METRICS,
        restore_best=case.restore_best,
        apply_lambdas=case.apply_lambdas,
    )
    options = {"ft_schedule": case.schedule(), "logging_level": logging.WARNING}
    checkpoint = {"save_top_k": -1}
    return Session(recipe, root, scheduler_options=options, checkpoint=checkpoint, extra_callbacks=callbacks)


def seen_lrs(session: Session) -> list[tuple[float, ...]]:
    return [step.lrs for step in session.history.steps]


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval':RuntimeWarning")
@pytest.mark.parametrize("case", LIGHTNING.values(), ids=LIGHTNING.keys())
def test_learning_rates_in_lightning_are_those_of_a_scheduler_built_by_hand(case: Case, tmp_path: Path) -> None:
    assert seen_lrs(session_of(case, tmp_path).fit()) == [seen.lrs for seen in by_hand(case)]


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval':RuntimeWarning")
@pytest.mark.parametrize("case", LIGHTNING.values(), ids=LIGHTNING.keys())
def test_learning_rates_go_on_when_resumed_in_each_phase(case: Case, tmp_path: Path) -> None:
    saver = SaveAt("on_train_epoch_end", tmp_path)
    uninterrupted = seen_lrs(session_of(case, tmp_path, saver).fit())
    for checkpoint in list(saver.files)[1:4]:
        resumed = seen_lrs(session_of(case, tmp_path).fit(ckpt_path=checkpoint))
        assert resumed == uninterrupted[saver.steps[checkpoint] :]
