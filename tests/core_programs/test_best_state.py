"""What a best state in memory holds and how it comes back: buffers, copies that move, loops under inference mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .loops import BATCHES, HEAD, OPTIMIZERS, UPPER, Loop, Model, copied, differing, loop_of, momentum_sgd, phases

EPOCHS = 4
BEST_FIRST = (1.0, 2.0, 3.0, 4.0)
BEST_SECOND = (2.0, 1.0, 3.0, 4.0)


# --- inference mode ---------------------------------------------------------------------------------------------------

Mode = Callable[[], AbstractContextManager[object]]
MODES: dict[str, Mode] = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}


def trained(
    optimizer_over: Callable[..., Optimizer],
    at_step: Mode,
    at_epoch_end: Mode,
    *,
    by: str = "epoch",
    metrics: tuple[float, ...] = BEST_FIRST,
) -> Loop:
    """Train, with calls of the runner inside of these contexts."""
    model = Model()
    schedule = phases(2, 3) if by == "epoch" else phases(6, 11, by="step")
    loop = loop_of(model, optimizer_over(model.parameters()), schedule)
    for metric in metrics:
        for index, batch in enumerate(BATCHES):
            loop.runner.optimizer.zero_grad()
            model.loss(batch, index).backward()
            loop.runner.optimizer.step()
            with at_step():
                loop.note(loop.runner.step())
        with at_epoch_end():
            loop.note(loop.runner.epoch_end(metric))
    return loop


@pytest.mark.parametrize("metrics", [BEST_FIRST, BEST_SECOND], ids=["best first", "best second"])
@pytest.mark.parametrize("by", ["epoch", "step"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("optimizer_over", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("where", ["step", "epoch_end", "both"])
def test_calls_inside_of_a_mode_train_as_calls_outside_of_it(
    where: str, optimizer_over: Callable[..., Optimizer], mode: Mode, by: str, metrics: tuple[float, ...]
) -> None:
    outside = trained(optimizer_over, nullcontext, nullcontext, by=by, metrics=metrics)
    inside = trained(
        optimizer_over,
        nullcontext if where == "epoch_end" else mode,
        nullcontext if where == "step" else mode,
        by=by,
        metrics=metrics,
    )
    assert len(outside.transitions) == 2
    assert inside.transitions == outside.transitions
    assert differing(copied(inside.model), copied(outside.model)) == set()


def test_nothing_of_the_model_is_an_inference_tensor_afterwards() -> None:
    loop = trained(momentum_sgd, torch.inference_mode, torch.inference_mode)
    held = [*loop.model.parameters(), *loop.model.buffers()]
    state = [value for state in loop.runner.optimizer.state.values() for value in state.values()]
    assert [each for each in (*held, *state) if isinstance(each, Tensor) and each.is_inference()] == []


# --- buffers ----------------------------------------------------------------------------------------------------------


class Caching(Model):
    """Buffers of every kind; ``change`` is what an epoch does to them."""

    def build(self) -> None:
        self.register_buffer("cache", torch.ones(1, 3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    cache: Tensor
    count: Tensor
    scratch: Tensor


def grows(model: Caching, epoch: int) -> None:
    model.cache = torch.full((1 if epoch == 0 else 6, 3), float(epoch))


def shrinks_to_a_row(model: Caching, epoch: int) -> None:
    model.cache = torch.full((6, 3) if epoch == 0 else (1, 3), float(epoch))


def shrinks_to_nothing(model: Caching, epoch: int) -> None:
    model.cache = torch.full((2 if epoch == 0 else 0, 3), float(epoch))


def is_written_in_place(model: Caching, epoch: int) -> None:
    model.cache.add_(1.0)
    model.count.add_(1)


def is_replaced(model: Caching, epoch: int) -> None:
    model.cache = model.cache + 1.0


def changes_its_type(model: Caching, epoch: int) -> None:
    model.cache = torch.full((1, 3), epoch, dtype=torch.int64 if epoch else torch.float64)


def is_resized_in_place(model: Caching, epoch: int) -> None:
    model.cache.resize_(epoch + 1, 3).fill_(float(epoch))


CHANGES = (
    grows,
    shrinks_to_a_row,
    shrinks_to_nothing,
    is_written_in_place,
    is_replaced,
    changes_its_type,
    is_resized_in_place,
)
changes = pytest.mark.parametrize("change", CHANGES, ids=[each.__name__.replace("_", " ") for each in CHANGES])


def restored(model: Caching, change: Callable[[Caching, int], None], best: int) -> tuple[Loop, dict[str, Tensor]]:
    """Train two epochs and restore the best; returns the loop and the state dictionary of the best moment."""
    loop = loop_of(model, momentum_sgd(model.parameters()), phases(2))
    kept = []
    for epoch in range(2):
        for index, batch in enumerate(BATCHES):
            loop.batch(batch, index)
        change(model, epoch)
        kept.append(copied(model))
        loop.note(loop.runner.epoch_end(0.0 if epoch == best else 1.0))
    assert loop.runner.phase == 1
    return loop, kept[best]


@pytest.mark.parametrize("best", [0, 1], ids=["best first", "best last"])
@changes
def test_a_buffer_comes_back_as_it_was_at_the_best_moment(change: Callable[[Caching, int], None], best: int) -> None:
    model = Caching()
    _, expected = restored(model, change, best)
    actual = copied(model)
    assert {name: (value.shape, value.dtype) for name, value in actual.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }
    assert differing(actual, expected) == set()


@changes
def test_the_same_best_state_comes_back_a_second_time(change: Callable[[Caching, int], None]) -> None:
    """A loop that goes on must not write into what is kept."""
    model = Caching()
    loop = loop_of(model, momentum_sgd(model.parameters()), phases(1, 2))
    change(model, 0)
    for index, batch in enumerate(BATCHES):
        loop.batch(batch, index)
    expected = copied(model)
    loop.runner.epoch_end(0.0)
    for epoch in (1, 2):
        assert differing(copied(model), expected) == set()
        for index, batch in enumerate(BATCHES):
            loop.batch(batch, index)
        change(model, epoch)
        loop.runner.epoch_end(1.0)
        if epoch == 1:
            assert loop.runner.phase == 2
            assert differing(copied(model), expected) == set()


@pytest.mark.parametrize("size", [2, 5], ids=["written", "grown"])
def test_a_buffer_that_is_not_persistent_is_left_alone(size: int) -> None:
    def change(model: Caching, epoch: int) -> None:
        model.scratch = torch.full((2 if epoch == 0 else size,), float(epoch + 1))

    model = Caching()
    restored(model, change, 0)
    assert torch.equal(model.scratch, torch.full((size,), 2.0))


class InsideAModule(Model):
    """A buffer that is not persistent, in a module inside a module, under a name that another one has persistently."""

    def build(self) -> None:
        self.inner = nn.ModuleList([nn.Module(), nn.Module()])
        self.inner[0].register_buffer("table", torch.zeros(2), persistent=False)
        self.inner[1].register_buffer("table", torch.zeros(2))


def test_it_is_the_module_that_tells_which_buffers_are_persistent() -> None:
    model = InsideAModule()
    loop = loop_of(model, momentum_sgd(model.parameters()), phases(2))
    for epoch in range(2):
        for index, batch in enumerate(BATCHES):
            loop.batch(batch, index)
        for module in model.inner:
            module.table.fill_(float(epoch + 1))
        loop.runner.epoch_end(float(epoch))
    assert [module.table.tolist() for module in model.inner] == [[2.0, 2.0], [1.0, 1.0]]


def test_a_buffer_that_two_modules_share_stays_shared() -> None:
    class Sharing(Model):
        def build(self) -> None:
            self.one, self.other = nn.Module(), nn.Module()
            self.one.register_buffer("table", torch.zeros(2))
            self.other.register_buffer("table", self.one.table)

    model = Sharing()
    loop = loop_of(model, momentum_sgd(model.parameters()), phases(2))
    for epoch in range(2):
        for index, batch in enumerate(BATCHES):
            loop.batch(batch, index)
        model.one.table.fill_(float(epoch + 1))
        loop.runner.epoch_end(float(epoch))
    assert model.other.table is model.one.table
    assert model.one.table.tolist() == [1.0, 1.0]


def test_statistics_of_normalisations_come_back() -> None:
    class Normalised(Model):
        def build(self) -> None:
            self.norm = nn.BatchNorm1d(4)

        def trunk(self, x: Tensor) -> Tensor:
            return self.norm(super().trunk(x))

    model = Normalised()
    loop = loop_of(model, momentum_sgd(model.parameters()), phases(2))
    kept = []
    for metric in (1.0, 2.0):
        for index, batch in enumerate(BATCHES):
            loop.batch(batch, index)
        kept.append(copied(model))
        loop.runner.epoch_end(metric)
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= differing(kept[0], kept[1])
    assert differing(copied(model), kept[0]) == set()


# --- frozen parameters that move without the optimizer ----------------------------------------------------------------


class MeanTeacher(Model):
    """A frozen copy of the head is the running mean of it."""

    def build(self) -> None:
        self.teacher = nn.Linear(4, 1).requires_grad_(False)

    @torch.no_grad()
    def move(self) -> None:
        for mean, present in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            mean.lerp_(present, 0.5)


class Prototypes(MeanTeacher):
    """A frozen table that is replaced, not written into."""

    def build(self) -> None:
        self.table = nn.Parameter(torch.zeros(2, 4), requires_grad=False)

    @torch.no_grad()
    def move(self) -> None:
        self.table.data = torch.cat([self.table[1:], self.trunk(BATCHES[0])[:1] + self.table[-1:]])


class Renormalised(MeanTeacher):
    """A layer that a later phase thaws is written to while it is frozen."""

    def build(self) -> None:
        """Nothing further."""

    @torch.no_grad()
    def move(self) -> None:
        self.upper.weight.mul_(0.9)


MOVING = {"a mean teacher": MeanTeacher, "a table of prototypes": Prototypes, "a layer of a later phase": Renormalised}


@pytest.mark.parametrize("metrics", [BEST_FIRST, BEST_SECOND], ids=["best first", "best second"])
@pytest.mark.parametrize("kind", MOVING.values(), ids=MOVING.keys())
def test_a_frozen_parameter_that_moves_without_the_optimizer_comes_back_too(
    kind: type[MeanTeacher], metrics: tuple[float, ...]
) -> None:
    model = kind()
    loop = loop_of(model, momentum_sgd(model.parameters()), phases(3, parameters=(HEAD, UPPER)))
    kept = []
    for metric in metrics[:3]:
        for index, batch in enumerate(BATCHES):
            loop.batch(batch, index)
            model.move()
        kept.append(copied(model))
        loop.runner.epoch_end(metric)
    best = kept[metrics.index(min(metrics))]
    assert len(differing(kept[-1], best) - set(HEAD)) > 0, "what is frozen has moved since"
    assert loop.runner.phase == 1
    assert differing(copied(model), best) == set()


def test_it_comes_back_after_it_was_thawed_too() -> None:
    """Best in phase 0, restored at the end of phase 1, which trains what moved while it was frozen."""
    model = Renormalised()
    loop = loop_of(model, momentum_sgd(model.parameters()), phases(2, 3))
    kept = []
    for metric in (1.0, 2.0, 3.0):
        for index, batch in enumerate(BATCHES):
            loop.batch(batch, index)
            if loop.runner.phase == 0:
                model.move()
        kept.append(copied(model))
        loop.runner.epoch_end(metric)
    assert loop.runner.phase == 2
    assert differing(copied(model), kept[0]) == set()
