"""Callbacks that average or rewrite weights: restoring the best brings back weights and average of its moment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from finetuning_scheduler import FTSCheckpoint

from .toy_programs import (
    BATCHES_PER_EPOCH,
    PATIENT,
    TWO_PHASES,
    Net,
    Program,
    assert_same_epochs,
    different_weights,
    patient,
    program,
    saved,
    scheduler,
    weights_of,
)


class Normalised(Net):
    """With running statistics, which are averaged or not as the user says."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.neck(torch.tanh(self.body(x))))))


class UsersOwn(WeightAveraging):
    """The example of Lightning's documentation: begins late."""

    def __init__(self) -> None:
        super().__init__(avg_fn=get_ema_avg_fn(decay=0.5))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= 3


@dataclass(frozen=True)
class Averaging:
    """A callback, and the same average in a few lines of plain PyTorch."""

    make: Callable[[], WeightAveraging]
    average: Callable[[nn.Module], AveragedModel]
    counts: Callable[[int], bool] = lambda step: True
    model: type[Net] = Net


def ema(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, avg_fn=get_ema_avg_fn(decay=0.5), use_buffers=True)


AVERAGES: dict[str, Averaging] = {
    "mean": Averaging(WeightAveraging, lambda model: AveragedModel(model, use_buffers=True)),
    "ema": Averaging(lambda: EMAWeightAveraging(decay=0.5), ema),
    "ema-every-three-steps": Averaging(
        lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=3), ema, lambda step: step % 3 == 0
    ),
    "ema-that-starts-late": Averaging(
        lambda: EMAWeightAveraging(decay=0.5, update_starting_at_step=6), ema, lambda step: step >= 6
    ),
    "user's-own": Averaging(UsersOwn, ema, lambda step: step >= 3),
    "ema-of-statistics": Averaging(lambda: EMAWeightAveraging(decay=0.5), ema, model=Normalised),
    "ema-without-statistics": Averaging(
        lambda: EMAWeightAveraging(decay=0.5, use_buffers=False),
        lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(decay=0.5), use_buffers=False),
        model=Normalised,
    ),
}


@dataclass(frozen=True)
class Story:
    """A schedule, the scores of its epochs, and from which epoch's end each transition restores."""

    schedule: dict[int, Any]
    scores: tuple[float, ...]
    phases: tuple[int, ...]
    restores: dict[int, int]
    patience: int = 1000


STORIES: dict[str, Story] = {
    "the-best-is-not-the-last": Story(TWO_PHASES, (1.0, 2.0, 3.0, 2.5, 2.0), (0, 0, 1, 1, 1), {2: 0}),
    "the-best-is-the-last": Story(TWO_PHASES, (2.0, 1.0, 3.0, 2.5, 2.0), (0, 0, 1, 1, 1), {2: 1}),
    "the-best-is-of-an-earlier-phase": Story(
        PATIENT, (2.0, 1.0, 3.0, 4.0, 4.0), (0, 0, 0, 1, 2), {3: 1, 4: 1}, patience=1
    ),
    "each-phase-has-a-best": Story(PATIENT, (2.0, 3.0, 1.0, 3.0, 4.0), (0, 0, 1, 1, 2), {2: 0, 4: 2}, patience=1),
}


EARLIER = "the-best-is-of-an-earlier-phase"

# Each average in one story, and one average in each story.
CASES = {name: (averaging, STORIES[EARLIER]) for name, averaging in AVERAGES.items()} | {
    f"ema-{name}": (AVERAGES["ema"], story) for name, story in STORIES.items() if name != EARLIER
}


class Steps(Callback):
    """Keeps the raw weights after each optimizer step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.weights.append(weights_of(pl_module))


class SavesWhenEpochsBegin(Callback):
    """Saves a checkpoint at the first batch of each epoch, after a transition if there is one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, Path] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.files[trainer.current_epoch] = self.root / "begins" / f"{trainer.current_epoch}.ckpt"
            trainer.save_checkpoint(self.files[trainer.current_epoch])


class SavesWhenEpochsEnd(Checkpoint):
    """Saves a checkpoint at the end of each epoch, after all other callbacks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, Path] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.files[trainer.current_epoch] = self.root / "ends" / f"{trainer.current_epoch}.ckpt"
        trainer.save_checkpoint(self.files[trainer.current_epoch])


def tell(
    root: Path, story: Story, model: type[Net], *more: Callback, order: str = "scheduler-first", **options: Any
) -> Program:
    stop = EarlyStopping("val_loss", patience=story.patience)
    save = ModelCheckpoint(root / "best", monitor="val_loss", save_top_k=-1)
    ours = scheduler(story.schedule)
    others = [stop, save, *more]  # Lightning moves those that save to the end, in this order
    callbacks = [ours, *others] if order == "scheduler-first" else [*others, ours]
    return program(root, callbacks, model(scores=story.scores), **options)


STATES = ("state_dict", "current_model_state", "averaging_state")
"""Where Lightning's weight averaging keeps the average, the raw weights, and how many it has averaged."""


@pytest.mark.parametrize("order", ["scheduler-first", "scheduler-last"])
@pytest.mark.parametrize("averaging", AVERAGES.values(), ids=AVERAGES)
def test_a_transition_brings_back_what_the_best_file_holds(averaging: Averaging, order: str, tmp_path: Path) -> None:
    begins, ends = SavesWhenEpochsBegin(tmp_path), SavesWhenEpochsEnd(tmp_path)
    story = STORIES[EARLIER]
    run = tell(tmp_path, story, averaging.model, averaging.make(), begins, ends, order=order).fit()
    assert run.phases == list(story.phases)
    for epoch, best in story.restores.items():
        begun, ended = saved(begins.files[epoch]), saved(ends.files[best])
        assert different_weights(ended["state_dict"], ended["current_model_state"]) != set()
        before = saved(ends.files[epoch - 1])
        for key in STATES:
            assert different_weights(before[key], ended[key]) != set(), "the transition has nothing to bring back"
            assert different_weights(begun[key], ended[key]) == set(), f"{key} in epoch {epoch}"


@pytest.mark.parametrize(("averaging", "story"), CASES.values(), ids=CASES)
def test_averaging_does_not_change_what_is_averaged(averaging: Averaging, story: Story, tmp_path: Path) -> None:
    """Scores are scripted: the raw weights are those of the same session without an average."""
    run = tell(tmp_path / "averaged", story, averaging.model, averaging.make()).fit()
    without = tell(tmp_path / "without", story, averaging.model).fit()
    assert run.phases == list(story.phases)
    assert_same_epochs(run.epochs, without.epochs)


@pytest.mark.parametrize(("averaging", "story"), CASES.values(), ids=CASES)
def test_the_average_of_the_end_is_the_one_worked_out_by_hand(
    averaging: Averaging, story: Story, tmp_path: Path
) -> None:
    """A transition takes the average back to the best epoch; after the fit the module holds it, as Lightning says."""
    steps = Steps()
    run = tell(tmp_path, story, averaging.model, averaging.make(), steps).fit()
    assert run.phases == list(story.phases)

    model = averaging.model()
    average = averaging.average(model)
    at_the_end_of: dict[int, AveragedModel] = {}
    for step, weights in enumerate(steps.weights):
        epoch, batch = divmod(step, BATCHES_PER_EPOCH)
        if batch == 0 and epoch in story.restores:
            average = copy.deepcopy(at_the_end_of[story.restores[epoch]])
        model.load_state_dict(weights)
        if averaging.counts(step):
            average.update_parameters(model)
        at_the_end_of[epoch] = copy.deepcopy(average)
    learnt = {name for name, _ in model.named_parameters()}
    mine, theirs = weights_of(run.model), weights_of(average.module)
    assert different_weights(mine, theirs) & learnt == set()
    assert different_weights(mine, run.epochs[-1].weights) != set()


class Hides(Callback):
    """Writes other weights than the model's, and keeps the true ones elsewhere in the file."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["hidden"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: torch.zeros_like(value) for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        pl_module.load_state_dict(checkpoint["hidden"])


class Doubles(Callback):
    """Rewrites one tensor in the file, and undoes that in the module."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["state_dict"] = {
            **checkpoint["state_dict"],
            "head.weight": checkpoint["state_dict"]["head.weight"] * 2,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        with torch.no_grad():
            pl_module.head.weight.copy_(checkpoint["state_dict"]["head.weight"] / 2)


@pytest.mark.parametrize("order", ["scheduler-first", "scheduler-last"])
@pytest.mark.parametrize("rewrites", [Hides, Doubles])
def test_a_callback_that_rewrites_weights_when_saving_is_asked_when_its_file_is_restored(
    rewrites: type[Callback], order: str, tmp_path: Path
) -> None:
    story = STORIES[EARLIER]
    run = tell(tmp_path / "rewritten", story, Net, rewrites(), order=order).fit()
    without = tell(tmp_path / "without", story, Net).fit()
    assert run.phases == list(story.phases)
    assert_same_epochs(run.epochs, without.epochs)


class Counts(Callback):
    """Keeps a state that has nothing to do with weights."""

    def __init__(self) -> None:
        self.epochs = 0

    def on_train_epoch_end(self, *_: Any) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]


def test_the_state_of_other_callbacks_goes_on_through_a_transition(tmp_path: Path) -> None:
    counts = Counts()
    story = STORIES[EARLIER]
    tell(tmp_path, story, Net, counts, EMAWeightAveraging(decay=0.5)).fit()
    assert counts.epochs == len(story.scores)


class CountsInTheFile(Counts):
    """Keeps it with the hooks that others rewrite weights with, beside a metric that has a bias's shape."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["counts"] = {"epochs": self.epochs, "by class": torch.ones(1)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.epochs = checkpoint["counts"]["epochs"]


def test_what_others_keep_in_the_file_goes_on_through_a_transition(tmp_path: Path) -> None:
    counts = CountsInTheFile()
    story = STORIES[EARLIER]
    tell(tmp_path, story, Net, counts, Hides()).fit()
    assert counts.epochs == len(story.scores)


class Lags(Callback):
    """Keeps the weights of each epoch's end as its state: by name, or in a list as some libraries do."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.weights: dict[str, torch.Tensor] = {}
        self.begins: dict[int, dict[str, torch.Tensor]] = {}
        self.ends: dict[int, dict[str, torch.Tensor]] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = weights_of(pl_module)
        self.ends[trainer.current_epoch] = self.weights

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.begins.setdefault(trainer.current_epoch, self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.weights if self.kind == "by name" else list(self.weights.values())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        shadow = state_dict["shadow"]
        self.weights = shadow if self.kind == "by name" else dict(zip(self.weights, shadow, strict=True))


@pytest.mark.parametrize("kind", ["by name", "in a list"])
def test_weights_that_a_callback_keeps_as_its_state_return_to_the_best_moment(kind: str, tmp_path: Path) -> None:
    lags, story = Lags(kind), STORIES[EARLIER]
    run = tell(tmp_path, story, Net, lags).fit()
    assert run.phases == list(story.phases)
    for epoch, best in story.restores.items():
        assert different_weights(lags.ends[epoch - 1], lags.ends[best]) != set(), "there is nothing to bring back"
        assert different_weights(lags.begins[epoch], lags.ends[best]) == set(), f"epoch {epoch}"


@pytest.mark.parametrize(("averaging", "story"), CASES.values(), ids=CASES)
def test_a_killed_and_resumed_session_ends_with_the_weights_and_the_average_of_an_uninterrupted_one(
    averaging: Averaging, story: Story, tmp_path: Path
) -> None:
    ends = SavesWhenEpochsEnd(tmp_path)
    uninterrupted = tell(tmp_path, story, averaging.model, averaging.make(), ends).fit()
    assert uninterrupted.phases == list(story.phases)
    for epoch in range(len(story.scores) - 1):
        resumed = tell(tmp_path, story, averaging.model, averaging.make())
        resumed.fit(ckpt_path=ends.files[epoch])
        assert_same_epochs(resumed.epochs, uninterrupted.epochs[epoch + 1 :])
        average, expected = weights_of(resumed.model), weights_of(uninterrupted.model)
        assert different_weights(average, expected) == set(), f"average after a resume from epoch {epoch}"


@pytest.mark.parametrize("kind", [ModelCheckpoint, FTSCheckpoint])
def test_averages_of_two_folds_do_not_meet(kind: type[ModelCheckpoint], tmp_path: Path) -> None:
    """One list of callbacks, the average among them, for two trainers and models."""
    callbacks = [scheduler(), patient(), EMAWeightAveraging(decay=0.5), kind(monitor="val_loss")]
    program(tmp_path / "first", callbacks, Net(seed=1, scores=(0.1, 0.2))).fit()
    used = program(tmp_path / "used", callbacks, Net(seed=2, scores=(1.0, 2.0))).fit()
    fresh = [scheduler(), patient(), EMAWeightAveraging(decay=0.5), kind(monitor="val_loss")]
    alone = program(tmp_path / "alone", fresh, Net(seed=2, scores=(1.0, 2.0))).fit()
    assert_same_epochs(used.epochs, alone.epochs)


class OnesOwnStochastic(StochasticWeightAveraging):
    """A user's subclass."""


class Counted(Net):
    """Counts its batches."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.batches_trained = 0

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.batches_trained += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [StochasticWeightAveraging, OnesOwnStochastic])
@pytest.mark.parametrize("order", ["scheduler-first", "scheduler-last"])
def test_stochastic_weight_averaging_and_its_subclasses_are_refused_before_training(
    kind: type[StochasticWeightAveraging], order: str, tmp_path: Path
) -> None:
    run = tell(tmp_path, STORIES["the-best-is-the-last"], Counted, kind(swa_lrs=0.1), order=order)
    with pytest.raises(MisconfigurationException, match=kind.__name__):
        run.fit()
    assert run.model.batches_trained == 0


def prune(**options: Any) -> Callable[[], ModelPruning]:
    """Half of the parameters, after epoch 1 unless said otherwise."""
    defaults = {"amount": 0.5, "apply_pruning": lambda epoch: epoch == 1, "use_lottery_ticket_hypothesis": False}
    return lambda: ModelPruning("l1_unstructured", **(defaults | options))


PRUNINGS: dict[str, Callable[[], ModelPruning]] = {
    "before-the-transition": prune(),
    "before-the-best": prune(apply_pruning=lambda epoch: epoch == 0),
    "in-the-second-phase": prune(apply_pruning=lambda epoch: epoch == 3),
    "each-epoch": prune(amount=0.2, apply_pruning=True),
    "weights-alone": prune(parameter_names=["weight"]),
    "by-layer": prune(use_global_unstructured=False),
    "after-validation": prune(prune_on_train_epoch_end=False),
    "not-permanent": prune(make_pruning_permanent=False),
    "lottery-ticket": prune(use_lottery_ticket_hypothesis=True),
}


@pytest.mark.parametrize("restore_best", [True, False], ids=["restoring", "not-restoring"])
@pytest.mark.parametrize("make", PRUNINGS.values(), ids=PRUNINGS)
def test_pruning_works_or_is_refused_before_training(
    make: Callable[[], ModelPruning], restore_best: bool, tmp_path: Path
) -> None:
    """Nothing in between: no exception at a transition, and no phase that trains nothing."""
    callbacks = [scheduler(restore_best=restore_best), patient(), make()]
    run = program(tmp_path, callbacks, Counted(scores=(1.0, 2.0, 3.0, 2.0)))
    refusal = None
    try:
        run.fit()
    except MisconfigurationException as error:
        refusal = str(error)
    if refusal is not None:
        assert "ModelPruning" in refusal
        assert run.model.batches_trained == 0
        return
    assert run.phases == [0, 0, 1, 1, 1]
    layers = {name: getattr(run.model, name) for name in ("body", "neck", "head")}
    values = torch.cat([tensor.flatten() for layer in layers.values() for tensor in (layer.weight, layer.bias)])
    assert (values == 0).float().mean() >= 0.4
    second, last = (unpruned_names(run.epochs[epoch].weights) for epoch in (2, 4))
    moved = {name.split(".")[0] for name in last if not torch.equal(second[name], last[name])}
    assert moved == layers.keys()


def unpruned_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pruning gives a parameter another name, and the model a mask."""
    return {name.removesuffix("_orig"): value for name, value in weights.items() if not name.endswith("_mask")}
