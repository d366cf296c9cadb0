"""Whoever saves in the middle of a transition, and however it ends, a resumed run does what the whole one did."""

from __future__ import annotations

import copy
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

import finetuning_scheduler
from finetuning_scheduler import FinetuningScheduler
from finetuning_scheduler.core import Listener, PhaseRunner
from finetuning_scheduler.strategy_adapters import StrategyAdapter
from tests.reference.history import History, assert_continues, assert_same_run
from tests.reference.networks import BATCHES_PER_EPOCH, HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, Recipe, adamw, schedule_of
from tests.reference.toys import Session

PACKAGE = str(Path(finetuning_scheduler.__file__).parent)
TRANSITION = 2  # the epoch that begins with the transition that is interrupted: from phase 0, back to epoch 0
EVERY = int(os.environ.get("FTS_EVERY", "251"))  # of how many lines one is tried; 1 for all, which takes an hour

RECIPE = Recipe(
    phases=(PhaseSpec(HEAD), PhaseSpec(THIRD, lr=0.05), PhaseSpec(SECOND, lr=0.02)),
    epochs=5,
    optimizer=adamw,
    patience=1,
    scores=(4.0, 5.0, 3.0, 3.5, 2.0),
)


class InterruptedTransition(BaseException):
    """Raised where a user's code might raise anything, and `KeyboardInterrupt` arrive."""


@contextmanager
def at_each_line(action: Callable[[int], None]) -> Iterator[None]:
    """Call a function, with their number, before all lines of the package that this block executes."""
    count = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            action(count - 1)
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


class Traced(FinetuningScheduler):
    """Has something done before each line of the code that makes one transition."""

    action: Callable[[int], None] = staticmethod(lambda _: None)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch != TRANSITION:
            super().on_train_epoch_start(trainer, pl_module)
            return
        with at_each_line(self.action):
            super().on_train_epoch_start(trainer, pl_module)


class SaveOnException(Checkpoint):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


@dataclass(frozen=True)
class Case:
    """A recipe, and what the phase entered by the transition that is interrupted installs."""

    recipe: Recipe
    installs: dict[str, Any] = field(default_factory=dict)


def fit(
    case: Case,
    root: Path,
    action: Callable[[int], None] | None = None,
    *extra: Callback,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> History:
    schedule = schedule_of(case.recipe)
    schedule[1] |= case.installs
    session = Session(
        case.recipe,
        root,
        scheduler_class=Traced,
        extra_callbacks=extra,
        checkpoint={"save_top_k": -1},  # a file that is the best one for a while stays
        scheduler_options={"ft_schedule": schedule, **(options or {})},
    )
    if action is not None:
        session.scheduler.action = action
    return session.fit(**arguments).history


def raise_at(number: int) -> Callable[[int], None]:
    def action(line: int) -> None:
        if line == number:
            raise InterruptedTransition

    return action


REPLACEMENTS = {
    "new_optimizer": {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}},
    "new_lr_scheduler": {
        "lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}
    },
    "lr_warmup_steps": 3,
}
STEPWISE = replace(RECIPE, scheduler=lambda optimizer: LinearLR(optimizer, 0.25, 1.0, total_iters=11), interval="step")
PLATEAU = replace(RECIPE, scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0))
CASES = {
    "restoring": Case(RECIPE),
    "not restoring": Case(replace(RECIPE, restore_best=False)),
    "an LR scheduler": Case(STEPWISE),
    "a scheduler of a metric": Case(PLATEAU),
    "replacements": Case(STEPWISE, REPLACEMENTS),
    "replacements, not restoring": Case(replace(STEPWISE, restore_best=False), REPLACEMENTS),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_exception_anywhere_in_a_transition(case: Case, tmp_path: Path) -> None:
    lines: list[int] = []
    whole = fit(case, tmp_path / "whole", lines.append)
    assert len(lines) > 500
    for number in range(EVERY // 2, len(lines), EVERY):
        root = tmp_path / str(number)
        with pytest.raises(InterruptedTransition):
            fit(case, root, raise_at(number), SaveOnException(root / "saved.ckpt"))
        resumed = fit(case, root, ckpt_path=root / "saved.ckpt")
        assert_continues(resumed, whole, TRANSITION * BATCHES_PER_EPOCH)


class SaveOnSignal(Callback):
    """A handler of a signal that saves; of what it has written, keeps what differs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, Path] = {}
        self.calls = 0

    def on_fit_start(self, trainer: Any, *_: Any) -> None:
        def save(*_: Any) -> None:
            self.calls += 1
            path = self.root / f"{len(self.files)}.ckpt"
            trainer.save_checkpoint(path)
            self.files.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)

        self.before = signal.signal(signal.SIGUSR1, save)

    def teardown(self, *_: Any, **__: Any) -> None:
        signal.signal(signal.SIGUSR1, self.before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_signal_anywhere_in_a_transition(case: Case, tmp_path: Path) -> None:
    whole = fit(case, tmp_path / "whole")
    saver, root = SaveOnSignal(tmp_path / "saved"), tmp_path / "signals"
    history = fit(case, root, lambda _: signal.raise_signal(signal.SIGUSR1), saver)
    assert_same_run(history, whole)
    assert saver.calls > 50  # those before the transition and after it, each at once
    assert len(saver.files) >= 2
    for path in saver.files.values():
        assert_continues(fit(case, root, ckpt_path=path), whole, TRANSITION * BATCHES_PER_EPOCH)


class SaveWhenThawed(StrategyAdapter):
    """An adapter whose hook saves when a phase has been thawed."""

    def on_phase_thawed(self) -> None:
        super().on_phase_thawed()
        if self.trainer.training:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / f"{self.trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_user_code_that_saves_in_the_middle_of_a_transition(case: Case, tmp_path: Path) -> None:
    adapters = {"custom_strategy_adapters": {"single_device": f"{__name__}:SaveWhenThawed"}}
    root = tmp_path / "whole"
    whole = fit(case, root, options=adapters)
    path = root / f"{TRANSITION}.ckpt"
    assert torch.load(path, weights_only=True)["callbacks"]["Traced"]["phase"] == 0
    assert_continues(fit(case, root, ckpt_path=path), whole, TRANSITION * BATCHES_PER_EPOCH)


class RaiseWhenThawed(Listener):
    """A listener that fails, once it is told to."""

    fails = False

    def after_thaw(self) -> None:
        if self.fails:
            raise InterruptedTransition


def train(model: nn.Module, runner: PhaseRunner, metrics: Sequence[float]) -> None:
    for metric in metrics:
        runner.optimizer.zero_grad()
        model(torch.ones(2, 3)).square().mean().backward()
        runner.optimizer.step()
        runner.step()
        runner.epoch_end(metric)


def runner_of(*listeners: Listener) -> tuple[nn.Module, PhaseRunner]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = AdamW(model.parameters(), lr=0.1)
    phases = {0: {"params": ["2.*"]}, 1: {"params": ["0.*"], "lr_warmup_steps": 2}, 2: {"params": ["1.*"]}}
    schedulers = [LinearLR(optimizer, 0.25, 1.0, total_iters=11)]
    return model, PhaseRunner(model, optimizer, phases, lr_schedulers=schedulers, patience=1, listeners=listeners)


def test_a_hand_written_loop_is_what_it_was_before_a_transition_that_fails() -> None:
    metrics = (4.0, 3.0, 5.0, 2.0, 6.0, 1.0)
    whole, runner = runner_of()
    train(whole, runner, metrics)
    failing = RaiseWhenThawed()
    model, runner = runner_of(failing)
    train(model, runner, metrics[:2])
    failing.fails = True
    before = runner.monitor.patience.waited
    with pytest.raises(InterruptedTransition):
        train(model, runner, metrics[2:3])
    assert runner.phase == 0
    assert [parameter.requires_grad for parameter in model[0].parameters()] == [False, False]
    saved = copy.deepcopy(
        (runner.state_dict(), model.state_dict(), runner.optimizer.state_dict(), runner.lr_schedulers[0].state_dict())
    )
    assert saved[0]["loop"]["patience"]["waited"] == before + 1
    resumed, runner = runner_of()
    runner.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    runner.optimizer.load_state_dict(saved[2])
    runner.lr_schedulers[0].load_state_dict(saved[3])
    assert runner.phase == 0
    # The epoch is over, and its metric known; asked again, the same transition is made from the same weights.
    runner.monitor.restore(runner.session)
    runner.thaw_to(1)
    train(resumed, runner, metrics[3:])
    different = [
        name for name, value in whole.state_dict().items() if not torch.equal(value, resumed.state_dict()[name])
    ]
    assert different == []


def test_signals_from_outside_at_any_time_around_a_transition(tmp_path: Path) -> None:
    """Each is sent a while after the hook in which the transition is made has begun; it may come before or after it."""
    trials = int(os.environ.get("FTS_SIGNALS", "4"))
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.scripts.signalled", str(tmp_path), str(trials)]
    with subprocess.Popen(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as process:
        generator = random.Random(0)
        seen: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "transition":
                time.sleep(generator.uniform(0, 0.06))
                process.send_signal(signal.SIGUSR1)
            seen.append(line.strip())
    assert seen == ["transition", "resumed"] * trials + ["done"]
