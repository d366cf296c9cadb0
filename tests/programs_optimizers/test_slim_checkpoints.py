"""Checkpoints that leave weights out: after a restore every parameter thawed so far has its value of the best moment.

The same fit with whole checkpoints is the reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from tests.core_programs.loops import HEAD, LOWER, UPPER, differing

from .toys import Fit, Toy, fit, phases, prepared

EPOCHS = 8
FIRST = ("first.weight", "first.bias")
SCHEDULE = phases(2, 4, 6, parameters=(HEAD, UPPER, LOWER, FIRST))


class Deep(Toy):
    """Four layers. Whole checkpoints, although it would let them be incomplete."""

    def __init__(self, scores: Any = None) -> None:
        super().__init__(scores)
        self.strict_loading = False

    def build(self) -> None:
        self.first = nn.Linear(3, 3)

    def trunk(self, x: Tensor) -> Tensor:
        return super().trunk(torch.tanh(self.first(x)))


def drop(checkpoint: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        checkpoint["state_dict"].pop(name, None)


def frozen_names(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


# --- who leaves out what ----------------------------------------------------------------------------------------------


class DropsFrozen(Deep):
    """Saves what trains, as users of adapters and large backbones do."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        drop(checkpoint, frozen_names(self))


class StateDictOfTrainable(Deep):
    """Leaves them out of its ``state_dict`` altogether."""

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        state = super().state_dict(*arguments, **options)
        left_out = set(frozen_names(self))
        return {name: value for name, value in state.items() if name not in left_out}


class DropsAndFillsIn(Deep):
    """Loads strictly: what the file lacks is filled in from the present model."""

    def __init__(self, scores: Any = None) -> None:
        super().__init__(scores)
        self.strict_loading = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        drop(checkpoint, frozen_names(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}


class DropsFirstToo(Deep):
    """Never saves one weight of the last phase."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        drop(checkpoint, [*frozen_names(self), "first.weight"])


class DropsFrozenCallback(Callback):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        drop(checkpoint, frozen_names(pl_module))


@dataclass(frozen=True)
class Slim:
    module: type[Deep]
    callbacks: tuple[Callback, ...] = ()


SLIM = {
    "a hook of the module": Slim(DropsFrozen),
    "a hook of a callback": Slim(Deep, (DropsFrozenCallback(),)),
    "a state_dict of its own": Slim(StateDictOfTrainable),
    "a hook that fills in what is missing": Slim(DropsAndFillsIn),
    "a hook that never saves a weight of the last phase": Slim(DropsFirstToo),
}
BEST = {
    "best in phase 0": (1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0),
    "best at the end of phase 0": (2.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0),
    "best in phase 1": (2.0, 3.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0),
    "best in phases 0 and 2": (3.0, 4.0, 5.0, 4.0, 1.0, 3.0, 3.0, 3.0),
    "ever better": (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0),
}


def run(slim: Slim, scores: tuple[float, ...], root: Path) -> Fit:
    module = slim.module(scores=scores)
    return fit(module, root, SCHEDULE, epochs=EPOCHS, callbacks=slim.callbacks, restore_best=True)


def best_file(done: Fit) -> dict[str, Any]:
    checkpoint = done.trainer.checkpoint_callback
    assert isinstance(checkpoint, ModelCheckpoint)
    state: dict[str, Any] = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    return state


class KeepsParameters(Callback):
    """Copies the parameters after each epoch, whatever the module's own ``state_dict`` says of them."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self.kept.append({name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()})


def kept_by(slim: Slim, scores: tuple[float, ...], root: Path) -> tuple[Fit, list[dict[str, Tensor]]]:
    keeper = KeepsParameters()
    done = run(Slim(slim.module, (*slim.callbacks, keeper)), scores, root)
    return done, keeper.kept


@pytest.mark.parametrize("scores", BEST.values(), ids=BEST.keys())
@pytest.mark.parametrize("slim", SLIM.values(), ids=SLIM.keys())
def test_a_fit_with_slim_checkpoints_is_the_fit_with_whole_ones(
    slim: Slim, scores: tuple[float, ...], tmp_path: Path
) -> None:
    _, expected = kept_by(Slim(Deep), scores, tmp_path / "whole")
    done, actual = kept_by(slim, scores, tmp_path / "slim")
    assert done.scheduler.curr_depth == 3
    assert [differing(mine, theirs) for mine, theirs in zip(actual, expected, strict=True)] == [set()] * EPOCHS


def test_the_files_are_slim_and_the_restores_matter(tmp_path: Path) -> None:
    """A check of the tests' own teeth."""
    scores = BEST["best in phase 0"]
    whole, restored = kept_by(Slim(Deep), scores, tmp_path / "whole")
    assert set(best_file(whole)) == {*HEAD, *UPPER, *LOWER, *FIRST}
    for number, slim in enumerate(SLIM.values()):
        assert set(best_file(run(slim, scores, tmp_path / str(number)))) == set(HEAD)
    keeper = KeepsParameters()
    fit(Deep(scores=scores), tmp_path / "continued", SCHEDULE, epochs=EPOCHS, callbacks=[keeper])
    assert {*HEAD, *UPPER} <= differing(restored[4], keeper.kept[4])


# --- what no file and no memory has -----------------------------------------------------------------------------------


class DropsUpper(Deep):
    """Never saves a layer that phase 1 thaws."""

    left_out: tuple[str, ...] = UPPER

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        drop(checkpoint, self.left_out)


class DropsHeadBias(DropsUpper):
    left_out = ("head.bias",)


@pytest.mark.parametrize("scores", [BEST["best in phase 0"], BEST["best at the end of phase 0"]], ids=["first", "last"])
def test_a_layer_that_is_never_saved_comes_back_as_it_was_before_it_was_thawed(
    scores: tuple[float, ...], tmp_path: Path
) -> None:
    _, expected = kept_by(Slim(Deep), scores, tmp_path / "whole")
    _, actual = kept_by(Slim(DropsUpper), scores, tmp_path / "slim")
    assert [differing(mine, theirs) for mine, theirs in zip(actual, expected, strict=True)] == [set()] * EPOCHS


@dataclass(frozen=True)
class Lost:
    """What is left out although it had been trained by the best moment."""

    module: type[DropsUpper]
    scores: tuple[float, ...]
    names: tuple[str, ...] = field(default=())


LOST = {
    "a layer of phase 1, best in phase 1": Lost(DropsUpper, BEST["best in phase 1"], UPPER),
    "a layer of phase 1, best in phase 2": Lost(DropsUpper, BEST["best in phases 0 and 2"], UPPER),
    "half of phase 0, best in phase 0": Lost(DropsHeadBias, BEST["best in phase 0"], ("head.bias",)),
}


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST.keys())
def test_a_value_that_neither_file_nor_memory_has_is_an_error_that_names_it_and_nothing_goes_on_without_it(
    lost: Lost, tmp_path: Path
) -> None:
    """An engine that keeps copies of the best moment in memory may go on, with exactly those."""
    try:
        _, actual = kept_by(Slim(lost.module), lost.scores, tmp_path / "slim")
    except MisconfigurationException as error:
        assert [name for name in lost.names if name not in str(error)] == []  # noqa: PT017 - the other outcome follows
        return
    _, expected = kept_by(Slim(Deep), lost.scores, tmp_path / "whole")
    assert [differing(mine, theirs) for mine, theirs in zip(actual, expected, strict=True)] == [set()] * EPOCHS


# --- resumed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 3, 5], ids=["in phase 0", "in phase 1", "in phase 2"])
def test_a_resumed_run_restores_what_whole_checkpoints_restore_or_says_what_it_lacks(
    epoch: int, tmp_path: Path
) -> None:
    def prepare(keeper: KeepsParameters) -> Fit:
        saving = ModelCheckpoint(tmp_path / "saved", monitor="val_loss", save_top_k=-1, filename="{epoch}")
        module = DropsFrozen(scores=BEST["best in phase 0"])
        callbacks: list[Callback] = [keeper, saving]
        return prepared(module, tmp_path, SCHEDULE, epochs=EPOCHS, callbacks=callbacks, restore_best=True)

    _, expected = kept_by(Slim(Deep), BEST["best in phase 0"], tmp_path / "whole")
    prepare(KeepsParameters()).run()
    for later in range(epoch + 1, EPOCHS):
        (tmp_path / "saved" / f"epoch={later}.ckpt").unlink()
    keeper = KeepsParameters()
    try:
        prepare(keeper).run(ckpt_path=tmp_path / "saved" / f"epoch={epoch}.ckpt")
    except MisconfigurationException as error:
        assert any(name in str(error) for name in (*UPPER, *LOWER)), str(error)  # noqa: PT017
        return
    assert [differing(mine, theirs) for mine, theirs in zip(keeper.kept, expected[epoch + 1 :], strict=True)] == (
        [set()] * (EPOCHS - epoch - 1)
    )
