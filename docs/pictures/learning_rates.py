"""Draw the learning rates of real runs: ``python docs/pictures/learning_rates.py`` writes the CSV and PNG files here.

A test makes the runs anew and compares them with the CSV.
"""

from __future__ import annotations

import csv
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler

HERE = Path(__file__).parent
NUMBERS = HERE / "learning_rates.csv"
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito: told apart without colour vision
GREY = "#808080"  # text that is legible on white and on black


class Rate(NamedTuple):
    """The learning rate that an epoch trains a group with; groups are numbered as the phases that add them."""

    picture: str
    panel: str
    epoch: int
    group: int
    rate: float


class Classifier(L.LightningModule):
    """The module of the pages."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(8, 2)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.head(self.blocks(batch[0])), batch[1])

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        """Log the loss."""
        self.log("val_loss", self.training_step(batch))

    def configure_optimizers(self) -> Any:
        """Use AdamW, and let learning rates fall by 0.7 an epoch."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]


class Recorder(L.Callback):
    """Keeps the learning rates of each epoch's first batch."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Keep the rates, once an epoch."""
        if len(self.rates) == trainer.current_epoch:
            self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def schedule(phase_1: Mapping[str, Any] | None = None, phase_2: Mapping[str, Any] | None = None) -> dict[int, Any]:
    """Make three phases of three epochs each, with further keys for two of them."""
    return {
        0: {"params": ["head"], "max_transition_epoch": 3},
        1: {"params": ["blocks.2"], "lr": 4e-3, "max_transition_epoch": 6, **(phase_1 or {})},
        2: {"params": ["*"], "lr": 1e-3, "max_transition_epoch": 9, **(phase_2 or {})},
    }


EXPONENTIAL = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 4}}
NEW = {"lr_scheduler_init": EXPONENTIAL}
SGD = {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02, "momentum": 0.9}}}
GENERATED = {"max_depth": 2, "base_max_lr": 4e-3}

# Pictures, their panels, and the arguments of the callback in each.
PANELS: dict[str, dict[str, dict[str, Any]]] = {
    "new_lr_scheduler": {
        "no new scheduler": {"ft_schedule": schedule()},
        "new_lr_scheduler in phase 2": {"ft_schedule": schedule(phase_2={"new_lr_scheduler": NEW})},
        "use_current_optimizer_pg_lrs: true": {
            "ft_schedule": schedule(phase_2={"new_lr_scheduler": {**NEW, "use_current_optimizer_pg_lrs": True}})
        },
        "init_pg_lrs: [2e-3, 3e-3]": {
            "ft_schedule": schedule(phase_2={"new_lr_scheduler": {**NEW, "init_pg_lrs": [2e-3, 3e-3]}})
        },
    },
    "reinit_lr_cfg": {
        "from the groups' initial rates": {**GENERATED, "reinit_lr_cfg": {"lr_scheduler_init": COSINE}},
        "use_current_optimizer_pg_lrs: true": {
            **GENERATED,
            "reinit_lr_cfg": {"lr_scheduler_init": COSINE, "use_current_optimizer_pg_lrs": True},
        },
    },
    "new_optimizer": {
        "new_optimizer in phase 1": {"ft_schedule": schedule(phase_1={"new_optimizer": SGD})},
        "with new_lr_scheduler": {
            "ft_schedule": schedule(phase_1={"new_optimizer": SGD, "new_lr_scheduler": NEW}),
        },
    },
}


def loader(seed: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Make a few random rows."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


def rates_of(arguments: Mapping[str, Any], directory: str) -> list[list[float]]:
    """Fit once; phases without a limit end when three epochs have been no better."""
    recorder = Recorder()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(
        max_epochs=9,
        accelerator="cpu",
        devices=1,
        num_sanity_val_steps=0,
        default_root_dir=directory,
        callbacks=[
            FinetuningScheduler(**arguments),
            EarlyStopping("val_loss", patience=3, min_delta=10.0),
            recorder,
        ],
        **quiet,
    )
    torch.manual_seed(0)
    trainer.fit(Classifier(), loader(1), loader(2))
    return recorder.rates


def measure() -> Iterator[Rate]:
    """Make all runs."""
    for picture, panels in PANELS.items():
        for panel, arguments in panels.items():
            with tempfile.TemporaryDirectory() as directory:
                for epoch, rates in enumerate(rates_of(arguments, directory)):
                    for group, rate in enumerate(rates):
                        yield Rate(picture, panel, epoch, group, float(f"{rate:.6g}"))


def read() -> list[Rate]:
    """Read what was measured when the pictures were drawn."""
    with NUMBERS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return [Rate(picture, panel, int(epoch), int(group), float(rate)) for picture, panel, epoch, group, rate in rows]


def write(rates: list[Rate]) -> None:
    """Write what was measured."""
    with NUMBERS.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rates)


def draw(picture: str, rates: list[Rate]) -> None:
    """Draw one picture: a panel for each run, a line for each group."""
    import matplotlib.pyplot as plt

    style = {"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY}
    with plt.rc_context({**style, "ytick.color": GREY, "font.size": 9}):
        panels = list(PANELS[picture])
        rows = (len(panels) + 1) // 2
        figure, axes = plt.subplots(rows, 2, figsize=(8, 2.6 * rows), sharex=True, sharey=True, squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=True):
            draw_panel(axis, panel, [rate for rate in rates if (rate.picture, rate.panel) == (picture, panel)])
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
        for axis in axes[:, 0]:
            axis.set_ylabel("learning rate")
        figure.tight_layout()
        figure.savefig(HERE / f"{picture}.png", transparent=True, dpi=130, pil_kwargs={"optimize": True})
        plt.close(figure)


def draw_panel(axis: Any, panel: str, rates: list[Rate]) -> None:
    """Draw the rates of one run, each line with its label at its end."""
    kinds = ((BLUE, "o", "phase 0"), (VERMILLION, "s", "phase 1"), (GREEN, "^", "phase 2"))
    ends = []
    for group, (colour, marker, label) in enumerate(kinds):
        line = [(rate.epoch, rate.rate) for rate in rates if rate.group == group]
        epochs, values = zip(*line, strict=True)
        axis.plot(epochs, values, color=colour, marker=marker, markersize=4, linewidth=1.5)
        ends.append((values[-1], label, colour))
        if group:
            axis.axvline(epochs[0], color=GREY, linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    lowest = 0.0
    for value, label, colour in sorted(ends):  # labels keep their distance, also where lines end together
        lowest = max(value, lowest * 1.5)
        axis.text(rates[-1].epoch + 0.25, lowest, label, color=colour, va="center", fontsize=8)
    axis.set_title(panel, fontsize=9)
    axis.set_xlim(-0.4, rates[-1].epoch + 1.8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    measured = list(measure())
    write(measured)
    for name in PANELS:
        draw(name, measured)
