"""Compiled models through many thaws: gradients are right, nothing runs eagerly, settings come back."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config
from torch._dynamo.backends.debugging import aot_eager
from torch.optim import SGD

from finetuning_scheduler.core import PhaseRunner
from finetuning_scheduler.core.compiling import RecompileLimits

# Dynamo looks at the gradient of what a block is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
LIMITS = ("recompile_limit", "accumulated_recompile_limit")


class Count:
    """A backend that counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, example)


class Block(nn.Module):
    """Its code runs as it stands where it is not compiled."""

    eager_calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            Block.eager_calls += 1
        return x + torch.tanh(self.inner(x))


class Net(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def whole(model: Net, backend: Count) -> Any:
    return torch.compile(model, backend=backend)


def whole_in_place(model: Net, backend: Count) -> Any:
    model.compile(backend=backend)
    return model


def blocks_in_place(model: Net, backend: Count) -> Any:
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def wrapped_blocks(model: Net, backend: Count) -> Any:
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend=backend)  # type: ignore[assignment]
    return model


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch.compiler.reset()
    gc.collect()  # runners of other tests give back what they have added when they are collected
    Block.eager_calls = 0
    before = [getattr(config, name) for name in LIMITS]
    yield
    gc.collect()
    after = [getattr(config, name) for name in LIMITS]
    torch.compiler.reset()
    assert after == before


def schedule(blocks: int) -> dict[int, Any]:
    phases = [["head.*"], *([rf"blocks\.{number}\..*"] for number in reversed(range(blocks)))]
    return {phase: {"params": params, "max_transition_step": 2 * phase + 2} for phase, params in enumerate(phases)}


def train(model: nn.Module, blocks: int, meet: Callable[[PhaseRunner], None] = lambda _: None) -> PhaseRunner:
    runner = PhaseRunner(model, SGD(model.parameters(), lr=0.01), schedule(blocks), base_max_lr=0.01)
    data = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    while not runner.finished:
        runner.optimizer.zero_grad()
        model(data).square().mean().backward()
        meet(runner)
        runner.optimizer.step()
        runner.step()
    return runner


WAYS = {
    "whole": (whole, 8, 9),
    "whole-in-place": (whole_in_place, 8, 9),
    "blocks-in-place": (blocks_in_place, 25, 3),
    "wrapped-blocks": (wrapped_blocks, 25, 3),
}


@pytest.mark.parametrize(("compiled", "blocks", "graphs"), WAYS.values(), ids=WAYS.keys())
def test_gradients_are_those_of_an_eager_run(compiled: Any, blocks: int, graphs: int) -> None:
    plain = Net(blocks)
    backend = Count()
    model = compiled(copy.deepcopy(plain), backend)
    expected: list[dict[str, Tensor]] = []
    found: list[dict[str, Tensor]] = []

    def note(into: list[dict[str, Tensor]]) -> Callable[[PhaseRunner], None]:
        def meet(runner: PhaseRunner) -> None:
            into.append({name: p.grad.clone() for name, p in runner.parameters.items() if p.grad is not None})

        return meet

    reference = train(plain, blocks, note(expected))
    Block.eager_calls = 0
    runner = train(model, blocks, note(found))
    assert (Block.eager_calls, backend.graphs) == (0, graphs)
    assert len(found) == len(expected) == 2 * blocks + 2
    for mine, other in zip(found, expected, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.allclose(mine[name], other[name], atol=1e-6) for name in other)
    for mine, other in zip(runner.parameters.values(), reference.parameters.values(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)
    assert [each.untrained for each in runner.gradients.judgements] == [()] * (blocks + 1)


def growth() -> int:
    """What a transition adds, however many sessions of other tests are still there."""
    limits, before = RecompileLimits(), config.recompile_limit
    for _ in range(2):  # the first thaw adds nothing
        limits.after_thaw()
    added = config.recompile_limit - before
    limits.release()
    return added


def test_limits_grow_with_the_phases_and_come_back_with_the_end_of_the_last() -> None:
    model = torch.compile(Net(3), backend="eager")
    initial, added, seen = config.recompile_limit, growth(), []
    train(model, 3, lambda _: seen.append(config.recompile_limit))
    assert seen == [initial + added * (step // 2) for step in range(8)]
    assert config.recompile_limit == initial  # the last phase has ended


def test_limits_come_back_when_training_is_over() -> None:
    model, initial = Net(2), config.recompile_limit
    runner = PhaseRunner(model, SGD(model.parameters(), lr=0.01), schedule(2))
    runner.thaw_to(1)
    assert config.recompile_limit == initial + growth()
    runner.release_module_modes()
    assert config.recompile_limit == initial


def test_limits_come_back_with_an_exception() -> None:
    initial = config.recompile_limit

    def fail(runner: PhaseRunner) -> None:
        if runner.phase == 2:
            assert config.recompile_limit > initial
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(torch.compile(Net(3), backend="eager"), 3, fail)
    gc.collect()  # the runner is gone
    assert config.recompile_limit == initial


def test_what_the_user_has_set_stays() -> None:
    model, initial = Net(2), config.recompile_limit
    runner = PhaseRunner(model, SGD(model.parameters(), lr=0.01), schedule(2))
    runner.thaw_to(2)
    config.recompile_limit += 100
    runner.release_module_modes()
    assert config.recompile_limit == initial + 100
    config.recompile_limit = initial


def test_two_sessions_at_once() -> None:
    models, initial = [Net(2), Net(2)], config.recompile_limit
    runners = [PhaseRunner(model, SGD(model.parameters(), lr=0.01), schedule(2)) for model in models]
    for runner in (*runners, *runners):
        runner.thaw_to(runner.phase + 1)
    assert config.recompile_limit == initial + 4 * growth()  # what one has added is not what the other starts from
    for runner in (*runners, *runners):
        runner.release_module_modes()
    assert config.recompile_limit == initial
