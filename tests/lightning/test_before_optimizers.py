"""The user's `configure_optimizers` meets the model in the state of phase 0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from finetuning_scheduler import FinetuningScheduler
from tests.reference.networks import HEAD, SECOND, THIRD, loader
from tests.reference.toys import Toy, make_trainer

SCHEDULE: dict[Any, Any] = {
    0: {"params": [*HEAD], "max_transition_epoch": 1},
    1: {"params": [*THIRD], "lr": 0.05, "max_transition_epoch": 2},
    2: {"params": [*SECOND], "lr": 0.02},
}


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


class Counting(Toy):
    """Remembers what it has met, and refuses to go on with anything but the two tensors of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[set[str]] = []
        self.lr, self.batch_size = 0.1, 4

    def configure_optimizers(self) -> Any:
        self.met.append(trainable(self))
        held = list(filter(lambda parameter: parameter.requires_grad, self.parameters()))
        if len(held) != 2:
            raise ValueError(f"two tensors are to be trained, not {len(held)}")
        return torch.optim.SGD(held, lr=self.lr)

    def train_dataloader(self) -> Any:
        return loader(self.recipe.task.training(), self.batch_size)


class Late(Counting):
    """The head comes in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.network.head

    def configure_model(self) -> None:
        if not hasattr(self.network, "head"):
            self.network.add_module("head", nn.Linear(5, 1))


class Lazy(Counting):
    """The head gets its shape in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.network.head = nn.LazyLinear(1)


class NewHead(Counting):
    """`setup` puts another head in the place of the one that was there."""

    def setup(self, stage: str) -> None:
        self.network.head = nn.Linear(5, 1)


def fit(trainer: pl.Trainer, module: Counting) -> None:
    trainer.fit(module)


def fit_again(trainer: pl.Trainer, module: Counting) -> None:
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module)


def fit_another(trainer: pl.Trainer, module: Counting) -> None:
    trainer.fit(other := Counting())
    assert trainable(other) > set(HEAD)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module)


def fit_and_resume(trainer: pl.Trainer, module: Counting) -> None:
    """Resume in the last phase, whose four other tensors have been thawed by then."""
    trainer.fit(Counting())
    path = Path(trainer.default_root_dir) / "resumed.ckpt"
    trainer.save_checkpoint(path)
    scheduler = FinetuningScheduler(SCHEDULE, log_dir=path.parent / "resumed")
    make_trainer(path.parent, callbacks=[scheduler], max_epochs=4).fit(module, ckpt_path=path)
    assert scheduler.curr_depth == 2


def search_a_rate(trainer: pl.Trainer, module: Counting) -> None:
    Tuner(trainer).lr_find(module, num_training=5)
    trainer.fit(module)


def search_a_batch_size(trainer: pl.Trainer, module: Counting) -> None:
    Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    trainer.fit(module)


def run(
    root: Path,
    module: Counting,
    schedule: Any = SCHEDULE,
    act: Callable[[pl.Trainer, Counting], None] = fit,
    **options: Any,
) -> None:
    scheduler = FinetuningScheduler(schedule)
    trainer = make_trainer(root, **({"callbacks": [scheduler], "max_epochs": 3} | options))
    act(trainer, module)


@pytest.mark.filterwarnings("ignore:A new version of Lightning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("schedule", [SCHEDULE, None], ids=["explicit", "implicit"])
@pytest.mark.parametrize("kind", [Counting, Late, Lazy, NewHead])
def test_it_meets_phase_0(kind: type[Counting], schedule: Any, tmp_path: Path) -> None:
    module = kind()
    run(tmp_path, module, schedule)
    assert module.met == [set(HEAD)]


@pytest.mark.parametrize(
    ("act", "times"),
    [(fit_again, 2), (fit_another, 1), (fit_and_resume, 1), (search_a_rate, 2), (search_a_batch_size, 2)],
)
def test_it_meets_phase_0_in_every_fit(act: Callable[[pl.Trainer, Counting], None], times: int, tmp_path: Path) -> None:
    module = Counting()
    run(tmp_path, module, act=act)
    assert module.met == times * [set(HEAD)]
    assert trainable(module) > set(HEAD)


def test_it_meets_phase_0_when_a_callback_searches_a_rate(tmp_path: Path) -> None:
    module = Counting()
    callbacks = [LearningRateFinder(num_training_steps=5), FinetuningScheduler(SCHEDULE)]
    run(tmp_path, module, callbacks=callbacks)
    assert module.met == [set(HEAD)]


def test_it_meets_phase_0_in_a_quick_trial(tmp_path: Path) -> None:
    module = Counting()
    run(tmp_path, module, fast_dev_run=True)
    assert module.met == [set(HEAD)]


def test_what_the_user_has_frozen_is_met_thawed_if_the_schedule_says_so(tmp_path: Path) -> None:
    module = Counting().requires_grad_(False)
    run(tmp_path, module)
    assert module.met == [set(HEAD)]


class ForTheCommandLine(Toy):
    """Its optimizer comes from the command line."""

    configure_optimizers = pl.LightningModule.configure_optimizers  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()


def test_the_optimizer_of_the_command_line_goes_on_with_phase_0(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """LightningCLI makes it before any callback is called, of all parameters."""
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse
    options = ["accelerator=cpu", "logger=false", "max_epochs=1", "enable_progress_bar=false"]
    words = [f"--trainer.{option}" for option in (*options, "enable_model_summary=false")]
    command = LightningCLI(
        ForTheCommandLine,
        args=[
            "fit",
            *words,
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.callbacks+=finetuning_scheduler.FinetuningScheduler",
            "--optimizer=torch.optim.Adam",
            "--optimizer.lr=0.25",
        ],
        save_config_callback=None,
        seed_everything_default=False,
    )
    (group,) = command.trainer.optimizers[0].param_groups
    names = {id(parameter): name for name, parameter in command.model.named_parameters()}
    assert {names[id(parameter)] for parameter in group["params"]} == set(HEAD)
    assert group["lr"] == 0.25


@pytest.mark.parametrize("trained_only", [True, False])
def test_an_optimizer_that_is_left_alone_holds_what_it_was_given(
    trained_only: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Toy()
    scheduler = FinetuningScheduler(SCHEDULE, enforce_phase0_params=False, restore_best=False)
    if not trained_only:
        module.optimizer_parameters = lambda: list(module.parameters())  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, callbacks=[scheduler], max_epochs=2)
    trainer.fit(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    held = [{names[id(parameter)] for parameter in group["params"]} for group in trainer.optimizers[0].param_groups]
    assert held == ([set(HEAD), set(THIRD)] if trained_only else [set(names.values())])
    warned = [line for line in caplog.messages if "does not hold exactly phase 0" in line]
    assert len(warned) == (0 if trained_only else 1)


WRONG = {
    "nothing matches in phase 0": ({0: {"params": ["network.haed.bias"]}}, "selector 'network.haed.bias'"),
    "nothing matches in phase 1": ({0: {"params": [*HEAD]}, 1: {"params": ["nothing"]}}, "selector 'nothing'"),
    "a gap": ({0: {"params": [*HEAD]}, 2: {"params": [*THIRD]}}, "phase 1 is missing"),
    "no phases": ({}, "got an empty mapping"),
    "no parameters": ({0: {"params": []}}, "at least one item"),
    "no file": ("no-such-file.yaml", "it does not exist"),
}


class Unwilling(Counting):
    """Makes no optimizer whatever it meets."""

    def configure_optimizers(self) -> Any:
        raise ZeroDivisionError("never mind the schedule")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", [Counting, Unwilling, Toy])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_the_schedule_is_told_first(
    name: str, kind: type[Any], frozen: bool, tmp_path: Path
) -> None:
    """Else the user would read of an optimizer that got an empty list, since nothing is trained in such a model."""
    schedule, message = WRONG[name]
    module = kind().requires_grad_(not frozen)
    before = trainable(module)
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, module, deepcopy(schedule))
    assert trainable(module) == before


def test_the_users_own_error_is_told_if_the_schedule_is_right(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="never mind"):
        run(tmp_path, Unwilling())
