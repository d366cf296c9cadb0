"""Generated schedules of the core leave out what came frozen; explicit ones thaw it with one notice."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from finetuning_scheduler.core.schedule.files import ScheduleImplMixin
from finetuning_scheduler.core.schedule.generate import Heuristic
from finetuning_scheduler.errors import ScheduleError

from .hearing import listening, naming, the_only
from .loops import HEAD, LOWER, UPPER, Model, loop_of, momentum_sgd, phases, trainable
from .quantised import QuantisedLinear


class WithTeacher(Model):
    def build(self) -> None:
        self.teacher = nn.Linear(4, 1).requires_grad_(False)


class WithTable(Model):
    def build(self) -> None:
        self.table = nn.Embedding(5, 4).requires_grad_(False)


class WithQuantised(Model):
    def build(self) -> None:
        self.spare = QuantisedLinear(nn.Linear(4, 4), requires_grad=False)


class WithHalf(Model):
    def build(self) -> None:
        self.upper.bias.requires_grad = False


FROZEN: dict[type[Model], tuple[str, ...]] = {
    WithTeacher: ("teacher.weight", "teacher.bias"),
    WithTable: ("table.weight",),
    WithQuantised: ("spare.weight",),
    WithHalf: ("upper.bias",),
}
heuristics = pytest.mark.parametrize("heuristic", ["pairs", "blocks"])
kinds = pytest.mark.parametrize(("kind", "frozen"), FROZEN.items(), ids=[kind.__name__ for kind in FROZEN])


def written(model: nn.Module, heuristic: Heuristic, directory: Path) -> list[str]:
    """The names in the file that a user has generated for a model."""
    path = ScheduleImplMixin.gen_ft_schedule(model, directory, heuristic)
    return [name for phase in YAML(typ="safe").load(path).values() for name in phase["params"]]


@heuristics
@kinds
def test_a_generated_file_leaves_out_what_came_frozen(
    kind: type[Model], frozen: tuple[str, ...], heuristic: Heuristic, tmp_path: Path
) -> None:
    model = kind()
    names = written(model, heuristic, tmp_path)
    assert sorted(names) == sorted(trainable(model))
    assert not set(names) & set(frozen)


@heuristics
def test_blocks_whose_weights_came_frozen_keep_what_trains_of_them(heuristic: Heuristic, tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), nn.Linear(3, 1))
    for layer in model:
        layer.weight.requires_grad = False
    assert set(written(model, heuristic, tmp_path)) == {f"{index}.bias" for index in range(5)}


def test_a_model_in_which_all_came_frozen_has_nothing_to_schedule() -> None:
    model = Model().requires_grad_(False)
    with pytest.raises(ScheduleError, match=r"frozen|requires_grad"):
        loop_of(model, momentum_sgd(model.parameters()), None)


@kinds
def test_a_runner_that_generates_its_schedule_says_once_what_it_left_out(
    kind: type[Model], frozen: tuple[str, ...]
) -> None:
    model = kind()
    expected = trainable(model)
    with listening() as said:
        loop = loop_of(model, momentum_sgd(model.parameters()), None)
    notice = the_only(naming(said, frozen, model))
    assert re.search(r"requires_grad|thaw", notice.text), notice.text
    loop.runner.thaw_to(loop.runner.plan.last_phase)
    assert trainable(model) == expected


@kinds
def test_an_explicit_schedule_thaws_what_came_frozen_with_one_notice(
    kind: type[Model], frozen: tuple[str, ...]
) -> None:
    model = kind()
    with listening() as said:
        loop = loop_of(model, momentum_sgd(model.parameters()), phases(1, parameters=(HEAD, frozen)))
    the_only(naming(said, frozen, model))
    loop.epoch()
    assert trainable(model) == {*HEAD, *frozen}


def test_an_explicit_schedule_of_what_came_trainable_gives_no_such_notice() -> None:
    model = WithTeacher()
    with listening() as said:
        loop_of(model, momentum_sgd(model.parameters()), phases(1, 2))
    assert [each.text for each in said if "teacher" in each.text] == []


def by_compile(model: Model) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]  # nothing is compiled before a forward


def by_checkpointing(model: Model) -> nn.Module:
    model.upper = checkpoint_wrapper(model.upper)
    return model


@pytest.mark.parametrize("wrap", [by_compile, by_checkpointing])
def test_in_a_wrapped_model_only_what_came_frozen_is_left_out(wrap: Callable[[Model], nn.Module]) -> None:
    model = wrap(WithTeacher())
    loop = loop_of(model, momentum_sgd(model.parameters()), None)  # type: ignore[arg-type]
    names = {name for phase in loop.runner.schedule.phases for name in phase.params}
    assert names == {*HEAD, *UPPER, *LOWER}
