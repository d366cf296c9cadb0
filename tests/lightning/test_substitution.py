"""A user's EarlyStopping and ModelCheckpoint are replaced by multi-phase forms that behave alike in every argument."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.reference.recipe import schedule_of, simple_recipe
from tests.reference.toys import Recorder, Toy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import lightning.pytorch as pl

# For each parameter of the base class a value other than its default, with what else that value needs to be valid.
EARLY_STOPPING_ARGUMENTS: dict[str, dict[str, Any]] = {
    "monitor": {"monitor": "val_accuracy"},
    "min_delta": {"min_delta": 0.25},
    "patience": {"patience": 11},
    "verbose": {"verbose": True},
    "mode": {"mode": "max"},
    "strict": {"strict": False},
    "check_finite": {"check_finite": False},
    "stopping_threshold": {"stopping_threshold": 0.125},
    "divergence_threshold": {"divergence_threshold": 99.0},
    "check_on_train_epoch_end": {"check_on_train_epoch_end": True},
    "log_rank_zero_only": {"log_rank_zero_only": True},
}
MODEL_CHECKPOINT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "dirpath": {"dirpath": "elsewhere"},
    "filename": {"filename": "{step}-named"},
    "monitor": {"monitor": "val_accuracy"},
    "verbose": {"verbose": True},
    "save_last": {"save_last": True},
    "save_top_k": {"save_top_k": 3},
    "save_on_exception": {"save_on_exception": True},
    "save_weights_only": {"save_weights_only": True},
    "mode": {"mode": "max"},
    "auto_insert_metric_name": {"auto_insert_metric_name": False},
    "every_n_train_steps": {"every_n_train_steps": 2},
    "train_time_interval": {"train_time_interval": timedelta(minutes=5)},
    "every_n_epochs": {"every_n_epochs": 2},
    "save_on_train_epoch_end": {"save_on_train_epoch_end": False},
    "enable_version_counter": {"enable_version_counter": False},
}
COMBINATIONS_OF_EARLY_STOPPING: dict[str, dict[str, Any]] = {
    "min_delta-max": {"min_delta": 0.25, "mode": "max"},
    "negative-min_delta": {"min_delta": -0.25},
    "checked-after-validation": {"check_on_train_epoch_end": False},
}
COMBINATIONS_OF_MODEL_CHECKPOINT: dict[str, dict[str, Any]] = {
    "save_last-link": {"save_last": "link"},
    "save-all": {"save_top_k": -1},
    "never-every-epoch": {"every_n_epochs": 0},
    "saved-at-epoch-end": {"save_on_train_epoch_end": True},
}


PHASES = schedule_of(simple_recipe())


class StopBeforeTrainingError(Exception):
    """The callbacks are in place; nothing more is needed."""


class Stop(Callback):
    def on_train_start(self, *_: Any) -> None:
        raise StopBeforeTrainingError


class ToyWithAccuracy(Toy):
    """Logs a second metric."""

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().validation_step(batch)
        self.log("val_accuracy", 0.5)


def scheduler(**options: Any) -> Any:
    from finetuning_scheduler import FinetuningScheduler

    return FinetuningScheduler(**({"ft_schedule": schedule_of(simple_recipe())} | options))


def set_up(trainer_in: Callable[..., pl.Trainer], callbacks: list[Any], **options: Any) -> pl.Trainer:
    trainer = trainer_in(callbacks=[*callbacks, Stop()], **options)
    with pytest.raises(StopBeforeTrainingError):
        trainer.fit(ToyWithAccuracy())
    return trainer


def of_type(trainer: pl.Trainer, kind: type[Any]) -> Any:
    (only,) = (callback for callback in trainer.callbacks if isinstance(callback, kind))
    return only


def behaviour(callback: Callback, like: Callback | None = None) -> dict[str, Any]:
    """The attributes that the base class has, without what Lightning attaches and what differs with the clock."""
    ignored = {"log", "log_dict", "_fs", "_last_time_checked"}
    names = vars(callback if like is None else like).keys() - ignored
    return {name: getattr(callback, name) for name in names}


def parameters_of(base: type[Any]) -> set[str]:
    return set(inspect.signature(base.__init__).parameters) - {"self"}


@pytest.mark.parametrize(
    ("base", "table"), [(EarlyStopping, EARLY_STOPPING_ARGUMENTS), (ModelCheckpoint, MODEL_CHECKPOINT_ARGUMENTS)]
)
def test_the_tables_cover_the_signatures(base: type[Any], table: dict[str, dict[str, Any]]) -> None:
    assert table.keys() == parameters_of(base)
    defaults = {name: parameter.default for name, parameter in inspect.signature(base.__init__).parameters.items()}
    assert [name for name, arguments in table.items() if arguments[name] == defaults[name]] == []


@pytest.mark.parametrize("listed", ["before", "after"])
@pytest.mark.parametrize(
    "arguments",
    [*EARLY_STOPPING_ARGUMENTS.values(), *COMBINATIONS_OF_EARLY_STOPPING.values()],
    ids=[*EARLY_STOPPING_ARGUMENTS, *COMBINATIONS_OF_EARLY_STOPPING],
)
def test_early_stopping(arguments: dict[str, Any], listed: str, trainer_in: Callable[..., pl.Trainer]) -> None:
    from finetuning_scheduler import FTSEarlyStopping

    arguments = {"monitor": "val_loss"} | arguments
    given, fresh = EarlyStopping(**arguments), EarlyStopping(**arguments)
    direct = FTSEarlyStopping(**arguments)

    callbacks = [given, scheduler()] if listed == "before" else [scheduler(), given]
    substituted = of_type(set_up(trainer_in, callbacks), EarlyStopping)
    directly = of_type(set_up(trainer_in, [scheduler(), direct]), EarlyStopping)

    assert type(substituted) is FTSEarlyStopping
    assert directly is direct
    assert behaviour(substituted, like=fresh) == behaviour(direct, like=fresh)
    assert substituted.state_key.split("{")[1] == given.state_key.split("{")[1]
    assert type(given) is EarlyStopping
    assert behaviour(given, like=fresh) == behaviour(substituted, like=fresh)


@pytest.mark.parametrize("listed", ["before", "after"])
@pytest.mark.parametrize(
    "arguments",
    [*MODEL_CHECKPOINT_ARGUMENTS.values(), *COMBINATIONS_OF_MODEL_CHECKPOINT.values()],
    ids=[*MODEL_CHECKPOINT_ARGUMENTS, *COMBINATIONS_OF_MODEL_CHECKPOINT],
)
def test_model_checkpoint(
    arguments: dict[str, Any], listed: str, trainer_in: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    from finetuning_scheduler import FTSCheckpoint

    arguments = {"monitor": "val_loss"} | arguments
    if "dirpath" in arguments:
        arguments["dirpath"] = tmp_path / arguments["dirpath"]
    given, fresh = ModelCheckpoint(**arguments), ModelCheckpoint(**arguments)
    direct = FTSCheckpoint(**arguments)

    ours = scheduler(restore_best=False)
    callbacks = [given, ours] if listed == "before" else [ours, given]
    substituted = of_type(set_up(trainer_in, callbacks), ModelCheckpoint)
    directly = of_type(set_up(trainer_in, [scheduler(restore_best=False), direct]), ModelCheckpoint)

    assert type(substituted) is FTSCheckpoint
    assert directly is direct
    assert behaviour(substituted, like=fresh) == behaviour(direct, like=fresh)
    assert type(given) is ModelCheckpoint
    assert behaviour(given, like=fresh) == behaviour(substituted, like=fresh)


def test_attributes_set_after_construction_are_carried_over(trainer_in: Callable[..., pl.Trainer]) -> None:
    """Lightning's own documentation sets these on the instance."""
    given = ModelCheckpoint(monitor="val_loss", save_last=True)
    given.CHECKPOINT_NAME_LAST = "{epoch}-latest"
    given.FILE_EXTENSION = ".pt"
    substituted = of_type(set_up(trainer_in, [scheduler(), given]), ModelCheckpoint)
    assert substituted.CHECKPOINT_NAME_LAST == "{epoch}-latest"
    assert substituted.FILE_EXTENSION == ".pt"


@pytest.mark.parametrize(("mode", "sign"), [("min", -1), ("max", 1)])
def test_min_delta_is_applied_once(mode: str, sign: int, trainer_in: Callable[..., pl.Trainer]) -> None:
    given = EarlyStopping("val_loss", min_delta=0.25, mode=mode)
    substituted = of_type(set_up(trainer_in, [scheduler(), given]), EarlyStopping)
    assert substituted.min_delta == sign * 0.25
    assert given.min_delta == sign * 0.25


def test_a_callback_instance_serves_two_trainers(trainer_in: Callable[..., pl.Trainer]) -> None:
    given = EarlyStopping("val_loss", min_delta=0.25)
    for _ in range(2):
        assert of_type(set_up(trainer_in, [scheduler(), given]), EarlyStopping).min_delta == -0.25


def test_missing_ones_are_added(trainer_in: Callable[..., pl.Trainer]) -> None:
    from finetuning_scheduler import FTSCheckpoint, FTSEarlyStopping

    trainer = set_up(trainer_in, [scheduler()])
    stopping, saving = of_type(trainer, EarlyStopping), of_type(trainer, ModelCheckpoint)
    assert type(stopping) is FTSEarlyStopping
    assert type(saving) is FTSCheckpoint
    assert {stopping.monitor, saving.monitor} == {"val_loss"}
    assert {stopping.mode, saving.mode} == {"min"}


def test_a_default_model_checkpoint_counts_as_missing(trainer_in: Callable[..., pl.Trainer]) -> None:
    """Trainer itself adds one, and nobody can tell it from the user's."""
    saving = of_type(set_up(trainer_in, [scheduler(), ModelCheckpoint()]), ModelCheckpoint)
    assert saving.monitor == "val_loss"


WITHOUT_MONITOR: dict[str, dict[str, Any]] = {
    "every second epoch": {"every_n_epochs": 2},
    "each epoch": {"save_top_k": -1},
    "the last": {"save_last": True},
    "the last only": {"save_last": True, "save_top_k": 0},
    "weights only": {"save_weights_only": True},
}


@pytest.mark.parametrize("arguments", WITHOUT_MONITOR.values(), ids=WITHOUT_MONITOR)
def test_one_that_monitors_nothing_saves_as_in_plain_lightning_and_does_not_drive(
    arguments: dict[str, Any], trainer_in: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    from finetuning_scheduler import FTSCheckpoint

    saved: list[list[str]] = []
    for name, ours in {"with": [scheduler()], "without": []}.items():
        given = ModelCheckpoint(dirpath=tmp_path / name, **arguments)
        trainer = trainer_in(callbacks=[*ours, given], max_epochs=4)
        trainer.fit(Toy())
        saved.append(sorted(path.name for path in (tmp_path / name).iterdir()))
        assert type(given) is ModelCheckpoint
        assert given.monitor is None
        drivers = [callback for callback in trainer.callbacks if isinstance(callback, FTSCheckpoint)]
        assert [driver.monitor for driver in drivers] == ["val_loss"] * len(ours)
    assert saved[0] == saved[1]


LISTED: dict[str, tuple[Callable[[], list[Callback]], int]] = {
    "a default beside one that monitors": (
        lambda: [ModelCheckpoint(), ModelCheckpoint(monitor="val_accuracy", mode="max")],
        1,
    ),
    "a multi-phase form without a monitor": (
        lambda: [fts_checkpoint(), ModelCheckpoint(monitor="val_accuracy", mode="max")],
        1,
    ),
    "weights only first": (
        lambda: [
            ModelCheckpoint(monitor="val_accuracy", mode="max", save_weights_only=True),
            ModelCheckpoint(monitor="val_accuracy", mode="max", every_n_epochs=2),
        ],
        1,
    ),
    "none kept first": (
        lambda: [
            ModelCheckpoint(monitor="val_accuracy", mode="max", save_top_k=0),
            ModelCheckpoint(monitor="val_accuracy", mode="max", every_n_epochs=2),
        ],
        1,
    ),
    "a multi-phase form last": (
        lambda: [ModelCheckpoint(monitor="val_accuracy"), fts_checkpoint(monitor="val_accuracy", mode="max")],
        1,
    ),
    "the first that monitors": (
        lambda: [ModelCheckpoint(monitor="val_accuracy", mode="max"), ModelCheckpoint(every_n_epochs=2)],
        0,
    ),
}


def fts_checkpoint(**arguments: Any) -> Any:
    from finetuning_scheduler import FTSCheckpoint

    return FTSCheckpoint(**arguments)


class OnlyAccuracy(Toy):
    """Logs nothing that is called ``val_loss``."""

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.log("val_accuracy", 1 - self.loss(batch))


@pytest.mark.parametrize(("make", "chosen"), LISTED.values(), ids=LISTED)
def test_of_several_one_that_can_be_restored_drives(
    make: Callable[[], list[Callback]], chosen: int, trainer_in: Callable[..., pl.Trainer]
) -> None:
    given = make()
    ours = scheduler()
    trainer = trainer_in(callbacks=[ours, EarlyStopping("val_accuracy", mode="max", patience=100), *given])
    trainer.fit(OnlyAccuracy())
    assert ours.curr_depth == 2
    depths = [vars(callback).get("current_ckpt_depth", 0) for callback in given]
    assert [index for index, depth in enumerate(depths) if depth > 0] == [chosen]


def test_without_restoring_nothing_has_to_be_logged(trainer_in: Callable[..., pl.Trainer]) -> None:
    """The checkpoint that a trainer adds saves each epoch then, as in plain Lightning."""
    schedule = {number: {**phase, "max_transition_epoch": 2 * number + 2} for number, phase in PHASES.items()}
    ours = scheduler(ft_schedule=schedule, restore_best=False, epoch_transitions_only=True)
    trainer = trainer_in(callbacks=[ours])
    trainer.fit(OnlyAccuracy())
    assert (ours.curr_depth, trainer.current_epoch) == (2, 6)
    assert trainer.checkpoint_callback.monitor is None  # type: ignore[union-attr]


def test_multi_phase_forms_given_by_the_user_are_kept(trainer_in: Callable[..., pl.Trainer]) -> None:
    from finetuning_scheduler import FTSCheckpoint, FTSEarlyStopping

    stopping, saving = FTSEarlyStopping("val_loss", patience=2), FTSCheckpoint(monitor="val_loss")
    trainer = set_up(trainer_in, [stopping, scheduler(), saving])
    assert of_type(trainer, EarlyStopping) is stopping
    assert of_type(trainer, ModelCheckpoint) is saving


def test_other_callbacks_stay_in_order_and_checkpointing_comes_last(trainer_in: Callable[..., pl.Trainer]) -> None:
    others = [Recorder(), Recorder()]
    trainer = set_up(trainer_in, [others[0], scheduler(), ModelCheckpoint(monitor="val_loss"), others[1]])
    assert [callback for callback in trainer.callbacks if isinstance(callback, Recorder)] == others
    assert isinstance(trainer.callbacks[-1], ModelCheckpoint)


def test_two_schedulers_are_an_error(trainer_in: Callable[..., pl.Trainer]) -> None:
    with pytest.raises((MisconfigurationException, RuntimeError), match="FinetuningScheduler"):
        trainer_in(callbacks=[scheduler(), scheduler()]).fit(Toy())


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"monitor": "val_loss", "save_top_k": 0}, "save_top_k"),
        ({"monitor": None, "every_n_epochs": 2}, "monitor"),
        ({"monitor": None, "filename": "{epoch}"}, "monitor"),
    ],
)
def test_restoring_the_best_needs_a_best(
    arguments: dict[str, Any], pattern: str, trainer_in: Callable[..., pl.Trainer]
) -> None:
    from finetuning_scheduler import FTSCheckpoint

    given = FTSCheckpoint(**arguments)
    with pytest.raises(MisconfigurationException, match=pattern):
        trainer_in(callbacks=[scheduler(), given]).fit(Toy())


@pytest.mark.parametrize("arguments", [{"monitor": "val_loss", "save_top_k": 0}, {"every_n_epochs": 2}])
def test_without_restoring_the_best_any_checkpointing_will_do(
    arguments: dict[str, Any], trainer_in: Callable[..., pl.Trainer]
) -> None:
    trainer = trainer_in(callbacks=[scheduler(restore_best=False), ModelCheckpoint(**arguments)])
    trainer.fit(Toy())
    assert trainer.current_epoch == 6


@pytest.mark.parametrize("kind", ["stopping", "saving"])
def test_an_absent_metric_lists_those_that_were_logged(kind: str, trainer_in: Callable[..., pl.Trainer]) -> None:
    given: Callback = EarlyStopping("typo") if kind == "stopping" else ModelCheckpoint(monitor="typo")
    with pytest.raises((MisconfigurationException, RuntimeError)) as error:
        trainer_in(callbacks=[scheduler(), given]).fit(ToyWithAccuracy())
    assert all(name in str(error.value) for name in ("typo", "val_loss", "val_accuracy"))


def test_early_stopping_checks_after_validation_unless_told_otherwise(trainer_in: Callable[..., pl.Trainer]) -> None:
    """At the end of validation a checkpoint of the same epoch already knows the outcome."""
    trainer = set_up(trainer_in, [scheduler()])
    seen: list[int] = []

    class Watch(Callback):
        def on_validation_end(self, *_: Any) -> None:
            seen.append(of_type(self.trainer, EarlyStopping).wait_count)

    watch = Watch()
    recipe = simple_recipe(scores=(1.0, 2.0))
    trainer = trainer_in(max_epochs=2, callbacks=[scheduler(), EarlyStopping("val_loss", patience=5), watch])
    watch.trainer = trainer
    trainer.fit(Toy(recipe))
    assert seen == [0, 1]
