"""What goes wrong without a word when layers are thawed by hand, and what the same program does with a schedule.

The programs on the left are plain PyTorch Lightning: its ``BaseFinetuning``, or a callback of a few lines, thaws a body
at an epoch. Those on the right do it by ``FinetuningScheduler``. Everything runs on a CPU, the first on two processes,
in about a minute:

    python benchmarks/silent_failures.py
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning, Callback, EarlyStopping
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler

SCHEDULE = {0: {"params": ["head.*"], "max_transition_epoch": 1}, 1: {"params": ["body.*"], "lr": 0.01}}
MAX_EPOCHS = 30


class Classifier(L.LightningModule):
    """A body that is frozen at first, as if pre-trained, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 2)

    def features(self, x: Tensor) -> Tensor:
        """Map rows of 16 numbers to as many features."""
        return self.body(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the batch's loss."""
        return nn.functional.cross_entropy(self.head(self.features(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        """Log what patience watches."""
        self.log("val_loss", self.training_step(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize everything; what has no gradient stays as it is."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Load 64 rows, the same ones in the same order each time."""
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)

    val_dataloader = train_dataloader


class OptimizesWhatTrains(Classifier):
    """Gives the optimizer what requires a gradient when it is made, which is often seen."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Leave out what is frozen."""
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=0.01)


class BodyWithoutGradient(Classifier):
    """Saves memory in the body, which is frozen, and goes on doing so when it no longer is."""

    def features(self, x: Tensor) -> Tensor:
        """Compute the features without a graph."""
        with torch.no_grad():
            return self.body(x)


class SameLoss(Classifier):
    """Its validation loss never gets better."""

    def validation_step(self, batch: list[Tensor]) -> None:
        """Log a constant."""
        self.log("val_loss", torch.tensor(1.0))


class ThawByHand(Callback):
    """Thaw the body at epoch 1."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set ``requires_grad``, and nothing else."""
        if trainer.current_epoch == 1:
            pl_module.body.requires_grad_(True)


class ThawByLightning(BaseFinetuning):
    """Do the same with Lightning's callback for it, as its documentation says."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        """Freeze the body."""
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Thaw the body and hand it to the optimizer."""
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.01)


def by_hand() -> list[Callback]:
    """Thaw by a few lines."""
    return [ThawByHand()]


def by_lightning() -> list[Callback]:
    """Thaw by ``BaseFinetuning``."""
    return [ThawByLightning()]


def by_schedule() -> list[Callback]:
    """Thaw the same layers at the same epoch."""
    return [FinetuningScheduler(SCHEDULE, restore_best=False, logging_level=logging.WARNING)]


def fit(
    kind: type[Classifier], callbacks: list[Callback], epochs: int = 3, resume: Path | None = None, **options: object
) -> tuple[Classifier, L.Trainer]:
    """Fit a classifier whose body is frozen at first."""
    torch.manual_seed(0)
    model = kind()
    model.body.requires_grad_(any(isinstance(each, FinetuningScheduler) for each in callbacks))
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": epochs} | quiet | options
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(callbacks=callbacks, default_root_dir=folder, **settings)
        trainer.fit(model, ckpt_path=resume)
    return model, trainer


def weights(module: nn.Module) -> Tensor:
    """All of a module's parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


# --- the programs -----------------------------------------------------------------------------------------------------


def drift(callbacks: Callable[[], list[Callback]]) -> float:
    """Return the largest difference between the weights of two processes, two epochs after the body has thawed."""
    model, _ = fit(OptimizesWhatTrains, callbacks(), devices=2, strategy="ddp")
    everywhere = [torch.empty_like(weights(model)) for _ in range(2)]
    dist.all_gather(everywhere, weights(model))
    return float((everywhere[0] - everywhere[1]).abs().max())


def movement(kind: type[Classifier], callbacks: Callable[[], list[Callback]]) -> float:
    """Return how far the body's weights have moved in the two epochs after it has thawed."""
    torch.manual_seed(0)
    before = weights(kind().body)
    model, _ = fit(kind, callbacks())
    return float((weights(model.body) - before).abs().max())


def resumed(callbacks: Callable[[], list[Callback]]) -> tuple[int, float]:
    """Return how many tensors train after a resume in epoch 2, and how far the run ends from one that goes through."""
    through, _ = fit(OptimizesWhatTrains, callbacks(), epochs=4)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "last.ckpt")
        fit(OptimizesWhatTrains, callbacks(), epochs=2)[1].save_checkpoint(checkpoint)
        training: list[int] = []
        watch = EpochStart(lambda model: training.append(sum(each.requires_grad for each in model.parameters())))
        model, _ = fit(OptimizesWhatTrains, [*callbacks(), watch], epochs=4, resume=checkpoint)
    return training[-1], float((weights(model) - weights(through)).abs().max())


class EpochStart(Callback):
    """Look at the model when the batches of an epoch begin."""

    def __init__(self, look: Callable[[nn.Module], None]) -> None:
        self.look = look

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Call what was given."""
        self.look(pl_module)


def patience(callbacks: Callable[[EarlyStopping], list[Callback]]) -> int:
    """Return after how many epochs early stopping ends a run of 30 whose loss stays the same."""
    stopping = EarlyStopping("val_loss", patience=3, min_delta=0.01, mode="min")
    return fit(SameLoss, callbacks(stopping), epochs=MAX_EPOCHS)[1].current_epoch


def copied(stopping: EarlyStopping) -> list[Callback]:
    """Replace a callback by one of another class, made from its attributes."""

    class Replacement(EarlyStopping):
        pass

    attributes = {name: getattr(stopping, name) for name in ("monitor", "min_delta", "patience", "mode")}
    return [Replacement(**attributes)]


def driving(stopping: EarlyStopping) -> list[Callback]:
    """Let the callback drive a schedule's only phase."""
    return [FinetuningScheduler({0: {"params": ["*"]}}, restore_best=False, logging_level=logging.WARNING), stopping]


def warned(kind: type[Classifier]) -> str:
    """Return the beginning of the warning about layers that were thawed and not trained."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("finetuning_scheduler").addHandler(handler)
    fit(kind, by_schedule())
    logging.getLogger("finetuning_scheduler").removeHandler(handler)
    return "; ".join(heard).partition(",")[0]


# --- several processes, and the table ---------------------------------------------------------------------------------


def quiet() -> None:
    """Hide what Lightning says of devices, data loaders and the end of a run; use one thread."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def process(rank: int, port: int, folder: str) -> None:
    """Measure the drift as one of two processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    quiet()
    measured = [drift(by_lightning), drift(by_schedule)]
    if rank == 0:
        torch.save(measured, Path(folder, "drift.pt"))
    dist.destroy_process_group()


def drift_of_two_processes() -> tuple[float, float]:
    """Start two processes and return what they have measured: by hand, and by a schedule."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.start_processes(process, (port, folder), nprocs=2, start_method="spawn")
        return tuple(torch.load(Path(folder, "drift.pt")))


def rows() -> list[tuple[str, str, str]]:
    """Run all programs, and say in words what came out."""
    (alone, apart), (training, exact) = resumed(by_lightning), resumed(by_schedule)
    drifted, together = drift_of_two_processes()
    never, trained = (movement(OptimizesWhatTrains, way) for way in (by_hand, by_schedule))
    unused = movement(BodyWithoutGradient, by_hand)
    endless, stopped = patience(copied), patience(driving)
    return [
        ("replicas under DDP, BaseFinetuning", f"weights differ by {drifted:.2f}", f"weights differ by {together:.2g}"),
        (
            "resumed after the thaw, BaseFinetuning",
            f"{alone} of 6 tensors train; off by {apart:.2f}",
            f"{training} of 6 train; off by {exact:.2g}",
        ),
        ("optimizer of what requires a gradient", f"body moves by {never:.2g}", f"body moves by {trained:.2f}"),
        (
            "body without a graph",
            f"body moves by {unused:.2g}, nothing said",
            f"warns: {warned(BodyWithoutGradient)}",
        ),
        ("min_delta of a replaced callback", f"{endless} of 30 epochs", f"{stopped} of 30 epochs"),
    ]


def main() -> None:
    """Print a row for each silent failure."""
    quiet()
    table = Table("what", "without a schedule", "with FinetuningScheduler")
    for row in rows():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
