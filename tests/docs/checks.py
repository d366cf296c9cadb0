"""What holds after blocks of the pages, beyond that they run; names that a page supposes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler
from tests.docs.pages import ROOT
from tests.docs.running import Names

Check = Callable[[Names], None]


def transitions(names: Names) -> list[str]:
    """Which phase came after which, and the learning rates in it."""
    lines = [line for line in names["said"] if re.match(r"Phase \d+ -> ", line)]
    return [re.sub(r"Phase (\d+ -> \d+).* learning rates ", r"\1 ", line) for line in lines]


def scored(names: Names) -> None:
    assert names["scheduler"].curr_depth == 1
    assert names["after"] < names["before"]


def one_drives(names: Names) -> None:
    assert names["scheduler"].curr_depth == 1
    assert type(names["stopping"]) is names["Loud"]
    assert (
        "Of 2 callbacks, FTSCheckpoint that monitors 'val_loss' drives the phases; the others only save."
        in names["said"]
    )
    assert names["trainer"].current_epoch == names["stopping"].stopped_epoch + 1 < 6
    saved = [path for path in names["written"] if path.match("checkpoints/*.ckpt")]
    assert len(saved) == names["trainer"].current_epoch
    assert [Path(names["best"].best_model_path)] == list(Path("best").absolute().glob("*.ckpt"))


def configured(names: Names) -> None:
    (scheduler,) = (each for each in names["trainer"].callbacks if isinstance(each, FinetuningScheduler))
    assert scheduler.curr_depth == 1


def judged_by_training(names: Names) -> None:
    assert names["scheduler"].curr_depth == 1
    assert names["trainer"].current_epoch == names["stopping"].stopped_epoch + 1 < 6
    assert float(names["stopping"].best_score) < 10


def each_fold_went_through_both_phases(names: Names) -> None:
    assert transitions(names) == ["0 -> 1 [0.01, 0.001]"] * 2


def went_on(names: Names) -> None:
    assert transitions(names) == ["0 -> 1 [0.01, 0.001]"]
    assert names["trainer"].current_epoch == 5


def searched(names: Names) -> None:
    assert names["model"].batch_size == 4
    assert names["rates"].optimal_lr.suggestion() == names["model"].lr != 0.01
    assert [group["lr"] for group in names["trainer"].optimizers[0].param_groups] == [names["model"].lr, 1e-3]


def holds_the_average(names: Names) -> None:
    assert names["scheduler"].curr_depth == 1
    saved = torch.load(names["trainer"].checkpoint_callback.best_model_path, weights_only=True)
    assert not torch.equal(saved["state_dict"]["head.weight"], saved["current_model_state"]["head.weight"])


def saved_what_trains(names: Names) -> None:
    assert names["scheduler"].curr_depth == 1
    saved = [set(torch.load(f"slim/epoch={epoch}.ckpt", weights_only=True)["state_dict"]) for epoch in range(4)]
    head, body = {"head.weight", "head.bias"}, {"body.weight", "body.bias"}
    assert saved == [head, head, head | body, head | body]


def ended_inside_an_epoch(names: Names) -> None:
    assert names["scheduler"].curr_depth == 1
    assert names["trainer"].global_step == 12  # all of one epoch


def left_the_body_frozen(names: Names) -> None:
    assert [set(phase.params) for phase in names["scheduler"].ft_schedule.phases] == [{"head.weight", "head.bias"}]
    assert len([line for line in names["said"] if "left out of the generated schedule: body.*" in line]) == 1
    assert not any(parameter.requires_grad for parameter in names["model"].body.parameters())


def trained_the_temperature(names: Names) -> None:
    assert names["temperature"].item() != 1.0


def split_each_phase(names: Names) -> None:
    assert names["decays"] == [0.01, 0.0, 0.01, 0.0]


def followed_the_lambda(names: Names) -> None:
    assert transitions(names) == ["0 -> 1 [0.0025, 0.001]", "0 -> 1 [0.0025, 0.00025]"]
    assert names["trainer"].optimizers[0].param_groups[-1]["lr"] == 1e-3 * 0.5**3


def got_a_shape(names: Names) -> None:
    assert names["scheduler"].curr_depth == 1
    assert names["model"].body.weight.shape == (8, 8)


def resumed_as_if_uninterrupted(names: Names) -> None:
    assert names["notes"].entered == [1]
    assert names["again"].phase == 1
    assert names["again"].finished
    names["train"](names["model"], names["runner"], epochs=1)
    expected = names["model"].state_dict()
    assert {name: torch.equal(value, expected[name]) for name, value in names["resumed"].state_dict().items()} == (
        dict.fromkeys(expected, True)
    )


def the_head_trained_for_three_epochs(names: Names) -> None:
    assert transitions(names)[0].startswith("0 -> 1")
    assert "at epoch 3," in next(line for line in names["said"] if line.startswith("Phase 0 -> 1"))
    assert names["trainer"].current_epoch > 4


def finished_its_phases(names: Names) -> None:
    assert names["runner"].finished
    assert names["runner"].phase == 1


def saved_as_much_as_the_page_says(names: Names) -> None:
    page = (ROOT / "docs" / "memory_profiling.md").read_text(encoding="utf-8")
    printed = [line for line in names["said"] if re.fullmatch(r"[01] \d+", line)]
    assert printed == [f"{phase} {size}" for size, phase in re.findall(r"(\d+)(?: bytes)? for phase (\d)", page)]
    assert len(printed) == 2
    assert {path.name for path in Path("phases").iterdir()} == {"memory_fit_rank_0.yaml"}


def tracks_fsdp2(names: Names) -> None:
    assert names["fsdp_cfg"].track_fsdp_mem


MEMORY = "docs/memory_profiling.md"
PROGRAMS = "docs/programs.md"
CHECKS: Mapping[tuple[str, str], list[Check]] = {  # by page and heading, a check for each block below it
    (MEMORY, "A phase at a time"): [saved_as_much_as_the_page_says],
    (MEMORY, "FSDP2"): [tracks_fsdp2],
    ("README.md", "Try it"): [the_head_trained_for_three_epochs],
    ("README.md", "Plain PyTorch"): [finished_its_phases],
    (PROGRAMS, "Scoring"): [scored],
    (PROGRAMS, "Callbacks of your own"): [one_drives],
    (PROGRAMS, "From `configure_callbacks`"): [configured],
    (PROGRAMS, "A metric of the training"): [judged_by_training],
    (PROGRAMS, "Folds, and fitting again"): [each_fold_went_through_both_phases, went_on],
    (PROGRAMS, "Searches for a learning rate or a batch size"): [searched],
    (PROGRAMS, "Averages of weights"): [holds_the_average],
    (PROGRAMS, "Slim checkpoints"): [saved_what_trains],
    (PROGRAMS, "Epochs without end"): [ended_inside_an_epoch],
    (PROGRAMS, "What came frozen"): [left_the_body_frozen],
    (PROGRAMS, "Optimizers and LR schedulers"): [
        trained_the_temperature,
        split_each_phase,
        followed_the_lambda,
        got_a_shape,
    ],
    (PROGRAMS, "Loops written by hand"): [resumed_as_if_uninterrupted],
}


class MyLightningModule(L.LightningModule):
    """The README's: twelve layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(4, 4) for _ in range(12)])})
        self.head = nn.Linear(4, 2)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x = batch[0]
        for layer in self.encoder["layer"]:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(x), batch[1])

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.log("val_loss", self.training_step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class MyDataModule(L.LightningDataModule):
    """The README's: rows of four numbers."""

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)

    val_dataloader = train_dataloader


# Names that a page takes for granted.
GIVEN: Mapping[str, Names] = {
    "README.md": {"MyLightningModule": MyLightningModule, "MyDataModule": MyDataModule},
}
