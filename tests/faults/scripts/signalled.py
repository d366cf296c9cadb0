"""Trains again and again, until signals from outside come around a transition; resumes from what their handler wrote.

Prints ``transition`` when one is about to be made, ``resumed`` when the run that was resumed did what the whole one
did, and ``done``.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from tests.reference.history import assert_continues
from tests.reference.networks import BATCHES_PER_EPOCH, HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, Recipe, adamw
from tests.reference.toys import Session

TRANSITION = 1
RECIPE = Recipe(
    phases=(PhaseSpec(HEAD, max_epoch=1), PhaseSpec(THIRD, lr=0.05, max_epoch=2), PhaseSpec(SECOND, lr=0.02)),
    epochs=3,
    optimizer=adamw,
    scores=(3.0, 4.0, 5.0),
)


class LeaveOnSignal(Callback):
    """A handler that saves and leaves the program, as on a cluster; a signal comes while an epoch starts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch != TRANSITION:
            return

        def leave(*_: Any) -> None:
            trainer.save_checkpoint(self.path)
            raise SystemExit

        signal.signal(signal.SIGUSR1, leave)
        print("transition", flush=True)


class WaitForSignal(Callback):
    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == TRANSITION:
            time.sleep(10)


def session(root: Path, *, signalled: bool = False) -> Session:
    made = Session(RECIPE, root, checkpoint={"save_top_k": -1})
    if signalled:
        made.trainer.callbacks.insert(0, LeaveOnSignal(root / "signal.ckpt"))
        made.trainer.callbacks.append(WaitForSignal())
    return made


def main(root: Path, trials: int) -> None:
    torch.set_num_threads(1)
    whole = session(root / "whole").fit().history
    for trial in range(trials):
        directory = root / str(trial)
        try:
            session(directory, signalled=True).fit()
        except SystemExit:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        resumed = session(directory).fit(ckpt_path=directory / "signal.ckpt").history
        assert_continues(resumed, whole, TRANSITION * BATCHES_PER_EPOCH)
        print("resumed", flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
