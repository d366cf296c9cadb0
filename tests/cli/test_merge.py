"""`fts merge`: slim checkpoints made whole, with the weights that were left out and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from finetuning_scheduler.cli.shapes import SHAPES
from finetuning_scheduler.core.slim import Fresh, names_of_keys
from tests.cli.files import fts, written

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
"""


@pytest.fixture
def slim(here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A folder with the module's source and a checkpoint without its body; the weights that are to be in it."""
    monkeypatch.syspath_prepend(here)
    written(here / "net_to_merge.py", NET)
    torch.manual_seed(0)
    model = nn.Module()
    model.body, model.head = nn.Linear(4, 4), nn.Linear(4, 2)
    parameters = dict(model.named_parameters())
    model.body.requires_grad_(False)
    fresh = Fresh()
    fresh.begin(parameters)
    torch.save({"state_dict": model.state_dict()}, here / "begin.ckpt")
    with torch.no_grad():
        model.head.weight.add_(1)
    whole = {"state_dict": model.state_dict(), "epoch": 3}
    torch.save(fresh.without_frozen(whole, parameters, names_of_keys(model, parameters)), here / "best.ckpt")
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def state_of(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    assert isinstance(state, dict)
    return state


@pytest.mark.parametrize("weights", ["net_to_merge:Net", "begin.ckpt"])
def test_a_slim_checkpoint_gets_what_it_has_left_out(here: Path, slim: dict[str, torch.Tensor], weights: str) -> None:
    assert "body.weight" not in state_of(here / "best.ckpt")
    answer = fts("merge", "best.ckpt", weights)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith("best_whole.ckpt: whole")
    merged = state_of(here / "best_whole.ckpt")
    assert {name: torch.equal(merged[name], value) for name, value in slim.items()} == dict.fromkeys(slim, True)
    assert merged.keys() == slim.keys()


@pytest.mark.usefixtures("slim")
def test_other_weights_than_those_left_out_are_refused(here: Path) -> None:
    answer = fts("merge", "best.ckpt", "net_to_merge:Net", "--init", "seed=1")
    assert (answer.status, answer.out) == (2, "")
    assert "body.weight" in answer.err
    assert not (here / "best_whole.ckpt").exists()


@pytest.mark.usefixtures("slim")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["begin.ckpt", "net_to_merge:Net"], "which is whole"),
        (["none.ckpt", "net_to_merge:Net"], "expected a checkpoint, but there is none"),
        (["best.ckpt", "nothing"], "expected a file with weights, or package.module:Class"),
        (["best.ckpt", "net_to_merge.py"], "but it cannot be read"),
        (["best.ckpt", "begin.ckpt", "-o", "begin.ckpt"], "expected a file that is not there yet"),
    ],
)
def test_what_cannot_be_merged_is_said_in_short(arguments: list[str], said: str) -> None:
    answer = fts("merge", *arguments)
    assert (answer.status, answer.out) == (2, "")
    assert said in " ".join(answer.err.split())


@pytest.mark.usefixtures("slim")
def test_the_answer_for_programs_has_the_sizes(here: Path) -> None:
    answer = fts("merge", "best.ckpt", "begin.ckpt", "-o", "whole.ckpt", "--json")
    SHAPES["merge"].model_validate_json(answer.out, strict=True)
    assert answer.json()["bytes_after"] == (here / "whole.ckpt").stat().st_size


@pytest.mark.usefixtures("slim")
def test_what_is_left_out_is_said_where_a_slim_checkpoint_is_the_model() -> None:
    answer = fts("params", "best.ckpt")
    assert answer.status == 0
    assert "best: 2 tensors, 10 parameters." in answer.out
    assert "It leaves out 2 frozen weights" in " ".join(answer.out.split())
