"""What is found of the parameters that a phase thaws is there as values; when phases are judged, and on which ranks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from finetuning_scheduler.core import PhaseRunner
from finetuning_scheduler.core.gradients import MAX_STEPS, Judgement

T = TypeVar("T")
HEAD, BODY, SPARE = (("head.weight",), ("body.weight",), ("spare.weight",))
BATCHES = 4


class Net(nn.Module):
    """The layer `spare` is used in batches from `spare_from` on."""

    def __init__(self, spare_from: int = 1000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.spare, self.head = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.spare_from = spare_from
        self.batch = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        self.batch += 1
        return self.head(self.spare(hidden) if self.batch > self.spare_from else hidden)


def momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9)


def runner_of(model: nn.Module, schedule: dict[int, Any], optimizer: Optimizer | None = None, **options: Any) -> Any:
    return PhaseRunner(model, optimizer or momentum(model.parameters()), schedule, **options)


def train(runner: PhaseRunner, batches: int = BATCHES, after: Callable[[], None] = lambda: None) -> None:
    for _ in range(batches):
        runner.optimizer.zero_grad()
        runner.model(torch.ones(2, 3)).square().sum().backward()
        runner.optimizer.step()
        after()
        runner.step()


def epochs(runner: PhaseRunner, count: int) -> list[Judgement]:
    for _ in range(count):
        train(runner)
        runner.epoch_end()
    return runner.gradients.judgements


def schedule(first: tuple[str, ...], second: tuple[str, ...], **limit: int) -> dict[int, Any]:
    return {0: {"params": list(first), **limit}, 1: {"params": list(second), "lr": 0.01}}


def test_each_phase_has_one_judgement() -> None:
    found = epochs(runner_of(Net(), schedule((*HEAD, *SPARE), BODY, max_transition_epoch=2)), 4)
    assert found == [
        Judgement(phase=0, steps=BATCHES, trained=HEAD, untrained=SPARE, moved=()),
        Judgement(phase=1, steps=BATCHES, trained=BODY, untrained=(), moved=()),
    ]


def test_a_phase_that_begins_inside_an_epoch_sees_a_whole_one_before_it_is_judged() -> None:
    runner = runner_of(Net(spare_from=5), schedule(HEAD, (*SPARE, *BODY), max_transition_step=3))
    assert epochs(runner, 1)[1:] == []
    assert epochs(runner, 1)[1:] == [Judgement(1, 2 * BATCHES - 3, (*BODY, *SPARE)[::-1], (), ())]


def test_a_phase_that_begins_with_the_last_step_of_an_epoch_is_judged_at_the_end_of_the_next() -> None:
    runner = runner_of(Net(), schedule(HEAD, SPARE, max_transition_step=BATCHES))
    assert [found.phase for found in epochs(runner, 1)] == [0]
    assert [found.phase for found in epochs(runner, 1)] == [0, 1]


def test_what_has_made_no_step_is_judged_with_the_phase_that_follows() -> None:
    runner = runner_of(Net(), schedule((*HEAD, *SPARE), BODY, max_transition_epoch=2))
    runner.thaw_to(1)
    assert epochs(runner, 1) == [Judgement(1, BATCHES, trained=(*HEAD, *BODY), untrained=SPARE, moved=())]


@pytest.mark.parametrize(("spare_from", "untrained"), [(MAX_STEPS - 1, ()), (MAX_STEPS, SPARE)])
def test_an_endless_epoch_is_judged_by_its_first_steps(spare_from: int, untrained: tuple[str, ...]) -> None:
    runner = runner_of(Net(spare_from), {0: {"params": [*HEAD, *SPARE]}})
    train(runner, MAX_STEPS + 20)
    (found,) = runner.gradients.judgements
    assert (found.steps, found.untrained) == (MAX_STEPS, untrained)


def test_a_phase_is_judged_when_the_session_ends() -> None:
    runner = runner_of(Net(), {0: {"params": [*HEAD, *SPARE], "max_transition_step": 2}})
    train(runner, 2)
    assert runner.finished
    assert [found.untrained for found in runner.gradients.judgements] == [SPARE]


@dataclass
class Others:
    """Ranks of which the others have given every parameter a gradient, or none."""

    received: bool

    def any(self, flag: bool) -> bool:
        return flag or not self.received

    def every(self, flag: bool) -> bool:
        return flag and not self.received

    def from_zero(self, function: Callable[[], T]) -> T:
        return function()


@pytest.mark.parametrize(("received", "untrained"), [(True, ()), (False, SPARE)])
def test_a_gradient_on_another_rank_is_enough(received: bool, untrained: tuple[str, ...]) -> None:
    runner = runner_of(Net(), {0: {"params": [*HEAD, *SPARE]}}, ranks=Others(received))
    assert [found.untrained for found in epochs(runner, 1)] == [untrained]


# --- what is frozen ---------------------------------------------------------------------------------------------------


class Decays(SGD):
    """Pulls all it holds towards zero, with or without gradients; not before its third step, as with warm-up."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9 if self.steps > 3 else 1.0)
        return super().step(closure)


def test_a_frozen_parameter_that_the_optimizer_changes_is_found_however_late_it_begins() -> None:
    model = Net()
    options = {"enforce_phase0_params": False}
    found = epochs(runner_of(model, {0: {"params": [*HEAD]}}, Decays(model.parameters(), lr=0.1), **options), 1)
    assert [set(each.moved) for each in found] == [{*BODY, *SPARE}]


def test_a_frozen_parameter_that_the_optimizer_holds_and_others_change_is_not_accused() -> None:
    model = Net()
    runner = runner_of(model, {0: {"params": [*HEAD]}}, enforce_phase0_params=False)
    before = model.spare.weight.detach().clone()

    def mean() -> None:
        model.spare.weight.data.lerp_(model.head.weight.data, 0.5)

    train(runner, after=mean)
    runner.epoch_end()
    assert not torch.equal(model.spare.weight, before)
    assert [each.moved for each in runner.gradients.judgements] == [()]


# --- what goes on as usual meanwhile ----------------------------------------------------------------------------------


def test_a_model_that_is_watched_can_be_copied_and_saved() -> None:
    model = Net()
    runner = runner_of(model, {0: {"params": [*HEAD, *SPARE]}})
    copy.deepcopy(model)(torch.ones(2, 3)).sum().backward()  # the copy's gradients are no gradients of the model
    torch.save(model, io.BytesIO())
    assert [found.trained for found in epochs(runner, 0)] == []
    assert [found.untrained for found in epochs(runner, 1)] == [SPARE]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_judged_too(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.spare = nn.Linear(3, 3)
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    runner = runner_of(
        torch.compile(model, backend=backend),  # type: ignore[arg-type]
        {
            0: {"params": ["1.*"], "max_transition_epoch": 1},
            1: {"params": ["0.*", "spare.*"], "lr": 0.1},
        },
    )
    found = epochs(runner, 2)
    assert [each.untrained for each in found] == [(), ("spare.weight", "spare.bias")]
