"""Files that run a command when they are unpickled, and a fit in which something happens to the checkpoints."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from tests.reference.history import snapshot
from tests.reference.networks import HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, Recipe, momentum_sgd

EPOCHS = Recipe(
    phases=(PhaseSpec(HEAD, max_epoch=2), PhaseSpec(THIRD, lr=0.05, max_epoch=4), PhaseSpec(SECOND, lr=0.02)),
    epochs=5,
    optimizer=momentum_sgd,
    scores=(3.0, 4.0, 5.0, 6.0, 7.0),
)
ONE_TRANSITION = replace(EPOCHS, phases=EPOCHS.phases[:2], epochs=3)


class Meddle(Callback):
    """Calls a function with the best checkpoint at the end of an epoch, when it is there."""

    def __init__(self, action: Callable[[Path], None], epoch: int = 1) -> None:
        self.epoch = epoch
        self.action = action

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            path = Path(trainer.checkpoint_callback.best_model_path)
            deadline = time.monotonic() + 20
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            self.action(path)


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (str(self.marker), "w"))


class RunsInAShell(Runs):
    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.marker}'",))


class RunsCode(Runs):
    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.marker)!r}, 'w')",))


class RunsByAttribute(Runs):
    """Reaches a function through one that looks harmless."""

    def __reduce__(self) -> Any:
        return (getattr, (RunsInAShell(self.marker), "marker"))


class RunsInState(Runs):
    """Hides it in the state of an object of an ordinary class."""

    def __reduce__(self) -> Any:
        return (OrderedDict, (), {"state": RunsInAShell(self.marker)})


OBJECTS = (Runs, RunsInAShell, RunsCode, RunsByAttribute, RunsInState)


def put(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path)


def alone(bad: Runs, content: dict[str, Any], path: Path) -> None:
    torch.save(bad, path)


def in_the_weights(bad: Runs, content: dict[str, Any], path: Path) -> None:
    put({**content, "state_dict": {**content["state_dict"], "network.head.bias": bad}}, path)


def in_the_optimizer(bad: Runs, content: dict[str, Any], path: Path) -> None:
    put({**content, "optimizer_states": [{**content["optimizer_states"][0], "more": [bad]}]}, path)


def in_the_progress(bad: Runs, content: dict[str, Any], path: Path) -> None:
    put({**content, "callbacks": {**content["callbacks"], "FinetuningScheduler": {"phase": bad}}}, path)


def in_another_callback(bad: Runs, content: dict[str, Any], path: Path) -> None:
    put({**content, "callbacks": {**content["callbacks"], "Other": {"phase": bad}}}, path)


def in_the_hyper_parameters(bad: Runs, content: dict[str, Any], path: Path) -> None:
    put({**content, "hyper_parameters": {"a": bad}}, path)


def as_a_key(bad: Runs, content: dict[str, Any], path: Path) -> None:
    put({**content, bad: 1}, path)


def in_a_legacy_file(bad: Runs, content: dict[str, Any], path: Path) -> None:
    torch.save({**content, "more": bad}, path, _use_new_zipfile_serialization=False)


def in_a_newer_protocol(bad: Runs, content: dict[str, Any], path: Path) -> None:
    torch.save({**content, "more": bad}, path, pickle_protocol=4)


def as_a_bare_pickle(bad: Runs, content: dict[str, Any], path: Path) -> None:
    path.write_bytes(pickle.dumps({"more": bad}, protocol=0))


def in_a_tar(bad: Runs, content: dict[str, Any], path: Path) -> None:
    """The oldest format: a tar of pickles."""
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            member = pickle.dumps(bad)
            info = tarfile.TarInfo(name)
            info.size = len(member)
            tar.addfile(info, io.BytesIO(member))


def in_a_second_pickle(bad: Runs, content: dict[str, Any], path: Path) -> None:
    """A good file with more pickles, under the names that readers look for."""
    put(content, path)
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("archive/constants.pkl", "constants.pkl", "data.pkl", "zz/data.pkl"):
            archive.writestr(name, pickle.dumps(bad, protocol=2))


def before_the_first_pickle(bad: Runs, content: dict[str, Any], path: Path) -> None:
    put(content, path)
    path.write_bytes(pickle.dumps(bad, protocol=2) + path.read_bytes())


FORMS: dict[str, Callable[[Runs, dict[str, Any], Path], None]] = {
    form.__name__: form
    for form in (
        alone,
        in_the_weights,
        in_the_optimizer,
        in_the_progress,
        in_another_callback,
        in_the_hyper_parameters,
        as_a_key,
        in_a_legacy_file,
        in_a_newer_protocol,
        as_a_bare_pickle,
        in_a_tar,
        in_a_second_pickle,
        before_the_first_pickle,
    )
}


class AtFirstBatch(Callback):
    """The weights at the first batch of each epoch, when transitions are over; and what is best by then."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.best: dict[int, str] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.weights[trainer.current_epoch] = snapshot(pl_module)
            self.best[trainer.current_epoch] = Path(trainer.checkpoint_callback.best_model_path).name


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
