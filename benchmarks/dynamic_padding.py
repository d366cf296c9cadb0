"""The hit rate on text: shuffled batches, each padded to its longest row, a BERT whose head alone trains for 5 epochs.

The rows have as many words as sentences of film reviews have (a median of 22, and a long tail). Of 100 rows that are
trained on after the first epoch, how many are found? Batches that are compared with plain ones count as not found.

    python benchmarks/dynamic_padding.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from _common import Figure, Options, main
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from finetuning_scheduler.core import PhaseRunner

EPOCHS, BATCH = 5, 32
Row = tuple[Tensor, int]


def sentences(count: int) -> list[Row]:
    """Make rows of token numbers with a label each."""
    draw = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=draw) * 0.5 + 3.1).exp().clamp(4, 80).long()
    return [(torch.randint(1, 1000, (int(length),), generator=draw), int(length) % 2) for length in lengths]


def padded(rows: list[Row]) -> dict[str, Tensor]:
    """Pad a batch to its longest row."""
    tokens = nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row, _ in rows], batch_first=True)
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])}


def hit_rate(rows: list[Row], seed: int) -> float:
    """Train, and return the share of rows found after the first epoch, in per cent."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=1000, num_labels=2, **sizes)
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = {0: {"params": [r"classifier\..*", r"bert\.pooler\..*"]}}
    runner = PhaseRunner(
        model, optimizer, schedule, restore_best=False, frozen_prefix="all", frozen_modules_mode="eval"
    )

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    for _ in range(EPOCHS):
        model.train()
        runner.apply_module_modes()
        for batch in DataLoader(rows, BATCH, shuffle=True, collate_fn=padded):
            runner.optimizer.zero_grad()
            runner.prefix.train(loss_of, batch).backward()
            runner.optimizer.step()
            runner.step()
        runner.epoch_end()
    (account,) = (each for each in runner.prefix.accounts if each.stage == "train")
    runner.release_module_modes()
    return 100 * account.hits / (len(rows) * (EPOCHS - 1))


def figures(options: Options) -> Iterator[Figure]:
    """Measure with several orders of the rows."""
    rows = sentences(4 * BATCH if options.tiny else 100 * BATCH)
    rates = [hit_rate(rows, seed) for seed in range(options.pairs)]
    yield Figure.of("hit rate with dynamic padding and shuffling", rates, ">= 95", limit=100, unit="%")


if __name__ == "__main__":
    main(__doc__, figures)
