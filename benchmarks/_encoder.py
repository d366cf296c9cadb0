"""An encoder of 12 blocks that classifies sequences, its data, and fits of it: without reuse, with it, and by hand.

By hand means what a user would write for this one model: the outputs of the frozen blocks are computed in one pass over
the data and looked up by the row's number from then on. That is the limit of what reuse can reach.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from _common import Options, alternate, timed
from _trainer import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from finetuning_scheduler import FinetuningScheduler

BLOCKS, WORDS, CLASSES = 12, 1000, 4

Way = Literal["plain", "validation", "all", "by hand"]


@dataclass(frozen=True)
class Sizes:
    """How large a session is."""

    width: int = 128
    tokens: int = 64
    batch: int = 16
    train_batches: int = 8  # an epoch
    val_batches: int = 2

    @classmethod
    def of(cls, options: Options, **more: int) -> Sizes:
        """The sizes of a benchmark, or as small as can be."""
        return cls.tiny() if options.tiny else cls(**more)

    @classmethod
    def tiny(cls) -> Sizes:
        """As small as can be."""
        return cls(width=16, tokens=4, batch=4, train_batches=2, val_batches=1)


@dataclass(frozen=True)
class Stage:
    """What trains from some epoch on: the head, and blocks counted from the top; all of it with ``"everything"``."""

    blocks: int | Literal["everything"]
    until: int  # the epoch at which it ends


class Encoder(L.LightningModule):
    """Token embeddings, 12 transformer blocks, the mean over positions, a linear head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sizes = sizes
        self.embeddings = nn.Embedding(WORDS, sizes.width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(sizes.width, 4, 4 * sizes.width, batch_first=True) for _ in range(BLOCKS)
        )
        self.head = nn.Linear(sizes.width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [rows, classes] of token numbers [rows, positions]."""
        return self.upper(self.lower(tokens, BLOCKS), BLOCKS)

    def lower(self, tokens: Tensor, cut: int) -> Tensor:
        """Run what lies below a block."""
        hidden = self.embeddings(tokens)
        for block in self.blocks[:cut]:
            hidden = block(hidden)
        return hidden

    def upper(self, hidden: Tensor, cut: int) -> Tensor:
        """Run a block and what lies above it."""
        for block in self.blocks[cut:]:
            hidden = block(hidden)
        return self.head(hidden.mean(dim=1))

    def logits(self, batch: list[Tensor]) -> Tensor:
        """Classify a batch of row numbers, tokens and labels."""
        return self(batch[1])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self.logits(batch), batch[2])

    def validation_step(self, batch: list[Tensor]) -> None:
        """Log the loss of a batch."""
        self.log("val_loss", nn.functional.cross_entropy(self.logits(batch), batch[2]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize what a phase thaws."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    def rows(self, split: str) -> TensorDataset:
        """Make the rows of a split: their numbers, tokens, and labels that the tokens tell."""
        batches = self.sizes.train_batches if split == "train" else self.sizes.val_batches
        draw = torch.Generator().manual_seed(len(split))
        tokens = torch.randint(0, WORDS, (batches * self.sizes.batch, self.sizes.tokens), generator=draw)
        return TensorDataset(torch.arange(len(tokens)), tokens, tokens[:, 0] % CLASSES)

    def train_dataloader(self) -> DataLoader[Any]:
        """Load the training rows, shuffled the same way in each run."""
        shuffle = torch.Generator().manual_seed(1)
        return DataLoader(self.rows("train"), self.sizes.batch, shuffle=True, generator=shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        """Load the validation rows."""
        return DataLoader(self.rows("val"), self.sizes.batch)


class ByHand(Encoder):
    """Looks up what the frozen blocks give."""

    def __init__(self, sizes: Sizes, stages: tuple[Stage, ...]) -> None:
        super().__init__(sizes)
        self.cuts = [(stage.until, BLOCKS - stage.blocks if stage.blocks != "everything" else 0) for stage in stages]
        self.tables: dict[str, dict[int, Tensor]] = {}

    def on_fit_start(self) -> None:
        """Run all blocks once over the data, and keep what each stage needs."""
        wanted = {cut for _, cut in self.cuts if cut}
        training = self.training
        self.eval()
        for split in ("train", "val"):
            pieces: dict[int, list[Tensor]] = {cut: [] for cut in wanted}
            for tokens in self.rows(split).tensors[1].split(self.sizes.batch):
                hidden = self.embeddings(tokens)
                for number, block in enumerate(self.blocks[: max(wanted)], start=1):
                    hidden = block(hidden)
                    if number in wanted:
                        pieces[number].append(hidden.detach())
            self.tables[split] = {cut: torch.cat(each) for cut, each in pieces.items()}
        self.train(training)

    def logits(self, batch: list[Tensor]) -> Tensor:
        """Classify by what lies above the cut of the present epoch."""
        cut = next(cut for until, cut in self.cuts if self.current_epoch < until)
        if not cut:
            return self(batch[1])
        table = self.tables["train" if self.training else "val"][cut]
        return self.upper(table.index_select(0, batch[0]), cut)


def schedule_of(stages: tuple[Stage, ...]) -> dict[int, dict[str, Any]]:
    """Write the stages as a schedule."""
    schedule: dict[int, dict[str, Any]] = {}
    thawed = 0
    for phase, stage in enumerate(stages):
        below = BLOCKS if stage.blocks == "everything" else stage.blocks
        names = [rf"blocks\.{BLOCKS - 1 - number}\..*" for number in range(thawed, below)]
        names += [r"embeddings\..*"] if stage.blocks == "everything" else []
        names += [r"head\..*"] if phase == 0 else []
        schedule[phase] = {"params": names, "max_transition_epoch": stage.until}
        if phase:
            schedule[phase]["lr"] = 1e-4
        thawed = below
    return schedule


def fit(sizes: Sizes, stages: tuple[Stage, ...], way: Way, **settings: Any) -> tuple[float, Mapping[str, float]]:
    """Fit the encoder; return the seconds it took, and the metrics at the end.

    Args:
        sizes: How large everything is.
        stages: What trains when.
        way: ``"plain"``, ``"by hand"``, or what of the callback's reuse is on.
        settings: More arguments of the callback.
    """
    reuse = {} if way in ("plain", "by hand") else {"frozen_prefix": way}
    scheduler = FinetuningScheduler(
        schedule_of(stages),
        epoch_transitions_only=True,
        frozen_modules_mode="eval",
        logging_level=logging.ERROR,
        **reuse,
        **settings,
    )
    model = ByHand(sizes, stages) if way == "by hand" else Encoder(sizes)
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            folder,
            max_epochs=stages[-1].until,
            callbacks=[scheduler],
        )
        torch.manual_seed(1)
        seconds = timed(lambda: trainer.fit(model))
    if scheduler.curr_depth != len(stages) - 1:
        raise RuntimeError(f"expected the run to end in phase {len(stages) - 1}, got {scheduler.curr_depth}")
    return seconds, {name: float(value) for name, value in trainer.callback_metrics.items()}


def compare(
    sizes: Sizes, stages: tuple[Stage, ...], ways: tuple[Way, ...], options: Options
) -> list[tuple[float, ...]]:
    """Fit in several ways in turns, and see that all end with the same metrics; return the seconds of each."""
    for way in ways:
        fit(Sizes.tiny(), stages, way)  # so that nothing is done for the first time in what is measured
    ends: dict[Way, Mapping[str, float]] = {}

    def run(way: Way) -> float:
        seconds, ends[way] = fit(sizes, stages, way)
        for name, value in ends[way].items():
            if any(abs(value - other[name]) > 1e-4 * abs(value) for other in ends.values()):
                raise RuntimeError(f"expected equal metrics, got {ends}")
        return seconds

    return alternate(*(partial(run, way) for way in ways), pairs=options.pairs, warm_up=0)
