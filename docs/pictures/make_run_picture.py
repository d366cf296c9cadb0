"""Draw the run of the README: ``python docs/pictures/make_run_picture.py`` writes ``run.csv`` and ``run.png`` here.

It is the demo's run with the explicit schedule: a network pre-trained on some digits, fine-tuned on others.
"""

from __future__ import annotations

import csv
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from finetuning_scheduler import FinetuningScheduler
from fts_examples import digits
from fts_examples._comparison import Settings, trainable_parameters, without_advice

HERE = Path(__file__).parent
BLUE, VERMILLION = "#0072B2", "#D55E00"  # of Okabe and Ito: told apart without colour vision
GREY = "#808080"  # text that is legible on white and on black
Row = dict[str, float]


class Phases(Callback):
    """Log the phase, and the share of the parameters that train, beside what the module logs."""

    def __init__(self, scheduler: FinetuningScheduler) -> None:
        self.scheduler = scheduler

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log both."""
        everything = sum(parameter.numel() for parameter in pl_module.parameters())
        pl_module.log("phase", float(self.scheduler.curr_depth))
        pl_module.log("trainable", trainable_parameters(pl_module) / everything)


def run(folder: Path, max_epochs: int = 300) -> list[Row]:
    """Pre-train, fine-tune by the demo's schedule, and return what the logger has written: a row an epoch."""
    settings = Settings(max_epochs=max_epochs, patience=4, seed=0, output=folder)
    features, _ = digits.pretrain(settings, lr=1e-3)
    module = digits.for_new_digits(features, settings, lr=1e-3)
    data = digits.Digits(digits.NEW, train_rows=100, validation_rows=200, seed=settings.seed)
    with resources.as_file(resources.files("fts_examples") / "digits_schedule.yaml") as path:
        scheduler = FinetuningScheduler(str(path), base_max_lr=None)
    logger = CSVLogger(folder, "run", version=0)
    L.seed_everything(settings.seed, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=settings.max_epochs,
        logger=logger,
        callbacks=[scheduler, Phases(scheduler), EarlyStopping("val_loss", patience=settings.patience)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    with Path(logger.log_dir, "metrics.csv").open(encoding="utf-8", newline="") as file:
        keys = ("epoch", "phase", "trainable", "val_loss")
        return [{key: float(row[key]) for key in keys} for row in csv.DictReader(file)]


def draw(rows: list[Row]) -> None:
    """Draw loss and share, one above the other, over bands for the phases."""
    import matplotlib.pyplot as plt

    style = {"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY}
    with plt.rc_context({**style, "ytick.color": GREY, "font.size": 9}):
        figure, (loss, share) = plt.subplots(2, 1, figsize=(8, 3.8), sharex=True, height_ratios=(2, 1))
        epochs = [row["epoch"] for row in rows]
        loss.plot(epochs, [row["val_loss"] for row in rows], color=BLUE, marker="o", markersize=2.5, linewidth=1.5)
        loss.set_ylim(bottom=0)
        loss.set_ylabel("validation loss", color=BLUE)
        edges = [epoch - 0.5 for epoch in [*epochs, epochs[-1] + 1]]
        share.stairs([100 * row["trainable"] for row in rows], edges, color=VERMILLION, fill=True, alpha=0.45)
        share.stairs([100 * row["trainable"] for row in rows], edges, color=VERMILLION, linewidth=1.5)
        share.set_ylabel("% trainable", color=VERMILLION)
        share.set_ylim(0, 105)
        share.set_xlabel("epoch")
        for axis in (loss, share):
            mark_phases(axis, rows, named=axis is loss)
        figure.tight_layout()
        figure.savefig(HERE / "run.png", transparent=True, dpi=130, pil_kwargs={"optimize": True})
        plt.close(figure)


def mark_phases(axis: Any, rows: list[Row], *, named: bool) -> None:
    """Put every other phase on a grey band."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(-0.5, rows[-1]["epoch"] + 0.5)
    for phase in sorted({row["phase"] for row in rows}):
        first, last = (function(row["epoch"] for row in rows if row["phase"] == phase) for function in (min, max))
        axis.axvspan(first - 0.5, last + 0.5, color=GREY, alpha=0.18 if phase % 2 else 0.06, linewidth=0)
        if named:
            axis.text((first + last) / 2, 1.03, f"phase {phase:.0f}", transform=axis.get_xaxis_transform(), ha="center")


def main() -> None:
    """Run, write and draw."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, without_advice():
        rows = run(Path(folder))
    with (HERE / "run.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    draw(rows)


if __name__ == "__main__":
    main()
