"""Default schedules of models of different shapes."""

from itertools import chain

import pytest
import torch
from torch import nn

from finetuning_scheduler.core.prepare import resolve
from finetuning_scheduler.core.schedule import Schedule
from finetuning_scheduler.core.schedule.generate import Heuristic, generate, phase_comments
from finetuning_scheduler.core.schedule.names import ParameterIndex
from finetuning_scheduler.errors import ScheduleError


class Block(nn.Module):
    """A layer with a list of layers inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(2)])


def _tower(blocks: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(3, 8),
            "layers": nn.ModuleList([Block(8) for _ in range(blocks)]),
            "norm": nn.LayerNorm(8),
        }
    )


def _transformer() -> nn.ModuleDict:
    head = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 2))
    return nn.ModuleDict({"encoder": _tower(2), "decoder": _tower(3), "head": head})


def _stages() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 2, 1),
            "stage1": nn.Sequential(Block(2), Block(2)),
            "stage2": nn.Sequential(Block(32), Block(32)),
            "head": nn.Linear(32, 2),
        }
    )


def _params(schedule: Schedule) -> list[tuple[str, ...]]:
    return [phase.params for phase in schedule.phases]


def test_pairs_walk_from_the_last_parameter_to_the_first() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1), nn.Linear(1, 1, bias=False))
    assert _params(generate(model)) == [("2.weight", "1.bias"), ("1.weight", "0.bias"), ("0.weight",)]


def test_blocks_of_two_towers_with_a_small_head() -> None:
    def block(tower: str, number: int) -> tuple[str, ...]:
        return (f"{tower}.layers.{number}.inner.1.weight", f"{tower}.layers.{number}.inner.0.weight")

    assert _params(generate(_transformer(), "blocks")) == [
        ("head.2.bias", "head.2.weight", "head.0.bias", "head.0.weight", "decoder.norm.bias", "decoder.norm.weight"),
        block("decoder", 2),
        block("decoder", 1),
        block("decoder", 0),
        ("decoder.embed.weight", "encoder.norm.bias", "encoder.norm.weight"),
        block("encoder", 1),
        block("encoder", 0),
        ("encoder.embed.weight",),
    ]


def test_blocks_of_stages_that_differ_in_size() -> None:
    assert [phase.params[-1] for phase in generate(_stages(), "blocks").phases] == [
        "head.weight",
        "stage2.1.inner.0.weight",
        "stage2.0.inner.0.weight",
        "stage1.1.inner.0.weight",
        "stage1.0.inner.0.weight",
        "stem.weight",
    ]


def test_blocks_with_numbers_for_names_below_a_module_of_another_class() -> None:
    tower = nn.Module()
    for number in range(2):
        tower.add_module(str(number), Block(2))
    assert len(generate(nn.ModuleDict({"tower": tower, "head": nn.Linear(2, 2)}), "blocks")) == 3


def test_blocks_that_are_plain_containers() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(3)), nn.Linear(2, 1))
    assert [len(phase.params) for phase in generate(model, "blocks").phases] == [2, 4, 4, 4]


def test_a_model_without_repeated_blocks_gets_pairs() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "head": nn.Linear(2, 2)})
    assert generate(model, "blocks") == generate(model, "pairs")


@pytest.mark.parametrize("heuristic", ["pairs", "blocks"])
@pytest.mark.parametrize("model", [_transformer(), _stages(), nn.Linear(1, 1)], ids=["transformer", "stages", "linear"])
def test_every_parameter_is_in_exactly_one_phase(model: nn.Module, heuristic: Heuristic) -> None:
    schedule = generate(model, heuristic)
    assert sorted(chain.from_iterable(_params(schedule))) == sorted(name for name, _ in model.named_parameters())
    resolution = resolve(schedule, model)
    assert (resolution.schedule, resolution.frozen, resolution.notices) == (schedule, 0, ())


@pytest.mark.parametrize("heuristic", ["pairs", "blocks"])
def test_tied_parameters_count_once_and_integers_not_at_all(heuristic: Heuristic) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "body": nn.Linear(2, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    model.register_parameter("counts", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    assert _params(generate(model, heuristic)) == [("body.bias", "body.weight"), ("embed.weight",)]
    assert ParameterIndex.of(model).aliases == {"head.weight": "embed.weight"}


def test_comments_tell_the_size_and_share_of_each_phase() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(1000, 50), "head": nn.Linear(50, 1), "scale": nn.Linear(1, 1, bias=False)}
    )
    schedule = Schedule.parse({0: {"params": ["scale.weight"]}, 1: {"params": ["head.weight", "head.bias"]}})
    assert phase_comments(schedule, model) == [
        "1 tensor, 1 parameters (< 0.01 % of the model)",
        "2 tensors, 51 parameters (0.10 % of the model)",
    ]


def test_lazy_parameters_have_no_size_yet() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    assert phase_comments(generate(model, "blocks"), model) == [
        "2 tensors, 6 parameters (100.00 % of the model)",
        "2 tensors, 0 parameters (0.00 % of the model)",
    ]


def test_a_model_with_nothing_to_thaw_is_refused() -> None:
    with pytest.raises(ScheduleError) as caught:
        generate(nn.Sequential(nn.ReLU()))
    assert str(caught.value) == (
        "expected a model with floating point or complex parameters, got one without. "
        "Fix: Give the model its layers before the schedule is made"
    )


def test_an_unknown_heuristic_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"expected the heuristic 'pairs' or 'blocks', got 'halves'"):
        generate(nn.Linear(1, 1), "halves")  # type: ignore[arg-type]  # what a user may pass
