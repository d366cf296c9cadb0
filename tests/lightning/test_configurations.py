"""Options of the callback and of the trainer around it."""

from __future__ import annotations

import logging
import math
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ruamel.yaml import YAML
from torch import Tensor, nn
from torch.optim import SGD

from finetuning_scheduler import FinetuningScheduler, FTSEarlyStopping
from finetuning_scheduler.errors import ScheduleError
from tests.reference.loop import train
from tests.reference.networks import BATCHES_PER_EPOCH, FIRST, HEAD, SECOND, THIRD, build_network, normalised, pair
from tests.reference.recipe import PhaseSpec, Recipe, momentum_sgd, schedule_of, simple_recipe
from tests.reference.toys import Recorder, Session, Toy, ToyOverAll

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

Messages = Callable[[], list[str]] if TYPE_CHECKING else Any
TrainerIn = Callable[..., "pl.Trainer"] if TYPE_CHECKING else Any

ALL_PAIRS = {0: HEAD, 1: THIRD, 2: SECOND, 3: FIRST}


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path)


def parameters_by_phase(path: Path) -> dict[int, tuple[str, ...]]:
    return {int(phase): tuple(entry["params"]) for phase, entry in read(path).items()}


class AtBatches(Callback):
    """Notes something of the module at every training batch, after transitions."""

    def __init__(self, look: Callable[[Any], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_start(self, _trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(self.look(pl_module))


# --- schedules and where they are written -----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["log_dir", "default_root_dir"])
def test_generating_a_schedule_only(where: str, trainer_in: TrainerIn, tmp_path: Path) -> None:
    target = tmp_path / "artifacts" if where == "log_dir" else tmp_path
    options = {"log_dir": target} if where == "log_dir" else {}
    module = Toy()
    before = deepcopy(module.state_dict())
    with pytest.raises(SystemExit) as leave:
        trainer_in(callbacks=[FinetuningScheduler(gen_ft_sched_only=True, **options)]).fit(module)
    assert leave.value.code == 0
    assert parameters_by_phase(target / "Toy_ft_schedule.yaml") == ALL_PAIRS
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", ["argument", "logger", "root"])
def test_where_artifacts_go(kind: str, trainer_in: TrainerIn, tmp_path: Path) -> None:
    options: dict[str, Any] = {"log_dir": str(tmp_path / "mine")} if kind == "argument" else {}
    logger = CSVLogger(tmp_path, "logged", version="one") if kind == "logger" else False
    scheduler = FinetuningScheduler(**options)
    trainer_in(callbacks=[scheduler], logger=logger, max_epochs=1).fit(Toy())
    target = {"argument": tmp_path / "mine", "logger": tmp_path / "logged" / "one", "root": tmp_path}[kind]
    assert (target / "Toy_ft_schedule.yaml").exists()
    assert Path(str(scheduler.log_dir)) == target


def test_the_schedule_in_force_is_saved_with_full_names(trainer_in: TrainerIn, tmp_path: Path) -> None:
    given = {
        "0": {"params": ["network.head"], "max_transition_epoch": 1},
        "1": {"params": [r"network\.(third|second)\..*"], "lr": 1e-6},
    }
    unchanged = deepcopy(given)
    trainer_in(callbacks=[FinetuningScheduler(ft_schedule=given)], max_epochs=2).fit(Toy())
    assert given == unchanged
    saved = read(tmp_path / "Toy_ft_schedule.yaml")
    assert set(saved[0]["params"]) == set(HEAD)
    assert set(saved[1]["params"]) == {*THIRD, *SECOND}
    assert saved[0]["max_transition_epoch"] == 1
    assert saved[1]["lr"] == 1e-6


@pytest.mark.parametrize("as_string", [True, False])
def test_a_schedule_from_a_file(as_string: bool, trainer_in: TrainerIn, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "0:\n  params:\n  - network.head.*\n  max_transition_epoch: 1\n"
        "1:\n  params:\n  - network.third.weight\n  - network.third.bias\n  lr: 1e-06\n",
        encoding="utf-8",
    )
    content = path.read_bytes()
    scheduler = FinetuningScheduler(ft_schedule=str(path) if as_string else path)
    trainer = trainer_in(callbacks=[scheduler], max_epochs=2)
    trainer.fit(Toy())
    assert path.read_bytes() == content
    assert scheduler.curr_depth == 1
    assert trainer.optimizers[0].param_groups[1]["lr"] == 1e-6
    assert parameters_by_phase(tmp_path / "Toy_ft_schedule.yaml").keys() == {0, 1}


def test_a_generated_schedule_can_be_trained_with(trainer_in: TrainerIn, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        trainer_in(callbacks=[FinetuningScheduler(gen_ft_sched_only=True)]).fit(Toy())
    scheduler = FinetuningScheduler(ft_schedule=tmp_path / "Toy_ft_schedule.yaml", log_dir=tmp_path / "run")
    trainer_in(callbacks=[scheduler], max_epochs=1).fit(Toy())
    assert scheduler.max_depth == 3


@pytest.mark.parametrize(
    ("schedule", "patterns"),
    [
        ({0: {"params": ["network.haed.weight"]}}, ["network.haed.weight", "network.head.weight"]),
        ({0: {"params": ["network.head.*"]}, 1: {"params": ["network.head.bias"]}}, ["network.head.bias"]),
        ({0: {"params": ["network.head.*"], "max_transition_epochs": 1}}, ["max_transition_epoch"]),
        ({0: {"params": ["network.head.*"]}, 2: {"params": ["network.third.*"]}}, ["Toy_ft_schedule_valid.yaml"]),
        (
            {0: {"params": ["network.haed.weight"]}, 1: {"params": ["network.thrid.weight"]}},
            ["network.haed.weight", "network.thrid.weight"],
        ),
    ],
    ids=["no-match", "twice", "unknown-key", "gap", "two-problems"],
)
def test_a_wrong_schedule_is_found_before_training(
    schedule: dict[int, Any], patterns: list[str], trainer_in: TrainerIn
) -> None:
    batches = AtBatches(lambda _: None)
    with pytest.raises(MisconfigurationException) as error:
        trainer_in(callbacks=[FinetuningScheduler(ft_schedule=schedule), batches]).fit(Toy())
    assert all(pattern in str(error.value) for pattern in patterns)
    assert isinstance(error.value.__cause__, ScheduleError)
    assert batches.seen == []


def test_parameters_in_no_phase_stay_frozen_and_are_reported_once(messages: Messages, trainer_in: TrainerIn) -> None:
    recipe = simple_recipe()
    module = Toy(recipe)
    before = module.network.first.weight.detach().clone()
    look = AtBatches(lambda _: module.network.first.weight.requires_grad)
    trainer_in(callbacks=[FinetuningScheduler(ft_schedule=schedule_of(recipe)), look]).fit(module)
    assert set(look.seen) == {False}
    assert module.network.first.weight.requires_grad  # as it came
    assert torch.equal(module.network.first.weight, before)
    count = sum(parameter.numel() for parameter in module.network.first.parameters())
    reported = [m for m in messages() if "no phase" in m or "frozen" in m]
    assert len(reported) == 1
    assert re.search(rf"\b(2|{count})\b", reported[0])


def test_a_learning_rate_in_phase_0_is_dropped_with_a_warning(messages: Messages, trainer_in: TrainerIn) -> None:
    schedule = {0: {"params": list(HEAD), "lr": 0.5}}
    trainer = trainer_in(callbacks=[FinetuningScheduler(ft_schedule=schedule)], max_epochs=1)
    trainer.fit(Toy(simple_recipe()))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    assert any("lr" in m and "phase 0" in m.lower() for m in messages())


# --- limits -----------------------------------------------------------------------------------------------------------


def test_epoch_transitions_only_needs_limits(trainer_in: TrainerIn) -> None:
    schedule = {0: {"params": list(HEAD), "max_transition_epoch": 2}, 1: {"params": list(THIRD)}}
    schedule |= {2: {"params": list(SECOND)}, 3: {"params": list(FIRST), "max_transition_epoch": 7}}
    scheduler = FinetuningScheduler(ft_schedule=schedule, epoch_transitions_only=True)
    with pytest.raises(MisconfigurationException, match=r"(?s)phase 1\b.*phase 2\b"):
        trainer_in(callbacks=[scheduler]).fit(Toy())


def test_epoch_transitions_only_needs_a_schedule(trainer_in: TrainerIn) -> None:
    """The default schedule names no limits."""
    with pytest.raises(MisconfigurationException, match="epoch_transitions_only"):
        trainer_in(callbacks=[FinetuningScheduler(epoch_transitions_only=True)]).fit(Toy())


@pytest.mark.parametrize(
    ("limit", "unreachable"), [({"max_epochs": 3}, True), ({"max_epochs": 4}, True), ({"max_epochs": 5}, False)]
)
def test_a_trainer_that_ends_before_the_schedule_is_warned_of(
    limit: dict[str, int], unreachable: bool, messages: Messages, trainer_in: TrainerIn
) -> None:
    scheduler = FinetuningScheduler(ft_schedule=schedule_of(simple_recipe()))
    trainer_in(callbacks=[scheduler], **limit).fit(Toy())
    assert any("max_epochs" in m and re.search(r"\b2\b", m) for m in messages()) is unreachable


def test_max_steps_is_a_ceiling_that_is_warned_of(messages: Messages, trainer_in: TrainerIn) -> None:
    scheduler = FinetuningScheduler(ft_schedule=schedule_of(simple_recipe()))
    trainer = trainer_in(callbacks=[scheduler], max_steps=10, max_epochs=-1)
    trainer.fit(Toy())
    assert (trainer.global_step, scheduler.curr_depth) == (10, 1)
    assert any("max_steps" in m for m in messages())


def test_a_phase_that_lasts_one_epoch_is_told_of_at_start(messages: Messages, trainer_in: TrainerIn) -> None:
    phases = (PhaseSpec(HEAD, max_epoch=3), PhaseSpec(THIRD, max_epoch=2), PhaseSpec(SECOND))
    recipe = simple_recipe(phases=phases)
    trainer_in(callbacks=[FinetuningScheduler(ft_schedule=schedule_of(recipe))]).fit(Toy(recipe))
    assert any("one epoch" in m and re.search(r"\b1\b", m) for m in messages())


def test_the_final_phase_ends_at_its_own_epoch(tmp_path: Path) -> None:
    recipe = simple_recipe(epochs=20)
    recipe = replace(recipe, phases=(*recipe.phases[:2], replace(recipe.phases[2], max_epoch=5)))
    session = Session(recipe, tmp_path).fit()
    assert session.trainer.global_step == 5 * BATCHES_PER_EPOCH
    assert session.trainer.current_epoch == 5
    assert [epoch.number for epoch in session.history.epochs] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("step", [19, 20, 21])
def test_the_final_phase_ends_at_its_own_step(step: int, tmp_path: Path) -> None:
    recipe = simple_recipe(epochs=20)
    recipe = replace(recipe, phases=(*recipe.phases[:2], replace(recipe.phases[2], max_step=step)))
    session = Session(recipe, tmp_path).fit()
    assert session.trainer.global_step == step
    assert session.history.steps == train(recipe).steps


@pytest.mark.parametrize(
    ("arguments", "scores"),
    [
        ({"stopping_threshold": 2.5}, (4.0, 3.0, 2.0)),
        ({"divergence_threshold": 9.0}, (4.0, 3.0, 10.0)),
        ({}, (4.0, 3.0, math.nan)),
        ({}, (4.0, 3.0, math.inf)),
    ],
    ids=["threshold", "divergence", "nan", "inf"],
)
@pytest.mark.parametrize("base", [EarlyStopping, FTSEarlyStopping])
def test_the_session_stops_in_a_phase_that_is_not_the_last(
    base: type[EarlyStopping], arguments: dict[str, float], scores: tuple[float, ...], trainer_in: TrainerIn
) -> None:
    recipe = simple_recipe(scores=(*scores, 1.0, 1.0, 1.0), phases=(PhaseSpec(HEAD), PhaseSpec(THIRD)))
    scheduler = FinetuningScheduler(ft_schedule=schedule_of(recipe))
    trainer = trainer_in(callbacks=[scheduler, base("val_loss", patience=2, **arguments)])
    trainer.fit(Toy(recipe))
    assert (trainer.current_epoch, scheduler.curr_depth, scheduler.depth_remaining) == (3, 0, 1)


def test_min_epochs_of_the_trainer_does_not_hold_back_a_transition(trainer_in: TrainerIn) -> None:
    recipe = simple_recipe(scores=(1.0, 2.0, 0.5, 0.4, 0.3, 0.2), phases=(PhaseSpec(HEAD), PhaseSpec(THIRD)))
    scheduler = FinetuningScheduler(ft_schedule=schedule_of(recipe))
    recorder = Recorder(lambda: scheduler.curr_depth)
    trainer_in(callbacks=[scheduler, EarlyStopping("val_loss", patience=1), recorder], min_epochs=5).fit(Toy(recipe))
    assert [epoch.phase for epoch in recorder.history.epochs] == [0, 0, 1, 1, 1, 1]


class ToyScoredByStep(Toy):
    """One score for each of the two validations of an epoch."""

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        scores = self.recipe.scores
        assert scores is not None
        self.log("val_loss", torch.tensor(scores[self.global_step // 2 - 1]), batch_size=8)


@pytest.mark.parametrize(
    ("intra", "scores", "phases"),
    [
        (True, (5.0, 4.0, 4.5, 3.0, 2.0, 1.0), [0] * 6 + [1] * 6),
        (True, (5.0, 6.0, 4.5, 3.0, 2.0, 1.0), [0] * 4 + [1] * 8),
        (False, (5.0, 4.0, 4.5, 4.75, 2.0, 1.0), [0] * 8 + [1] * 4),
    ],
)
def test_transitions_inside_an_epoch(
    intra: bool, scores: tuple[float, ...], phases: list[int], trainer_in: TrainerIn
) -> None:
    recipe = simple_recipe(scores=scores, phases=(PhaseSpec(HEAD), PhaseSpec(THIRD)))
    scheduler = FinetuningScheduler(ft_schedule=schedule_of(recipe), intra_epoch_transitions=intra)
    recorder = Recorder(lambda: scheduler.curr_depth)
    stopping = EarlyStopping("val_loss", patience=1)
    trainer = trainer_in(callbacks=[scheduler, stopping, recorder], val_check_interval=0.5, max_epochs=3)
    trainer.fit(ToyScoredByStep(recipe))
    assert [step.phase for step in recorder.history.steps] == phases


# --- attributes, messages, overriding ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_depth", "resolved"), [(-1, 3), (1, 1), (9, 3)])
def test_depths(max_depth: int, resolved: int, trainer_in: TrainerIn) -> None:
    scheduler = FinetuningScheduler(max_depth=max_depth)
    depths = AtBatches(lambda _: (scheduler.curr_depth, scheduler.depth_remaining))
    trainer = trainer_in(callbacks=[scheduler, EarlyStopping("val_loss", patience=1), depths], max_epochs=12)
    module = Toy(simple_recipe(scores=tuple(float(n) for n in range(12))))
    trainer.fit(module)
    assert scheduler.max_depth == resolved
    assert list(dict.fromkeys(depths.seen)) == [(depth, resolved - depth) for depth in range(resolved + 1)]
    assert scheduler.trainer is trainer
    assert scheduler.pl_module is module


def test_every_transition_logs_one_line(messages: Messages, trainer_in: TrainerIn) -> None:
    recipe = simple_recipe()
    trainer_in(callbacks=[FinetuningScheduler(ft_schedule=schedule_of(recipe))]).fit(Toy(recipe))
    first, second = [m for m in messages() if "trainable" in m and "learning rate" in m]
    assert "\n" not in first
    assert "\n" not in second
    for word in ("0", "1", "epoch 2", "step 8", "36", "39.", "0.1", "0.05"):
        assert word in first
    for word in ("1", "2", "epoch 4", "step 16", "66", "72.", "0.02"):
        assert word in second


def test_the_logging_level_is_that_of_the_package_alone(
    caplog: pytest.LogCaptureFixture, trainer_in: TrainerIn
) -> None:
    caplog.set_level(logging.INFO, logger="finetuning_scheduler")  # puts the level back afterwards
    before = {name: logging.getLogger(name).level for name in ("lightning", "lightning.pytorch", "torch", "")}
    recipe = simple_recipe()
    scheduler = FinetuningScheduler(ft_schedule=schedule_of(recipe), logging_level=logging.ERROR)
    trainer_in(callbacks=[scheduler]).fit(Toy(recipe))
    assert logging.getLogger("finetuning_scheduler").level == logging.ERROR
    assert {name: logging.getLogger(name).level for name in before} == before


def test_should_transition_can_be_overridden(trainer_in: TrainerIn) -> None:
    class EveryEpoch(FinetuningScheduler):
        def should_transition(self, trainer: Any) -> bool:
            return trainer.current_epoch > self.curr_depth

    scheduler = EveryEpoch()
    recorder = Recorder(lambda: scheduler.curr_depth)
    trainer_in(callbacks=[scheduler, recorder], max_epochs=4).fit(Toy())
    assert [epoch.phase for epoch in recorder.history.epochs] == [0, 1, 2, 3]


def test_in_the_last_phase_an_answer_of_ones_own_does_not_count(trainer_in: TrainerIn) -> None:
    class Always(FinetuningScheduler):
        def should_transition(self, trainer: Any) -> bool:
            return True

    scheduler = Always(max_depth=1)
    recorder = Recorder(lambda: scheduler.curr_depth)
    trainer_in(callbacks=[scheduler, recorder], max_epochs=3).fit(Toy())
    assert [epoch.phase for epoch in recorder.history.epochs] == [1, 1, 1]


def test_step_can_be_overridden(trainer_in: TrainerIn) -> None:
    entered: list[int] = []

    class Noting(FinetuningScheduler):
        def step(self) -> None:
            super().step()
            entered.append(self.curr_depth)

    recipe = simple_recipe()
    trainer_in(callbacks=[Noting(ft_schedule=schedule_of(recipe))]).fit(Toy(recipe))
    assert entered[-2:] == [1, 2]


# --- models, optimizers, normalisation --------------------------------------------------------------------------------


class BuiltInSetup(ToyOverAll):
    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__(recipe)
        del self.network

    def setup(self, stage: str) -> None:
        self.network = build_network(self.recipe.network)


class BuiltInConfigureModel(ToyOverAll):
    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__(recipe)
        del self.network

    def configure_model(self) -> None:
        if not hasattr(self, "network"):
            self.network = build_network(self.recipe.network)


@pytest.mark.parametrize("module", [BuiltInSetup, BuiltInConfigureModel])
@pytest.mark.parametrize("explicit", [True, False])
def test_layers_that_are_built_late(module: type[Toy], explicit: bool, tmp_path: Path) -> None:
    phases = tuple(PhaseSpec(names, max_epoch=-1) for names in ALL_PAIRS.values())
    recipe = simple_recipe(phases=phases, patience=1, scores=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    session = Session(recipe, tmp_path, module=module, explicit=explicit).fit()
    expected = train(recipe)
    assert session.history.steps == expected.steps
    assert session.history.epochs[-1].groups == expected.epochs[-1].groups


class TwoOptimizers(Toy):
    def configure_optimizers(self) -> Any:
        return [SGD(self.network.head.parameters(), lr=0.1), SGD(self.network.third.parameters(), lr=0.1)]


def test_two_optimizers_are_an_error(trainer_in: TrainerIn) -> None:
    module = TwoOptimizers()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="optimizer"):
        trainer_in(callbacks=[FinetuningScheduler()]).fit(module)


class NoOptimizer(Toy):
    def configure_optimizers(self) -> None:
        return None


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer_is_an_error(trainer_in: TrainerIn) -> None:
    with pytest.raises(MisconfigurationException, match="optimizer"):
        trainer_in(callbacks=[FinetuningScheduler()]).fit(NoOptimizer())


BATCH_NORM_RECIPE = Recipe(
    phases=(PhaseSpec(HEAD, max_epoch=1), PhaseSpec(pair("second"), max_epoch=2), PhaseSpec((*pair("norm"), *FIRST))),
    epochs=3,
    optimizer=momentum_sgd,
    network=normalised,
)


@pytest.mark.parametrize("track", [True, False])
def test_running_statistics_of_frozen_batch_norm(track: bool, tmp_path: Path) -> None:
    flags = AtBatches(lambda module: module.network.norm.track_running_stats)
    batches = AtBatches(lambda module: module.network.norm.num_batches_tracked.item())
    options = {"frozen_bn_track_running_stats": track}
    recipe = replace(BATCH_NORM_RECIPE, restore_best=False)
    session = Session(recipe, tmp_path, extra_callbacks=(flags, batches), scheduler_options=options).fit()
    assert flags.seen == [track] * 8 + [True] * 4
    assert batches.seen == (list(range(12)) if track else [0] * 8 + [0, 1, 2, 3])
    assert session.scheduler.curr_depth == 2


class Body(nn.Module):
    """A block of layers that is frozen or thawed as one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_of_frozen_modules(mode: str, tmp_path: Path) -> None:
    body = ("network.body.0.weight", "network.body.0.bias", "network.body.1.weight", "network.body.1.bias")
    body += ("network.body.3.weight", "network.body.3.bias")
    phases = (PhaseSpec(HEAD, max_epoch=2), PhaseSpec(body, lr=0.01))
    recipe = simple_recipe(phases=phases, network=Body, epochs=3, restore_best=False)
    modes = AtBatches(lambda module: [part.training for part in module.network.body.modules()])
    head = AtBatches(lambda module: module.network.head.training)
    statistics = AtBatches(lambda module: module.network.body[1].num_batches_tracked.item())
    options = {"frozen_modules_mode": mode}
    Session(recipe, tmp_path, extra_callbacks=(modes, head, statistics), scheduler_options=options).fit()
    frozen = mode == "train"
    assert modes.seen == [[frozen] * 5] * 8 + [[True] * 5] * 4
    assert head.seen == [True] * 12
    assert statistics.seen == (list(range(12)) if frozen else [0] * 8 + [0, 1, 2, 3])


def test_an_unknown_mode_of_frozen_modules_is_an_error(trainer_in: TrainerIn) -> None:
    with pytest.raises(MisconfigurationException, match="frozen_modules_mode"):
        trainer_in(callbacks=[FinetuningScheduler(frozen_modules_mode="sleep")]).fit(Toy())


def test_only_the_parameters_of_the_phases_so_far_require_gradients(tmp_path: Path) -> None:
    def trainable(module: Any) -> set[str]:
        return {name for name, parameter in module.named_parameters() if parameter.requires_grad}

    seen = AtBatches(trainable)
    Session(simple_recipe(), tmp_path, extra_callbacks=(seen,)).fit()
    phases = [set(HEAD), {*HEAD, *THIRD}, {*HEAD, *THIRD, *SECOND}]
    assert seen.seen == [names for names in phases for _ in range(8)]


# --- other uses of the trainer ----------------------------------------------------------------------------------------


def test_validating_and_testing_after_fit(tmp_path: Path) -> None:
    session = Session(simple_recipe(scores=(3.0, 2.0, 4.0, 5.0, 6.0, 7.0)), tmp_path).fit()
    session.module.recipe = replace(session.module.recipe, scores=None)
    final = deepcopy(session.module.state_dict())
    assert session.trainer.validate(session.module, verbose=False)[0].keys() == {"val_loss"}
    assert all(torch.equal(final[name], tensor) for name, tensor in session.module.state_dict().items())

    session.trainer.test(session.module, ckpt_path="best", verbose=False)
    best = session.history.epochs[1].weights
    assert all(torch.equal(best[name], tensor) for name, tensor in session.module.state_dict().items())


def test_validating_without_fit(trainer_in: TrainerIn) -> None:
    trainer = trainer_in(callbacks=[FinetuningScheduler()])
    assert trainer.validate(Toy(), verbose=False)[0].keys() == {"val_loss"}


def test_a_fast_development_run(trainer_in: TrainerIn) -> None:
    trainer = trainer_in(callbacks=[FinetuningScheduler()], fast_dev_run=2)
    trainer.fit(Toy())
    assert trainer.global_step == 2


def test_the_sanity_check_counts_for_nothing(tmp_path: Path) -> None:
    recipe = simple_recipe(scores=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), patience=2)
    recipe = replace(recipe, phases=tuple(replace(phase, max_epoch=-1) for phase in recipe.phases))
    session = Session(recipe, tmp_path, num_sanity_val_steps=2).fit()
    assert [epoch.phase for epoch in session.history.epochs] == [epoch.phase for epoch in train(recipe).epochs]


def test_enable_checkpointing_false_without_restoring(trainer_in: TrainerIn) -> None:
    recipe = simple_recipe()
    scheduler = FinetuningScheduler(ft_schedule=schedule_of(recipe), restore_best=False)
    trainer = trainer_in(callbacks=[scheduler], enable_checkpointing=False)
    trainer.fit(Toy(recipe))
    assert scheduler.curr_depth == 2


def test_the_callback_can_be_listed_last(trainer_in: TrainerIn) -> None:
    recipe = simple_recipe(
        scores=(1.0, 2.0, 0.5, 0.25, 0.75, 0.8), patience=1, phases=(PhaseSpec(HEAD), PhaseSpec(THIRD))
    )
    scheduler = FinetuningScheduler(ft_schedule=schedule_of(recipe))
    recorder = Recorder(lambda: scheduler.curr_depth)
    others = [EarlyStopping("val_loss", patience=1), ModelCheckpoint(monitor="val_loss"), recorder]
    trainer_in(callbacks=[*others, scheduler]).fit(Toy(recipe))
    assert [epoch.phase for epoch in recorder.history.epochs] == [0, 0, 1, 1, 1]
