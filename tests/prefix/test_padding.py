"""Batches padded to their longest row: rows are known by what counts of them, where padding does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from .models import CASES, TEXT, Case, Data, text, transformer
from .runs import Run, assert_same, run

BERT = CASES["bert"]


def cut_to_longest(data: Data, rows: Tensor) -> Data:
    """As a collating function pads: the batch is as wide as its longest row."""
    part = {name: each[rows] for name, each in data.items()}
    width = int(part["attention_mask"].sum(dim=1).max())
    return {**part, **{name: part[name][:, :width] for name in ("input_ids", "attention_mask")}}


def both(case: Case, **options: Any) -> tuple[Run, Run]:
    plain, reused = (run(case, mode, batch_of=cut_to_longest, epochs=5, **options) for mode in ("off", "all"))
    return plain, reused


def left_out(reused: Run) -> str:
    return "; ".join(each for account in reused.accounts for each in account.left_out)


@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_rows_hit_in_batches_of_other_widths(name: str) -> None:
    plain, reused = both(CASES[name])
    assert_same(reused, plain, tolerance=2e-5)
    assert reused.reason is None
    assert reused.hits("train") >= 250  # of 360
    assert reused.hits("validation") >= 250


class Pooled(nn.Module):
    """A head over the mean of all positions, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.body = transformer("BertModel", "BertConfig", **TEXT)()
        self.head = nn.Linear(16, 3)

    def forward(self, batch: Data) -> Tensor:
        states = self.body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return self.pooled(states, batch["attention_mask"])

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        return self.head(states.mean(dim=1))


class Masked(Pooled):
    """A head over the mean of the positions that count."""

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        return self.head((states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))


def of_pooled(model: nn.Module, batch: Data) -> Tensor:
    return nn.functional.cross_entropy(model(batch), batch["labels"])


POOLED = Case(Pooled, text, of_pooled, ("head.*", r"body\.encoder\.layer\.3\..*"))


def test_a_head_that_reads_padding_is_found_out() -> None:
    plain, reused = both(POOLED)
    assert_same(reused, plain)
    assert "padding counts: without it" in left_out(reused)


def test_a_head_that_does_not_read_padding() -> None:
    plain, reused = both(replace(POOLED, build=Masked))
    assert_same(reused, plain, tolerance=2e-5)
    assert reused.hits("train") >= 150  # of 240
    assert left_out(reused).count("padding counts") == 0


class Neighbours(nn.Module):
    """A frozen convolution reads beyond the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.mix = self.Mix()
        self.head = nn.Linear(8, 3)

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.conv(x.transpose(1, 2)).transpose(1, 2) * mask[..., None]

    def forward(self, batch: Data) -> Tensor:
        mask = batch["attention_mask"]
        states = self.mix(self.embedding(batch["input_ids"]), mask)
        return self.head(states.sum(dim=1) / mask.sum(dim=1, keepdim=True))


def test_a_frozen_layer_that_reads_padding_is_found_out() -> None:
    plain, reused = both(Case(Neighbours, text, of_pooled, ("head.*",)))
    assert_same(reused, plain)
    assert "padding counts in `mix`" in left_out(reused)


def test_padding_on_the_left_counts() -> None:
    def flipped(data: Data, rows: Tensor) -> Data:
        batch = cut_to_longest(data, rows)
        return {**batch, **{name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}}

    plain, reused = (run(BERT, mode, batch_of=flipped) for mode in ("off", "all"))
    assert_same(reused, plain)


def test_padding_that_is_on_the_left_in_some_batches() -> None:
    count = 0

    def sometimes(data: Data, rows: Tensor) -> Data:
        nonlocal count
        count += 1
        batch = cut_to_longest(data, rows)
        names = ("input_ids", "attention_mask") if count % 5 == 4 else ()
        return {**batch, **{name: batch[name].flip(1) for name in names}}

    plain = run(BERT, "off", batch_of=sometimes)
    count = 0
    reused = run(BERT, "all", batch_of=sometimes)
    assert_same(reused, plain, tolerance=2e-5)
