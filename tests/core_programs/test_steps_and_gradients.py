"""Which optimizer steps a loop counts, and which gradients are cleared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from finetuning_scheduler.core import PhaseRunner

from .loops import BATCHES, HEAD, LOWER, OPTIMIZERS, UPPER, Loop, Model, loop_of, momentum_sgd, phases
from .optimizers import Wrapper

# --- steps ------------------------------------------------------------------------------------------------------------

Step = Callable[[Optimizer, Tensor, bool], None]  # optimizer, loss, whether the gradients overflow


class SkippingScaler:
    """Leaves out the steps of gradients that are not finite, as a scaler of gradients does."""

    def __call__(self, optimizer: Optimizer, loss: Tensor, overflows: bool) -> None:
        (loss * float("inf") if overflows else loss).backward()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            optimizer.step()


class TorchScaler:
    """PyTorch's own, on the CPU."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def __call__(self, optimizer: Optimizer, loss: Tensor, overflows: bool) -> None:
        self.scaler.scale(loss * float("inf") if overflows else loss).backward()
        self.scaler.unscale_(optimizer)
        self.scaler.step(optimizer)
        self.scaler.update()


SCALERS: dict[str, Callable[[], Step]] = {"a stand-in": SkippingScaler, "torch.amp.GradScaler": TorchScaler}
scalers = pytest.mark.parametrize("make_scaler", SCALERS.values(), ids=SCALERS.keys())


def run(loop: Loop, step: Step, overflows: Sequence[bool]) -> list[int]:
    """Run batches, of which some overflow; returns the phase after each."""
    entered = []
    for index, overflow in enumerate(overflows):
        loop.runner.optimizer.zero_grad()
        step(loop.runner.optimizer, loop.model.loss(BATCHES[index % len(BATCHES)], 0), overflow)
        loop.note(loop.runner.step())
        entered.append(loop.runner.phase)
    return entered


def by_steps(*limits: int, optimizer_over: Callable[..., Optimizer] = momentum_sgd) -> Loop:
    model = Model()
    return loop_of(model, optimizer_over(model.parameters()), phases(*limits, by="step"))


@pytest.mark.parametrize("optimizer_over", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize(
    ("overflows", "phases_entered"),
    [
        ((False, False, False, False), [0, 1, 1, 2]),
        ((True, True, False, False, False, False), [0, 0, 0, 1, 1, 2]),
        ((False, True, False, True, True, False, False), [0, 0, 1, 1, 1, 1, 2]),
        ((True, True, True, True), [0, 0, 0, 0]),
    ],
    ids=["none skipped", "the first skipped", "some skipped", "all skipped"],
)
@scalers
def test_a_step_that_a_scaler_skips_is_not_counted(
    make_scaler: Callable[[], Step],
    overflows: Sequence[bool],
    phases_entered: list[int],
    optimizer_over: Callable[..., Optimizer],
) -> None:
    loop = by_steps(2, 4, optimizer_over=optimizer_over)
    assert run(loop, make_scaler(), overflows) == phases_entered
    assert [transition.step for transition in loop.transitions] == [2, 4][: len(loop.transitions)]


@scalers
def test_a_step_that_is_skipped_right_after_a_transition_ends_no_phase(make_scaler: Callable[[], Step]) -> None:
    """A phase whose limit is in the past lasts one step, which has to be a real one."""
    loop = by_steps(2, 1)
    assert run(loop, make_scaler(), (False, False, True, True, False)) == [0, 1, 1, 1, 2]


@scalers
def test_steps_of_an_optimizer_that_a_phase_installs_are_counted(make_scaler: Callable[[], Step]) -> None:
    model = Model()
    schedule = phases(2, 4, by="step")
    init = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    schedule[1]["new_optimizer"] = {"optimizer_init": init}
    loop = loop_of(model, momentum_sgd(model.parameters()), schedule)
    step = make_scaler()
    assert run(loop, step, (False, True, False, True, False, False)) == [0, 0, 1, 1, 1, 2]
    assert type(loop.runner.optimizer) is AdamW


def wrapped(parameters: Any) -> Optimizer:
    return Wrapper(momentum_sgd(parameters))


def test_steps_of_a_wrapped_optimizer_are_counted() -> None:
    loop = by_steps(2, 4, optimizer_over=wrapped)
    assert run(loop, SkippingScaler(), (False, False, False, False)) == [0, 1, 1, 2]


def test_steps_that_a_wrapped_optimizer_skips_are_not_counted() -> None:
    loop = by_steps(2, 4, optimizer_over=wrapped)
    assert run(loop, SkippingScaler(), (True, False, True, False, False, False)) == [0, 0, 0, 1, 1, 2]


def test_a_call_for_each_batch_of_an_accumulation_counts_the_steps_made() -> None:
    """Loops that call `step` after each backward pass, step or not."""
    loop = by_steps(2, 4)
    entered = []
    for index in range(8):
        loop.model.loss(BATCHES[index % len(BATCHES)], 0).backward()
        if index % 2:
            loop.runner.optimizer.step()
            loop.runner.optimizer.zero_grad()
        loop.runner.step()
        entered.append(loop.runner.phase)
    assert entered == [0, 0, 0, 1, 1, 1, 1, 2]


@scalers
def test_a_resumed_loop_counts_on(make_scaler: Callable[[], Step]) -> None:
    first, resumed = by_steps(3, 5), by_steps(3, 5)
    run(first, make_scaler(), (False, True, False))
    resumed.runner.load_state_dict(first.runner.state_dict())
    assert run(resumed, make_scaler(), (True, False, False, False)) == [0, 1, 1, 2]


# --- gradients --------------------------------------------------------------------------------------------------------


def with_gradients(model: Model) -> Model:
    """Gradients as a pass of other code has left them."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def frozen_by_the_user(model: Model) -> Model:
    model.requires_grad_(False)
    return model


def frozen_by_the_user_after_a_pass(model: Model) -> Model:
    return frozen_by_the_user(with_gradients(model))


def halfway(model: Model) -> Model:
    with_gradients(model).lower.requires_grad_(False)
    return model


BEGINNINGS = {
    "trainable": with_gradients,
    "frozen by the user": frozen_by_the_user_after_a_pass,
    "partly frozen by the user": halfway,
}


def gradients(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("begin", BEGINNINGS.values(), ids=BEGINNINGS.keys())
def test_gradients_left_on_what_is_frozen_are_cleared_when_a_runner_is_made(begin: Callable[[Model], Model]) -> None:
    model = begin(Model())
    PhaseRunner(model, momentum_sgd(model.parameters()), phases(2, 4))
    assert gradients(model) <= set(HEAD)


def test_gradients_left_on_the_head_that_the_user_froze_are_cleared_when_it_is_thawed() -> None:
    model = frozen_by_the_user_after_a_pass(Model())
    PhaseRunner(model, momentum_sgd(model.parameters()), phases(2, 4))
    assert gradients(model) == set()


@pytest.mark.parametrize("by", ["thaw_to", "step", "epoch_end"])
def test_gradients_that_other_code_leaves_on_what_is_frozen_are_cleared_when_it_is_thawed(by: str) -> None:
    model = Model()
    limits = phases(1, 2) if by == "epoch_end" else phases(len(BATCHES), 20, by="step")
    loop = loop_of(model, momentum_sgd(model.parameters()), limits)
    for index, batch in enumerate(BATCHES):
        loop.model.loss(batch, index).backward()
        loop.runner.optimizer.step()
        loop.runner.optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            if name in (*UPPER, *LOWER):
                parameter.grad = torch.ones_like(parameter)
        if by == "step":
            loop.runner.step()
    if by == "epoch_end":
        loop.runner.epoch_end()
    if by == "thaw_to":
        loop.runner.thaw_to(1)
    assert loop.runner.phase == 1
    assert not gradients(model) & set(UPPER)


@pytest.mark.parametrize("optimizer_over", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_gradient_from_before_moves_nothing_in_the_first_step_of_a_phase(
    optimizer_over: Callable[..., Optimizer],
) -> None:
    model = with_gradients(frozen_by_the_user(Model()))
    loop = loop_of(model, optimizer_over(model.parameters()), phases(2, 4))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loop.runner.thaw_to(1)
    loop.runner.optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set()


def test_gradients_of_what_goes_on_training_are_left_alone() -> None:
    """A phase that begins inside an accumulation must not lose what has been accumulated."""
    model = Model()
    loop = loop_of(model, momentum_sgd(model.parameters()), phases(2, 4))
    model.loss(BATCHES[0], 0).backward()
    kept = {name: model.get_parameter(name).grad.clone() for name in HEAD}  # type: ignore[union-attr]
    loop.runner.thaw_to(1)
    assert gradients(model) == set(HEAD)
    assert all(torch.equal(model.get_parameter(name).grad, kept[name]) for name in HEAD)  # type: ignore[arg-type]
