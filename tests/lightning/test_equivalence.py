"""Runs of the callback against the plain PyTorch loop of ``reference``: equal bit for bit after every epoch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    ReduceLROnPlateau,
    StepLR,
)

from tests.reference.history import assert_same_epochs, assert_same_run
from tests.reference.loop import train
from tests.reference.networks import FIRST, HEAD, SECOND, THIRD, Tied, normalised, pair
from tests.reference.recipe import PhaseSpec, Recipe, adamw, momentum_sgd, simple_recipe, unscheduled
from tests.reference.toys import Recorder, Session, Toy, ToyOverAll, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def slow_sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.01, momentum=0.9)


# Four phases; the validation scores are written down, so that every kind of transition is certain to happen.
EPOCH_LIMITS = Recipe(
    phases=(
        PhaseSpec(HEAD, max_epoch=2),
        PhaseSpec(THIRD, lr=0.05, max_epoch=3),
        PhaseSpec(SECOND, max_epoch=6),
        PhaseSpec(FIRST, lr=0.01, max_epoch=8),
    ),
    epochs=10,
    optimizer=momentum_sgd,
    scores=(5.0, 4.0, 4.5, 3.0, 3.5, 3.25, 6.0, 2.0),
)
EARLY_STOPPING = Recipe(
    phases=(PhaseSpec(HEAD), PhaseSpec(THIRD, lr=0.05), PhaseSpec(SECOND, lr=0.02), PhaseSpec(FIRST, lr=0.01)),
    epochs=14,
    optimizer=momentum_sgd,
    patience=2,
    # the second phase never improves on the first: the third starts from the first's best
    scores=(5.0, 4.0, 4.5, 4.25, 4.0, 4.1, 3.0, 3.5, 2.5, 2.75, 2.5, 2.4, 2.6, 2.4),
)
STEP_LIMITS = Recipe(
    phases=(
        PhaseSpec(HEAD, max_step=6),
        PhaseSpec(THIRD, lr=0.05, max_step=7),
        PhaseSpec(SECOND, lr=0.02, max_step=16),
        PhaseSpec(FIRST, lr=0.01),
    ),
    epochs=6,
    optimizer=momentum_sgd,
    scores=(5.0, 4.0, 4.5, 4.75, 3.0, 2.0),
)
MIXED = Recipe(
    phases=(
        PhaseSpec(HEAD, max_step=3),
        PhaseSpec(THIRD, lr=0.05, max_epoch=3),
        PhaseSpec(SECOND, lr=0.02, max_epoch=2),  # not larger than the one before: lasts one epoch
        PhaseSpec(FIRST, lr=0.01),
    ),
    epochs=9,
    optimizer=momentum_sgd,
    patience=2,
    min_delta=0.5,
    scores=(5.0, 4.0, 4.5, 3.0, 3.25, 2.0, 1.75, 1.6, 1.5),
)
REAL_LOSS = replace(EARLY_STOPPING, scores=None, patience=1, epochs=12)

SCHEDULES = {
    "epoch-limits": EPOCH_LIMITS,
    "early-stopping": EARLY_STOPPING,
    "step-limits": STEP_LIMITS,
    "mixed": MIXED,
    "real-loss": REAL_LOSS,
}
OPTIMIZERS = {"sgd": momentum_sgd, "adamw": adamw}
LR_SCHEDULERS: dict[str, dict[str, Any]] = {
    "constant": {},
    "epoch": {"scheduler": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.5), "interval": "epoch"},
    "step": {"scheduler": lambda optimizer: LinearLR(optimizer, 0.25, 1.0, total_iters=11), "interval": "step"},
}


def lambdas(epoch: int) -> float:
    return 0.9**epoch


ALL_LR_SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.7),
    "MultiStepLR": lambda optimizer: MultiStepLR(optimizer, milestones=[1, 3, 4], gamma=0.5),
    "CosineAnnealingWarmRestarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, T_0=3, eta_min=1e-4),
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=0.004),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambdas),
    "ConstantLR": lambda optimizer: ConstantLR(optimizer, factor=0.5, total_iters=4),
    "LinearLR": lambda optimizer: LinearLR(optimizer, start_factor=0.5, total_iters=5),
    "ExponentialLR": lambda optimizer: ExponentialLR(optimizer, gamma=0.8),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, T_max=5, eta_min=1e-4),
    "MultiplicativeLR": lambda optimizer: MultiplicativeLR(optimizer, lambdas),
}


@pytest.mark.quick
@pytest.mark.parametrize(
    "recipe",
    [
        unscheduled(),
        replace(unscheduled(), optimizer=adamw),
        replace(unscheduled(), **LR_SCHEDULERS["epoch"]),
        replace(unscheduled(), **LR_SCHEDULERS["step"], frequency=3),
        replace(unscheduled(), **LR_SCHEDULERS["step"], accumulate=3),
        replace(unscheduled(), scheduler=ALL_LR_SCHEDULERS["ReduceLROnPlateau"], scores=(1.0, 2.0, 3.0)),
        replace(
            unscheduled(),
            network=normalised,
            optimizer=slow_sgd,
            phases=(PhaseSpec(tuple(f"network.{name}" for name, _ in normalised().named_parameters())),),
        ),
        replace(
            unscheduled(),
            network=Tied,
            phases=(PhaseSpec(tuple(f"network.{name}" for name, _ in Tied().named_parameters())),),
        ),
    ],
    ids=["sgd", "adamw", "epoch", "step-frequency", "accumulate", "plateau", "dropout", "tied"],
)
def test_the_reference_loop_is_plain_lightning_training(recipe: Recipe, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        callbacks=[recorder],
        max_epochs=recipe.epochs,
        accumulate_grad_batches=recipe.accumulate,
        enable_checkpointing=False,
    )
    trainer.fit(Toy(recipe))
    assert_same_run(recorder.history, train(recipe))


@pytest.mark.parametrize("restore_best", [True, False], ids=["restore", "no-restore"])
@pytest.mark.parametrize("lr_scheduler", LR_SCHEDULERS.values(), ids=LR_SCHEDULERS.keys())
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("recipe", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedule(
    recipe: Recipe,
    optimizer: Callable[..., Optimizer],
    lr_scheduler: dict[str, Any],
    restore_best: bool,
    tmp_path: Path,
) -> None:
    recipe = replace(recipe, optimizer=optimizer, restore_best=restore_best, **lr_scheduler)
    assert_same_run(Session(recipe, tmp_path).fit().history, train(recipe))


@pytest.mark.parametrize(
    ("recipe", "phases"),
    [
        (EPOCH_LIMITS, [0, 0, 1, 2, 2, 2, 3, 3]),
        (EARLY_STOPPING, [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]),
        (STEP_LIMITS, [0, 2, 2, 2, 3, 3]),
        (MIXED, [1, 1, 1, 2, 3, 3, 3, 3]),
    ],
    ids=["epoch-limits", "early-stopping", "step-limits", "mixed"],
)
def test_the_reference_schedules_do_what_their_names_say(recipe: Recipe, phases: list[int]) -> None:
    assert [epoch.phase for epoch in train(recipe).epochs] == phases


@pytest.mark.parametrize("restore_best", [True, False], ids=["restore", "no-restore"])
@pytest.mark.parametrize("scheduler", ALL_LR_SCHEDULERS.values(), ids=ALL_LR_SCHEDULERS.keys())
@pytest.mark.parametrize("recipe", [EARLY_STOPPING, MIXED], ids=["early-stopping", "mixed"])
def test_lr_scheduler(
    recipe: Recipe, scheduler: Callable[[Optimizer], LRScheduler], restore_best: bool, tmp_path: Path
) -> None:
    recipe = replace(recipe, scheduler=scheduler, restore_best=restore_best)
    assert_same_run(Session(recipe, tmp_path).fit().history, train(recipe))


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", [name for name in ALL_LR_SCHEDULERS if name != "ReduceLROnPlateau"])
def test_lr_scheduler_with_frequency_two(name: str, interval: str, tmp_path: Path) -> None:
    recipe = replace(STEP_LIMITS, scheduler=ALL_LR_SCHEDULERS[name], interval=interval, frequency=2)
    assert_same_run(Session(recipe, tmp_path).fit().history, train(recipe))


@pytest.mark.parametrize("name", ["LambdaLR", "MultiplicativeLR"])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_new_groups_take_the_last_lambda(name: str, interval: str, tmp_path: Path) -> None:
    recipe = replace(STEP_LIMITS, scheduler=ALL_LR_SCHEDULERS[name], interval=interval, apply_lambdas=True)
    assert_same_run(Session(recipe, tmp_path).fit().history, train(recipe))


@pytest.mark.parametrize(
    ("name", "lists"),
    [(name, ["base_lrs", "_last_lr"]) for name in ALL_LR_SCHEDULERS if name != "ReduceLROnPlateau"]
    + [
        ("ReduceLROnPlateau", ["min_lrs", "_last_lr"]),
        ("LambdaLR", ["lr_lambdas"]),
        ("MultiplicativeLR", ["lr_lambdas"]),
    ],
)
def test_lists_kept_for_each_group_grow_with_the_groups(name: str, lists: list[str], tmp_path: Path) -> None:
    session = Session(replace(EPOCH_LIMITS, scheduler=ALL_LR_SCHEDULERS[name]), tmp_path).fit()
    scheduler = session.trainer.lr_scheduler_configs[0].scheduler
    assert {len(getattr(scheduler, attribute)) for attribute in lists} == {4}


def test_an_initial_lr_is_the_learning_rate_a_group_started_with(tmp_path: Path) -> None:
    session = Session(replace(EPOCH_LIMITS, **LR_SCHEDULERS["epoch"]), tmp_path).fit()
    (optimizer,) = session.trainer.optimizers
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.05, 1e-5, 0.01]


@pytest.mark.parametrize("base_max_lr", [1e-5, 0.003, None])
@pytest.mark.parametrize("lr_scheduler", LR_SCHEDULERS.values(), ids=LR_SCHEDULERS.keys())
def test_phases_that_name_no_learning_rate(
    base_max_lr: float | None, lr_scheduler: dict[str, Any], tmp_path: Path
) -> None:
    recipe = replace(EPOCH_LIMITS, base_max_lr=base_max_lr, **lr_scheduler)
    assert_same_run(Session(recipe, tmp_path).fit().history, train(recipe))


@pytest.mark.quick
def test_implicit_mode_thaws_pairs_from_the_last_layer_to_the_first(tmp_path: Path) -> None:
    phases = tuple(PhaseSpec(names) for names in (HEAD, THIRD, SECOND, FIRST))
    recipe = replace(EARLY_STOPPING, phases=phases)
    assert_same_run(Session(recipe, tmp_path, explicit=False).fit().history, train(recipe))


@pytest.mark.quick
@pytest.mark.parametrize("max_depth", [0, 1, 2, 3])
def test_max_depth_makes_that_phase_the_final_one(max_depth: int, tmp_path: Path) -> None:
    session = Session(EARLY_STOPPING, tmp_path, scheduler_options={"max_depth": max_depth}).fit()
    expected = train(replace(EARLY_STOPPING, phases=EARLY_STOPPING.phases[: max_depth + 1]))
    assert_same_run(session.history, expected)


def test_no_decay_parameters_get_a_group_of_their_own(tmp_path: Path) -> None:
    recipe = replace(EARLY_STOPPING, no_decay=("bias",), optimizer=adamw, **LR_SCHEDULERS["epoch"])
    session = Session(recipe, tmp_path).fit()
    assert_same_run(session.history, train(recipe))
    (optimizer,) = session.trainer.optimizers
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0] * 4


@pytest.mark.parametrize("lr_scheduler", LR_SCHEDULERS.values(), ids=LR_SCHEDULERS.keys())
@pytest.mark.parametrize("recipe", [EARLY_STOPPING, STEP_LIMITS], ids=["early-stopping", "step-limits"])
def test_an_optimizer_over_all_parameters_is_rebuilt_over_those_of_phase_0(
    recipe: Recipe, lr_scheduler: dict[str, Any], tmp_path: Path
) -> None:
    recipe = replace(recipe, **lr_scheduler)
    assert_same_run(Session(recipe, tmp_path, module=ToyOverAll).fit().history, train(recipe))


class ToyInGroups(Toy):
    """Every layer has a group of its own, with hyper-parameters of its own; phase 0 holds two of the layers."""

    def optimizer_parameters(self) -> Any:
        layers = {"first": (0.3, 0.0), "second": (0.2, 0.1), "third": (0.04, 0.2), "head": (0.02, 0.0)}
        return [
            {"params": list(getattr(self.network, name).parameters()), "lr": lr, "momentum": 0.5, "weight_decay": decay}
            for name, (lr, decay) in layers.items()
        ]


def test_groups_of_the_users_optimizer_keep_their_hyper_parameters(tmp_path: Path) -> None:
    phases = (PhaseSpec((*HEAD, *THIRD), max_epoch=1), PhaseSpec(SECOND, lr=0.01))
    recipe = simple_recipe(phases=phases, epochs=2)
    session = Session(recipe, tmp_path, module=ToyInGroups).fit()
    (optimizer,) = session.trainer.optimizers
    groups = session.history.epochs[-1].groups
    options = {
        names: (group["lr"], group["momentum"], group["weight_decay"])
        for names, group in zip(groups, optimizer.param_groups, strict=True)
        if names
    }
    assert options.pop(SECOND)[0] == 0.01  # the specification names only the learning rate of a later phase's group
    assert options == {THIRD: (0.04, 0.5, 0.2), HEAD: (0.02, 0.5, 0.0)}


class ToyKeepingObjects(ToyOverAll):
    """Remembers what configure_optimizers returned."""

    def configure_optimizers(self) -> Any:
        self.returned = super().configure_optimizers()
        return self.returned


def test_the_users_optimizer_and_lr_scheduler_objects_stay_in_use(tmp_path: Path) -> None:
    recipe = replace(EPOCH_LIMITS, **LR_SCHEDULERS["epoch"])
    session = Session(recipe, tmp_path, module=ToyKeepingObjects).fit()
    module = session.module
    assert isinstance(module, ToyKeepingObjects)
    assert session.trainer.optimizers[0] is module.returned["optimizer"]
    scheduler = session.trainer.lr_scheduler_configs[0].scheduler
    assert scheduler is module.returned["lr_scheduler"]["scheduler"]
    assert scheduler.optimizer is session.trainer.optimizers[0]


def test_without_enforcement_the_optimizer_is_left_alone(messages: Callable[[], list[str]], tmp_path: Path) -> None:
    recipe = simple_recipe(epochs=3)
    session = Session(recipe, tmp_path, module=ToyOverAll, scheduler_options={"enforce_phase0_params": False})
    session.fit()
    assert any("network.third.weight" in message for message in messages())
    first, *_, last = session.history.epochs
    assert first.groups == (tuple(sorted((*HEAD, *THIRD, *SECOND, *FIRST))),)
    held = [name for group in last.groups for name in group]
    assert sorted(held) == sorted(set(held)), "a parameter that some group holds is never added again"


@pytest.mark.parametrize("accumulate", [2, 3])
@pytest.mark.parametrize("recipe", [EARLY_STOPPING, STEP_LIMITS], ids=["early-stopping", "step-limits"])
def test_gradient_accumulation(recipe: Recipe, accumulate: int, tmp_path: Path) -> None:
    recipe = replace(recipe, accumulate=accumulate, **LR_SCHEDULERS["step"])
    assert_same_run(Session(recipe, tmp_path).fit().history, train(recipe))


@pytest.mark.quick
@pytest.mark.parametrize("restore_best", [True, False], ids=["restore", "no-restore"])
def test_batch_norm_statistics_and_dropout(restore_best: bool, tmp_path: Path) -> None:
    phases = (PhaseSpec(HEAD), PhaseSpec(pair("second"), lr=0.02), PhaseSpec((*pair("norm"), *FIRST), lr=0.01))
    recipe = replace(EARLY_STOPPING, phases=phases, network=normalised, optimizer=slow_sgd, restore_best=restore_best)
    assert_same_run(Session(recipe, tmp_path).fit().history, train(recipe))


def test_tied_weights(tmp_path: Path) -> None:
    phases = (
        PhaseSpec(("network.out.bias",), max_epoch=2),
        PhaseSpec(pair("middle"), lr=0.02, max_epoch=4),
        PhaseSpec(pair("embed"), lr=0.01),
    )
    recipe = simple_recipe(phases=phases, network=Tied)
    assert_same_run(Session(recipe, tmp_path).fit().history, train(recipe))


def test_epoch_transitions_only_needs_no_early_stopping(tmp_path: Path) -> None:
    session = Session(
        replace(EPOCH_LIMITS, patience=1), tmp_path, scheduler_options={"epoch_transitions_only": True}
    ).fit()
    assert_same_epochs(session.history.epochs, train(replace(EPOCH_LIMITS, patience=None)).epochs)


def test_restoring_the_best_undoes_the_epochs_after_it(tmp_path: Path) -> None:
    """A check of the test's own teeth: with and without restoring, the runs differ."""
    restored = train(EARLY_STOPPING).epochs[-1].weights
    continued = train(replace(EARLY_STOPPING, restore_best=False)).epochs[-1].weights
    assert any(not torch.equal(restored[name], continued[name]) for name in restored)
