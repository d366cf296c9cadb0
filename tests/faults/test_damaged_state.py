"""What is damaged in a checkpoint is told before training, by file and key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from finetuning_scheduler.callbacks.best import ran_out_of_memory
from finetuning_scheduler.core.fingerprints import damaged_parts
from finetuning_scheduler.errors import CheckpointError
from tests.reference.recipe import adamw
from tests.reference.toys import Session, Toy

from .hostile import EPOCHS

pytestmark = pytest.mark.quick

SCHEDULER, STOPPING, SAVING = "FinetuningScheduler", "EarlyStopping", "ModelCheckpoint"
Damage = Callable[[dict[str, Any]], None]


def state_of(checkpoint: dict[str, Any], callback: str) -> dict[str, Any]:
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith(callback))
    state: dict[str, Any] = checkpoint["callbacks"][key]
    return state


def replaced(callback: str, **values: Any) -> Damage:
    return lambda checkpoint: state_of(checkpoint, callback).update(values)


def without(callback: str, key: str) -> Damage:
    def damage(checkpoint: dict[str, Any]) -> None:
        del state_of(checkpoint, callback)[key]

    return damage


def not_a_state(callback: str) -> Damage:
    def damage(checkpoint: dict[str, Any]) -> None:
        (key,) = (key for key in checkpoint["callbacks"] if key.startswith(callback))
        checkpoint["callbacks"][key] = ["no", "mapping"]

    return damage


def optimizer(**values: Any) -> Damage:
    return lambda checkpoint: checkpoint["optimizer_states"][0].update(values)


def option_lost(checkpoint: dict[str, Any]) -> None:
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    group["betas"] = (0.9, 0.999)
    del group["momentum"]


def other_shape(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"] = torch.ones(7, 7)


def no_state(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"] = ["nothing"]


DAMAGES: dict[str, tuple[Damage, str]] = {
    "scheduler: no phase": (without(SCHEDULER, "phase"), "phase"),
    "scheduler: no groups": (without(SCHEDULER, "parameter_groups"), "parameter_groups"),
    "scheduler: a phase in words": (replaced(SCHEDULER, phase="one"), "phase"),
    "scheduler: a negative phase": (replaced(SCHEDULER, phase=-1), "phase"),
    "scheduler: a phase too far": (replaced(SCHEDULER, phase=9), "phase"),
    "scheduler: groups in words": (replaced(SCHEDULER, parameter_groups="all"), "parameter_groups"),
    "scheduler: other groups": (replaced(SCHEDULER, parameter_groups=[["a", "b"]]), "parameter group"),
    "scheduler: too many groups": (replaced(SCHEDULER, parameter_groups=[[], [], []]), "parameter groups"),
    "scheduler: no version": (without(SCHEDULER, "version"), "version"),
    "scheduler: a newer format": (replaced(SCHEDULER, version=99), "format 99"),
    "scheduler: metrics in words": (replaced(SCHEDULER, metrics="none"), "metrics"),
    "scheduler: a metric of no type": (
        replaced(SCHEDULER, metrics={"val_loss": {"value": 1.0, "dtype": "load"}}),
        "metrics.val_loss",
    ),
    "scheduler: patience in words": (replaced(SCHEDULER, phase_exhausted="no"), "phase_exhausted"),
    "scheduler: a warm-up in words": (replaced(SCHEDULER, warmup={"1": "x"}), "warmup"),
    "scheduler: no state": (not_a_state(SCHEDULER), "state of the FinetuningScheduler"),
    "stopping: no count": (without(STOPPING, "wait_count"), "wait_count"),
    "stopping: a count in words": (replaced(STOPPING, wait_count="3"), "wait_count"),
    "stopping: no score": (without(STOPPING, "best_score"), "best_score"),
    "stopping: several scores": (replaced(STOPPING, best_score=torch.ones(2)), "best_score"),
    "stopping: no state": (not_a_state(STOPPING), "EarlyStopping"),
    "saving: no best": (without(SAVING, "best_model_path"), "best_model_path"),
    "saving: no directory": (without(SAVING, "dirpath"), "dirpath"),
    "saving: a best without a name": (replaced(SAVING, best_model_path=None), "best_model_path"),
    "saving: scores in a list": (replaced(SAVING, best_k_models=[1.0]), "best_k_models"),
    "saving: a score in words": (replaced(SAVING, best_k_models={"a": "b"}), "best_k_models.a"),
    "saving: files without content": (replaced(SAVING, files={"a": {"phase": 1}}), "files.a.fingerprint"),
    "saving: a depth in words": (replaced(SAVING, current_ckpt_depth="x"), "current_ckpt_depth"),
    "saving: no state": (not_a_state(SAVING), "FTSCheckpoint"),
    "optimizer: another one's options": (option_lost, "optimizer_states[0]['param_groups'][0]"),
    "optimizer: other shapes": (other_shape, "optimizer_states[0]['state'][0]['momentum_buffer']"),
    "optimizer: other groups": (optimizer(param_groups=[]), "optimizer_states[0]['param_groups']"),
    "optimizer: groups without parameters": (optimizer(param_groups=[{"lr": 0.1}]), "optimizer_states[0]['param"),
    "optimizer: no groups": (optimizer(param_groups=None), "optimizer_states[0]"),
    "optimizer: no state": (no_state, "optimizer_states[0]"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    Session(replace(EPOCHS, epochs=1), root).fit()
    return root / "checkpoints" / "epoch=0-step=4.ckpt"


class Trains(Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1


def damaged(written: Path, damage: Damage, path: Path) -> Path:
    checkpoint = torch.load(written, weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(("damage", "key"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_told_before_training_by_file_and_key(
    damage: Damage, key: str, written: Path, tmp_path: Path
) -> None:
    path, trains = damaged(written, damage, tmp_path / "damaged.ckpt"), Trains()
    with pytest.raises(MisconfigurationException, match=r"damaged\.ckpt: ") as error:
        Session(EPOCHS, written.parents[1], extra_callbacks=(trains,)).fit(ckpt_path=path)
    assert isinstance(error.value.__cause__, CheckpointError)
    assert key in str(error.value)
    assert "Fix: " in str(error.value)
    assert trains.batches == 0


def test_the_state_of_another_optimizer_is_told_too(tmp_path: Path) -> None:
    Session(replace(EPOCHS, epochs=1, optimizer=adamw), tmp_path).fit()
    with pytest.raises(MisconfigurationException, match=r"expected SGD's .*momentum.* got .*betas"):
        Session(EPOCHS, tmp_path).fit(ckpt_path=tmp_path / "checkpoints" / "epoch=0-step=4.ckpt")


def test_a_file_that_is_sound_is_resumed(written: Path, tmp_path: Path) -> None:
    """A check of the tests' own teeth."""
    path, trains = damaged(written, lambda _: None, tmp_path / "sound.ckpt"), Trains()
    Session(EPOCHS, written.parents[1], extra_callbacks=(trains,)).fit(ckpt_path=path)
    assert trains.batches == 16


@pytest.mark.parametrize("share", [0.2, 0.4, 0.5, 0.6, 0.7, 0.8])
def test_a_flipped_bit_in_a_file_to_resume_from_is_an_error(share: float, written: Path, tmp_path: Path) -> None:
    """Or makes no difference: some bytes are between the parts."""
    content = bytearray(written.read_bytes())
    content[int(share * len(content))] ^= 1
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(content)
    whole = Session(EPOCHS, written.parents[1])
    whole.fit(ckpt_path=written)
    session = Session(EPOCHS, written.parents[1])
    try:
        session.fit(ckpt_path=path)
    except Exception:  # noqa: BLE001 - whoever has noticed it
        return
    expected, actual = whole.history.epochs[-1].weights, session.history.epochs[-1].weights
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_flipped_bit_in_the_weights_is_told_by_file_and_part(written: Path, tmp_path: Path) -> None:
    content = bytearray(written.read_bytes())
    with ZipFile(written) as archive:
        part = next(part for part in archive.infolist() if part.filename.endswith("data/0"))
        begin = content.index(archive.read(part), part.header_offset)
    content[begin] ^= 1
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["epoch"] == 0
    with pytest.raises(MisconfigurationException, match=r"flipped\.ckpt: .* checksums of \S*data/0\."):
        Session(EPOCHS, written.parents[1]).fit(ckpt_path=path)


@pytest.mark.parametrize("checksums", [True, False])
def test_a_file_without_checksums_is_taken_as_it_is(checksums: bool, written: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(torch.load(written, weights_only=True), path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert damaged_parts(path) == []


# --- memory that does not suffice -------------------------------------------------------------------------------------


class Hungry(Toy):
    """Needs more memory than any machine has, when it is restored."""

    error: BaseException | None = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        torch.empty(2**58)


class NoMemory(Hungry):
    error = MemoryError()


class NoDeviceMemory(Hungry):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class NoMapping(Hungry):
    error = OSError(12, "Cannot allocate memory")


class Broken(Hungry):
    error = RuntimeError("another thing")


@pytest.mark.parametrize("module", [Hungry, NoMemory, NoDeviceMemory, NoMapping])
def test_memory_that_does_not_suffice_is_told_as_such(module: type[Hungry], tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"not enough memory .*epoch=0-step=4\.ckpt") as error:
        Session(EPOCHS, tmp_path, module=module).fit()
    assert "cannot be read" not in str(error.value)


def test_another_error_is_told_as_before(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"cannot be read .*another thing"):
        Session(EPOCHS, tmp_path, module=Broken).fit()
    assert not ran_out_of_memory(RuntimeError("another thing"))
