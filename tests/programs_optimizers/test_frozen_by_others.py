"""What came frozen stays out of generated schedules, and a fit leaves what it did not thaw as it came."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from ruamel.yaml import YAML
from torch import Tensor, nn

from tests.core_programs.loops import HEAD, LOWER, UPPER, copied, differing, trainable

from ..core_programs.hearing import Said, naming, the_only
from ..core_programs.quantised import QuantisedLinear
from .toys import Fit, Toy, fit, phases, plain_fit, prepared

LAYERS = (*HEAD, *UPPER, *LOWER)
RISING = tuple(float(score) for score in range(1, 20))  # with a patience of 1 each epoch after the first ends a phase


class Teacher(Toy):
    """Distils a frozen network."""

    def build(self) -> None:
        self.teacher = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).requires_grad_(False)

    def loss(self, batch: Tensor, batch_index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch), self.teacher(batch))


class LossNetwork(Toy):
    """Compares what a frozen network makes of prediction and target."""

    def build(self) -> None:
        self.perceptual = nn.ModuleList([nn.Linear(1, 5) for _ in range(12)]).requires_grad_(False)

    def loss(self, batch: Tensor, batch_index: int) -> Tensor:
        prediction, target = self(batch), batch.sin().sum(dim=1, keepdim=True)
        return sum(
            (nn.functional.mse_loss(each(prediction), each(target)) for each in self.perceptual), torch.zeros(())
        )


class PositionTable(Toy):
    def build(self) -> None:
        self.positions = nn.Parameter(torch.linspace(-1, 1, 4), requires_grad=False)

    def trunk(self, x: Tensor) -> Tensor:
        return super().trunk(x) + self.positions


class LowRank(nn.Module):
    """A frozen layer and its low-rank update."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(2, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.lora_a.T @ self.lora_b.T


class Adapted(Toy):
    def build(self) -> None:
        self.upper = LowRank(self.upper)  # type: ignore[assignment]
        self.lower = LowRank(self.lower)  # type: ignore[assignment]


class Quantised(Toy):
    def build(self) -> None:
        self.upper = QuantisedLinear(self.upper, requires_grad=False)  # type: ignore[assignment]


class FrozenByTheUser(Toy):
    """Half of a layer, as ``model.lower.weight.requires_grad = False`` leaves it."""

    def build(self) -> None:
        self.lower.weight.requires_grad = False


@dataclass(frozen=True)
class Row:
    module: type[Toy]
    frozen: tuple[str, ...]


def both(*layers: str) -> tuple[str, ...]:
    return tuple(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))


ROWS = {
    "a teacher": Row(Teacher, both("teacher.0", "teacher.2")),
    "a loss network": Row(LossNetwork, both(*(f"perceptual.{index}" for index in range(12)))),
    "a table of positions": Row(PositionTable, ("positions",)),
    "the base weights of an adapter": Row(Adapted, both("upper.base_layer", "lower.base_layer")),
    "a quantised weight": Row(Quantised, ("upper.weight",)),
    "half of a layer": Row(FrozenByTheUser, ("lower.weight",)),
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def generated(module: Toy, root: Path, **options: Any) -> Fit:
    """A fit through every phase of the generated schedule."""
    module.scores = RISING
    return fit(module, root, None, epochs=12, patience=1, **options)


def scheduled_names(done: Fit) -> list[str]:
    schedule = done.scheduler.ft_schedule
    return [name for phase in schedule.phases for name in phase.params]  # type: ignore[union-attr]


def values(module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    return {name: named[name].detach().clone() for name in names}


# --- generated schedules ----------------------------------------------------------------------------------------------


@rows
def test_a_generated_schedule_leaves_out_what_came_frozen(row: Row, tmp_path: Path) -> None:
    module = row.module()
    expected = trainable(module)
    before = values(module, row.frozen)
    done = generated(module, tmp_path)
    assert sorted(scheduled_names(done)) == sorted(expected)
    assert done.scheduler.depth_remaining == 0
    assert trainable(module) == expected
    assert differing(values(module, row.frozen), before) == set()


@rows
def test_one_notice_counts_it_names_it_and_says_how_to_include_it(row: Row, tmp_path: Path) -> None:
    done = generated(row.module(), tmp_path)
    notice = the_only(about_frozen(done.said, row, done.module))
    named = dict(done.module.named_parameters())
    size = sum(named[name].numel() for name in row.frozen)
    assert re.search(rf"\b(?:{len(row.frozen)}|{size:,})\b", notice.text), notice.text
    assert re.search(r"requires_grad|thaw", notice.text), notice.text
    assert "schedule" in notice.text
    assert notice.step == 0


def about_frozen(said: list[Said], row: Row, module: nn.Module) -> list[Said]:
    if row.module is PositionTable:  # its name has no dot by which a message could be told to mean it
        return [each for each in said if re.search(r"\bpositions\b", each.text)]
    return naming(said, row.frozen, module)


def test_names_are_collapsed_to_patterns(tmp_path: Path) -> None:
    row = ROWS["a loss network"]
    done = generated(row.module(), tmp_path)
    text = the_only(about_frozen(done.said, row, done.module)).text
    assert len([name for name in row.frozen if name in text]) <= 4, text


@rows
def test_the_generated_file_leaves_it_out_too(row: Row, tmp_path: Path) -> None:
    module = row.module()
    with pytest.raises(SystemExit):
        prepared(module, tmp_path, None, gen_ft_sched_only=True).run()
    (file,) = tmp_path.rglob("*_ft_schedule.yaml")
    schedule = YAML(typ="safe").load(file)
    assert sorted(name for phase in schedule.values() for name in phase["params"]) == sorted(trainable(module))


def test_a_model_in_which_nothing_came_frozen_gets_no_notice(tmp_path: Path) -> None:
    done = generated(Toy(), tmp_path)
    assert sorted(scheduled_names(done)) == sorted(LAYERS)
    assert [each.text for each in done.said if "frozen" in each.text or "requires_grad" in each.text] == []


def test_what_the_user_thaws_first_is_included(tmp_path: Path) -> None:
    module = Teacher()
    module.teacher.requires_grad_(True)
    assert set(ROWS["a teacher"].frozen) <= set(scheduled_names(generated(module, tmp_path)))


def test_a_resumed_run_generates_the_schedule_of_the_run_it_goes_on_with(tmp_path: Path) -> None:
    def prepare() -> Fit:
        saving = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}", monitor=None)
        module = Teacher(scores=RISING)
        options = {"enable_checkpointing": True}
        return prepared(module, tmp_path, None, epochs=6, patience=1, callbacks=[saving], trainer_options=options)

    whole, resumed = prepare().run(), prepare()
    (tmp_path / "saved" / "epoch=2.ckpt").rename(tmp_path / "resumed.ckpt")
    resumed.run(ckpt_path=tmp_path / "resumed.ckpt")
    assert scheduled_names(resumed) == scheduled_names(whole)
    assert differing(copied(resumed.module), copied(whole.module)) == set()


# --- explicit schedules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [ROWS["a teacher"], ROWS["half of a layer"]], ids=["a teacher", "half of a layer"])
def test_an_explicit_schedule_thaws_what_came_frozen_with_one_notice(row: Row, tmp_path: Path) -> None:
    module = row.module()
    before = values(module, row.frozen)
    done = fit(module, tmp_path, phases(1, parameters=(HEAD, row.frozen)), epochs=3)
    assert differing(values(module, row.frozen), before) == set(row.frozen)
    assert set(row.frozen) <= trainable(module)
    the_only(about_frozen(done.said, row, module))


def test_an_explicit_schedule_that_does_not_select_it_gives_no_notice_of_thawing(tmp_path: Path) -> None:
    done = fit(Teacher(), tmp_path, phases(1), epochs=3)
    assert [each.text for each in done.said if re.search(r"\bteacher\b", each.text)] == []


# --- the end of a fit -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """A schedule, the scheduler's options, and what trains when it is over; the toy has a frozen teacher."""

    schedule: Any
    options: dict[str, Any]
    epochs: int = 3


ENDINGS = {
    "every phase was executed": Ending(phases(1, 2), {}),
    "a part of the phases was executed": Ending(phases(1, 2), {"max_depth": 1}),
    "phase 0 alone": Ending(phases(1, 2), {"max_depth": 0}, 1),
    "some parameters are in no phase": Ending(phases(1), {}),
    "the trainer stopped before the last phase": Ending(phases(1, 9), {}),
    "generated": Ending(None, {"max_depth": 0}),
    "phase 0 is not enforced": Ending(phases(1), {"enforce_phase0_params": False}),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_after_a_fit_what_no_phase_thawed_is_as_it_came(ending: Ending, tmp_path: Path) -> None:
    module = Teacher()
    fit(module, tmp_path, ending.schedule, epochs=ending.epochs, **ending.options)
    assert trainable(module) == set(LAYERS)


class Breaks(Callback):
    """Ends a fit from inside."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_train_batch_end(self, *_: Any) -> None:
        raise self.error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_fit_that_breaks_off_it_is_as_it_came_too(error: type[BaseException], tmp_path: Path) -> None:
    module = Teacher()
    with pytest.raises((error, SystemExit)):  # Lightning exits after an interrupt
        fit(module, tmp_path, phases(1, 2), callbacks=[Breaks(error)])
    assert trainable(module) == set(LAYERS)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_changes_nothing(stage: str, tmp_path: Path) -> None:
    module = Teacher()
    module.test_step = module.validation_step  # type: ignore[method-assign]
    module.test_dataloader = module.val_dataloader  # type: ignore[method-assign]
    attempt = prepared(module, tmp_path, phases(1))
    getattr(attempt.trainer, stage)(module, verbose=False)
    assert trainable(module) == set(LAYERS)


def test_a_second_fit_without_the_callback_trains_the_whole_model(tmp_path: Path) -> None:
    module, reference = Teacher(), Teacher()
    fit(module, tmp_path / "first", phases(1), epochs=1)
    reference.load_state_dict(copied(module))
    plain_fit(module, tmp_path / "second", 2)
    plain_fit(reference, tmp_path / "reference", 2)
    assert differing(copied(module), copied(reference)) == set()
    assert differing(copied(module), copied(Teacher())) == set(LAYERS)


@pytest.mark.parametrize("depth", [0, 1, -1])
def test_a_second_fit_with_a_new_callback_generates_the_same_schedule(depth: int, tmp_path: Path) -> None:
    module = Teacher()
    first = generated(module, tmp_path / "first", max_depth=depth)
    second = generated(module, tmp_path / "second", max_depth=depth)
    assert scheduled_names(second) == scheduled_names(first)
    assert second.scheduler.curr_depth == first.scheduler.curr_depth


def as_it_came(make: Callable[[], Toy]) -> set[str]:
    return trainable(make())


@rows
def test_a_fit_of_phase_0_gives_every_kind_back_as_it_came(row: Row, tmp_path: Path) -> None:
    module = row.module()
    fit(module, tmp_path, {0: {"params": list(HEAD)}}, epochs=1)
    assert trainable(module) == as_it_came(row.module)


@pytest.mark.parametrize("depth", [0, 1])
def test_what_the_user_freezes_after_a_fit_stays_out_of_the_next_generated_schedule(depth: int, tmp_path: Path) -> None:
    module = Toy()
    generated(module, tmp_path / "first", max_depth=depth)
    module.lower.requires_grad_(False)
    second = generated(module, tmp_path / "second")
    assert set(scheduled_names(second)) == {*HEAD, *UPPER}
    assert trainable(module) == {*HEAD, *UPPER}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_that_fails_after_a_fit_leaves_what_the_user_froze_since(stage: str, tmp_path: Path) -> None:
    module = Toy()
    done = fit(module, tmp_path, phases(1), epochs=1)
    module.lower.requires_grad_(False)
    module.test_step = module.validation_step  # type: ignore[method-assign]
    done.trainer.callbacks.append(FailsToEvaluate())
    with pytest.raises(ArithmeticError):
        getattr(done.trainer, stage)(module, module.val_dataloader(), verbose=False)
    assert trainable(module) == {*HEAD, *UPPER}


class FailsToEvaluate(Callback):
    def on_validation_start(self, *_: Any) -> None:
        raise ArithmeticError

    def on_test_start(self, *_: Any) -> None:
        raise ArithmeticError
