"""A plain loop driven by `PhaseRunner` computes, bit for bit, what the reference loop computes.

Here the reference loop asks when a plain loop does: after each step and each epoch.
"""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler

from finetuning_scheduler.core import PhaseRunner, Reason, Schedule
from finetuning_scheduler.errors import CheckpointError, ScheduleError
from tests.reference.loop import Clock, ReferenceLoop
from tests.reference.networks import BATCHES_PER_EPOCH, HEAD, Wrapped, batch_normalised, build_network, pair
from tests.reference.plain import Outcome, PlainSession, assert_same_outcome, batches_of, describe, train_batch
from tests.reference.recipe import PhaseSpec, Recipe, momentum_sgd

GAMMA = 0.5
LATER_LR = 0.02

OPTIMIZERS: dict[str, Callable[[Iterable[Any]], Optimizer]] = {
    "SGD": momentum_sgd,
    "AdamW": lambda parameters: AdamW(parameters, lr=0.1, weight_decay=0.1),
}

UPPER = pair("upper")
LOWER = (*pair("norm"), *pair("lower"))


def step_lr(optimizer: Optimizer) -> LRScheduler:
    return schedulers.StepLR(optimizer, 3, gamma=GAMMA)


def run(limits: list[dict[str, Any]], scores: tuple[float, ...], **changes: Any) -> Recipe:
    """A phase with these limits for each of HEAD, UPPER and LOWER, and the metric after each epoch."""
    phases = tuple(PhaseSpec(names, **each) for names, each in zip((HEAD, UPPER, LOWER), limits, strict=False))
    recipe = Recipe(
        phases=phases,
        epochs=len(scores),
        optimizer=momentum_sgd,
        network=batch_normalised,
        scores=scores,
        base_max_lr=LATER_LR,
    )
    return replace(recipe, **changes)


def make_model() -> Wrapped:
    return Wrapped(build_network(batch_normalised))


class DescribedLoop(ReferenceLoop):
    """Describes itself after each epoch as the session does."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, Clock.PLAIN)
        self.lines: list[str] = []

    def record(self, epoch: int) -> None:
        self.lines.append(describe(self.phase, self.model, self.optimizer))

    def execute(self) -> Outcome:
        self.run()
        return Outcome.of(self.model, self.optimizer, self.lines)


FALLING = (9.0, 8.0, 7.0, 6.0, 5.0, 4.0)
BEST_FIRST = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
BEST_AMID = (5.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0)

RUNS = {
    "epoch limits": run([{"max_epoch": 2}, {"max_epoch": 3}, {}], FALLING),
    "epoch limits, best in phase 0": run([{"max_epoch": 2}, {"max_epoch": 4}, {}], BEST_FIRST),
    "epoch limits, nothing restored": run([{"max_epoch": 2}, {"max_epoch": 4}, {}], BEST_FIRST, restore_best=False),
    "epoch limits in the past last one epoch": run([{"max_epoch": 3}, {"max_epoch": 1}, {"max_epoch": 2}], FALLING),
    "step limits inside epochs": run([{"max_step": 6}, {"max_step": 11}, {}], BEST_FIRST),
    "step limits before the first metric": run([{"max_step": 1}, {"max_step": 2}, {"max_step": 10}], FALLING),
    "step limits in the past last one step": run([{"max_step": 6}, {"max_step": 2}, {}], BEST_FIRST[:3]),
    "patience": run([{}, {}, {}], BEST_AMID, patience=2),
    "patience, nothing restored": run([{}, {}, {}], BEST_AMID, patience=1, restore_best=False),
    "patience upwards by a least gain": run(
        [{}, {}, {}], (1.0, 3.0, 3.5, 3.25, 5.0, 5.0, 4.0), patience=2, mode="max", min_delta=0.75
    ),
    "whichever comes first": run(
        [{"max_epoch": 5, "max_step": 6}, {"max_epoch": 9}, {"max_step": 26}], BEST_AMID, patience=2
    ),
    "learning rate of each phase": run([{"max_epoch": 1}, {"max_epoch": 3, "lr": 0.05}, {"lr": 0.003}], BEST_AMID),
    "no decay": run([{"max_epoch": 1}, {"max_epoch": 3}, {}], BEST_AMID, no_decay=("bias", "norm")),
    "max depth": run([{"max_epoch": 1}, {"max_epoch": 4}, {}], BEST_AMID, max_depth=1),
    "max depth of phase 0": run([{"max_epoch": 2}, {}, {}], FALLING, max_depth=0),
    "max depth beyond the schedule": run([{"max_epoch": 1}, {"max_epoch": 2}], FALLING, max_depth=7),
}
OVER_OPTIMIZERS = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@OVER_OPTIMIZERS
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "StepLR"])
@pytest.mark.parametrize("case", RUNS)
def test_trains_like_the_reference_loop(case: str, optimizer: str, scheduled: bool) -> None:
    recipe = replace(RUNS[case], optimizer=OPTIMIZERS[optimizer], scheduler=step_lr if scheduled else None)
    session, reference = PlainSession(recipe), DescribedLoop(recipe)
    assert_same_outcome(session.execute(), reference.execute())
    assert session.runner.finished == reference.finished
    assert session.runner.phase == reference.phase
    assert session.runner.phases_remaining == len(recipe.executed) - 1 - reference.phase


@OVER_OPTIMIZERS
@pytest.mark.parametrize("case", RUNS)
def test_a_run_resumed_after_any_epoch_ends_like_the_uninterrupted_one(case: str, optimizer: str) -> None:
    recipe = replace(RUNS[case], optimizer=OPTIMIZERS[optimizer], scheduler=step_lr)
    uninterrupted = PlainSession(recipe)
    expected = uninterrupted.execute()
    for done, checkpoint in enumerate(uninterrupted.checkpoints[:-1], start=1):
        resumed = PlainSession(recipe, seed=done)
        resumed.load(checkpoint)
        assert_same_outcome(resumed.execute(recipe.scores[done:]), replace(expected, lines=expected.lines[done:]))
        assert resumed.runner.finished == uninterrupted.runner.finished


SCHEDULER_OPTIONS: dict[type[LRScheduler], dict[str, Any]] = {
    schedulers.StepLR: {"step_size": 2},
    schedulers.MultiStepLR: {"milestones": [1, 4]},
    schedulers.CosineAnnealingWarmRestarts: {"T_0": 3},
    schedulers.ReduceLROnPlateau: {"patience": 0},
    schedulers.LambdaLR: {"lr_lambda": lambda epoch: 1 / (1 + epoch)},
    schedulers.ConstantLR: {},
    schedulers.LinearLR: {},
    schedulers.ExponentialLR: {"gamma": 0.5},
    schedulers.CosineAnnealingLR: {"T_max": 5},
    schedulers.MultiplicativeLR: {"lr_lambda": lambda _: 0.5},
}


@pytest.mark.parametrize("apply_lambdas", [False, True], ids=["", "apply lambdas"])
@pytest.mark.parametrize("kind", SCHEDULER_OPTIONS, ids=lambda kind: kind.__name__)
def test_every_scheduler_resumes_bitwise(kind: type[LRScheduler], apply_lambdas: bool) -> None:
    recipe = replace(
        RUNS["epoch limits, best in phase 0"],
        scheduler=lambda optimizer: kind(optimizer, **SCHEDULER_OPTIONS[kind]),
        apply_lambdas=apply_lambdas,
    )
    uninterrupted = PlainSession(recipe)
    expected = uninterrupted.execute()
    for done in (1, 3, 5):
        resumed = PlainSession(recipe, seed=done)
        resumed.load(uninterrupted.checkpoints[done - 1])
        assert_same_outcome(resumed.execute(recipe.scores[done:]), replace(expected, lines=expected.lines[done:]))


def test_a_finished_run_is_still_finished_when_it_is_loaded() -> None:
    session = PlainSession(RUNS["max depth of phase 0"])
    session.execute()
    assert session.runner.finished
    loaded = PlainSession(session.recipe)
    loaded.load(session.checkpoints[-1])
    assert loaded.runner.finished


ENDING = {
    "epoch limits": run([{"max_epoch": 2}, {"max_epoch": 4}, {}], BEST_FIRST),
    "epoch limits, nothing restored": run([{"max_epoch": 2}, {"max_epoch": 4}, {}], BEST_FIRST, restore_best=False),
    "step limits at the end of epochs": run([{"max_step": 8}, {"max_step": 16}, {}], BEST_AMID),
    "patience": run([{}, {}, {}], BEST_AMID, patience=2),
    "patience, nothing restored": run([{}, {}, {}], BEST_AMID, patience=1, restore_best=False),
    "no decay": run([{"max_epoch": 1}, {"max_epoch": 3}, {}], BEST_AMID, no_decay=("bias", "norm")),
}


@OVER_OPTIMIZERS
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "StepLR"])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("case", ENDING)
def test_a_finished_run_goes_on_with_a_greater_max_depth(
    case: str, depth: int, scheduled: bool, optimizer: str
) -> None:
    """As if the phases had been there from the start."""
    recipe = replace(ENDING[case], optimizer=OPTIMIZERS[optimizer], scheduler=step_lr if scheduled else None)
    ended, whole = PlainSession(replace(recipe, max_depth=depth)), PlainSession(recipe)
    done, expected = ended.execute(), whole.execute()
    assert ended.runner.finished
    assert ended.runner.phase == depth
    checkpoint = ended.save()  # a step limit ends the session before the last epoch does
    resumed = PlainSession(recipe, seed=9)
    resumed.load(checkpoint)
    epochs = len(done.lines)
    if "step" in case:
        resumed.runner.epoch_end(recipe.scores[epochs])
        if resumed.scheduler is not None:
            resumed.scheduler.step()
        epochs += 1
    outcome = resumed.execute(recipe.scores[epochs:])
    assert_same_outcome(outcome, replace(expected, lines=expected.lines[epochs:]))
    assert resumed.runner.phase == 2
    assert resumed.runner.finished == whole.runner.finished


def test_asking_a_loaded_run_before_the_optimizer_is_loaded_is_not_too_early() -> None:
    ended = PlainSession(RUNS["max depth of phase 0"])
    ended.execute()
    states = torch.load(io.BytesIO(ended.checkpoints[-1]), weights_only=True)
    loaded = PlainSession(replace(ended.recipe, max_depth=-1))
    loaded.runner.load_state_dict(states["runner"])
    assert not loaded.runner.finished
    assert loaded.runner.phase == 0
    loaded.optimizer.load_state_dict(states["optimizer"])
    assert not loaded.runner.finished
    assert loaded.runner.phase == 1


def test_phase_by_phase_with_a_greater_max_depth_each_time() -> None:
    recipe = ENDING["patience"]
    expected = PlainSession(recipe).execute()
    session = PlainSession(replace(recipe, max_depth=0))
    lines = session.execute().lines
    for depth in (1, 2):
        checkpoint, session = session.save(), PlainSession(replace(recipe, max_depth=depth), seed=depth)
        session.load(checkpoint)
        outcome = session.execute(recipe.scores[len(lines) :])
        lines += outcome.lines
    assert_same_outcome(replace(outcome, lines=lines[-1:]), replace(expected, lines=expected.lines[-1:]))


def test_a_state_saved_before_a_finished_run_has_gone_on_is_still_finished() -> None:
    ended = PlainSession(RUNS["max depth of phase 0"])
    ended.execute()
    loaded = PlainSession(replace(ended.recipe, max_depth=-1))
    loaded.load(ended.checkpoints[-1])
    again = PlainSession(ended.recipe)
    again.load(loaded.save())
    assert again.runner.finished
    assert loaded.runner.phase == 0
    assert not loaded.runner.finished
    assert (loaded.runner.phase, loaded.runner.progress.entry_epoch, loaded.runner.progress.entry_step) == (1, 2, 8)


def test_a_step_made_before_a_finished_run_has_gone_on_is_told() -> None:
    messages: list[tuple[int, str]] = []
    ended = PlainSession(RUNS["max depth of phase 0"])
    ended.execute()
    loaded = PlainSession(
        replace(ended.recipe, max_depth=-1), report=lambda level, text: messages.append((level, text))
    )
    loaded.load(ended.checkpoints[-1])
    train_batch(loaded.model, loaded.optimizer, loaded.recipe, batches_of(loaded.recipe)[0])
    transition = loaded.runner.step()
    assert transition is not None
    assert (transition.left, transition.entered, transition.reason, transition.step) == (0, 1, Reason.EPOCH, 8)
    assert (logging.WARNING, "Phase 0, which had ended, has made a step too many: ask `finished` before.") in messages
    weights = ended.model.state_dict()  # the best state is restored, so that the step has left no trace
    assert all(torch.equal(value, weights[name]) for name, value in loaded.model.state_dict().items())


def test_what_a_metric_that_is_not_finite_has_ended_stays_ended() -> None:
    """Whatever limit was reached at the same time."""
    session = PlainSession(run([{"max_epoch": 1}, {}], FALLING, patience=1, max_depth=0))
    session.execute([math.nan])
    loaded = PlainSession(replace(session.recipe, max_depth=-1))
    loaded.load(session.checkpoints[-1])
    assert loaded.runner.finished
    assert loaded.runner.phase == 0


def test_a_loaded_state_is_not_changed_by_training_on() -> None:
    recipe = RUNS["epoch limits, best in phase 0"]
    session = PlainSession(recipe)
    session.execute(recipe.scores[:1])
    state = torch.load(io.BytesIO(session.checkpoints[0]), weights_only=True)["runner"]
    untouched = copy.deepcopy(state)
    resumed = PlainSession(recipe)
    resumed.runner.load_state_dict(state)
    resumed.execute(recipe.scores[1:])
    assert str(state) == str(untouched)


# --- what a transition does ------------------------------------------------------------------------------------------


def test_later_phases_are_undone_by_restoring_an_earlier_best_and_learning_rates_are_not() -> None:
    limits = [{"max_epoch": 1}, {"max_epoch": 3}, {}]
    recipe = run(limits, BEST_FIRST, optimizer=OPTIMIZERS["AdamW"], scheduler=step_lr)
    session = PlainSession(recipe)
    pretrained = make_model().state_dict()
    session.execute(recipe.scores[:2])
    upper = session.model.get_parameter("network.upper.weight")
    assert not torch.equal(upper, pretrained["network.upper.weight"])
    session.execute(recipe.scores[2:3])
    assert session.runner.phase == 2
    assert torch.equal(upper, pretrained["network.upper.weight"])
    assert upper not in session.optimizer.state
    assert session.runner.progress.best_phase == 0
    assert [group["lr"] for group in session.optimizer.param_groups] == [0.1 * GAMMA, LATER_LR * GAMMA, LATER_LR]


def test_transitions_tell_what_happened() -> None:
    messages: list[tuple[int, str]] = []
    recipe = run([{"max_step": 5}, {"max_epoch": 3}, {}], BEST_AMID, patience=3)
    session = PlainSession(recipe, report=lambda level, text: messages.append((level, text)))
    session.execute()
    assert [(t.left, t.entered, t.reason) for t in session.transitions] == [
        (0, 1, Reason.STEP),
        (1, 2, Reason.EPOCH),
    ]
    lines = [
        "Phase 0 -> 1 (max_transition_step) at epoch 1, step 5: 25 parameters trainable (47.17%), "
        "learning rates [0.1, 0.02]",
        "Phase 1 -> 2 (max_transition_epoch) at epoch 3, step 12: 53 parameters trainable (100.00%), "
        "learning rates [0.1, 0.02, 0.02]",
    ]
    assert messages == [(logging.INFO, line) for line in lines]
    assert [str(transition) for transition in session.transitions] == lines


def test_on_thawed_is_called_at_the_start_and_at_each_transition() -> None:
    calls: list[int] = []
    session = PlainSession(RUNS["epoch limits"], on_thawed=lambda: calls.append(1))
    assert len(calls) == 1
    session.execute()
    assert len(calls) == 1 + len(session.transitions) == 3


@pytest.mark.parametrize("metric", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_ends_the_session(metric: float) -> None:
    session = PlainSession(run([{"max_epoch": 1}, {}], FALLING, patience=1))
    assert session.runner.epoch_end(metric) is None
    assert session.runner.finished
    assert session.runner.phase == 0


def test_a_mode_that_is_neither_min_nor_max_is_refused_before_anything_is_changed() -> None:
    model = make_model()
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    optimizer = momentum_sgd(model.parameters())
    mode: Any = "maximum"
    with pytest.raises(ScheduleError, match="expected `mode` to be 'min' or 'max', got 'maximum'"):
        PhaseRunner(model, optimizer, mode=mode)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


def test_without_a_metric_epoch_limits_still_count() -> None:
    session = PlainSession(RUNS["epoch limits"])
    entered = [session.runner.epoch_end() for _ in range(3)]
    assert [transition is not None for transition in entered] == [False, True, True]


def test_a_phase_trains_before_it_ends() -> None:
    session = PlainSession(run([{"max_step": BATCHES_PER_EPOCH}, {"max_epoch": 1}, {}], FALLING))
    session.execute(FALLING[:1])
    assert session.runner.phase == 1


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_modules_follow_the_asked_mode_until_they_are_thawed_or_released(mode: str) -> None:
    session = PlainSession(RUNS["epoch limits"], frozen_modules_mode=mode)
    session.runner.apply_module_modes()
    assert session.model.get_submodule("network.norm").training is (mode == "train")
    session.runner.thaw_to(2)
    assert session.model.get_submodule("network.norm").training

    session = PlainSession(RUNS["epoch limits"], frozen_modules_mode=mode)
    session.runner.release_module_modes()
    assert all(module.training for module in session.model.modules())


def test_frozen_statistics_stand_still_when_asked_and_move_again_with_their_phase() -> None:
    recipe = RUNS["epoch limits, nothing restored"]
    session = PlainSession(recipe, frozen_bn_track_running_stats=False)
    batches_tracked = session.model.get_buffer("network.norm.num_batches_tracked")
    session.execute(recipe.scores[:4])
    assert batches_tracked == 0
    session.execute(recipe.scores[4:5])
    assert batches_tracked == BATCHES_PER_EPOCH


# --- phase 0 and the user's optimizer --------------------------------------------------------------------------------


RECIPE = RUNS["epoch limits"]
HELD = {
    "all parameters": [*LOWER, *UPPER, *HEAD],
    "phase 0's own": HEAD,
    "some of phase 0's and others": [HEAD[1], *LOWER],
    "none of phase 0's": LOWER,
}
SCHEDULES = {
    "no scheduler": None,
    "StepLR": step_lr,
    "LinearLR": lambda optimizer: schedulers.LinearLR(optimizer, start_factor=0.25, total_iters=3),
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: (1 + epoch) / 4),
}


def rates_over_three_epochs(held: list[str], make_scheduler: Callable[[Optimizer], LRScheduler] | None) -> list[set]:
    """The learning rate of phase 0's parameters in each epoch."""
    model = make_model()
    optimizer = SGD([model.get_parameter(name) for name in held], lr=0.5, momentum=0.9)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    runner = PhaseRunner(
        model, optimizer, {0: {"params": HEAD}}, lr_schedulers=[] if scheduler is None else [scheduler]
    )
    rates = []
    for _ in range(3):
        rates.append({group["lr"] for group in optimizer.param_groups})
        train_batch(model, optimizer, RECIPE, batches_of(RECIPE)[0])
        runner.step()
        if scheduler is not None:
            scheduler.step()
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.network.head.parameters())
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("held", HELD)
def test_an_optimizer_over_other_parameters_is_rebuilt_for_phase_0(held: str, schedule: str) -> None:
    expected = rates_over_three_epochs(HEAD, SCHEDULES[schedule])
    assert rates_over_three_epochs(HELD[held], SCHEDULES[schedule]) == expected


@pytest.mark.parametrize("held", HELD)
def test_a_rebuilt_optimizer_keeps_parameter_names_and_a_tensor_lr(held: str) -> None:
    model = make_model()
    optimizer = AdamW([(name, model.get_parameter(name)) for name in HELD[held]], lr=torch.tensor(0.5))
    PhaseRunner(model, optimizer, {0: {"params": HEAD}, 1: {"params": UPPER}}).thaw_to(1)
    names = [name for group in optimizer.param_groups for name in group.get("param_names", [])]
    assert sorted(names) == sorted([*HEAD, *UPPER])
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)


@pytest.mark.parametrize("held", HELD)
def test_a_rebuilt_optimizer_keeps_the_hyper_parameters_of_its_groups(held: str) -> None:
    model = make_model()
    group = {"params": [model.get_parameter(name) for name in HELD[held]], "momentum": 0.5, "weight_decay": 0.25}
    optimizer = SGD([group], lr=0.5)
    PhaseRunner(model, optimizer, {0: {"params": HEAD}})
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.25}


def test_unless_enforced_the_optimizer_is_left_alone_and_its_differences_are_told() -> None:
    model = make_model()
    optimizer = SGD([model.get_parameter(name) for name in [HEAD[1], *UPPER]], lr=0.5)
    told: list[tuple[int, str]] = []
    runner = PhaseRunner(
        model,
        optimizer,
        {0: {"params": HEAD}, 1: {"params": [*UPPER, *LOWER]}},
        enforce_phase0_params=False,
        report=lambda level, text: told.append((level, text)),
    )
    message = (
        "The optimizer does not hold exactly phase 0's parameters: missing ['network.head.bias'], "
        "also held ['network.upper.bias', 'network.upper.weight']."
    )
    assert told == [(logging.WARNING, message)]
    assert len(optimizer.param_groups[0]["params"]) == 3
    runner.thaw_to(1)
    added = set(optimizer.param_groups[1]["params"])
    assert added == {model.get_parameter(name) for name in LOWER}


@pytest.mark.parametrize(
    ("base_max_lr", "lr", "expected"),
    [
        pytest.param(1e-5, None, 1e-5, id="the default"),
        pytest.param(None, None, 0.5, id="none: the optimizer's initial lr"),
        pytest.param(1e-5, 0.125, 0.125, id="the phase's own"),
    ],
)
def test_a_phases_group_starts_at(base_max_lr: float | None, lr: float | None, expected: float) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    phases = {0: {"params": HEAD}, 1: {"params": UPPER} | ({} if lr is None else {"lr": lr})}
    runner = PhaseRunner(model, optimizer, phases, lr_schedulers=[scheduler], base_max_lr=base_max_lr)
    train_batch(model, optimizer, RECIPE, batches_of(RECIPE)[0])
    scheduler.step()
    runner.thaw_to(1)
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[1]["initial_lr"] == expected


def test_without_a_schedule_the_default_one_is_executed() -> None:
    model = make_model()
    runner = PhaseRunner(model, SGD(model.parameters(), lr=0.5))
    assert runner.phases_remaining == 3
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(HEAD)


def test_a_state_that_was_returned_does_not_grow_with_the_phases() -> None:
    model = make_model()
    runner = PhaseRunner(model, SGD(model.parameters(), lr=0.5), {0: {"params": HEAD}, 1: {"params": UPPER}})
    runner.epoch_end(1.0)
    state = runner.state_dict()
    runner.thaw_to(1)
    assert set(state["loop"]["snapshot"]["weights"]) == set(HEAD)
    assert set(runner.state_dict()["loop"]["snapshot"]["weights"]) == {*HEAD, *UPPER}


def test_parameters_in_no_phase_stay_frozen_which_is_told_once() -> None:
    told: list[str] = []
    model = make_model()
    runner = PhaseRunner(
        model,
        SGD(model.parameters(), lr=0.5),
        Schedule.parse({0: {"params": HEAD}, 1: {"params": UPPER}}),
        report=lambda _, text: told.append(text),
    )
    runner.thaw_to(1)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {*UPPER, *HEAD}
    assert len([text for text in told if "4 parameters are in no phase" in text]) == 1


# --- errors ----------------------------------------------------------------------------------------------------------


FIRST, SECOND = RUNS["epoch limits"], RUNS["no decay"]


@pytest.mark.parametrize(
    ("writer", "phase", "changes", "reader", "message"),
    [
        pytest.param(
            FIRST,
            0,
            {"version": 2},
            FIRST,
            r"expected checkpoint state of format 1 or older, got format 2\. "
            r"Fix: Resume with the newer release that wrote the checkpoint\.",
            id="newer version",
        ),
        pytest.param(
            FIRST,
            2,
            {},
            replace(FIRST, max_depth=1),
            r"expected a checkpoint of a phase up to 1, got one of phase 2\. "
            r"Fix: Resume with a schedule and `max_depth` that reach that phase\.",
            id="phase beyond max_depth",
        ),
        pytest.param(
            SECOND,
            1,
            {},
            FIRST,
            r"expected 4 parameter groups as in the checkpoint, got 2\. "
            r"Fix: Resume with the schedule, model and optimizer groups that wrote the checkpoint\.",
            id="other groups",
        ),
        pytest.param(
            FIRST,
            0,
            {"parameter_groups": [["network.head.weight", "network.lower.bias"]]},
            FIRST,
            r"parameter group 0 differs from the checkpoint's: "
            r"missing \['network\.lower\.bias'\], not expected \['network\.head\.bias'\]\. "
            r"Fix: Resume with the schedule, model and optimizer groups that wrote the checkpoint\.",
            id="other schedule",
        ),
    ],
)
def test_a_state_that_cannot_be_continued_is_refused(
    writer: Recipe, phase: int, changes: dict[str, Any], reader: Recipe, message: str
) -> None:
    written = PlainSession(writer)
    written.runner.thaw_to(phase)
    state = written.runner.state_dict() | changes
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        PlainSession(reader).runner.load_state_dict(state)


@pytest.mark.parametrize("phase", [0, 3, -1])
def test_phases_can_only_be_entered_in_order(phase: int) -> None:
    runner = PlainSession(FIRST).runner
    runner.thaw_to(1)
    message = (
        rf"^expected a phase from 1 \(the present one\) to 2, got {phase}\. Fix: Phases can only be entered in order\.$"
    )
    with pytest.raises(ScheduleError, match=message):
        runner.thaw_to(phase)
    assert runner.phase == 1
