"""Blocks as a model's library tells them; what the modules show is tested with the generated schedules."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from finetuning_scheduler.core import ModelView, generate
from finetuning_scheduler.core.schedule.blocks import blocks_of
from finetuning_scheduler.core.view import structure_of


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)


class Body(nn.Module):
    """Blocks that are no list: nothing but its author can tell them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 2)
        self.early, self.middle, self.late = Layer(), Layer(), Layer()
        self.norm = nn.LayerNorm(2)


class OfTransformers(nn.Module):
    def __init__(self, told: Any) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(2, 2)
        self._no_split_modules = told


class OfTimm(nn.Module):
    """Stages of blocks, with a step down before the second stage, as Swin has them."""

    def __init__(self, told: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.stages = nn.ModuleList([nn.Module(), nn.Module()])
        for stage in self.stages:
            stage.down = nn.Linear(2, 2)
            stage.blocks = nn.ModuleList([Layer(), Layer()])
        self.norm, self.head = nn.LayerNorm(2), nn.Linear(2, 2)
        self.told = told

    def group_matcher(self, coarse: bool = False) -> Any:
        return self.told


SWIN = {
    "stem": r"^stem",
    "blocks": [(r"^stages\.(\d+)\.down", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))],
}


def phases(model: nn.Module) -> list[set[str]]:
    """The modules that each phase of the schedule by blocks thaws."""
    return [{name.rpartition(".")[0] for name in phase.params} for phase in generate(model, "blocks").phases]


@pytest.mark.parametrize("told", [["Layer"], ("Body", "Layer"), {"Layer", "Missing"}])
def test_transformers_models_name_the_classes_of_their_blocks(told: Any) -> None:
    assert phases(OfTransformers(told)) == [
        {"head", "body.norm"},
        {"body.late.first", "body.late.second"},
        {"body.middle.first", "body.middle.second"},
        {"body.early.first", "body.early.second"},
        {"body.embed"},
    ]


@pytest.mark.parametrize("told", [None, [], ["Missing"], "Layer", ["Body"]])
def test_a_model_that_tells_nothing_usable_shows_its_blocks_by_its_modules(told: Any) -> None:
    assert blocks_of(OfTransformers(told)) == {}


def test_timm_s_patterns_group_what_they_capture_the_same_numbers_of() -> None:
    assert phases(OfTimm(SWIN)) == [
        {"head", "norm"},
        {"stages.1.blocks.1.first", "stages.1.blocks.1.second"},
        {"stages.1.blocks.0.first", "stages.1.blocks.0.second", "stages.1.down"},
        {"stages.0.blocks.1.first", "stages.0.blocks.1.second"},
        {"stages.0.blocks.0.first", "stages.0.blocks.0.second", "stages.0.down"},
        {"stem"},
    ]


def test_timm_s_patterns_can_be_plain_and_stand_within_another_model() -> None:
    whole = nn.Module()
    whole.backbone, whole.classifier = OfTimm({"stem": "^stem", "blocks": r"^stages\.(\d+)"}), nn.Linear(2, 2)
    assert [len(each) for each in phases(whole)] == [3, 5, 5, 1]


@pytest.mark.parametrize("told", [None, {}, {"stem": "^stem"}])
def test_patterns_that_capture_nothing_leave_it_to_the_modules(told: Any) -> None:
    assert {*blocks_of(OfTimm(told)).values()} == {"stages.0", "stages.1"}


@pytest.mark.parametrize("model", [OfTransformers(["Layer"]), OfTimm(SWIN)])
def test_a_copy_without_wrappers_tells_the_same(model: nn.Module) -> None:
    expected = blocks_of(model)
    assert expected
    assert blocks_of(structure_of(model, {})) == expected
    assert blocks_of(ModelView.of(model).plain) == expected
