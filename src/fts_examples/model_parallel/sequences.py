"""Sequences of tokens that follow a rule, made on the spot."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class CountingSequences(L.LightningDataModule):
    """Count in steps: each token is the one before plus the sequence's step, modulo the size of the vocabulary.

    From the second token on the next one is certain; the first one's successor can be any of ``steps``.

    Args:
        vocab_size: Number of different tokens.
        length: Tokens of a sequence.
        steps: The step of a sequence is one of 1 to ``steps``.
        batch_size: Sequences of a batch, for each data-parallel rank.
        train_rows: Sequences to train on.
        validation_rows: Other sequences, for validation.
        seed: Seed of the first tokens and the steps.
    """

    def __init__(
        self,
        vocab_size: int = 32,
        length: int = 16,
        steps: int = 4,
        batch_size: int = 16,
        train_rows: int = 256,
        validation_rows: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(seed)
        shape = (train_rows + validation_rows, 1)
        first = torch.randint(vocab_size, shape, generator=generator)
        step = torch.randint(1, steps + 1, shape, generator=generator)
        tokens = (first + step * torch.arange(length + 1)) % vocab_size
        self.train, self.validation = tokens[:train_rows], tokens[train_rows:]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Load the training sequences, shuffled."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Load the sequences for validation."""
        return self._loader(self.validation)

    def _loader(self, tokens: Tensor, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        """Load pairs of tokens and, one position on, the tokens to predict, both (batch, length)."""
        return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), self.batch_size, shuffle=shuffle)
