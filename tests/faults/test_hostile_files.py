"""No code of a checkpoint runs, whatever the file is; and one with the user's own objects is restored all the same."""

from __future__ import annotations

import argparse
import enum
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from finetuning_scheduler.core.foreign import foreign_places, stand_ins
from tests.reference.history import snapshot
from tests.reference.toys import Session, Toy

from .hostile import EPOCHS, FORMS, OBJECTS, ONE_TRANSITION, AtFirstBatch, Meddle, Runs, RunsInAShell, alike

pytestmark = pytest.mark.quick
CONTENT: dict[str, Any] = {
    "state_dict": {"network.head.bias": torch.ones(1)},
    "optimizer_states": [{"state": {}, "param_groups": []}],
    "callbacks": {},
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_nothing_of_a_file_runs_when_it_is_read(form: Any, kind: type[Runs], tmp_path: Path) -> None:
    path, marker = tmp_path / "hostile.ckpt", tmp_path / "it ran"
    form(kind(marker), CONTENT, path)
    with suppress(Exception), stand_ins(path):  # that it is refused is one of the good ends
        torch.load(path, weights_only=True)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("name", sorted(FORMS.keys() - {"in_a_second_pickle", "before_the_first_pickle"}))
def test_the_files_would_run_if_they_were_unpickled(name: str, tmp_path: Path) -> None:
    """A check of the tests' own teeth."""
    path, marker = tmp_path / "hostile.ckpt", tmp_path / "it ran"
    FORMS[name](RunsInAShell(marker), CONTENT, path)
    with suppress(Exception):  # what it makes is of no use afterwards
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("kept", ["known", "unknown"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_best_checkpoint_that_is_swapped_is_never_unpickled(form: Any, kept: str, tmp_path: Path) -> None:
    """Also where it is not known what was written, as nothing was there yet when it was saved."""
    marker = tmp_path / "it ran"

    def swap(path: Path) -> None:
        form(RunsInAShell(marker), torch.load(path, weights_only=True), path)

    options = {"plugins": [AsyncCheckpointIO()]} if kept == "unknown" else {}
    seen = AtFirstBatch()
    session = Session(ONE_TRANSITION, tmp_path, extra_callbacks=(Meddle(swap), seen), **options)
    if kept == "unknown":
        # The file system does not tell that it was swapped, and it is not read: what was written is in memory.
        assert alike(session.fit().history.epochs[0].weights, seen.weights[2])
    else:
        with pytest.raises(MisconfigurationException, match=r"best checkpoint .*epoch=0-step=4\.ckpt") as error:
            session.fit()
        assert "weights_only" not in str(error.value)  # to unpickle it is no advice
    assert not marker.exists()


# --- the user's own objects -------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Settings(dict[str, Any]):
    pass


class Names(list[str]):
    pass


@dataclass(frozen=True)
class Nested:
    path: Path
    inner: Any = None


def filled() -> dict[str, Any]:
    lists: defaultdict[str, list[int]] = defaultdict(list)
    lists["a"].append(1)
    settings, names = Settings(a=1), Names(["a"])
    return {"lists": lists, "settings": settings, "names": names}


OWN: dict[str, Any] = {
    "path": Path("somewhere"),
    "enum": Colour.RED,
    "dataclass": Nested(Path("x"), Nested(Path("y"), Colour.RED)),
    "namespace": argparse.Namespace(a=1, b=Path("z")),
    "partial": partial(max, 1),
    "class": torch.optim.SGD,
    "function": torch.nn.functional.relu,
    "containers": filled(),
    "key": {Nested(Path("k")): 1},
    "several": [Path("a"), (Colour.RED, {"b": range(3)}), {Path("c")}],
}


class WithObject(Toy):
    def __init__(self, recipe: Any = None, *, own: Any) -> None:
        super().__init__(recipe)
        self.save_hyperparameters({"own": own})


class KeepsAnObject(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"path": Path("x")}


@pytest.mark.usefixtures("restored_from")
@pytest.mark.parametrize("own", OWN.values(), ids=OWN.keys())
def test_a_best_checkpoint_with_the_users_own_objects_is_restored(own: Any, tmp_path: Path) -> None:
    plain, other = AtFirstBatch(), AtFirstBatch()
    Session(EPOCHS, tmp_path / "plain", extra_callbacks=(plain,)).fit()
    module: Any = partial(WithObject, own=own)
    Session(EPOCHS, tmp_path / "other", module=module, extra_callbacks=(other, KeepsAnObject())).fit()
    with pytest.raises(Exception, match="weights_only"):
        torch.load(next((tmp_path / "other" / "checkpoints").iterdir()), weights_only=True)
    for epoch, weights in plain.weights.items():
        assert all(torch.equal(other.weights[epoch][name], value) for name, value in weights.items())


class ReadsHyperParameters(WithObject):
    """Finds its own hyper-parameters in what is restored: those in memory."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["hyper_parameters"]["own"] is self.hparams.own


@pytest.mark.usefixtures("restored_from")
def test_hyper_parameters_come_from_memory(tmp_path: Path) -> None:
    Session(EPOCHS, tmp_path, module=partial(ReadsHyperParameters, own=Path("x"))).fit()  # type: ignore[arg-type]


class SavesAnObject(Toy):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"deep": [Path("x")]}


class ReadsItBack(SavesAnObject):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.mine = checkpoint["mine"]


class SpoilsTheWeights(Toy):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["network.extra"] = Path("x")


class Averages(Callback):
    """Keeps the weights, and an object."""

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "path": Path("x")}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = snapshot(pl_module)


@pytest.mark.usefixtures("restored_from")
def test_what_nobody_reads_is_left_out(tmp_path: Path) -> None:
    Session(EPOCHS, tmp_path, module=SavesAnObject).fit()


NEEDED: dict[str, tuple[type[Toy], tuple[Callback, ...], str]] = {
    "a hook reads it": (ReadsItBack, (), "checkpoint['mine']['deep'][0]"),
    "among the weights": (SpoilsTheWeights, (), "checkpoint['state_dict']['network.extra']"),
    "beside averaged weights": (Toy, (Averages(),), "callbacks['Averages']['path']"),
}


@pytest.mark.usefixtures("restored_from")
@pytest.mark.parametrize(("module", "callbacks", "place"), NEEDED.values(), ids=NEEDED.keys())
def test_an_object_where_a_restore_needs_values_is_an_error_that_names_the_place(
    module: type[Toy], callbacks: tuple[Callback, ...], place: str, tmp_path: Path
) -> None:
    session = Session(EPOCHS, tmp_path, module=module, extra_callbacks=callbacks)
    with pytest.raises(MisconfigurationException, match=r"pathlib\.\S*PosixPath at") as error:
        session.fit()
    assert place in str(error.value)
    assert "add_safe_globals" in str(error.value)


@pytest.mark.usefixtures("restored_from")
def test_a_class_that_the_program_has_allowed_is_read_as_it_is(tmp_path: Path) -> None:
    with torch.serialization.safe_globals([type(Path("x"))]):
        session = Session(EPOCHS, tmp_path, module=ReadsItBack).fit()
    assert session.module.mine == {"deep": [Path("x")]}


def test_the_program_allows_no_more_than_before(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    Session(EPOCHS, tmp_path, module=partial(WithObject, own=Path("x"))).fit()  # type: ignore[arg-type]
    assert set(torch.serialization.get_safe_globals()) == before


def test_places_are_found_in_whatever_holds_them(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": [(Path("x"),)], Path("k"): 1, "s": {Path("y")}, "plain": [1, "2", None]}, path)
    with stand_ins(path) as names:
        read = torch.load(path, weights_only=True)
    assert len(names) == 1
    assert sorted(place for place, _ in foreign_places(read, "it")) == ["a key of it", "it['a'][0][0]", "it['s']"]


def test_resuming_a_file_with_objects_asks_for_lightnings_own_argument(tmp_path: Path) -> None:
    module: Any = partial(WithObject, own=Path("x"))
    Session(EPOCHS, tmp_path, module=module, checkpoint={"save_top_k": -1}).fit()
    file = tmp_path / "checkpoints" / "epoch=1-step=8.ckpt"
    with pytest.raises(Exception, match="weights_only"):
        Session(EPOCHS, tmp_path, module=module).fit(ckpt_path=file)
    Session(EPOCHS, tmp_path, module=module).fit(ckpt_path=file, weights_only=False)
