"""Ways to train and what can be combined with each: fits of every pair, which are all compared with one device."""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau, StepLR

from . import cases, harness
from .cases import AN_EPOCH_EACH, Classifier
from .history import Epoch, group_names, learning_rates, snapshot
from .networks import HEAD, SECOND, THIRD, Residual, Share, Wrapped, build_network
from .recipe import Recipe, momentum_sgd

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003, "weight_decay": 0.1}}
HALVING = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
BELOW_THE_HEAD = ["network.(first|norm|second|third).*"]


def with_keys(**keys: Any) -> dict[int, dict[str, Any]]:
    """The schedule with further keys in phase 1."""
    return {**AN_EPOCH_EACH, 1: AN_EPOCH_EACH[1] | keys}


@dataclass(frozen=True)
class Feature:
    """What a run is combined with.

    Args:
        schedule: The phases as a user writes them; ``None`` for a generated schedule.
        recipe: Changes of the recipe.
        settings: Arguments of the callback and of `PhaseRunner`.
        epochs: Epochs to train.
        bfloat16: Whether to train with ``bf16-mixed``.
        compiled: Whether a layer is compiled.
        statistics: Whether the normalisation, which no phase thaws then, keeps running statistics.
        average: Whether `EMAWeightAveraging` averages the weights.
        slim: Whether checkpoints leave out what is frozen.
        interval: When Lightning validates, as a share of an epoch.
        saved_after: Epochs after which a hand-written loop is saved and goes on in a new one.
        tolerance: Of the weights; what ranks sum in another order than one device does.
    """

    schedule: dict[int, dict[str, Any]] | None = field(default_factory=lambda: AN_EPOCH_EACH)
    changes: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int = 4
    bfloat16: bool = False
    compiled: bool = False
    statistics: bool = False
    average: bool = False
    slim: bool = False
    interval: float = 1.0
    saved_after: int | None = None
    tolerance: float = cases.TOLERANCE

    @property
    def recipe(self) -> Recipe:
        return replace(cases.RECIPE, epochs=self.epochs, **self.changes)


# The first epoch's score stays the best one.
WORSENING = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
BEST_BACK = {"restore_best": True, "scores": WORSENING}
FEATURES = {
    "nothing": Feature(),
    "generated schedule": Feature(None, {"patience": 1, "scores": WORSENING}, epochs=6),
    "restored best": Feature(changes=BEST_BACK),
    "resumed": Feature(cases.SCHEDULE, BEST_BACK, epochs=8, saved_after=3),
    "new optimizer": Feature(with_keys(new_optimizer={"optimizer_init": ADAMW}), {"optimizer": momentum_sgd}),
    "new LR scheduler": Feature(with_keys(new_lr_scheduler={"lr_scheduler_init": HALVING})),
    "no_decay": Feature(
        changes={"no_decay": ("bias", "norm"), "optimizer": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.3)}
    ),
    "lr_decay": Feature(
        {
            0: {"params": [*HEAD], "max_transition_epoch": 1},
            1: {"params": BELOW_THE_HEAD, "lr": 0.01, "lr_decay": 0.5, "max_transition_epoch": 3},
        }
    ),
    "warm-up": Feature(with_keys(lr_warmup_steps=3)),
    "LR scheduler by epoch": Feature(changes={"scheduler": partial(StepLR, step_size=1, gamma=0.5)}),
    "LR scheduler by step": Feature(
        changes={"scheduler": partial(LinearLR, start_factor=0.25, total_iters=11), "interval": "step"}
    ),
    "ReduceLROnPlateau": Feature(
        changes={"scheduler": partial(ReduceLROnPlateau, factor=0.5, patience=0), "scores": WORSENING}
    ),
    "accumulation": Feature(changes={"accumulate": 2}),
    "clipping by norm": Feature(changes={"clip_norm": 0.05}),
    "clipping by value": Feature(changes={"clip_value": 0.05}),
    "bf16-mixed": Feature(changes={"optimizer": momentum_sgd}, bfloat16=True, tolerance=1e-2),
    "torch.compile": Feature(compiled=True),
    "frozen modules in eval mode": Feature(
        {**AN_EPOCH_EACH, 2: {"params": ["network.first.*"], "lr": 0.01, "max_transition_epoch": 3}},
        settings={"frozen_modules_mode": "eval"},
        statistics=True,
    ),
    "averaged weights": Feature(changes=BEST_BACK, average=True),
    "slim checkpoints": Feature(changes=BEST_BACK, slim=True),
    "transitions inside an epoch": Feature(
        {0: {"params": [*HEAD]}, 1: {"params": [*THIRD, *SECOND], "lr": 0.01}, 2: {"params": ["*"], "lr": 0.01}},
        {"patience": 1, "scores": WORSENING},
        {"intra_epoch_transitions": True},
        interval=0.5,
    ),
}

# The same run without what it is named after.
WITHOUT = {
    "restored best": replace(FEATURES["restored best"], changes={"scores": WORSENING}),
    "new optimizer": replace(FEATURES["new optimizer"], schedule=AN_EPOCH_EACH),
    "no_decay": replace(
        FEATURES["no_decay"], changes={k: v for k, v in FEATURES["no_decay"].changes.items() if k != "no_decay"}
    ),
    "lr_decay": replace(
        FEATURES["lr_decay"],
        schedule={0: AN_EPOCH_EACH[0], 1: {"params": BELOW_THE_HEAD, "lr": 0.01, "max_transition_epoch": 3}},
    ),
    "bf16-mixed": replace(FEATURES["bf16-mixed"], bfloat16=False),
    "frozen modules in eval mode": replace(FEATURES["frozen modules in eval mode"], settings={}),
    "averaged weights": replace(FEATURES["averaged weights"], average=False),
    "transitions inside an epoch": replace(FEATURES["transitions inside an epoch"], settings={}),
    **dict.fromkeys(
        (
            "new LR scheduler",
            "warm-up",
            "LR scheduler by epoch",
            "LR scheduler by step",
            "ReduceLROnPlateau",
            "accumulation",
            "clipping by norm",
            "clipping by value",
        ),
        FEATURES["nothing"],
    ),
}


# --- in Lightning ----------------------------------------------------------------------------------------------------


class Featured:
    """What a feature asks of the LightningModule; put in front of the class that shards as the strategy needs."""

    def __init__(self, feature: Feature) -> None:
        super().__init__(feature.recipe.optimizer)  # type: ignore[call-arg]
        self.feature, self.recipe = feature, feature.recipe
        self.computed: set[torch.dtype] = set()
        self.validations = 0
        if feature.statistics:
            self.network.norm = nn.BatchNorm1d(16)
        if self.recipe.no_decay:
            self.no_decay = list(self.recipe.no_decay)
        self.strict_loading = not feature.slim

    def configure_model(self) -> None:
        super().configure_model()  # type: ignore[misc]
        if self.feature.compiled:
            self.network.second.compile(backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)  # type: ignore[misc]
        self.computed.add(output.dtype)
        return output

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        if self.recipe.scores is None:
            return super().validation_step(batch)  # type: ignore[misc]
        self.log("val_loss", torch.tensor(self.recipe.scores[self.validations]), batch_size=8, sync_dist=True)
        self.validations += 1
        return None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.feature.slim:
            parameters = [(name, p) for name, p in self.named_parameters() if not p.requires_grad]
            frozen = {part for name, p in parameters for part in cases.names_in(name, p)}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: value for n, value in state.items() if cases.plain_name(n) not in frozen}


class AtTheEnd(Callback):
    """Records once more when training has ended and the average is what the module holds. List it after that."""

    def __init__(self, recorder: cases.Recorder) -> None:
        self.recorder = recorder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.recorder.on_train_epoch_end(trainer, pl_module)


@dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        strategy: Makes Lightning's strategy; ``None`` for a loop written by hand.
        module: The class that shards as the strategy needs.
        ranks: Number of processes.
    """

    strategy: Callable[[], Any] | None
    module: type[Classifier] = Classifier
    ranks: int = 2


FLAT = partial(cases.fsdp, use_orig_params=False, state_dict_type="sharded")
WAYS = {
    "one device": Way(partial(str, "auto"), ranks=1),
    "ddp": Way(cases.ddp),
    "ddp find_unused_parameters": Way(partial(cases.ddp, find_unused_parameters=True)),
    "fsdp": Way(cases.fsdp),
    "fsdp use_orig_params=False": Way(FLAT),
    "fsdp2": Way(cases.fsdp2, cases.Sharded),
    "tensor parallel": Way(cases.tensor_parallel, cases.TensorParallel),
    "2-d mesh": Way(cases.mesh_2d, cases.TensorParallel, ranks=4),
    "PhaseRunner": Way(None, ranks=1),
    "PhaseRunner and DDP": Way(None),
}


def fit(root: Path, way: Way, feature: Feature) -> list[Epoch]:
    """Train with the callback."""
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

    recipe = feature.recipe
    scheduler = FinetuningScheduler(feature.schedule, restore_best=recipe.restore_best, **feature.settings)
    recorder = cases.Recorder(lambda: scheduler.curr_depth)
    patience = recipe.patience or 1000
    callbacks: list[Callback] = [scheduler, EarlyStopping("val_loss", patience=patience), recorder]
    if recipe.restore_best:
        callbacks.append(FTSCheckpoint(dirpath=root / "best", monitor="val_loss"))
    if feature.average:
        callbacks += [EMAWeightAveraging(decay=0.5), AtTheEnd(recorder)]
    trainer = cases.make_trainer(
        root,
        way.ranks,
        way.strategy(),
        callbacks=callbacks,
        enable_checkpointing=recipe.restore_best,
        max_epochs=recipe.epochs,
        accumulate_grad_batches=recipe.accumulate,
        val_check_interval=feature.interval,
        precision="bf16-mixed" if feature.bfloat16 else "32-true",
        **_clipping(recipe),
    )
    module = type("Module", (Featured, way.module), {})(feature)
    trainer.fit(module)
    assert (torch.bfloat16 in module.computed) is feature.bfloat16
    return recorder.epochs


def _clipping(recipe: Recipe) -> dict[str, Any]:
    if recipe.clip_norm is not None:
        return {"gradient_clip_val": recipe.clip_norm}
    if recipe.clip_value is not None:
        return {"gradient_clip_val": recipe.clip_value, "gradient_clip_algorithm": "value"}
    return {}


# --- by hand ---------------------------------------------------------------------------------------------------------


class Processes:
    """The processes of a hand-written loop, as the page on programs shows it."""

    def any(self, flag: bool) -> bool:
        return any(self._gathered(flag))

    def every(self, flag: bool) -> bool:
        return all(self._gathered(flag))

    def from_zero(self, function: Callable[[], Any]) -> Any:
        answer = [function() if harness.rank() == 0 else None]
        torch.distributed.broadcast_object_list(answer)
        return answer[0]

    def _gathered(self, flag: bool) -> list[Any]:
        flags = [None] * harness.world_size()
        torch.distributed.all_gather_object(flags, flag)
        return flags


class Loop:
    """A loop with `PhaseRunner`, in one process or with a model that is wrapped anew after each thaw."""

    def __init__(self, ranks: int, feature: Feature) -> None:
        from finetuning_scheduler import PhaseRunner

        self.recipe, self.feature, self.ranks = feature.recipe, feature, ranks
        if ranks > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        self.model = Wrapped(build_network(Residual))
        if feature.statistics:
            self.model.network.norm = nn.BatchNorm1d(16)
        if feature.compiled:
            self.model.network.second.compile(backend="aot_eager")
        optimizer = self.recipe.optimizer(self.model.parameters())
        self.users = [] if self.recipe.scheduler is None else [self.recipe.scheduler(optimizer)]
        self.runner = PhaseRunner(
            self.model,
            optimizer,
            copy.deepcopy(feature.schedule),
            lr_schedulers=self.users,
            no_decay=self.recipe.no_decay,
            patience=self.recipe.patience,
            restore_best=self.recipe.restore_best,
            on_thawed=self.wrap,
            ranks=Processes() if ranks > 1 else None,
            **feature.settings,
        )

    def wrap(self) -> None:
        self.wrapped = DistributedDataParallel(self.model) if self.ranks > 1 else self.model

    def save(self, file: Path) -> None:
        parts = {"model": self.model, "runner": self.runner, "optimizer": self.runner.optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)

    def load(self, file: Path) -> None:
        saved = torch.load(file, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.runner.load_state_dict(saved["runner"])
        self.runner.optimizer.load_state_dict(saved["optimizer"])

    def execute(self, numbers: range) -> list[Epoch]:
        epochs: list[Epoch] = []
        for number in numbers:
            self.train_epoch()
            loss = self.validate()
            score = loss if self.recipe.scores is None else self.recipe.scores[number]
            epochs.append(self.observe(number))
            for scheduler in self.runner.lr_schedulers:
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(score)
            self.runner.epoch_end(score)
            if self.runner.finished:
                break
        return epochs

    def train_epoch(self) -> None:
        self.wrapped.train()
        self.runner.apply_module_modes()
        batches = self.share(self.recipe.task.training()).batches
        for index, batch in enumerate(batches):
            if index % self.recipe.accumulate == 0:
                self.runner.optimizer.zero_grad()
            self.backward(*batch, last=(index + 1) % self.recipe.accumulate == 0)
        self.step_schedulers("epoch")

    def backward(self, x: Tensor, y: Tensor, *, last: bool) -> None:
        no_sync = self.ranks > 1 and not last
        with self.wrapped.no_sync() if no_sync else contextlib.nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.feature.bfloat16):
                loss = self.recipe.task.loss(self.wrapped(x), y)
            (loss / self.recipe.accumulate).backward()
        if not last:
            return
        held = list(self.model.parameters())
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(held, self.recipe.clip_norm)
        if self.recipe.clip_value is not None:
            nn.utils.clip_grad_value_(held, self.recipe.clip_value)
        self.runner.optimizer.step()
        self.step_schedulers("step")
        self.runner.step()

    def step_schedulers(self, interval: str) -> None:
        settings = self.runner.scheduler_settings
        if (self.recipe.interval if settings is None else settings.interval) != interval:
            return
        for scheduler in self.runner.lr_schedulers:
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()

    def validate(self) -> float:
        self.model.eval()
        x, y = self.recipe.task.validation().tensors
        with torch.no_grad():
            return float(self.recipe.task.loss(self.model(x), y))

    def share(self, data: Any) -> Share:
        rank = harness.rank() if self.ranks > 1 else 0
        return Share(data, self.recipe.task.batch_size, rank, self.ranks)

    def observe(self, number: int) -> Epoch:
        optimizer = self.runner.optimizer
        groups = group_names(self.model, optimizer)
        return Epoch(number, self.runner.phase, snapshot(self.model), groups, learning_rates(optimizer))


# --- many at once ----------------------------------------------------------------------------------------------------


def fit_each(root: Path, way: str, names: tuple[str, ...], *, without: bool = False) -> dict[str, list[Epoch] | str]:
    """Train with each feature, one after the other; what fails leaves its traceback."""
    outcomes: dict[str, list[Epoch] | str] = {}
    for number, name in enumerate(names):
        torch.manual_seed(0)
        try:
            outcomes[name] = run(root / str(number), WAYS[way], (WITHOUT if without else FEATURES)[name])
        except Exception:  # noqa: BLE001 - it is the outcome, and the next feature's turn
            outcomes[name] = traceback.format_exc()
    return outcomes


def run(root: Path, way: Way, feature: Feature) -> list[Epoch]:
    if way.strategy is not None:
        return fit(root, way, feature)
    loop, numbers = Loop(way.ranks, feature), range(feature.recipe.epochs)
    if (done := feature.saved_after) is None:
        return loop.execute(numbers)
    epochs, file = loop.execute(numbers[:done]), Path(f"{root}-{os.environ['RANK']}.pt")
    loop.save(file)
    resumed = Loop(way.ranks, feature)
    resumed.load(file)
    return epochs + resumed.execute(numbers[done:])
