"""`fts diff`: what two schedules do, not how they are written."""

from __future__ import annotations

import json
from pathlib import Path

from finetuning_scheduler.cli.shapes import SHAPES
from tests.cli.files import fts, written

A = r"""
0: {params: ['classifier.*']}
1: {params: ['bert.encoder.layer.1[01]\..*', 'bert.pooler.*'], lr: 1e-5}
2: {params: ['*'], max_transition_epoch: 9}
"""
B = r"""
0: {params: [classifier.bias, classifier.weight], max_transition_epoch: -1}
1: {params: ['bert.encoder.layer.(9|10|11)\..*'], lr: 2.0e-05}
2: {params: ['bert.encoder.layer.[0-8]\..*']}
3: {params: ['bert.embeddings.*']}
"""
SAID = """\
--- a.yaml
+++ b.yaml

phase 1 -> frozen  2 tensors, 72 parameters
    bert.pooler.*

phase 2 -> phase 1  6 tensors, 216 parameters
    bert.encoder.layer.9.*

phase 2 -> phase 3  1 tensor, 400 parameters
    bert.embeddings.word_embeddings.weight

settings
    phase 1: lr: 1e-05 -> 2e-05
    phase 2: max_transition_epoch: 9 -> none
    phase 3: only in B
"""


def test_with_a_model_what_thaws_when_is_compared(here: Path, bert: str) -> None:
    written(here / "a.yaml", A), written(here / "b.yaml", B)
    answer = fts("diff", "a.yaml", "b.yaml", bert)
    assert (answer.status, answer.out) == (1, SAID)


def test_without_a_model_the_selectors_are(here: Path) -> None:
    written(here / "a.yaml", "0: {params: [a, b]}\n1: {params: [c]}\n")
    written(here / "b.yaml", "0: {params: [b]}\n1: {params: [d, a]}\n")
    answer = fts("diff", "a.yaml", "b.yaml", "--json")
    SHAPES["diff"].model_validate_json(answer.out, strict=True)
    moves = [(move["a"], move["b"], move["selectors"]) for move in json.loads(answer.out)["moves"]]
    assert moves == [(0, 1, ["a"]), (1, None, ["c"]), (None, 1, ["d"])]
    assert answer.status == 1


def test_other_ways_to_write_the_same_are_no_difference(here: Path, bert: str) -> None:
    written(here / "a.yaml", "0: {params: ['classifier.*']}\n1: {params: ['*'], lr: 1e-5}\n")
    written(
        here / "b.yaml", "'1': {lr: 0.00001, params: ['bert.*']}\n0:\n  params: [classifier.bias, classifier.weight]\n"
    )
    answer = fts("diff", "a.yaml", "b.yaml", bert)
    assert answer.status == 0
    assert answer.out.startswith("no difference")


def test_nested_settings_are_named_by_their_path(here: Path) -> None:
    phase = "0: {params: [a]}\n1:\n  params: [b]\n  new_lr_scheduler:\n    lr_scheduler_init:\n"
    scheduler = "      class_path: torch.optim.lr_scheduler.StepLR\n      init_args: {step_size: SIZE}\n"
    for name, size in (("a.yaml", "1"), ("b.yaml", "2")):
        written(here / name, phase + scheduler.replace("SIZE", size))
    answer = fts("diff", "a.yaml", "b.yaml")
    assert "phase 1: new_lr_scheduler.lr_scheduler_init.init_args.step_size: 1 -> 2" in answer.out


def test_a_schedule_that_cannot_be_used_is_not_compared(here: Path, bert: str) -> None:
    written(here / "a.yaml", A), written(here / "b.yaml", "0: {params: [nothing]}\n")
    answer = fts("diff", "a.yaml", "b.yaml", bert)
    assert (answer.status, answer.out) == (2, "")
    assert "b.yaml:1, phase 0, selector 'nothing': expected to match a parameter" in " ".join(answer.err.split())
