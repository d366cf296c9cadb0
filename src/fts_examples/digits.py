"""Pre-train a small network on the digits 0-4, fine-tune it on the digits 5-9: without a schedule and with two.

Run it with ``python -m fts_examples.digits``. Data: the 8 x 8 images that come with scikit-learn.
"""

import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated

import lightning as L
import torch
import typer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler
from fts_examples._comparison import Outcome, Settings, print_outcomes, train_and_test

OLD, NEW = range(5), range(5, 10)
BATCH_SIZE = 32

app = typer.Typer(add_completion=False)


class DigitClassifier(L.LightningModule):
    """Three convolutions and a linear head over five classes."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.features = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 16, 3, padding=1),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(16, 32, 3, padding=1),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                conv3=nn.Conv2d(32, 32, 3, padding=1),
                relu3=nn.ReLU(),
                pool3=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
            )
        )
        self.head = nn.Linear(32 * 2 * 2, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, 5)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the batch's loss."""
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss that early stopping and checkpoints watch."""
        images, labels = batch
        self.log("val_loss", cross_entropy(self(images), labels), prog_bar=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the share of right answers."""
        images, labels = batch
        self.log("test_accuracy", (self(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize with Adam; a schedule decides which parameters it holds."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Digits(L.LightningDataModule):
    """Images of some digits, relabelled from 0, split at random into training, validation and test rows."""

    def __init__(self, digits: range, *, train_rows: int, validation_rows: int, seed: int) -> None:
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        wanted = torch.isin(torch.as_tensor(labels), torch.tensor(digits))
        self.images = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[wanted] / 16
        self.labels = torch.as_tensor(labels)[wanted] - digits.start
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        held_out = train_rows + validation_rows
        self.rows = order[:train_rows], order[train_rows:held_out], order[held_out:]

    def loader(self, part: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        """Load one part: 0 training, 1 validation, 2 test."""
        rows = self.rows[part]
        return DataLoader(TensorDataset(self.images[rows], self.labels[rows]), BATCH_SIZE, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Load the training rows, shuffled."""
        return self.loader(0, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Load the validation rows."""
        return self.loader(1)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Load the rows that neither training nor the choice of a checkpoint has seen."""
        return self.loader(2)


def pretrain(settings: Settings, lr: float) -> tuple[nn.Module, Outcome]:
    """Train on the old digits; return the features and how well they did."""
    L.seed_everything(settings.seed, verbose=False)
    module = DigitClassifier(lr)
    data = Digits(OLD, train_rows=500, validation_rows=200, seed=settings.seed)
    outcome = train_and_test("pre-training", module, data, settings)
    return module.features, outcome


def for_new_digits(features: nn.Module, settings: Settings, lr: float) -> DigitClassifier:
    """Return a network with the pre-trained features and a new head, the same one each time."""
    L.seed_everything(settings.seed, verbose=False)
    module = DigitClassifier(lr)
    module.features.load_state_dict(features.state_dict())
    return module


def schedulers() -> Iterator[tuple[str, FinetuningScheduler | None]]:
    """Yield the ways to fine-tune. A phase that names no learning rate takes the module's."""
    yield "no schedule", None
    yield "generated schedule", FinetuningScheduler(base_max_lr=None)
    with resources.as_file(resources.files("fts_examples") / "digits_schedule.yaml") as path:
        yield "explicit schedule", FinetuningScheduler(ft_schedule=str(path), base_max_lr=None)


def compare(features: nn.Module, settings: Settings, *, train_rows: int, lr: float) -> list[Outcome]:
    """Fine-tune the same features on the same rows in every way."""
    data = Digits(NEW, train_rows=train_rows, validation_rows=200, seed=settings.seed)
    return [
        train_and_test(way, for_new_digits(features, settings, lr), data, settings, scheduler)
        for way, scheduler in schedulers()
    ]


@app.command()
def main(
    max_epochs: Annotated[int, typer.Option(min=1, help="Most epochs for each way, and for pre-training.")] = 300,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better val_loss before a phase ends.")] = 4,
    train_rows: Annotated[int, typer.Option(min=1, max=600, help="Images of new digits to train on.")] = 100,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights, splits and shuffling.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Where checkpoints go; by default nothing is kept.")] = None,
) -> None:
    """Pre-train on the digits 0-4, fine-tune on the digits 5-9 in three ways, compare."""
    torch.set_num_threads(1)  # so small a network is slower on more
    with tempfile.TemporaryDirectory() as temporary:
        settings = Settings(max_epochs=max_epochs, patience=patience, seed=seed, output=output or Path(temporary))
        features, pretraining = pretrain(settings, lr)
        typer.echo(f"Pre-trained on the digits 0-4: {pretraining.accuracy:.1%} right, {pretraining.epochs} epochs.")
        outcomes = compare(features, settings, train_rows=train_rows, lr=lr)
    print_outcomes(f"Fine-tuned on {train_rows} images of the digits 5-9", outcomes, held_out="images held out")


if __name__ == "__main__":
    app()
