"""`PhaseRunner` names what a phase thaws and no gradient reaches, whatever the order of calls in the loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from finetuning_scheduler.core import PhaseRunner

from .hearing import Said, listening, naming, the_only, warnings_in
from .loops import (
    BATCHES,
    BATCHES_PER_EPOCH,
    HEAD,
    LOWER,
    OPTIMIZERS,
    UPPER,
    Model,
    loop_of,
    momentum_sgd,
    phases,
)
from .quantised import QuantisedLinear

SPARE = ("spare.weight", "spare.bias")


class SkippedByForward(Model):
    def build(self) -> None:
        self.spare = nn.Linear(4, 4)


class BehindDetach(SkippedByForward):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        return self.head(hidden + self.spare(hidden).detach())


class Checkpointed(SkippedByForward):
    reentrant = True

    def build(self) -> None:
        super().build()
        self.embedding = nn.Embedding(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embedding((x > 0).long()).mean(dim=1)
        return self.head(self.trunk(x) + checkpoint(self.spare, embedded, use_reentrant=self.reentrant))


class CheckpointedWithoutReentry(Checkpointed):
    reentrant = False


class OverQuantisedWeight(Model):
    def build(self) -> None:
        self.spare = QuantisedLinear(nn.Linear(4, 4), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.spare(self.trunk(x)))


class OneExpertABatch(Model):
    def build(self) -> None:
        self.spare = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def loss(self, batch: Tensor, batch_index: int) -> Tensor:
        routed = self.spare[min(batch_index, 2)](self.trunk(batch))
        return (self.head(routed) - batch.sum(dim=1, keepdim=True)).square().mean()


# --- the loop, with its calls in several orders -----------------------------------------------------------------------

Order = Callable[[Model, PhaseRunner, int], None]


def clears_first(model: Model, runner: PhaseRunner, index: int) -> None:
    runner.optimizer.zero_grad()
    model.loss(BATCHES[index], index).backward()
    runner.optimizer.step()
    runner.step()


def clears_after_its_step(model: Model, runner: PhaseRunner, index: int) -> None:
    model.loss(BATCHES[index], index).backward()
    runner.optimizer.step()
    runner.optimizer.zero_grad()
    runner.step()


def clears_the_model(model: Model, runner: PhaseRunner, index: int) -> None:
    model.loss(BATCHES[index], index).backward()
    runner.optimizer.step()
    model.zero_grad()
    runner.step()


def keeps_zeros(model: Model, runner: PhaseRunner, index: int) -> None:
    model.loss(BATCHES[index], index).backward()
    runner.optimizer.step()
    runner.step()
    runner.optimizer.zero_grad(set_to_none=False)


def accumulates(model: Model, runner: PhaseRunner, index: int) -> None:
    model.loss(BATCHES[index], index).backward()
    if index % 2:
        runner.optimizer.step()
        runner.optimizer.zero_grad()
        runner.step()


def steps_with_a_closure(model: Model, runner: PhaseRunner, index: int) -> None:
    def closure() -> float:
        runner.optimizer.zero_grad()
        loss = model.loss(BATCHES[index], index)
        loss.backward()
        return float(loss.detach())

    runner.optimizer.step(closure)
    runner.optimizer.zero_grad()
    runner.step()


ORDERS: dict[str, Order] = {
    order.__name__.replace("_", " "): order
    for order in (clears_first, clears_after_its_step, clears_the_model, keeps_zeros, accumulates, steps_with_a_closure)
}


def said_by(
    model: Model,
    schedule: Any,
    *,
    epochs: int = 3,
    order: Order = clears_first,
    optimizer_over: Callable[[Iterable[Any]], Optimizer] = momentum_sgd,
    **options: Any,
) -> list[Said]:
    steps = [0]
    with listening(lambda: steps[0]) as said:
        runner = PhaseRunner(model, optimizer_over(model.parameters()), schedule, **options)
        for _ in range(epochs):
            for index in range(BATCHES_PER_EPOCH):
                steps[0] += 1
                order(model, runner, index)
            runner.epoch_end()
    return said


# --- tests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    module: type[Model]
    untrained: tuple[str, ...]
    cause: str


ROWS = {
    "a layer that forward skips": Row(SkippedByForward, SPARE, "forward"),
    "a layer behind detach": Row(BehindDetach, SPARE, "detach"),
    "reentrant checkpointing over a frozen embedding": Row(Checkpointed, SPARE, "reentrant"),
    "a quantised weight that looks like float": Row(OverQuantisedWeight, SPARE[:1], "quanti[sz]ed"),
}
IN_PHASE_0 = phases(1, parameters=((*HEAD, *SPARE), UPPER))
IN_PHASE_1 = phases(1, 2, parameters=(HEAD, SPARE, UPPER))
reentrant = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")


@reentrant
@pytest.mark.parametrize(("schedule", "phase"), [(IN_PHASE_0, 0), (IN_PHASE_1, 1)], ids=["phase 0", "phase 1"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_one_warning_names_what_no_gradient_reached(row: Row, schedule: Any, phase: int) -> None:
    model = row.module()
    warning = the_only(warnings_in(said_by(model, schedule)))
    assert naming([warning], row.untrained, model) == [warning], warning.text
    assert re.search(row.cause, warning.text, re.IGNORECASE), warning.text
    assert phase * BATCHES_PER_EPOCH < warning.step <= (phase + 1) * BATCHES_PER_EPOCH


@pytest.mark.parametrize("optimizer_over", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_the_order_of_calls_does_not_matter(order: Order, optimizer_over: Callable[..., Optimizer]) -> None:
    model = SkippedByForward()
    said = warnings_in(said_by(model, IN_PHASE_1, order=order, optimizer_over=optimizer_over))
    assert naming(said, SPARE, model) == [the_only(said)]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_an_expert_that_the_third_batch_uses_gets_no_warning(order: Order) -> None:
    schedule = phases(1, parameters=((*HEAD, "spare.*"), UPPER))
    assert [each.text for each in warnings_in(said_by(OneExpertABatch(), schedule, order=order))] == []


@pytest.mark.parametrize(
    ("module", "schedule"),
    [
        (CheckpointedWithoutReentry, IN_PHASE_1),
        (Checkpointed, phases(1, parameters=((*HEAD, "embedding.weight"), SPARE))),
        (SkippedByForward, phases(1, parameters=(HEAD, UPPER))),
    ],
    ids=["checkpointing without reentry", "reentrant over a thawed embedding", "the skipped layer stays frozen"],
)
def test_no_warning_where_everything_thawed_is_trained(module: type[Model], schedule: Any) -> None:
    assert [each.text for each in warnings_in(said_by(module(), schedule))] == []


def test_without_an_end_of_epoch_the_warning_comes_within_a_hundred_steps() -> None:
    model = SkippedByForward()
    with listening() as said:
        loop = loop_of(model, SGD(model.parameters(), lr=0.001), phases(parameters=((*HEAD, *SPARE),)))
        for index in range(100):
            loop.batch(BATCHES[index % BATCHES_PER_EPOCH])
    assert len(naming(warnings_in(said), SPARE, model)) == 1


def test_a_phase_that_ends_by_steps_is_judged_before_it_ends() -> None:
    model = SkippedByForward()
    schedule = phases(2, by="step", parameters=((*HEAD, *SPARE), UPPER))
    warning = the_only(naming(warnings_in(said_by(model, schedule, epochs=1)), SPARE, model))
    assert warning.step <= BATCHES_PER_EPOCH


def test_a_runner_with_a_report_of_its_own_gets_the_warning_there() -> None:
    model, heard = SkippedByForward(), []
    said_by(model, IN_PHASE_0, report=lambda level, text: heard.append(Said(level, text, 0)))
    assert len(naming(warnings_in(heard), SPARE, model)) == 1


class DecaysEverything(Optimizer):
    """Pulls all it holds towards zero, with or without gradients."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"])


def decays_by_weight_decay(parameters: Iterable[Any]) -> Optimizer:
    return SGD(parameters, lr=0.1, weight_decay=0.1)


def fills_in_gradients(model: Model, runner: PhaseRunner, index: int) -> None:
    """User code that gives every parameter a gradient, frozen or not."""
    model.loss(BATCHES[index], index).backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    runner.optimizer.step()
    runner.step()
    model.zero_grad()


@pytest.mark.parametrize(
    ("optimizer_over", "order"),
    [(DecaysEverything, clears_first), (decays_by_weight_decay, fills_in_gradients)],
    ids=["an optimizer that needs no gradient", "weight decay of gradients that are zero"],
)
def test_a_frozen_parameter_that_the_optimizer_moves_is_named_in_one_warning(
    optimizer_over: Callable[..., Optimizer], order: Order
) -> None:
    def warned(optimizer_over: Callable[..., Optimizer], order: Order) -> list[str]:
        return [
            each.text
            for each in warnings_in(
                said_by(
                    model, phases(2), epochs=2, order=order, optimizer_over=optimizer_over, enforce_phase0_params=False
                )
            )
        ]

    model = Model()
    usual = warned(momentum_sgd, clears_first)
    model = Model()
    warning = the_only(Said(0, text, 0) for text in warned(optimizer_over, order) if text not in usual)
    assert naming([warning], (*UPPER, *LOWER), model) == [warning], warning.text
    assert "frozen" in warning.text


# --- what it costs ----------------------------------------------------------------------------------------------------


class Synchronisations(TorchDispatchMode):
    """Counts the operations that wait for a device: reading a value, or comparing tensors."""

    NAMES = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "allclose", "item")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ in self.NAMES
        return function(*arguments, **(keywords or {}))


def test_the_mode_counts_what_waits() -> None:
    with Synchronisations() as waiting:
        float(torch.ones(()))
        bool(torch.equal(torch.ones(2), torch.ones(2)))
        torch.ones(2) + 1
    assert waiting.count == 2


@pytest.mark.parametrize("module", [SkippedByForward, OneExpertABatch])
def test_a_step_waits_for_no_device(module: type[Model]) -> None:
    model = module()
    runner = PhaseRunner(model, momentum_sgd(model.parameters()), phases(parameters=((*HEAD, "spare.*"),)))
    with Synchronisations() as waiting:
        for _ in range(10):
            for index in range(BATCHES_PER_EPOCH):
                clears_first(model, runner, index)
    assert waiting.count == 0
