"""The callback with `frozen_prefix`: the same fit as without, with hits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler

from .models import Encoder

ROWS, LENGTH = 32, 7


class Module(pl.LightningModule):
    """Counts its training steps, keeps a running score, and logs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Encoder(blocks=4)
        self.steps = 0
        self.scores: list[float] = []
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.steps += 1
        loss = self.loss(batch)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = self.loss(batch)
        self.seen += len(batch[0])
        self.scores.append(round(loss.item(), 5))
        self.log("val_loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def loader(shuffle: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, 3, (ROWS,), generator=generator)
    order = torch.Generator().manual_seed(2)
    return DataLoader(TensorDataset(ids, labels), batch_size=8, shuffle=shuffle, generator=order)


SCHEDULE = {
    0: {"params": [r"network\.head\..*"], "max_transition_epoch": 3},
    1: {"params": [r"network\.blocks\.3\..*"], "max_transition_epoch": 6},
    2: {"params": [r"network\.blocks\.2\..*"]},
}


def fit(
    tmp_path: Path,
    mode: str,
    *,
    build: Callable[[], Module] = Module,
    callbacks: tuple[Callback, ...] = (),
    modes: str = "eval",
    epochs: int = 9,
    checkpoint: Path | None = None,
    shuffle: bool = True,
    restore_best: bool = True,
    **trainer: Any,
) -> tuple[Module, FinetuningScheduler, pl.Trainer]:
    module = build()
    scheduler = FinetuningScheduler(
        copy.deepcopy(SCHEDULE), restore_best=restore_best, frozen_modules_mode=modes, frozen_prefix=mode
    )
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, **trainer}
    runner = pl.Trainer(
        default_root_dir=tmp_path / mode,
        max_epochs=epochs,
        callbacks=[scheduler, *callbacks],
        enable_model_summary=False,
        **trainer,
    )
    runner.fit(module, loader(shuffle), loader(shuffle=False), ckpt_path=checkpoint)
    return module, scheduler, runner


def hits(scheduler: FinetuningScheduler, stage: str) -> int:
    return sum(account.hits for account in scheduler.prefix_accounts if account.stage == stage)


def assert_same_fit(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    (module, _, trainer), (other, _, other_trainer) = actual, expected
    for name, value in other.state_dict().items():
        assert torch.allclose(module.state_dict()[name], value, rtol=1e-5, atol=1e-7), name
    assert (module.steps, module.scores) == (other.steps, other.scores)
    assert trainer.global_step == other_trainer.global_step
    assert trainer.callback_metrics.keys() == other_trainer.callback_metrics.keys()
    for name, metric in other_trainer.callback_metrics.items():
        assert torch.allclose(trainer.callback_metrics[name], metric, rtol=1e-5), name


@pytest.mark.parametrize("mode", ["validation", "all"])
def test_a_fit_with_reuse_is_the_same(tmp_path: Path, mode: str) -> None:
    plain, reused = fit(tmp_path, "off"), fit(tmp_path, mode)
    assert_same_fit(reused, plain)
    assert hits(reused[1], "validation") >= 200
    assert (hits(reused[1], "train") >= 200) == (mode == "all")
    assert plain[1].prefix_accounts == ()


class Delegating(Module):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch))


def test_a_validation_step_that_calls_the_training_step(tmp_path: Path, messages: Callable[[], list[str]]) -> None:
    plain, reused = fit(tmp_path, "off", build=Delegating), fit(tmp_path, "all", build=Delegating)
    assert_same_fit(reused, plain)
    assert hits(reused[1], "train") >= 200
    assert hits(reused[1], "validation") >= 200
    assert {account.reason for account in reused[1].prefix_accounts} == {None}
    assert not any("without frozen-prefix reuse" in message for message in messages())


def test_nothing_is_left_on_the_module(tmp_path: Path) -> None:
    module, _, _ = fit(tmp_path, "all", epochs=2)
    assert "training_step" not in vars(module)
    assert not any("forward" in vars(each) for each in module.modules())
    pickle.dumps(module.network)


class Copying(Callback):
    """Copies and pickles the module while it is trained, as callbacks that average weights may."""

    def __init__(self) -> None:
        self.copies: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Module, *args: Any) -> None:
        if trainer.global_step in (7, 8):
            pickle.loads(pickle.dumps(pl_module.network))
            bare = copy.copy(vars(pl_module)["training_step"])
            self.copies.append(bare)
            trainer_of, pl_module._trainer = pl_module._trainer, None
            copied = copy.deepcopy(pl_module)
            pl_module._trainer = trainer_of
            assert copied.training_step.__self__ is copied


def test_the_module_can_be_copied_during_a_fit(tmp_path: Path) -> None:
    copying = Copying()
    assert_same_fit(fit(tmp_path, "all", callbacks=(copying,), epochs=3), fit(tmp_path, "off", epochs=3))
    assert len(copying.copies) == 2


def test_all_needs_frozen_modules_in_eval_mode(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="frozen_modules_mode='eval' with frozen_prefix='all'"):
        fit(tmp_path, "all", modes="train")


def test_validation_is_reused_with_frozen_modules_in_train_mode(tmp_path: Path) -> None:
    plain, reused = fit(tmp_path, "off", modes="train"), fit(tmp_path, "validation", modes="train")
    assert_same_fit(reused, plain)
    assert hits(reused[1], "validation") >= 200


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"num_sanity_val_steps": 0}]
)
def test_other_ways_to_train(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, reused = fit(tmp_path, "off", **options), fit(tmp_path, "all", **options)
    assert_same_fit(reused, plain)
    assert hits(reused[1], "train") >= 200


class Averaging(pl.callbacks.WeightAveraging):
    """Validates with averaged weights, frozen ones included."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None


def test_averaged_weights_are_validated(tmp_path: Path) -> None:
    options: dict[str, Any] = {"restore_best": False, "epochs": 4}
    plain = fit(tmp_path, "off", callbacks=(Averaging(),), **options)
    reused = fit(tmp_path, "all", callbacks=(Averaging(),), **options)
    assert_same_fit(reused, plain)


class Normalised(Module):
    """BatchNorm below tracks statistics in train mode, frozen or not."""

    def __init__(self) -> None:
        super().__init__()
        self.network.embedding = nn.Sequential(self.network.embedding, self.Norm())

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)


def test_statistics_that_move_end_reuse_in_validation(tmp_path: Path, messages: Callable[[], list[str]]) -> None:
    plain = fit(tmp_path, "off", build=Normalised, modes="train")
    reused = fit(tmp_path, "validation", build=Normalised, modes="train")
    assert_same_fit(reused, plain)
    assert any("a frozen module changes; frozen_modules_mode='eval' keeps statistics" in each for each in messages())


def test_statistics_that_rest_are_reused(tmp_path: Path) -> None:
    plain, reused = fit(tmp_path, "off", build=Normalised), fit(tmp_path, "all", build=Normalised)
    assert_same_fit(reused, plain)
    assert hits(reused[1], "train") > 0


class Searching(Callback):
    """Tries learning rates before the training, as the tuner does."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Module) -> None:
        finder = pl.callbacks.LearningRateFinder(num_training_steps=4, update_attr=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finder, "on_fit_start", lambda *_: None)
            finder.lr_find(trainer, pl_module)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_search_for_a_learning_rate(tmp_path: Path) -> None:
    options: dict[str, Any] = {"restore_best": False, "epochs": 5}
    plain = fit(tmp_path, "off", callbacks=(Searching(),), **options)
    reused = fit(tmp_path, "all", callbacks=(Searching(),), **options)
    assert_same_fit(reused, plain)
    assert hits(reused[1], "train") > 0


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.steps += 1
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization_goes_without_reuse_in_training(tmp_path: Path, messages: Callable[[], list[str]]) -> None:
    plain, reused = fit(tmp_path, "off", build=Manual), fit(tmp_path, "all", build=Manual)
    assert_same_fit(reused, plain)
    assert hits(reused[1], "train") == 0
    assert hits(reused[1], "validation") > 0
    assert any("the module optimizes manually" in message for message in messages())


def test_a_resumed_fit_records_anew_and_ends_alike(tmp_path: Path) -> None:
    def resumed(mode: str) -> tuple[Module, FinetuningScheduler, pl.Trainer]:
        folder = tmp_path / mode
        saving = pl.callbacks.ModelCheckpoint(folder, "at", save_top_k=0, save_last=True)
        fit(tmp_path, mode, callbacks=(saving,), epochs=5, restore_best=False)
        saving = pl.callbacks.ModelCheckpoint(folder, "at", save_top_k=0, save_last=True)
        return fit(tmp_path, mode, callbacks=(saving,), checkpoint=folder / "last.ckpt", restore_best=False)

    plain, reused = resumed("off"), resumed("all")
    assert_same_fit(reused, plain)
    assert hits(reused[1], "train") > 0


class Written(pl.loggers.CSVLogger):
    """Remembers what is written past ``log``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.written: list[float] = []


class Writing(Module):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().training_step(batch)
        if isinstance(self.logger, Written):
            self.logger.written.append(1.0)
        self.logger.log_metrics({"own": 1.0}, step=self.global_step)
        return loss


def test_a_logger_is_written_to_once_a_step(tmp_path: Path) -> None:
    def written(mode: str) -> int:
        logger = Written(tmp_path / mode)
        _, scheduler, _ = fit(tmp_path, mode, build=Writing, logger=logger, log_every_n_steps=100, epochs=4)
        assert (hits(scheduler, "train") > 0) == (mode == "all")
        return len(logger.written)

    assert written("all") == written("off") == 16


class Counted(Callback):
    """Is counted up by the step of a module that reaches it through the trainer."""

    def __init__(self) -> None:
        self.steps: list[int] = []


class Reaching(Module):
    """Holds the trainer's callbacks, the scheduler among them."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.reached = list(self.trainer.callbacks)
        for each in self.reached:
            if isinstance(each, Counted):
                each.steps.append(self.steps)
        return super().training_step(batch)


def test_callbacks_that_a_step_reaches(tmp_path: Path) -> None:
    plain, reused = Counted(), Counted()
    assert_same_fit(
        fit(tmp_path, "all", build=Reaching, callbacks=(reused,), epochs=5),
        fit(tmp_path, "off", build=Reaching, callbacks=(plain,), epochs=5),
    )
    assert reused.steps == plain.steps
