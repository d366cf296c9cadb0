"""Text classification data: JSON lines on disk to tokenized batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

TEXT_KEYS = (("sentence",), ("premise", "hypothesis"))

Label = str | int
Batch = tuple[dict[str, Tensor], Tensor]


class DataError(ValueError):
    """Data that cannot be used; the message names file and line."""


class ModelError(ValueError):
    """A model that cannot be loaded."""


@dataclass(frozen=True)
class Row:
    """One text, or a pair of texts, and its label."""

    texts: tuple[str, ...]
    label: Label
    where: str


def read_rows(path: Path, limit: int | None = None, text_keys: Sequence[tuple[str, ...]] = TEXT_KEYS) -> list[Row]:
    """Read the first ``limit`` rows of a JSON lines file, all of them if it is ``None``.

    Args:
        path: The file.
        limit: The most rows to read.
        text_keys: Under which keys a row can have its texts; the first that it has count.

    Raises:
        DataError: The file is missing or empty, or a line of it is not a row.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            rows = list(islice(_rows(path, lines, text_keys), limit))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{path}: expected a readable UTF-8 file, got: {reason}") from error
    if not rows:
        raise DataError(f"{path}: expected at least one row, got none")
    return rows


def _rows(path: Path, lines: Iterator[str], text_keys: Sequence[tuple[str, ...]]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _row(line, f"{path}:{number}", text_keys)


def _row(line: str, where: str, text_keys: Sequence[tuple[str, ...]]) -> Row:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: expected a JSON object, got invalid JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(content).__name__}")
    keys = next((keys for keys in text_keys if content.keys() >= set(keys)), None)
    if keys is None or "label" not in content:
        found = ", ".join(map(repr, content)) or "none"
        expected = ", or ".join(_listed("label", *each) for each in text_keys)
        raise DataError(f"{where}: expected the keys {expected}; got {found}")
    texts, label = tuple(content[key] for key in keys), content["label"]
    for key, text in zip(keys, texts, strict=True):
        if not isinstance(text, str):
            raise DataError(f"{where}: expected {key!r} to be a string, got {text!r}")
    if not isinstance(label, str | int):
        raise DataError(f"{where}: expected 'label' to be a string or an integer, got {label!r}")
    return Row(texts, label, where)


def _listed(*names: str) -> str:
    *first, last = map(repr, names)
    return f"{', '.join(first)} and {last}"


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from a folder or by its hub id.

    Raises:
        ModelError: There is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}: expected a folder or hub id of a transformer, got: {error}") from error
    return tokenizer


def tokenized(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[Label], max_length: int
) -> Batch:
    """Make a batch, padded to its longest row; label indices come second."""
    columns = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
    tokens = tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return dict(tokens), torch.tensor([labels.index(row.label) for row in rows])


class TextData(L.LightningDataModule):
    """Batches of rows to train on and of rows to validate on, padded to the longest text of each batch.

    Raises:
        DataError: All training rows have one label, or a validation row has a label that no training row has.
    """

    def __init__(
        self,
        train: Sequence[Row],
        validation: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 64,
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.train = train
        self.validation = validation
        self.labels: list[Label] = sorted({row.label for row in train}, key=str)
        if len(self.labels) < 2:  # a single class is always right
            where = train[0].where.rpartition(":")[0]
            raise DataError(f"{where}: expected training rows of at least two labels, got {self.labels[0]!r} only")
        self.check_labels(validation)

    @classmethod
    def from_folder(
        cls,
        directory: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_rows: int | None = None,
        validation_rows: int | None = None,
        max_length: int = 64,
        batch_size: int = 16,
    ) -> TextData:
        """Read ``train.jsonl`` and ``validation.jsonl``, or the first rows of them.

        Raises:
            DataError: A file cannot be used, or a validation row has a label that no training row has.
        """
        train = read_rows(directory / "train.jsonl", train_rows)
        validation = read_rows(directory / "validation.jsonl", validation_rows)
        return cls(train, validation, tokenizer, max_length=max_length, batch_size=batch_size)

    def check_labels(self, rows: Sequence[Row]) -> None:
        """Raise a DataError if a row has a label that no training row has."""
        for row in rows:
            if row.label not in self.labels:
                raise DataError(f"{row.where}: expected a label of the training rows, got {row.label!r}")

    def loader(self, rows: Sequence[Row], *, shuffle: bool = False) -> DataLoader[Any]:
        """Load rows in batches."""
        # batch_size by name: Lightning gives it again for predictions
        return DataLoader(rows, batch_size=self.batch_size, shuffle=shuffle, collate_fn=self.collate)  # type: ignore[arg-type]

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Tokenize rows; label indices come second."""
        return tokenized(rows, self.tokenizer, self.labels, self.max_length)

    def train_dataloader(self) -> DataLoader[Any]:
        """Load the training rows, shuffled."""
        return self.loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Load the validation rows."""
        return self.loader(self.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        """Load the validation rows: test sets of public tasks come without labels."""
        return self.val_dataloader()
