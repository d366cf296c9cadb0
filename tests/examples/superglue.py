"""What the tests of the SuperGLUE example share: tiny models on disk, rows of data, runs on ranks that are recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from finetuning_scheduler import FinetuningScheduler

SCRIPT_FOLDER = Path(__file__).parents[2] / "src" / "fts_examples"
CONFIGURATIONS = SCRIPT_FOLDER / "config"
MARKS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
WORDS = ["a", "the", "cat", "dog", "sat", "ran", "on", "mat", "fast", "slow", "is", "did"]
RTE = [
    {"premise": f"the {animal} {verb} on the mat", "hypothesis": f"a {animal} is {how}", "label": label, "idx": index}
    for animal in ("cat", "dog")
    for verb in ("sat", "ran")
    for index, (how, label) in enumerate([("fast", "entailment"), ("slow", "not_entailment")])
]
BOOLQ = [
    {"question": f"did the {animal} run", "passage": f"the {animal} ran", "label": animal == "cat", "idx": index}
    for index, animal in enumerate(["cat", "dog"] * 4)
]


def write_tokenizer(folder: Path) -> int:
    """Save a tokenizer of a few words; return how many tokens it knows."""
    vocabulary = {word: index for index, word in enumerate([*MARKS, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), MARKS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return len(vocabulary)


def write_model(folder: Path, layers: int) -> Path:
    """Save a random model of the shape of DeBERTa-v3, and a tokenizer."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        **sizes(write_tokenizer(folder), layers),
        pooler_hidden_size=32,
        # as in DeBERTa-v3
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_bert(folder: Path, layers: int) -> Path:
    """Save a random BERT, and a tokenizer."""
    BertForSequenceClassification(BertConfig(**sizes(write_tokenizer(folder), layers))).save_pretrained(folder)
    return folder


def sizes(words: int, layers: int) -> dict[str, int]:
    return {
        "vocab_size": words,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }


def write_rows(folder: Path, rows: Sequence[object], validation: str = "val.jsonl") -> Path:
    """Write the same rows for training and validation, in the format of SuperGLUE's archive; text is written as is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    for name in ("train.jsonl", validation):
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


def overrides(model: Path, data: Path, logs: Path) -> list[str]:
    """Options for a run of two batches an epoch on CPUs."""
    return [
        f"--model.init_args.model_name_or_path={model}",
        f"--data.init_args.data_dir={data}",
        "--data.init_args.train_batch_size=2",
        "--data.init_args.eval_batch_size=2",
        f"--trainer.logger.init_args.save_dir={logs}",
        "--trainer.accelerator=cpu",
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=2",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]


@dataclass
class Phase:
    """A phase as it was trained."""

    lrs: list[float]  # of each group, at the first step
    optimizer: str
    scheduler: str
    trained: list[str]
    batches: int = 0


@dataclass
class Record(pl.Callback):
    """Keeps what is trained in each phase."""

    scheduler: FinetuningScheduler | None
    phases: dict[int, Phase] = field(default_factory=dict)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        depth = 0 if self.scheduler is None else self.scheduler.curr_depth
        if depth not in self.phases:
            optimizer = trainer.optimizers[0]
            self.phases[depth] = Phase(
                lrs=[group["lr"] for group in optimizer.param_groups],
                optimizer=type(optimizer).__name__,
                scheduler=type(trainer.lr_scheduler_configs[0].scheduler).__name__,
                trained=[name for name, parameter in pl_module.named_parameters() if parameter.requires_grad],
            )
        self.phases[depth].batches += 1


def run(arguments: Sequence[str], **options: Any) -> dict[int, Phase]:
    """Run a command line until its session ends, with a patience of one epoch; return its phases."""
    from lightning.pytorch.callbacks import EarlyStopping

    from fts_examples.fts_superglue import RteBoolqCLI

    class Recorded(RteBoolqCLI):
        def before_fit(self) -> None:
            callbacks = self.trainer.callbacks
            (stopping,) = (each for each in callbacks if isinstance(each, EarlyStopping))
            stopping.patience = 1
            schedulers = [each for each in callbacks if isinstance(each, FinetuningScheduler)]
            self.record = Record(schedulers[0] if schedulers else None)
            callbacks.append(self.record)

    return Recorded(args=["fit", *arguments], **options).record.phases


def run_several(runs: dict[str, list[str]]) -> dict[str, dict[int, Phase] | str]:
    """Run command lines one after the other in a rank's process; of one that fails, return the traceback."""
    import os
    import traceback
    import warnings

    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning's own use of jsonargparse
    outcomes: dict[str, dict[int, Phase] | str] = {}
    warnings.simplefilter("ignore")
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # a CPU's memory needs no pinning and has no streams
    torch.cpu.Stream.synchronize = lambda self: None
    for name, arguments in runs.items():
        try:
            outcomes[name] = run(arguments)
        except BaseException:  # noqa: BLE001 - the test that looks at this run reports it
            outcomes[name] = traceback.format_exc()
    return outcomes
