"""What a step of each phase costs, relative to full fine-tuning, and what of it frozen-prefix reuse would save."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from ..core.plan import Plan
from ..core.view import ModelView
from .shapes import Basis

# Tables in which rows are looked up: no arithmetic.
_TABLE = re.compile(r"(^|[._])(\w*embed\w*|emb|wte|wpe)([._]|$)")


@dataclass(frozen=True)
class Costs:
    """The costs of each phase.

    Attributes:
        steps: A step's cost relative to one that trains all parameters.
        saved: The share of a step that frozen-prefix reuse saves once all outputs are recorded.
        basis: Whether floating point operations were counted, or the shares of parameters had to do.
        notes: How they were found out, for people.
    """

    steps: Sequence[float]
    saved: Sequence[float]
    basis: Basis
    notes: tuple[str, ...] = ()


def from_parameters(plan: Plan, view: ModelView, notes: tuple[str, ...] = ()) -> Costs:
    """Take each parameter for one multiplication a sample, made in the order in which the model registers them.

    Gradients of inputs are needed behind the first parameter that is trained, gradients of weights for those that are.
    Rows looked up in tables of embeddings cost nothing.
    """
    weights = _computing(view)
    names = list(weights)
    position = {name: place for place, name in enumerate(names)}
    before = [0, *accumulate(weights.values())]  # what is computed before each parameter
    total = max(before[-1], 1)
    full = 3 * total
    steps, saved = [], []
    first, trained = len(names), 0
    for state in plan.phases:
        placed = [name for name in state.limits.params if name in position]
        first = min([first, *(position[name] for name in placed)])
        trained += sum(weights[name] for name in placed)
        inputs = total - before[min(first + 1, len(names))]
        cost = total + inputs + trained
        steps.append(cost / (full - (before[1] if names else 0)))
        saved.append(before[first] / cost)
    said = "Costs are estimates from shares of parameters; with a sample batch, operations are counted."
    return Costs(steps, saved, "parameters", (*notes, said))


def _computing(view: ModelView) -> dict[str, int]:
    """Tell how many values of each tensor take part in arithmetic."""
    shared = _aliased(view.plain)
    tables = {
        name
        for path, module in view.plain.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for name in [f"{path}.weight" if path else "weight"]
    }
    shapes = {name: tensor.dim() for name, tensor in view.plain.named_parameters()}

    def is_table(name: str) -> bool:
        looks_so = shapes.get(name) == 2 and _TABLE.search(name.rpartition(".")[0]) is not None
        return name not in shared and (name in tables or looks_so)

    return {name: 0 if is_table(name) else size for name, size in view.sizes.items()}


def _aliased(model: nn.Module) -> set[str]:
    """Name the parameters that have another name, such as an embedding that is also the last layer."""
    first: dict[int, str] = {}
    return {
        first[id(tensor)]
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(tensor), name) != name
    }


def measured_at(phases: int, most: int) -> list[int]:
    """Choose phases to be measured: all, or so many, evenly, with the first and the last."""
    if phases <= most:
        return list(range(phases))
    return sorted({round(number * (phases - 1) / (most - 1)) for number in range(most)})


def between(known: Mapping[int, float], counts: Sequence[int]) -> Iterator[float]:
    """Fill in what was not measured, in proportion to how many values are trainable."""
    places = sorted(known)
    for phase, count in enumerate(counts):
        low = max(place for place in places if place <= phase)
        high = min(place for place in places if place >= phase)
        span = counts[high] - counts[low]
        share = (count - counts[low]) / span if span else 0.0
        yield known[low] + share * (known[high] - known[low])
