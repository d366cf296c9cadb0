"""`torch.compile` through thaws: how many graphs are made, and how many calls run without being compiled.

Blocks that are compiled one by one need few graphs in all phases together; a model that is compiled as a whole needs
one in each, of which 13 are made here. The backend is `aot_eager`, which traces as the usual one does and generates no
code. What resetting the compiler at each transition would cost instead is told beside.

    python benchmarks/compiled.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from _common import Figure, Options, main, timed
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.optim import SGD

from finetuning_scheduler.core import PhaseRunner


class Block(nn.Module):
    """Counts the calls in which its code runs as it stands."""

    eager_calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Add what a layer makes of the input."""
        if not torch.compiler.is_compiling():
            Block.eager_calls += 1
        return x + torch.tanh(self.inner(x))


class Net(nn.Module):
    """Blocks and a head."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run one after another."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def run(blocks: int, *, whole: bool, resets: bool = False) -> int:
    """Train three steps a phase, a block more each; return how many graphs were made."""
    torch.compiler.reset()
    Block.eager_calls, graphs, model = 0, 0, Net(blocks)

    def backend(graph: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, example)

    for module in [model] if whole else model.blocks:
        module.compile(backend=backend)
    phases = [["head.weight", "head.bias"]]
    phases += [[f"blocks.{number}.inner.weight", f"blocks.{number}.inner.bias"] for number in reversed(range(blocks))]
    schedule = {phase: {"params": params, "max_transition_step": 3 * phase + 3} for phase, params in enumerate(phases)}
    reset = torch.compiler.reset if resets else None
    runner = PhaseRunner(model, SGD(model.parameters(), lr=0.01), schedule, on_thawed=reset)
    while not runner.finished:
        runner.optimizer.zero_grad()
        model(torch.ones(4, 8)).square().mean().backward()
        runner.optimizer.step()
        runner.step()
    return graphs


def figures(options: Options) -> Iterator[Figure]:
    """Count graphs and calls that were not compiled."""
    for whole, name, thaws in ((False, "by blocks", 25), (True, "as a whole", 12)):
        thaws = 3 if options.tiny else thaws
        counts: list[int] = []
        seconds = timed(lambda: counts.append(run(thaws, whole=whole)))  # noqa: B023
        eager = Block.eager_calls
        with_resets = timed(lambda: counts.append(run(thaws, whole=whole, resets=True)))  # noqa: B023
        note = f"{seconds:.1f} s in all; with a reset at each transition {counts[1]} graphs and {with_resets:.1f} s"
        goal = f"<= {thaws + 1 if whole else 3}"
        yield Figure.of(f"graphs, compiled {name}, {thaws} thaws", [counts[0]], goal, unit="", note=note)
        yield Figure.of(f"calls that run eagerly, compiled {name}, {thaws} thaws", [eager], "== 0", unit="")


if __name__ == "__main__":
    main(__doc__, figures)
