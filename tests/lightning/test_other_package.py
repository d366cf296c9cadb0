"""Checkpoints of the 2.x package of this name resume: files that it has written, and files in its form."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping
from finetuning_scheduler.errors import CheckpointError
from tests.reference.history import assert_continues
from tests.reference.networks import FIRST, HEAD, SECOND, THIRD
from tests.reference.other_package import Reasons, as_2x, convert, convert_all
from tests.reference.recipe import PhaseSpec, Recipe, adamw, momentum_sgd
from tests.reference.toys import SaveAt, Session, make_trainer, roll_back

pytestmark = [
    pytest.mark.quick,
    # Lightning misses the multi-phase forms, although Lightning's own stand for them.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # It is, where a test says so; for a validation that is of no interest.
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

# --- files that the 2.x package has written --------------------------------------------------------------------------

WRITTEN = Path(__file__).parent / "from_2x"
SUMS = {
    "plain": {
        "model.3.weight": 2.44638,
        "model.5.weight": -0.52845,
        "model.7.weight": 0.07322,
        "model.7.bias": 0.26939,
    },
    "nodecay": {
        "model.3.weight": 2.44525,
        "model.5.weight": -0.52746,
        "model.7.weight": 0.07322,
        "model.7.bias": 0.27280,
    },
}
"""Where its uninterrupted session has ended."""
LOSSES = {"plain-epoch1": 0.71229, "plain-epoch2": 0.65123, "nodecay-epoch1": 0.71254, "nodecay-epoch2": 0.65118}
SCHEDULE = {
    0: {"params": ["model.7.*"], "max_transition_epoch": 2},
    1: {"params": ["model.5.*"], "lr": 0.05, "max_transition_epoch": 4},
    2: {"params": ["model.3.*"], "lr": 0.02},
}


class Net(pl.LightningModule):
    """The model of its session."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "nodecay":
            self.no_decay = ["bias"]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = nn.Sequential(
                *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)),
                *(nn.Tanh(), nn.Linear(8, 2)),
            )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", self.training_step(batch))
        self.log("val_acc", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return [optimizer], [StepLR(optimizer, 1, 0.7)]

    def train_dataloader(self) -> Any:
        return batches(0)

    def val_dataloader(self) -> Any:
        return batches(1)

    test_dataloader = val_dataloader

    @property
    def sums(self) -> dict[str, float]:
        return {name: float(each.detach().sum()) for name, each in self.named_parameters() if name in SUMS["plain"]}


def batches(seed: int) -> Any:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


def trainer_of(root: Path, dirpath: Path | str | None, **options: Any) -> pl.Trainer:
    saving = FTSCheckpoint(dirpath, monitor="val_loss", save_top_k=-1, filename="{epoch}")
    callbacks = [FinetuningScheduler(SCHEDULE), FTSEarlyStopping("val_loss", patience=3), saving]
    return make_trainer(root, max_epochs=8, callbacks=callbacks, **options)


@pytest.mark.parametrize("kind", SUMS)
def test_the_session_itself_ends_there(kind: str, tmp_path: Path) -> None:
    module = Net(kind)
    trainer_of(tmp_path, None).fit(module)
    assert module.sums == pytest.approx(SUMS[kind], abs=2e-5)


@pytest.mark.parametrize("where", ["its own", "its own, alone", "its own, from elsewhere", "another", "renamed"])
@pytest.mark.parametrize("name", LOSSES)
def test_its_files_resume(name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths in them are relative."""
    kind, _, epoch = name.partition("-epoch")
    own = tmp_path / "ckpts" / kind
    own.mkdir(parents=True)
    for path in WRITTEN.glob(f"{name}.ckpt" if "alone" in where else f"{kind}-*.ckpt"):
        shutil.copy(path, own / path.name.replace(f"{kind}-epoch", "epoch="))
    dirpath = own if "elsewhere" in where else f"ckpts/{kind}" if "own" in where else tmp_path / "other"
    if isinstance(dirpath, str):
        monkeypatch.chdir(tmp_path)
    trainer = trainer_of(tmp_path, dirpath)
    path = WRITTEN / f"{name}.ckpt" if where == "renamed" else own / f"epoch={epoch}.ckpt"
    module = Net(kind)
    trainer.fit(module, ckpt_path=path)
    assert module.sums == pytest.approx(SUMS[kind], abs=2e-5)
    assert trainer.global_step == 32
    kept = [Path(each) for each in trainer.checkpoint_callbacks[0].best_k_models]
    assert all(each.exists() for each in kept)
    if where == "another":
        assert [each.name for each in kept] == [f"epoch={number}.ckpt" for number in range(int(epoch), 8)]
    if "own" in where:  # the step is not saved twice
        assert f"epoch={epoch}-v1.ckpt" not in {each.name for each in kept}


@pytest.mark.parametrize("name", LOSSES)
def test_its_files_are_validated_and_tested(name: str, tmp_path: Path) -> None:
    for score in ("validate", "test"):
        trainer = trainer_of(tmp_path, tmp_path)
        (scores,) = getattr(trainer, score)(Net(name.partition("-")[0]), ckpt_path=WRITTEN / f"{name}.ckpt")
        assert scores["val_loss"] == pytest.approx(LOSSES[name], abs=2e-5)


def test_its_weights_load_and_a_new_fit_starts_from_them(tmp_path: Path) -> None:
    module = Net.load_from_checkpoint(WRITTEN / "plain-epoch1.ckpt", kind="plain")
    written = torch.load(WRITTEN / "plain-epoch1.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, written[name]) for name, value in module.state_dict().items())
    trainer = trainer_of(tmp_path, tmp_path)
    trainer.fit(module)
    assert trainer.current_epoch == 8


# --- runs in its form ------------------------------------------------------------------------------------------------

PATIENCE = Recipe(
    phases=(PhaseSpec(HEAD), PhaseSpec(THIRD, lr=0.05), PhaseSpec(SECOND, lr=0.02), PhaseSpec(FIRST, lr=0.01)),
    epochs=11,
    optimizer=momentum_sgd,
    patience=2,
    scores=(5.0, 4.0, 4.5, 4.25, 4.75, 4.1, 3.0, 3.5, 3.25, 2.0, 2.5),
)
EPOCHS = replace(
    PATIENCE,
    phases=(
        PhaseSpec(HEAD, max_epoch=2),
        PhaseSpec(THIRD, lr=0.05, max_epoch=4),
        PhaseSpec(SECOND, lr=0.02, max_epoch=5),
        PhaseSpec(FIRST, lr=0.01),
    ),
    epochs=7,
    optimizer=adamw,
    patience=None,
    scores=(1.0, 2.0, 3.0, 0.5, 0.75, 0.8, 0.9),
)
RECIPES = {
    "patience": PATIENCE,
    "patience, no decay": replace(PATIENCE, optimizer=adamw, no_decay=("bias",)),
    "epochs, best in an earlier phase": EPOCHS,
    "epochs, StepLR": replace(EPOCHS, scheduler=lambda optimizer: StepLR(optimizer, 1, 0.7)),
    "epochs, nothing restored": replace(EPOCHS, restore_best=False),
    "limits in the past": replace(
        EPOCHS, phases=tuple(replace(phase, max_epoch=1) for phase in EPOCHS.phases[:3]) + EPOCHS.phases[3:]
    ),
}


@pytest.mark.parametrize("reasons", ["as Lightning", "none", "of an earlier phase"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_resume_continues_from_every_epoch(recipe: Recipe, reasons: Reasons, tmp_path: Path) -> None:
    """The best checkpoint, which the transitions restore, is in that form, too."""
    saver = SaveAt("on_train_epoch_end", tmp_path)
    uninterrupted = Session(recipe, tmp_path, extra_callbacks=(saver,)).fit().history
    convert_all(tmp_path, reasons)
    for checkpoint in list(saver.files)[:-1]:
        roll_back(tmp_path, saver.files[checkpoint])
        resumed = Session(recipe, tmp_path).fit(ckpt_path=checkpoint)
        assert_continues(resumed.history, uninterrupted, saver.steps[checkpoint])


def test_files_in_that_form_are_of_the_same_form_as_those_that_it_has_written(tmp_path: Path) -> None:
    """A check of the tests' own teeth."""
    trainer_of(tmp_path, tmp_path, limit_train_batches=4).fit(Net("plain"))
    mine = as_2x(torch.load(tmp_path / "epoch=1.ckpt", weights_only=True))
    its = torch.load(WRITTEN / "plain-epoch1.ckpt", weights_only=True)
    assert mine["callbacks"].keys() == its["callbacks"].keys()
    for key, state in its["callbacks"].items():
        assert mine["callbacks"][key].keys() == state.keys()
    for part in ("fts_metadata", "internal_optimizer_metadata"):
        one, other = (each["callbacks"]["FinetuningScheduler"][part] for each in (mine, its))
        assert one.keys() == other.keys()
    (mine_groups,), (its_groups,) = (
        each["callbacks"]["FinetuningScheduler"]["internal_optimizer_metadata"].values() for each in (mine, its)
    )
    assert [(group.keys(), group["params"]) for group in mine_groups] == [
        (group.keys(), group["params"]) for group in its_groups
    ]


CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "multi-phase forms": lambda: [FTSEarlyStopping("val_loss", patience=2), FTSCheckpoint(monitor="val_loss")],
    "Lightning's own": lambda: [EarlyStopping("val_loss", patience=2), ModelCheckpoint(monitor="val_loss")],
    "none": list,
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_whatever_callbacks_there_are(kind: str, tmp_path: Path) -> None:
    saver = SaveAt("on_train_epoch_end", tmp_path)
    whole = Session(PATIENCE, tmp_path, extra_callbacks=(saver,)).fit()
    checkpoint = convert(list(saver.files)[1])  # the best one
    session = Session(PATIENCE, tmp_path / "resumed")
    kept = [each for each in session.trainer.callbacks if not isinstance(each, (EarlyStopping, ModelCheckpoint))]
    session.trainer.callbacks[:] = [*kept, *CALLBACKS[kind]()]
    session.fit(ckpt_path=checkpoint)
    assert_continues(session.history, whole.history, 8)


@pytest.mark.parametrize("reasons", ["as Lightning", "none"])
@pytest.mark.parametrize("recipe", [PATIENCE, EPOCHS], ids=["patience", "epochs"])
def test_a_finished_session_goes_on_with_a_greater_max_depth(recipe: Recipe, reasons: Reasons, tmp_path: Path) -> None:
    saver = SaveAt("on_train_epoch_end", tmp_path / "run")
    Session(replace(recipe, max_depth=1), tmp_path / "run", extra_callbacks=(saver,)).fit()
    uninterrupted = Session(recipe, tmp_path / "whole").fit().history
    convert_all(tmp_path / "run", reasons)
    last = list(saver.files)[-1]
    resumed = Session(recipe, tmp_path / "run").fit(ckpt_path=last)
    assert_continues(resumed.history, uninterrupted, saver.steps[last])
    over = Session(replace(recipe, max_depth=1), tmp_path / "run").fit(ckpt_path=last)
    assert over.history.steps == []


def plateau(optimizer: Any) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_reduce_on_plateau_is_told_the_score(epoch: int, tmp_path: Path) -> None:
    recipe = replace(EPOCHS, scheduler=plateau, restore_best=False)
    options: dict[str, Any] = {"checkpoint": {"save_top_k": -1, "save_on_train_epoch_end": False}}
    uninterrupted = Session(recipe, tmp_path, **options).fit().history
    (path,) = (tmp_path / "checkpoints").glob(f"epoch={epoch}-*.ckpt")
    resumed = Session(recipe, tmp_path, **options).fit(ckpt_path=convert(path)).history
    assert_continues(resumed, uninterrupted, 4 * (epoch + 1))


def test_a_score_that_the_last_checkpoint_does_not_tell_is_not_made_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Written with Lightning before 2.6, `current_score` is that of the newest best one there."""
    recipe = replace(EPOCHS, scheduler=plateau, restore_best=False)
    options: dict[str, Any] = {"checkpoint": {"save_top_k": -1, "save_last": True, "save_on_train_epoch_end": False}}
    whole = Session(recipe, tmp_path, **options).fit().history
    (path,) = (tmp_path / "checkpoints").glob("epoch=1-*.ckpt")
    file = torch.load(convert(path), weights_only=True)
    saving(last_model_path=str(path))(file["callbacks"])
    torch.save(file, path)
    with caplog.at_level(logging.INFO):
        resumed = Session(recipe, tmp_path / "new", **options).fit(ckpt_path=path).history
    assert "not known" not in caplog.text
    assert "does not tell" not in caplog.text
    assert_continues(resumed, whole, 8)
    torch.save({**file, "pytorch-lightning_version": "2.5.5"}, path)
    with caplog.at_level(logging.INFO):
        Session(recipe, tmp_path / "old", **options).fit(ckpt_path=path)
    assert f"{path} as its best, whose score it does not tell, until the next one." in caplog.text
    assert "'val_loss' of the epoch before the resume is not known: ReduceLROnPlateau misses a step." in caplog.text


@pytest.mark.parametrize("version", ["2.0.0", "2.5.1", "99.0.0"])
@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning v99")
def test_other_versions_of_lightning(version: str, tmp_path: Path) -> None:
    file = torch.load(WRITTEN / "plain-epoch1.ckpt", weights_only=True)
    torch.save({**file, "pytorch-lightning_version": version, "hyper_parameters": {"kind": "plain"}}, tmp_path / "a")
    module = Net("plain")
    trainer_of(tmp_path, tmp_path / "other").fit(module, ckpt_path=tmp_path / "a")
    assert module.sums == pytest.approx(SUMS["plain"], abs=2e-5)


# --- files that it has not written, or that are damaged --------------------------------------------------------------

Damage = Callable[[dict[str, Any]], object]
SCHEDULER, GROUPS, DEPTHS = "FinetuningScheduler", "internal_optimizer_metadata", "fts_metadata"


def scheduler(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda callbacks: change(callbacks[SCHEDULER])


def stored_groups(change: Callable[[list[dict[str, Any]]], object]) -> Damage:
    return lambda callbacks: change(callbacks[SCHEDULER][GROUPS][0])


def saving(**values: Any) -> Damage:
    return lambda callbacks: next(state for state in callbacks.values() if "dirpath" in state).update(values)


def stopping(**values: Any) -> Damage:
    return lambda callbacks: next(state for state in callbacks.values() if "wait_count" in state).update(values)


def neither(callbacks: dict[str, Any]) -> None:
    callbacks[SCHEDULER] = {"depth": 1, "groups": []}


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no depths": (scheduler(lambda state: state.pop(DEPTHS)), "`fts_metadata`: Field required"),
    "no groups": (scheduler(lambda state: state.pop(GROUPS)), "`internal_optimizer_metadata`: Field required"),
    "no depth": (
        scheduler(lambda state: state[DEPTHS].pop("current_ckpt_depth")),
        "`fts_metadata.current_ckpt_depth`: Field required",
    ),
    "a depth in words": (
        scheduler(lambda state: state[DEPTHS].update(current_ckpt_depth="1")),
        "`fts_metadata.current_ckpt_depth`: Input should be a valid integer",
    ),
    "a negative depth": (
        scheduler(lambda state: state[DEPTHS].update(current_ckpt_depth=-1)),
        "`fts_metadata.current_ckpt_depth`: Input should be greater than or equal to 0",
    ),
    "a depth too far": (
        scheduler(lambda state: state[DEPTHS].update(current_ckpt_depth=7)),
        "expected a checkpoint of a phase up to 2, got one of phase 7",
    ),
    "another depth": (
        scheduler(lambda state: state[DEPTHS].update(current_ckpt_depth=2)),
        "expected 2 parameter groups as in the checkpoint, got 3",
    ),
    "depths in words": (scheduler(lambda state: state.update({DEPTHS: "none"})), "`fts_metadata`: Input should be"),
    "two optimizers": (
        scheduler(lambda state: state[GROUPS].update({1: []})),
        "the groups of one optimizer, got [0, 1]",
    ),
    "no optimizer": (scheduler(lambda state: state[GROUPS].clear()), "the groups of one optimizer, got []"),
    "groups in words": (scheduler(lambda state: state[GROUPS].update({0: "all"})), f"`{GROUPS}.0`: Input should be"),
    "a group without names": (stored_groups(lambda groups: groups[1].pop("params")), f"`{GROUPS}.0.1.params`: Field"),
    "a group of numbers": (
        stored_groups(lambda groups: groups[0].update(params=[0, 1])),
        f"`{GROUPS}.0.0.params.0`: Input should be a valid string",
    ),
    "a group too few": (stored_groups(lambda groups: groups.pop()), "expected 1 parameter groups as in the checkpoint"),
    "an unknown name": (
        stored_groups(lambda groups: groups[0]["params"].append("model.9.weight")),
        "parameter group 0 differs from the checkpoint's: missing ['model.9.weight']",
    ),
    "a missing name": (
        stored_groups(lambda groups: groups[0]["params"].pop()),
        "parameter group 0 differs from the checkpoint's: missing [], not expected ['model.7.bias']",
    ),
    "saving: no best": (saving(best_model_path=None), "state of FTSCheckpoint: `best_model_path`"),
    "saving: a depth in words": (saving(best_ckpt_depth="x"), "state of FTSCheckpoint: `best_ckpt_depth`"),
    "saving: a directory of numbers": (saving(dirpath=3, last_model_path=4), "state of FTSCheckpoint: `dirpath"),
    "saving: a score in words": (saving(best_k_models={"a": "b"}), "state of FTSCheckpoint: `best_k_models"),
    "saving: scores in a list": (saving(best_k_models=[1.0]), "state of FTSCheckpoint: `best_k_models`"),
    "stopping: a count in words": (stopping(wait_count="3"), "state of FTSEarlyStopping: `wait_count`"),
    "stopping: no score": (stopping(best_score=None), "state of FTSEarlyStopping: `best_score"),
    "stopping: a reason in words": (stopping(stopping_reason="tired"), "stopping_reason"),
    "neither form": (neither, "checkpoint state: `phase`: Field required"),
    "no state": (lambda callbacks: callbacks.pop(SCHEDULER), "expected a checkpoint written with FinetuningScheduler"),
    "a list": (lambda callbacks: callbacks.update({SCHEDULER: [1]}), "expected a mapping, got list"),
}


class Trains(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained")


def damaged(damage: Damage, path: Path) -> Path:
    file = torch.load(WRITTEN / "plain-epoch2.ckpt", weights_only=True)
    damage(file["callbacks"])
    torch.save(file, path)
    return path


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_wrong_is_told_before_training_by_file_and_key(damage: Damage, message: str, tmp_path: Path) -> None:
    path, module = damaged(damage, tmp_path / "older.ckpt"), Net("plain")
    trainer = trainer_of(tmp_path, tmp_path / "other")
    trainer.callbacks.append(Trains())
    with pytest.raises(MisconfigurationException) as refused:
        trainer.fit(module, ckpt_path=path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "Fix: " in str(refused.value)
    assert isinstance(refused.value.__cause__, CheckpointError)
    assert all(parameter.requires_grad for parameter in module.parameters())  # as it came


SCHEDULES: dict[str, tuple[dict[int, dict[str, Any]], str]] = {
    "too few phases": ({0: SCHEDULE[0]}, "expected a checkpoint of a phase up to 0, got one of phase 1"),
    "another phase": ({**SCHEDULE, 1: SCHEDULE[2], 2: SCHEDULE[1]}, "parameter group 1 differs from the checkpoint's"),
    "more at once": (
        {0: SCHEDULE[0], 1: {"params": ["model.[35].*"]}},
        "missing [], not expected ['model.3.bias', 'model.3.weight']",
    ),
}


@pytest.mark.parametrize(("schedule", "message"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_another_schedule_is_told(schedule: dict[int, dict[str, Any]], message: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tmp_path)
    trainer.callbacks[0].ft_schedule = schedule
    with pytest.raises(MisconfigurationException) as refused:
        trainer.fit(Net("plain"), ckpt_path=WRITTEN / "plain-epoch2.ckpt")
    assert str(refused.value).startswith(f"{WRITTEN / 'plain-epoch2.ckpt'}: ")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda callbacks: callbacks.pop(SCHEDULER), "expected a best checkpoint written with FinetuningScheduler"),
        (neither, "expected a best checkpoint written with FinetuningScheduler"),
        (scheduler(lambda state: state.pop(DEPTHS)), "`fts_metadata`: Field required"),
        (stored_groups(lambda groups: groups.append({"params": []})), "cannot be read"),
    ],
    ids=["no state", "neither form", "no depths", "a group too many"],
)
def test_a_best_checkpoint_that_is_damaged_is_told_at_the_transition(
    damage: Damage, message: str, tmp_path: Path
) -> None:
    """The run is resumed from another, sound one that tells of it."""
    best, sound = tmp_path / "best.ckpt", tmp_path / "sound.ckpt"
    file, states = (torch.load(WRITTEN / "plain-epoch1.ckpt", weights_only=True) for _ in range(2))
    damage(file["callbacks"])
    torch.save(file, best)
    kept = {str(best): torch.tensor(0.7)}
    saving(dirpath=str(tmp_path), best_model_path=str(best), best_k_models=kept)(states["callbacks"])
    torch.save(states, sound)
    with pytest.raises(MisconfigurationException) as refused:
        trainer_of(tmp_path, tmp_path).fit(Net("plain"), ckpt_path=sound)
    assert message in str(refused.value)
    assert str(best) in str(refused.value)
    assert isinstance(refused.value.__cause__, CheckpointError)
