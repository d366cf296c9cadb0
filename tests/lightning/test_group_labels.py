"""The names of optimizer groups in Lightning: kept, made, logged, and there after a resume from a file without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD

from finetuning_scheduler import FinetuningScheduler
from tests.reference.networks import HEAD, SECOND, THIRD
from tests.reference.recipe import simple_recipe
from tests.reference.toys import Toy, make_trainer

SCHEDULE: dict[int, dict[str, Any]] = {
    0: {"params": [*HEAD], "max_transition_epoch": 1},
    1: {"params": [*THIRD], "lr": 0.05, "max_transition_epoch": 2},
    2: {"params": [*SECOND], "lr": 0.02},
}


class Named(Toy):
    """The user calls the only group by a name."""

    def configure_optimizers(self) -> Any:
        return SGD([{"params": self.optimizer_parameters(), "name": "mine"}], lr=0.1)


class Labels(Callback):
    """Notes the names of the groups by epoch."""

    def __init__(self) -> None:
        self.seen: dict[int, list[str]] = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen[trainer.current_epoch] = [group["name"] for group in trainer.optimizers[0].param_groups]


def fit(root: Path, module: Toy, epochs: int, **arguments: Any) -> tuple[Any, dict[int, list[str]]]:
    labels = Labels()
    scheduler = FinetuningScheduler(SCHEDULE, log_dir=root)
    trainer = make_trainer(root, callbacks=[scheduler, labels], max_epochs=epochs)
    trainer.fit(module, **arguments)
    return trainer, labels.seen


@pytest.mark.parametrize("module", [Toy, Named])
def test_the_users_name_is_kept_and_later_groups_are_named(module: type[Toy], tmp_path: Path) -> None:
    first = "mine" if module is Named else "phase0"
    _, seen = fit(tmp_path, module(simple_recipe()), 3)
    assert seen == {0: [first], 1: [first, "phase1"], 2: [first, "phase1", "phase2"]}


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("has_names", [True, False], ids=["with names", "without names"])
def test_checkpoints_with_and_without_names_resume(has_names: bool, epochs: int, tmp_path: Path) -> None:
    root, path = tmp_path / "first", tmp_path / "saved.ckpt"
    whole, _ = fit(tmp_path / "whole", Toy(simple_recipe()), 3)
    trainer, _ = fit(root, Toy(simple_recipe()), epochs)
    trainer.save_checkpoint(path)
    files = [path, *root.rglob("*.ckpt")]  # the best one, to which the next transition returns, has none either
    for file in files if not has_names else []:
        content = torch.load(file, weights_only=True)
        for group in content["optimizer_states"][0]["param_groups"]:
            group.pop("name")
        torch.save(content, file)
    resumed, seen = fit(root, Toy(simple_recipe()), 3, ckpt_path=path)
    assert seen[2] == ["phase0", "phase1", "phase2"]
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(value, resumed.lightning_module.state_dict()[name]), name
