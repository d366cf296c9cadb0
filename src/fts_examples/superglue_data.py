"""SuperGLUE's RTE and BoolQ, from the Hugging Face hub or from the JSON lines of SuperGLUE's archive."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from fts_examples._text_data import Batch, DataError, Label, Row, load_tokenizer, read_rows, tokenized

HUB_DATASET = "aps/super_glue"
FILES = {"train": ("train.jsonl",), "validation": ("val.jsonl", "validation.jsonl")}

TaskName = Literal["rte", "boolq"]


@dataclass(frozen=True)
class Task:
    """How SuperGLUE writes a task."""

    folder: str
    texts: tuple[str, str]
    labels: tuple[Label, Label]


TASKS = {
    "rte": Task("RTE", ("premise", "hypothesis"), ("entailment", "not_entailment")),
    "boolq": Task("BoolQ", ("question", "passage"), (False, True)),
}


class RteBoolqDataModule(L.LightningDataModule):
    """Batches of pairs of texts, padded to the longest pair of each batch.

    Validation rows serve for tests and predictions too: SuperGLUE's own test rows have no labels.

    Args:
        model_name_or_path: Hub id or folder of the model whose tokenizer is used. The command line takes the model's.
        task_name: ``rte`` or ``boolq``. The command line takes the model's.
        data_dir: Folder with ``train.jsonl`` and ``val.jsonl`` (or ``validation.jsonl``), or one that has them in
            ``RTE`` or ``BoolQ``, as SuperGLUE's archive unpacks; ``None`` takes the rows from the hub.
        max_seq_length: Tokens that a pair is cut to.
        train_batch_size: Rows of a training batch, on each device.
        eval_batch_size: Rows of a validation batch, on each device.
        num_workers: Processes that load data.
        tokenizers_parallelism: Let the tokenizer use threads; ``False`` avoids its warning with ``num_workers``.

    Raises:
        DataError: In `setup`; a file or a row of it cannot be used.
        ModelError: In `setup`; there is no tokenizer.
    """

    def __init__(
        self,
        model_name_or_path: str | None = None,
        task_name: TaskName | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        max_seq_length: int = 128,
        train_batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        tokenizers_parallelism: bool = True,
    ) -> None:
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.task = TASKS[task_name or "rte"]
        self.task_name = task_name or "rte"
        self.data_dir = None if data_dir is None else Path(data_dir)
        self.max_seq_length = max_seq_length
        self.train_batch_size = train_batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.rows: dict[str, list[Row]] = {}
        self.tokenizer: PreTrainedTokenizerBase | None = None
        os.environ["TOKENIZERS_PARALLELISM"] = str(tokenizers_parallelism).lower()

    def prepare_data(self) -> None:
        """Download what is not on disk yet; one process of a machine does."""
        if self.data_dir is None:
            hub_rows(self.task_name)

    def setup(self, stage: str) -> None:
        """Read and check all rows, once; load the tokenizer."""
        if self.rows:
            return
        if self.model_name_or_path is None:
            raise DataError("expected `model_name_or_path`, whose tokenizer is needed, got None")
        if self.data_dir is None:
            self.rows = hub_rows(self.task_name)
        else:
            paths = local_files(self.data_dir, self.task)
            self.rows = {split: labelled_rows(path, self.task) for split, path in paths.items()}
        self.tokenizer = load_tokenizer(self.model_name_or_path)

    def train_dataloader(self) -> DataLoader[Any]:
        """Load the training rows, shuffled."""
        return self._loader("train", self.train_batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Load the validation rows."""
        return self._loader("validation", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Load the validation rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Load the validation rows, in their order."""
        return self.val_dataloader()

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Tokenize rows; label indices come second."""
        if self.tokenizer is None:
            raise RuntimeError("expected `setup` to be called before batches are loaded")
        return tokenized(rows, self.tokenizer, self.task.labels, self.max_seq_length)

    def _loader(self, split: str, batch_size: int, *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            self.rows[split],  # type: ignore[arg-type]
            batch_size=batch_size,  # by name: Lightning gives it again for predictions
            shuffle=shuffle,
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )


def local_files(folder: Path, task: Task) -> dict[str, Path]:
    """Find the files of a task in a folder, or in its subfolder of the task's name.

    Raises:
        DataError: A file is missing.
    """
    home = folder / task.folder if (folder / task.folder).is_dir() else folder
    found = {split: [home / name for name in names if (home / name).is_file()] for split, names in FILES.items()}
    for split, paths in found.items():
        if not paths:
            there = ", ".join(sorted(path.name for path in home.iterdir())) if home.is_dir() else "no such folder"
            raise DataError(
                f"{home}: expected {' or '.join(FILES[split])}, got: {there or 'an empty folder'}. Fix: Unpack "
                f"SuperGLUE's archive of {task.folder} and give its folder as --data.init_args.data_dir."
            )
    return {split: paths[0] for split, paths in found.items()}


def labelled_rows(path: Path, task: Task) -> list[Row]:
    """Read the rows of a file.

    Raises:
        DataError: A row is no row of the task.
    """
    try:
        rows = read_rows(path, text_keys=[task.texts])
        for row in rows:
            if row.label not in task.labels:
                first, second = map(_as_json, task.labels)
                raise DataError(f"{row.where}: expected 'label' to be {first} or {second}, got {_as_json(row.label)}")
    except DataError as error:
        fix = "Fix: Correct the file, or name its task with --model.init_args.task_name."
        raise DataError(f"{error}. {fix}") from error
    return rows


def _as_json(label: Label) -> str:
    return str(label).lower() if isinstance(label, bool) else repr(label)


def hub_rows(task_name: str) -> dict[str, list[Row]]:
    """Download a task's rows from the hub, or read what has been downloaded.

    Raises:
        DataError: The hub cannot be reached, or does not have them.
    """
    import datasets  # type: ignore[import-untyped] # slow to import, and not needed for local files

    task = TASKS[task_name]
    try:
        splits = {split: datasets.load_dataset(HUB_DATASET, task_name, split=split) for split in FILES}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{HUB_DATASET}: expected the hub's data set for {task_name!r}, got: {str(error).rstrip('.')}. "
            "Fix: Connect to the network, or give a local folder as --data.init_args.data_dir."
        ) from error
    return {split: [_hub_row(content, task) for content in rows] for split, rows in splits.items()}


def _hub_row(content: dict[str, Any], task: Task) -> Row:
    first, second = task.texts
    return Row((content[first], content[second]), task.labels[content["label"]], f"row {content['idx']}")
