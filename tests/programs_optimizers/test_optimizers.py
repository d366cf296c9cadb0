"""Optimizers without a learning rate, with one rate for all groups, and around another optimizer, under Lightning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, AdamW, Optimizer

from tests.core_programs.loops import (
    BATCHES_PER_EPOCH,
    HEAD,
    UPPER_LR,
    Schedule,
    copied,
    differing,
    momentum_sgd,
    trainable,
)

from ..core_programs.optimizers import WITHOUT_RATE, OneRate, Wrapper
from .toys import Fit, Toy, by_hand, fit, phases, prepared


class Optimized(Toy):
    """Returns the optimizer that is asked for, over all parameters; keeps it, and counts the steps of training."""

    def __init__(self, optimizer_over: Callable[..., Optimizer], **options: Any) -> None:
        super().__init__(**options)
        self.optimizer_over = optimizer_over
        self.batches_seen = 0

    def configure_optimizers(self) -> Any:
        self.returned = self.optimizer_over(self.parameters())
        return self.returned

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches_seen += 1
        return super().training_step(batch, batch_idx)


def without_rates(schedule: Schedule) -> Schedule:
    return {number: {key: value for key, value in phase.items() if key != "lr"} for number, phase in schedule.items()}


def installing(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"optimizer_init": {"class_path": class_path, "init_args": arguments}}


# --- no learning rate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_over", WITHOUT_RATE.values(), ids=WITHOUT_RATE.keys())
def test_new_groups_of_an_optimizer_without_learning_rate_have_none_either(
    optimizer_over: Callable[..., Optimizer], tmp_path: Path
) -> None:
    schedule = without_rates(phases(2, 4))
    hand = Toy()
    by_hand(hand, optimizer_over, schedule)
    done = fit(Optimized(optimizer_over), tmp_path, schedule)
    assert differing(done.recorder.weights[-1], copied(hand)) == set()
    assert done.rates[-1] == (None, None, None)
    assert [each.text.split(" (")[0] for each in done.said if each.text.startswith("Phase ")] == [
        "Phase 0 -> 1",
        "Phase 1 -> 2",
    ]


def test_a_generated_schedule_trains_without_a_learning_rate(tmp_path: Path) -> None:
    module = Optimized(WITHOUT_RATE["Relative"], scores=(1.0, 2.0, 3.0, 4.0))
    done = fit(module, tmp_path, None, epochs=4, patience=1, base_max_lr=0.01)
    assert done.scheduler.curr_depth == 2
    assert done.rates[-1] == (None, None, None)


class LooksAtPhase1(Optimized):
    """Keeps the weights with which phase 1 begins."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 2 * BATCHES_PER_EPOCH:
            self.at_phase_1 = copied(self)


@pytest.mark.parametrize("optimizer_over", WITHOUT_RATE.values(), ids=WITHOUT_RATE.keys())
def test_the_best_checkpoint_comes_back_under_an_optimizer_without_learning_rate(
    optimizer_over: Callable[..., Optimizer], tmp_path: Path
) -> None:
    module = LooksAtPhase1(optimizer_over, scores=(1.0, 2.0, 3.0))
    done = fit(module, tmp_path, without_rates(phases(2)), epochs=3, restore_best=True)
    best, last = done.recorder.weights[:2]
    assert differing(best, last) == set(HEAD)
    assert differing(module.at_phase_1, best) == set()


def with_schedule_of_transformers(optimizer: Optimizer) -> Any:
    import transformers

    return transformers.optimization.AdafactorSchedule(optimizer)


class Reporting(Optimized):
    """The scheduler that ``transformers`` gives Adafactor only reports its step sizes."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = {"scheduler": with_schedule_of_transformers(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def test_adafactor_trains_under_the_schedule_that_transformers_gives_it(tmp_path: Path) -> None:
    schedule = without_rates(phases(2, 4))
    hand = Toy()
    by_hand(hand, WITHOUT_RATE["Adafactor"], schedule)
    done = fit(Reporting(WITHOUT_RATE["Adafactor"]), tmp_path, schedule, allow_untested=True)
    assert done.scheduler.curr_depth == 2
    assert differing(done.recorder.weights[-1], copied(hand)) == set()


def assert_refused(module: Optimized, schedule: Any, root: Path, *names: str, **options: Any) -> None:
    attempt = prepared(module, root, schedule, **options)
    weights, required = copied(module), trainable(module)
    with pytest.raises(MisconfigurationException, match="phase 1") as caught:
        attempt.run()
    assert [name for name in names if name not in str(caught.value)] == []
    assert module.batches_seen == 0
    assert differing(copied(module), weights) == set()
    assert trainable(module) == required


@pytest.mark.parametrize("name", WITHOUT_RATE)
def test_a_phases_lr_for_an_optimizer_without_one_is_an_error_before_training(name: str, tmp_path: Path) -> None:
    assert_refused(Optimized(WITHOUT_RATE[name]), phases(2), tmp_path, name, "lr")


# --- one learning rate for all groups ---------------------------------------------------------------------------------


def one_rate(parameters: Any) -> Optimizer:
    return OneRate(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (phases(2), {}),
        (without_rates(phases(2)), {}),
        (None, {"base_max_lr": 0.2}),
        (phases(2, phase_1={"lr": 0.1, "lr_warmup_steps": 3}), {}),
    ],
    ids=["a phase's lr", "the default rate of later phases", "a generated schedule", "a warm-up of the new group"],
)
def test_rates_that_an_optimizer_with_one_for_all_would_refuse_are_found_before_the_first_batch(
    schedule: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    assert_refused(Optimized(one_rate), schedule, tmp_path, "OneRate", **options)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (phases(2, 4, phase_1={"lr": 0.1}, phase_2={"lr": 0.1}), {}),
        (without_rates(phases(2, 4)), {"base_max_lr": None}),
        (phases(2, 4), {"max_depth": 0}),
    ],
    ids=["the same lr", "the initial lr", "other rates in phases that are not executed"],
)
def test_an_optimizer_with_one_rate_for_all_trains_as_by_hand_where_the_rates_are_equal(
    schedule: Schedule, options: dict[str, Any], tmp_path: Path
) -> None:
    executed = {0: schedule[0]} if "max_depth" in options else schedule
    hand = Toy()
    by_hand(hand, momentum_sgd, {number: {**phase, "lr": 0.1} for number, phase in executed.items()}, epochs=2)
    done = fit(Optimized(one_rate), tmp_path, schedule, epochs=2 if "max_depth" in options else 6, **options)
    assert differing(done.recorder.weights[1], copied(hand)) == set()
    assert {rate for rates in done.rates for rate in rates} == {0.1}


# --- wrappers ---------------------------------------------------------------------------------------------------------


def wrapped(parameters: Any) -> Optimizer:
    return Wrapper(momentum_sgd(parameters))


def test_a_wrapped_optimizer_trains_as_the_one_inside(tmp_path: Path) -> None:
    hand = Toy()
    by_hand(hand, momentum_sgd, phases(2, 4))
    done = fit(Optimized(wrapped), tmp_path, phases(2, 4))
    assert differing(done.recorder.weights[-1], copied(hand)) == set()


@pytest.mark.parametrize("restore_best", [False, True], ids=["nothing restored", "best restored"])
def test_a_phase_with_an_optimizer_of_its_own_leaves_the_wrapped_one_its_groups(
    restore_best: bool, tmp_path: Path
) -> None:
    schedule = phases(2, 4, phase_1={"new_optimizer": installing("torch.optim.AdamW", lr=0.01)})

    def run(optimizer_over: Callable[..., Optimizer], root: Path) -> Fit:
        module = Optimized(optimizer_over, scores=(1.0, 2.0, 3.0, 0.5, 0.75, 0.8))
        return fit(module, root, schedule, restore_best=restore_best)

    bare, done = run(momentum_sgd, tmp_path / "bare"), run(wrapped, tmp_path / "wrapped")
    assert isinstance(done.optimizer, AdamW)
    assert done.rates[-1][1] == UPPER_LR
    assert differing(done.recorder.weights[-1], bare.recorder.weights[-1]) == set()
    module = done.module
    assert isinstance(module, Optimized)
    inner = module.returned.optimizer
    assert isinstance(inner, SGD)
    assert [{id(parameter) for parameter in group["params"]} for group in inner.param_groups] == [
        {id(module.head.weight), id(module.head.bias)}
    ]
    assert len(done.recorder.rates) == 6 * BATCHES_PER_EPOCH
