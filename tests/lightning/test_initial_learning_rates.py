"""From which learning rates a phase's LR scheduler starts, with a new optimizer before it: the same in every loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from finetuning_scheduler.core import PhaseRunner
from tests.reference.history import assert_continues
from tests.reference.networks import BATCHES_PER_EPOCH, FIRST, HEAD, SECOND, THIRD, Wrapped, build_network
from tests.reference.plain import batches_of, train_batch
from tests.reference.recipe import PhaseSpec, Recipe, schedule_of
from tests.reference.toys import SaveAt, Session

if TYPE_CHECKING:
    from pathlib import Path

Rates = tuple[float, ...]
SCORES = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
RECIPE = Recipe(
    phases=(
        PhaseSpec(HEAD, max_epoch=1),
        PhaseSpec(THIRD, lr=0.05, max_epoch=2),
        PhaseSpec(SECOND, lr=0.02, max_epoch=4),
        PhaseSpec(FIRST, lr=0.03),
    ),
    epochs=6,
    optimizer=partial(SGD, lr=0.01, momentum=0.9),
    scores=SCORES,
)


def sgd(**init_args: Any) -> dict[str, Any]:
    return {"new_optimizer": {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": init_args}}}


def scheduler(name: str, init_args: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    init = {"class_path": f"torch.optim.lr_scheduler.{name}", "init_args": init_args}
    return {"new_lr_scheduler": {"lr_scheduler_init": init, **others}}


def halving(**others: Any) -> dict[str, Any]:
    return scheduler("StepLR", {"step_size": 1, "gamma": 0.5}, **others)


def on_plateau(min_lr: Any) -> dict[str, Any]:
    """Every epoch is one without an improvement."""
    arguments = {"mode": "max", "factor": 0.5, "patience": 0, "min_lr": min_lr}
    return scheduler("ReduceLROnPlateau", arguments, pl_lrs_cfg={"monitor": "val_loss"})


@dataclass(frozen=True)
class Case:
    """Keys of phases, and the groups' learning rates in each epoch, those that differ from nothing installed."""

    keys: dict[int, dict[str, Any]]
    rates: dict[int, Rates]
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return replace(RECIPE, **self.changes)

    def schedule(self) -> dict[int, dict[str, Any]]:
        return {number: phase | self.keys.get(number, {}) for number, phase in schedule_of(self.recipe).items()}


def one_cycle(optimizer: Any) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.2, total_steps=20, cycle_momentum=False)


NO_DECAY = {"no_decay": ("bias",)}
LATER = {4: (0.5, 0.05, 0.02, 0.03), 5: (0.25, 0.025, 0.01, 0.015)}
CASES = {
    "same-phase": Case(
        {2: {**sgd(lr=0.5), **halving()}},
        {
            0: (0.01,),
            1: (0.01, 0.05),
            2: (0.5, 0.05, 0.02),
            3: (0.25, 0.025, 0.01),
            4: (0.125, 0.0125, 0.005, 0.03),
            5: (0.0625, 0.00625, 0.0025, 0.015),
        },
    ),
    "scheduler-later": Case({2: sgd(lr=0.5), 3: halving()}, {2: (0.01, 0.05, 0.02), 3: (0.01, 0.05, 0.02), **LATER}),
    "no_decay": Case(
        {2: sgd(lr=0.5), 3: halving()},
        {epoch: tuple(rate for rate in rates for _ in range(2)) for epoch, rates in LATER.items()},
        NO_DECAY,
    ),
    "no_decay-init_pg_lrs": Case(
        {1: halving(init_pg_lrs=[2e-6, 3e-6])}, {0: (0.01, 0.01), 1: (2e-6, 3e-6, 0.05, 0.05)}, NO_DECAY
    ),
    "current-rates": Case(
        {2: sgd(lr=0.5), 3: halving(use_current_optimizer_pg_lrs=True)},
        {4: (0.01, 0.05, 0.02, 0.03), 5: (0.005, 0.025, 0.01, 0.015)},
    ),
    "init_pg_lrs": Case(
        {2: sgd(lr=0.5), 3: halving(init_pg_lrs=[0.4, 0.3, 0.2])},
        {4: (0.4, 0.3, 0.2, 0.03), 5: (0.2, 0.15, 0.1, 0.015)},
    ),
    "no-lr": Case({2: sgd(momentum=0.9), 3: halving()}, {4: (0.01, 0.05, 0.02, 0.03)}),
    "last-of-two": Case({1: sgd(lr=0.8), 2: sgd(lr=0.5), 3: halving()}, LATER),
    "first-of-two": Case({1: sgd(lr=0.5), 2: sgd(momentum=0.9), 3: halving()}, LATER),
    # OneCycleLR reads `initial_lr` at each step: the new one waits until it is replaced.
    "under-one-cycle": Case({2: sgd(lr=0.5, momentum=0.9), 3: halving()}, LATER, {"scheduler": one_cycle}),
    "first-of-two-under-one-cycle": Case(
        {1: sgd(lr=0.5), 2: sgd(momentum=0.9), 3: halving()}, LATER, {"scheduler": one_cycle}
    ),
    "last-of-two-under-one-cycle": Case(
        {1: sgd(lr=0.8), 2: {**sgd(lr=0.5, momentum=0.9), **halving()}},
        {2: (0.5, 0.05, 0.02)},
        {"scheduler": one_cycle},
    ),
    "a-minimum-for-each-group": Case(
        {2: {**sgd(lr=0.5), **on_plateau([0.3, 0.04, 0.015])}},
        {2: (0.5, 0.05, 0.02), 3: (0.5, 0.05, 0.02), 4: (0.3, 0.04, 0.015, 0.03), 5: (0.3, 0.04, 0.015, 0.015)},
    ),
    "a-minimum-for-each-group-of-two": Case(
        {1: {**sgd(lr=0.5), **on_plateau([0.2, 0.3, 0.04, 0.03])}},
        {
            1: (0.5, 0.5, 0.05, 0.05),
            2: (0.5, 0.5, 0.05, 0.05, 0.02, 0.02),
            3: (0.25, 0.3, 0.04, 0.03, 0.02, 0.02),  # later groups have the last minimum, and lie below it
        },
        NO_DECAY,
    ),
}


class Loop:
    """A loop written by hand; `saved` holds its state after each epoch."""

    def __init__(self, case: Case) -> None:
        self.recipe = case.recipe
        self.model = Wrapped(build_network(self.recipe.network))
        optimizer = self.recipe.optimizer([self.model.get_parameter(name) for name in HEAD])
        schedulers = [] if self.recipe.scheduler is None else [self.recipe.scheduler(optimizer)]
        self.runner = PhaseRunner(
            self.model, optimizer, case.schedule(), lr_schedulers=schedulers, no_decay=self.recipe.no_decay
        )
        self.rates: dict[int, Rates] = {}
        self.saved: dict[int, dict[str, Any]] = {}

    def execute(self, first_epoch: int = 0) -> Loop:
        for epoch in range(first_epoch, len(SCORES)):
            self.rates[epoch] = tuple(group["lr"] for group in self.runner.optimizer.param_groups)
            for batch in batches_of(self.recipe):
                train_batch(self.model, self.runner.optimizer, self.recipe, batch)
                self.runner.step()
            for each in self.runner.lr_schedulers:
                each.step(*([SCORES[epoch]] if isinstance(each, ReduceLROnPlateau) else []))
            self.runner.epoch_end(SCORES[epoch])
            self.saved[epoch] = {name: copy.deepcopy(part.state_dict()) for name, part in self.parts().items()}
        return self

    def parts(self) -> dict[str, Any]:
        """What is saved, each loaded after those before it."""
        parts = {"model": self.model, "runner": self.runner, "optimizer": self.runner.optimizer}
        return parts | {f"scheduler {number}": each for number, each in enumerate(self.runner.lr_schedulers)}

    def resume(self, saved: Mapping[str, Any], first_epoch: int) -> Loop:
        for name in ("model", "runner"):
            self.parts()[name].load_state_dict(copy.deepcopy(saved[name]))
        for name, part in list(self.parts().items())[2:]:
            part.load_state_dict(copy.deepcopy(saved[name]))
        return self.execute(first_epoch)

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_scheduler_starts_from_them_in_a_loop_written_by_hand(case: Case) -> None:
    rates = Loop(case).execute().rates
    assert {epoch: rates[epoch] for epoch in case.rates} == case.rates


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_resumed_loop_written_by_hand_has_the_same(case: Case) -> None:
    whole = Loop(case).execute()
    for epoch in range(len(SCORES) - 1):
        resumed = Loop(case).resume(whole.saved[epoch], epoch + 1)
        assert resumed.rates == {later: whole.rates[later] for later in range(epoch + 1, len(SCORES))}
        assert [
            name for name, value in whole.weights().items() if not torch.equal(resumed.weights()[name], value)
        ] == []


def session(case: Case, root: Path, *callbacks: Any) -> Session:
    options = {"ft_schedule": case.schedule()}
    return Session(
        case.recipe, root, scheduler_options=options, checkpoint={"save_top_k": -1}, extra_callbacks=callbacks
    )


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval':RuntimeWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_scheduler_starts_from_them_in_lightning_resumed_or_not(case: Case, tmp_path: Path) -> None:
    saver = SaveAt("on_train_epoch_end", tmp_path)
    whole = session(case, tmp_path, saver).fit().history
    assert {epoch: whole.steps[epoch * BATCHES_PER_EPOCH].lrs for epoch in case.rates} == case.rates
    for checkpoint in list(saver.files)[:-1]:
        resumed = session(case, tmp_path).fit(ckpt_path=checkpoint).history
        assert_continues(resumed, whole, saver.steps[checkpoint])
