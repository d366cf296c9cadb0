"""Very large models: set-up and resume of 40,000 tensors in 20,000 phases, in seconds and against 4,000 tensors.

The schedule is the generated one of two tensors a phase. Set-up is the making of a `PhaseRunner`; a resume is a set-up
with a new model and loading the states of runner and optimizer, of the last phase, with AdamW's state of every tensor.
Seconds are the processor's.

    python benchmarks/scale.py [--pairs 3]
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from _common import Figure, Options, alternate, main, timed
from torch import nn
from torch.optim import AdamW

from finetuning_scheduler.core import PhaseRunner


class Layer(nn.Module):
    """Two small tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))


def build(layers: int) -> tuple[nn.Module, AdamW]:
    """Make a model of many layers and its optimizer."""
    model = nn.ModuleList(Layer() for _ in range(layers))
    return model, AdamW(model.parameters(), lr=1e-3)


def set_up(layers: int) -> float:
    """Return the seconds until the first step can be made."""
    model, optimizer = build(layers)
    gc.collect()
    return timed(lambda: PhaseRunner(model, optimizer))


def saved_in_the_last_phase(layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the states of a run in its last phase."""
    model, optimizer = build(layers)
    runner = PhaseRunner(model, optimizer)
    runner.thaw_to(runner.plan.last_phase)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    runner.step()
    return runner.state_dict(), optimizer.state_dict()


def resume(layers: int, states: tuple[dict[str, Any], dict[str, Any]]) -> float:
    """Return the seconds from a new model to the next step."""
    model, optimizer = build(layers)

    def load() -> None:
        runner = PhaseRunner(model, optimizer)
        runner.load_state_dict(states[0])
        runner.optimizer.load_state_dict(states[1])

    gc.collect()
    return timed(load)


def resume_from(states: dict[int, tuple[dict[str, Any], dict[str, Any]]], layers: int) -> float:
    """Time a resume of a model of some size."""
    return resume(layers, states[layers])


def figures(options: Options) -> Iterator[Figure]:
    """Measure both sizes in turns."""
    large, small = (200, 20) if options.tiny else (20_000, 2_000)
    pairs = min(options.pairs, 3)
    states: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # later: what lives longer makes set-up slower
    name = f"{2 * large:,} tensors in {large:,} phases"
    for what, seconds_of, goal in (
        ("set-up", set_up, "<= 10"),
        ("resume into the last phase", partial(resume_from, states), "<= 15"),
    ):
        if seconds_of is not set_up:
            states |= {layers: saved_in_the_last_phase(layers) for layers in (large, small)}
        turns = alternate(lambda: seconds_of(large), lambda: seconds_of(small), pairs=pairs)  # noqa: B023
        yield Figure.of(f"{what}, {name}", [each[0] for each in turns], goal, unit="s")
        note = f"{statistics.median(each[1] for each in turns):.2f} s with {2 * small:,} tensors"
        ratios = [each[0] / each[1] for each in turns]
        yield Figure.of(f"{what} against {2 * small:,} tensors", ratios, "<= 13", limit=large / small, note=note)


if __name__ == "__main__":
    main(__doc__, figures)
