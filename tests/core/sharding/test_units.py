"""Units whose parameters thaw in different phases, and the modules that would have to be units of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetuning_scheduler.core.sharding.units import Unit


class Layer(nn.Module):
    """Has a parameter of its own beside two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(nn.Linear(1, 1).weight[0])
        self.attention = nn.Linear(2, 2)
        self.output = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(3, 2)
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])
        self.head = nn.Linear(2, 2)


def unit(phases: dict[int, list[str]], path: str = "") -> Unit:
    """The unit of a module; a phase names beginnings of names."""
    plain = Model()
    names = [name for name, _ in plain.named_parameters() if name.startswith(path)]
    phase_of = {
        name: phase for phase, parts in phases.items() for part in parts for name in names if name.startswith(part)
    }
    return Unit(path, names, phase_of, plain)


CASES: dict[str, tuple[Unit, list[str] | None]] = {
    "what most have stays": (
        unit({0: ["head"], 1: ["layers"], 2: ["embeddings"]}),
        ["embeddings", "head"],
    ),
    "containers are no units": (
        unit({0: ["head"], 1: ["layers.2"], 2: ["layers.1"], 3: ["layers.0", "embeddings"]}),
        ["layers.1", "layers.2", "head"],
    ),
    "frozen ones too": (unit({0: ["head"]}), ["head"]),
    "inside one layer": (
        unit({0: ["layers.1.attention"], 1: ["layers.1.scale", "layers.1.output"]}, path="layers.1"),
        ["layers.1.attention"],
    ),
    "the layer's own decide": (
        unit({0: ["layers.1.scale"], 1: ["layers.1.attention", "layers.1.output"]}, path="layers.1"),
        ["layers.1.attention", "layers.1.output"],
    ),
    "two levels down": (
        unit({0: ["layers.1.scale", "layers.1.attention", "layers.1.output.0"], 1: ["layers.1.output.1"]}, "layers.1"),
        ["layers.1.output.1"],
    ),
    "two levels down, elsewhere than around": (
        unit({0: ["layers.1.scale", "layers.1.attention"], 1: ["layers.1.output.0"]}, path="layers.1"),
        ["layers.1.output.1", "layers.1.output"],
    ),
    "through a module with nothing of its own": (
        unit({0: ["layers.1.output.0"], 1: ["layers.1.output.1"]}, path="layers.1.output"),
        ["layers.1.output.1"],
    ),
    "apart within a module": (unit({0: ["head.weight"], 1: ["head.bias"]}, path="head"), None),
}


@pytest.mark.parametrize("name", CASES)
def test_modules_to_make_units_of_their_own(name: str) -> None:
    misaligned, expected = CASES[name]
    assert not misaligned.is_aligned
    assert misaligned.separation() == expected
    for part in taken_apart(misaligned, expected or []):
        assert part.is_aligned or expected is None


def taken_apart(whole: Unit, modules: list[str]) -> list[Unit]:
    """What FSDP makes of a unit when these modules become units: the innermost takes a parameter."""
    held: dict[str, list[str]] = {path: [] for path in (whole.path, *modules)}
    for name in whole.names:
        around = [path for path in modules if name.startswith(f"{path}.")]
        held[max(around, key=len, default=whole.path)].append(name)
    return [Unit(path, names, whole.phase_of, whole.plain) for path, names in held.items() if names]


def test_a_unit_of_one_phase_or_none_is_aligned() -> None:
    assert unit({0: ["head"]}, path="head").is_aligned
    assert unit({}, path="head").is_aligned


def test_a_unit_lists_its_parameters_by_phase() -> None:
    assert str(unit({10: ["head.weight"], 2: ["layers.1.scale"]}, path="")).startswith(
        "Model with phase 2: layers.1.scale; phase 10: head.weight; no phase: embeddings.weight, layers.0.scale, "
    )
    assert str(unit({1: ["head.weight"]}, path="head")) == "head with phase 1: head.weight; no phase: head.bias"


@pytest.mark.parametrize("seed", range(30))
def test_any_phases_of_whole_layers_can_be_taken_apart(seed: int) -> None:
    parts = [name.rpartition(".")[0] for name, _ in Model().named_parameters() if not name.endswith("scale")]
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-1, 3, (len(parts),), generator=random).tolist()
    phases = {phase: [f"{part}." for part, of in zip(parts, drawn, strict=True) if of == phase] for phase in range(3)}
    misaligned = unit(phases)
    for part in taken_apart(misaligned, misaligned.separation() or []):
        assert part.is_aligned
