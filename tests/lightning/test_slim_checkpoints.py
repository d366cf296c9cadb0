"""Checkpoints without the frozen weights: whole again wherever they are loaded, or an error says why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import finetuning_scheduler as fts
from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, ScheduleError
from tests.reference.history import assert_continues, assert_same_run, snapshot
from tests.reference.networks import BATCHES_PER_EPOCH, HEAD, SECOND, THIRD, Tied, batch_normalised
from tests.reference.recipe import PhaseSpec, Recipe, adamw, simple_recipe
from tests.reference.toys import Session, Toy, make_trainer

pytestmark = pytest.mark.quick
NOTE = "finetuning_scheduler.merge_checkpoint"

RECIPE = Recipe(
    phases=(
        PhaseSpec(HEAD, max_epoch=2),
        PhaseSpec(THIRD, lr=0.05, max_epoch=4),
        PhaseSpec(SECOND, lr=0.02),
    ),
    epochs=6,
    optimizer=adamw,
    scores=(4.0, 3.0, 2.0, 3.0, 4.0, 1.0),
)
FROZEN = {"network.first.weight", "network.first.bias"}


def fitted(
    root: Path,
    recipe: Recipe = RECIPE,
    *,
    module: type[Toy] = Toy,
    callbacks: tuple[Callback, ...] = (),
    slim: bool = True,
    ckpt_path: Path | None = None,
    **saving: Any,
) -> Session:
    session = Session(recipe, root, module=module, extra_callbacks=callbacks)
    held: list[Callback] = session.trainer.callbacks  # type: ignore[attr-defined]
    place = next(index for index, each in enumerate(held) if isinstance(each, ModelCheckpoint))
    options = {"monitor": "val_loss", "save_last": True, "save_top_k": -1, "filename": "{epoch}"} | saving
    held[place] = FTSCheckpoint(root / "checkpoints", save_frozen_weights=not slim, **options)
    return session.fit(ckpt_path=ckpt_path)


def file_of(root: Path, epoch: int) -> Path:
    return root / "checkpoints" / f"epoch={epoch}.ckpt"


def keys_of(path: Path) -> set[str]:
    return {key for key in torch.load(path, weights_only=True)["state_dict"] if NOTE not in key}


class Made(Toy):
    """Can be made without arguments, as `load_from_checkpoint` does."""

    def __init__(self, recipe: Recipe = RECIPE) -> None:
        super().__init__(recipe)


# --- what is in the files ---------------------------------------------------------------------------------------------


def test_what_no_phase_has_thawed_is_left_out(tmp_path: Path) -> None:
    fitted(tmp_path)
    assert keys_of(file_of(tmp_path, 1)) == {*HEAD}
    assert keys_of(file_of(tmp_path, 3)) == {*HEAD, *THIRD}
    assert keys_of(file_of(tmp_path, 5)) == {*HEAD, *THIRD, *SECOND}
    assert keys_of(tmp_path / "checkpoints" / "last.ckpt") == {*HEAD, *THIRD, *SECOND}


def test_a_file_holds_tensors_and_plain_values(tmp_path: Path) -> None:
    fitted(tmp_path)
    content = torch.load(file_of(tmp_path, 1), weights_only=True)["frozen_weights_left_out"]
    assert set(content["fingerprints"]) == FROZEN | set(THIRD) | set(SECOND)


def test_the_fit_is_the_one_with_whole_files(restored_from: str, tmp_path: Path) -> None:
    slim, whole = fitted(tmp_path / "slim"), fitted(tmp_path / "whole", slim=False)
    assert_same_run(slim.history, whole.history)


def test_buffers_are_saved(tmp_path: Path) -> None:
    phases = (PhaseSpec(HEAD, max_epoch=2), PhaseSpec(("network.upper.weight",)))
    fitted(tmp_path, replace(RECIPE, network=batch_normalised, phases=phases))
    kept = {f"network.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert keys_of(file_of(tmp_path, 1)) == {*HEAD, *kept}


def test_a_shared_parameter_is_left_out_under_each_of_its_names(tmp_path: Path) -> None:
    phases = (PhaseSpec(("network.out.bias",), max_epoch=2), PhaseSpec(("network.embed.weight",)))
    recipe = replace(RECIPE, network=Tied, phases=phases, epochs=4)
    whole = fitted(tmp_path, recipe)
    assert keys_of(file_of(tmp_path, 1)) == {"network.out.bias"}
    assert keys_of(file_of(tmp_path, 3)) == {"network.out.bias", "network.embed.weight", "network.out.weight"}
    for epoch in (1, 2):
        resumed = fitted(tmp_path / str(epoch), recipe, ckpt_path=file_of(tmp_path, epoch))
        assert_continues(resumed.history, whole.history, (epoch + 1) * BATCHES_PER_EPOCH)


class Teacher(Toy):
    """Frozen parameters that move."""

    def __init__(self, recipe: Recipe = RECIPE) -> None:
        super().__init__(recipe)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.teacher, self.rests = nn.Linear(5, 1), nn.Linear(2, 2)

    def on_train_batch_end(self, *_: Any) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.network.head.parameters(), strict=True):
            mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)


def test_frozen_weights_that_move_are_saved_in_a_resumed_run_too(tmp_path: Path) -> None:
    whole = fitted(tmp_path, module=Teacher)
    teacher = {"teacher.weight", "teacher.bias"}
    assert keys_of(file_of(tmp_path, 1)) == {*HEAD, *teacher}
    for epoch in (1, 3):
        resumed = fitted(tmp_path, module=Teacher, ckpt_path=file_of(tmp_path, epoch), filename=f"{epoch}-{{epoch}}")
        assert teacher <= keys_of(tmp_path / "checkpoints" / f"{epoch}-epoch=5.ckpt")
        assert_continues(resumed.history, whole.history, (epoch + 1) * BATCHES_PER_EPOCH)


def test_a_run_that_goes_on_from_a_whole_file_saves_what_a_new_model_does_not_have(tmp_path: Path) -> None:
    """The file holds other frozen weights than those that the module has when it is made."""
    fitted(tmp_path, slim=False)
    path = file_of(tmp_path, 1)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["network.first.weight"] += 1
    torch.save(content, path)
    whole = fitted(tmp_path / "whole", slim=False, ckpt_path=path)
    slim = fitted(tmp_path / "slim", ckpt_path=path)
    assert_same_run(slim.history, whole.history)
    assert keys_of(file_of(tmp_path / "slim", 3)) == {*HEAD, *THIRD, "network.first.weight"}
    again = fitted(tmp_path / "slim", ckpt_path=file_of(tmp_path / "slim", 3))
    assert_continues(again.history, whole.history, 2 * BATCHES_PER_EPOCH)


def test_a_second_fit_of_the_same_trainer_leaves_out_what_was_never_changed(tmp_path: Path) -> None:
    session = fitted(tmp_path, replace(RECIPE, epochs=3))
    session.trainer.fit_loop.max_epochs = 6
    session.fit()
    assert keys_of(file_of(tmp_path, 5)) == {*HEAD, *THIRD, *SECOND}


def test_other_callbacks_save_whole_files(tmp_path: Path) -> None:
    other = ModelCheckpoint(tmp_path / "other", save_top_k=-1, filename="{epoch}", monitor="epoch", mode="max")
    session = fitted(tmp_path, callbacks=(other,))
    session.trainer.save_checkpoint(tmp_path / "mine.ckpt")
    assert keys_of(tmp_path / "other" / "epoch=1.ckpt") >= FROZEN
    assert keys_of(tmp_path / "mine.ckpt") >= FROZEN


# --- loading ----------------------------------------------------------------------------------------------------------


def expected_weights(root: Path, epoch: int) -> dict[str, Tensor]:
    """What a whole file has; its fit is the same."""
    fitted(root / "whole", module=Made, slim=False)
    weights: dict[str, Tensor] = torch.load(file_of(root / "whole", epoch), weights_only=True)["state_dict"]
    return weights


def alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 4])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(epoch: int, restored_from: str, tmp_path: Path) -> None:
    whole = fitted(tmp_path)
    resumed = fitted(tmp_path, ckpt_path=file_of(tmp_path, epoch))
    assert_continues(resumed.history, whole.history, (epoch + 1) * BATCHES_PER_EPOCH)


class Notes(Callback):
    """The weights that are validated, tested or predicted with."""

    weights: Mapping[str, Tensor] = {}

    def note(self, trainer: Any, pl_module: Any) -> None:
        self.weights = snapshot(pl_module)

    on_validation_start = on_test_start = on_predict_start = note


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # no FTSCheckpoint
@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_a_trainer_with_the_callback_fills_in_what_is_left_out(function: str, tmp_path: Path) -> None:
    expected = expected_weights(tmp_path, 3)
    fitted(tmp_path, module=Made)
    notes = Notes()
    trainer, module = make_trainer(tmp_path, callbacks=[FinetuningScheduler(), notes]), Made()
    options = {"dataloaders": module.val_dataloader()} if function == "predict" else {"verbose": False}
    Made.predict_step = lambda self, batch: self(batch[0])  # type: ignore[method-assign, assignment]
    getattr(trainer, function)(module, ckpt_path=file_of(tmp_path, 3), **options)
    assert alike(notes.weights, expected)


def test_load_from_checkpoint_fills_in_what_is_left_out(tmp_path: Path) -> None:
    expected = expected_weights(tmp_path, 3)
    fitted(tmp_path, module=Made)
    module = fts.load_from_checkpoint(Made, file_of(tmp_path, 3))
    assert type(module) is Made
    assert alike(snapshot(module), expected)
    whole = fts.load_from_checkpoint(Made, file_of(tmp_path / "whole", 3), map_location="cpu")
    assert alike(snapshot(whole), expected)


def test_lightnings_own_way_loads_it_if_it_is_not_strict(tmp_path: Path) -> None:
    expected = expected_weights(tmp_path, 3)
    fitted(tmp_path, module=Made)
    with pytest.warns(UserWarning, match="network.first.weight"), pytest.warns(UserWarning, match=NOTE):
        module = Made.load_from_checkpoint(file_of(tmp_path, 3), strict=False)
    assert alike(snapshot(module), expected)


def test_an_error_of_who_loads_it_strictly_says_what_to_do(tmp_path: Path) -> None:
    fitted(tmp_path, module=Made)
    with pytest.raises(RuntimeError, match=NOTE):
        Made.load_from_checkpoint(file_of(tmp_path, 3))
    with pytest.raises(RuntimeError, match=NOTE):
        make_trainer(tmp_path).test(Made(), ckpt_path=file_of(tmp_path, 3), verbose=False)


@pytest.mark.parametrize("source", ["module", "state dictionary"])
def test_a_file_is_made_whole(source: str, tmp_path: Path) -> None:
    expected = expected_weights(tmp_path, 3)
    whole = fitted(tmp_path, module=Made)
    module = Made()
    path = fts.merge_checkpoint(
        file_of(tmp_path, 3), module if source == "module" else module.state_dict(), tmp_path / "merged" / "whole.ckpt"
    )
    assert alike(snapshot(Made.load_from_checkpoint(path)), expected)
    assert alike(torch.load(path, weights_only=True)["state_dict"], expected)
    resumed = fitted(tmp_path, slim=False, ckpt_path=Path(path))
    assert_continues(resumed.history, whole.history, 4 * BATCHES_PER_EPOCH)


def test_it_is_made_whole_in_its_place(tmp_path: Path) -> None:
    fitted(tmp_path, module=Made)
    path = file_of(tmp_path, 1)
    assert fts.merge_checkpoint(path, Made()) == str(path)
    assert keys_of(path) == set(Made().state_dict())
    with pytest.raises(ScheduleError, match="which is whole"):
        fts.merge_checkpoint(path, Made())


def test_what_is_no_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    broken = [lambda content=content: path.write_bytes(content) for content in (b"", b"?", b"hello")]
    for write in (lambda: torch.save({"a": 1}, path), lambda: torch.save([1], path), *broken, path.unlink):
        write()
        with pytest.raises(ScheduleError, match=r"other\.ckpt"):
            fts.merge_checkpoint(path, Made())


class Averaged(Made):
    pass


@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_averages_are_whole_again_too(epoch: int, restored_from: str, tmp_path: Path) -> None:
    averaging = lambda: (EMAWeightAveraging(decay=0.5),)  # noqa: E731
    whole = fitted(tmp_path, callbacks=averaging())
    content = torch.load(file_of(tmp_path, epoch), weights_only=True)
    assert FROZEN.isdisjoint(content["state_dict"])
    assert FROZEN.isdisjoint(content["current_model_state"])
    full = fitted(tmp_path / "whole", callbacks=averaging(), slim=False)
    assert_same_run(whole.history, full.history)
    resumed = fitted(tmp_path, callbacks=averaging(), ckpt_path=file_of(tmp_path, epoch))
    assert_continues(resumed.history, whole.history, (epoch + 1) * BATCHES_PER_EPOCH)
    assert alike(snapshot(resumed.module), snapshot(whole.module))


class SeesAll(Made):
    """A hook that needs every key."""

    seen: tuple[set[str], ...] = ()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert set(checkpoint["state_dict"]) == set(self.state_dict())
        type(self).seen = (*self.seen, set(checkpoint["state_dict"]))


def test_a_hook_of_the_module_meets_a_whole_checkpoint(restored_from: str, tmp_path: Path) -> None:
    fitted(tmp_path, module=SeesAll)
    fitted(tmp_path, module=SeesAll, ckpt_path=file_of(tmp_path, 2))
    fts.load_from_checkpoint(SeesAll, file_of(tmp_path, 2))
    assert len(SeesAll.seen) >= 4


def test_a_compiled_network_is_whole_again(tmp_path: Path) -> None:
    class Compiled(Toy):
        def __init__(self, recipe: Recipe = RECIPE) -> None:
            super().__init__(recipe)
            self.network = torch.compile(self.network, backend="eager")  # type: ignore[assignment]

    whole = fitted(tmp_path, module=Compiled)
    assert all("_orig_mod" in key for key in keys_of(file_of(tmp_path, 1)))
    assert len(keys_of(file_of(tmp_path, 1))) == 2
    resumed = fitted(tmp_path, module=Compiled, ckpt_path=file_of(tmp_path, 1))
    assert_continues(resumed.history, whole.history, 2 * BATCHES_PER_EPOCH)


# --- other weights ----------------------------------------------------------------------------------------------------


class Other(Made):
    """Made with another frozen layer."""

    def __init__(self, recipe: Recipe = RECIPE) -> None:
        super().__init__(recipe)
        self.network.first.weight.data[0, 0] += 1e-3


class Smaller(Made):
    """Made without it."""

    def __init__(self, recipe: Recipe = RECIPE) -> None:
        super().__init__(recipe)
        self.network.first = nn.Identity()


@dataclass(frozen=True)
class Way:
    """A way to load a file into a module of a class."""

    load: Callable[[type[Made], Path, Path], Any]
    error: type[Exception]


WAYS = {
    "resumed": Way(lambda kind, path, root: fitted(root / "x", module=kind, ckpt_path=path), MisconfigurationException),
    "validated": Way(
        lambda kind, path, root: make_trainer(root, callbacks=[FinetuningScheduler()]).validate(kind(), ckpt_path=path),
        MisconfigurationException,
    ),
    "loaded": Way(lambda kind, path, root: fts.load_from_checkpoint(kind, path), ScheduleError),
    "merged": Way(lambda kind, path, root: fts.merge_checkpoint(path, kind(), root / "whole"), ScheduleError),
}


@pytest.mark.parametrize("kind", [Other, Smaller])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_model_with_other_frozen_weights_is_refused_and_they_are_named(
    way: Way, kind: type[Made], tmp_path: Path
) -> None:
    fitted(tmp_path, module=Made)
    path = file_of(tmp_path, 1)
    with pytest.raises(way.error, match=r"network\.first\.weight") as error:
        way.load(kind, path, tmp_path)
    assert str(path) in str(error.value)
    assert "network.second" not in str(error.value)
    assert "same pre-trained weights" in str(error.value)
    assert not (tmp_path / "whole").exists()


def test_a_file_read_in_another_precision_is_refused_or_the_same(tmp_path: Path) -> None:
    """Weights of half the precision are those that a model gets that is trained in it."""
    recipe = simple_recipe(optimizer=adamw, scores=RECIPE.scores)
    session = Session(recipe, tmp_path, precision="bf16-true")
    held: list[Callback] = session.trainer.callbacks  # type: ignore[attr-defined]
    place = next(index for index, each in enumerate(held) if isinstance(each, ModelCheckpoint))
    held[place] = FTSCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}", save_frozen_weights=False
    )
    session.fit()
    module = fts.load_from_checkpoint(Made, tmp_path / "epoch=1.ckpt")
    assert torch.equal(module.network.first.weight, Made().network.first.weight.bfloat16().float())


def test_the_argument_is_taken_by_name(tmp_path: Path) -> None:
    saving = FTSCheckpoint(tmp_path, None, "val_loss", save_frozen_weights=False)
    assert (saving.monitor, saving.save_frozen_weights) == ("val_loss", False)
    assert saving.state_key == FTSCheckpoint(tmp_path, None, "val_loss").state_key
    assert isinstance(saving, pl.callbacks.ModelCheckpoint)
