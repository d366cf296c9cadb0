"""`fts params`: the tree of modules, and what a pattern selects."""

from __future__ import annotations

import json
import re
from pathlib import Path

from finetuning_scheduler.cli.shapes import SHAPES
from tests.cli.files import fts, safetensors

TREE = """\
module                                 parameters    share  tensors
bert                                        3,082  100.0 %
|-- bert                                    3,064   99.4 %
|   |-- embeddings.word_embeddings            400   13.0 %  weight 50x8
|   |-- encoder.layer.0-11 (12 alike)       2,592   84.1 %
|   |   |-- attention                         144    4.7 %
|   |   |   |-- output.dense                   72    2.3 %  weight 8x8, bias 8
|   |   |   `-- self.query                     72    2.3 %  weight 8x8, bias 8
|   |   `-- intermediate.dense                 72    2.3 %  weight 8x8, bias 8
|   `-- pooler.dense                           72    2.3 %  weight 8x8, bias 8
`-- classifier                                 18    0.6 %  weight 2x8, bias 2

bert: 77 tensors, 3,082 parameters.
"""


def test_blocks_that_are_alike_share_a_line(bert: str) -> None:
    answer = fts("params", bert)
    assert answer.status == 0
    assert answer.out.startswith(TREE)


def test_what_a_pattern_selects_is_counted_and_marked(bert: str) -> None:
    answer = fts("params", bert, r"bert.encoder.layer.1[01]\..*dense.bias")
    assert answer.status == 0
    lines = {re.split("  +", line.lstrip("|`- "))[0]: line for line in answer.out.splitlines()}
    assert lines["10-11 (2 alike)"].split()[-2:] == ["432", "32"]
    assert lines["0-9 (10 alike)"].split()[-4:] == ["-", "60", "tensors", "inside"]
    assert lines["intermediate.dense"].endswith("*bias 8, weight 8x8")
    assert "selects 4 of 77 tensors, 32 of 3,082 parameters (1.0 %)." in " ".join(answer.out.split())


def test_a_pattern_that_selects_nothing_says_what_is_near(bert: str) -> None:
    answer = fts("params", bert, "clasifier.weight")
    assert answer.status == 1
    assert "Did you mean `classifier.weight` or" in answer.out


def test_a_pattern_that_runs_across_a_number_is_corrected(bert: str) -> None:
    answer = fts("params", bert, "bert.encoder.layer.1.*")
    assert answer.status == 0
    assert r"Write 'bert.encoder.layer.1\..*'" in answer.out


def test_the_depth_is_the_user_s(bert: str) -> None:
    answer = fts("params", bert, "--depth", "1")
    assert [line.split()[-3:] for line in answer.out.splitlines()[2:4]] == [
        ["75", "tensors", "inside"],
        ["2x8,", "bias", "2"],
    ]


def test_what_is_no_parameter_is_told_by_name_and_type(here: Path) -> None:
    shapes = {"bn.weight": (4,), "bn.running_mean": (4,), "attn.bias": (1, 1, 8, 8), "steps": (1,)}
    model = safetensors(here / "buffers.safetensors", shapes, {"steps": "I64"}).name
    content = json.loads(fts("params", model, "--json").out)
    assert [each["name"] for each in content["tensors"]] == ["bn.weight"]
    assert {*content["buffers"]} == {"bn.running_mean", "attn.bias", "steps"}


def test_the_answer_for_programs_has_every_tensor(bert: str) -> None:
    answer = fts("params", bert, "classifier.*", "--json")
    content = json.loads(answer.out)
    SHAPES["params"].model_validate_json(answer.out, strict=True)
    assert len(content["tensors"]) == content["model"]["tensors"] == 77
    assert [each["name"] for each in content["tensors"] if each["selected"]] == ["classifier.weight", "classifier.bias"]
    assert (content["selected_tensors"], content["selected_parameters"]) == (2, 18)
