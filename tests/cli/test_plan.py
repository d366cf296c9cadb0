"""`fts plan` and `fts lr`: what they print, for people and programs, and what they say when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetuning_scheduler.cli.shapes import SHAPES
from tests.cli.files import fts, safetensors, written

PROGRAM = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))

def batch():
    print("a batch is made")
    return torch.ones(3, 4)

def wrong_batch():
    return torch.ones(3, 5)

def broken():
    raise ValueError("no data here")
"""
SCHEDULE = r"""
0:
  params: ['classifier.*']
  max_transition_epoch: 2
1:
  params: ['bert.encoder.layer.([89]|1[01])\..*', 'bert.pooler.*']
  lr: 1e-4
  lr_warmup_steps: 5
  max_transition_step: 12
2:
  params: ['*']
  new_lr_scheduler:
    lr_scheduler_init: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1, gamma: 0.5}}
"""
PLAN = """\
bert: 3,082 parameters, 3 phases, 3 parameter groups in the end; AdamW,
precision 32-true; at most 48.5 KiB, against 48.5 KiB for training everything.

phase  trained   share  groups  new at    memory  step  saved
    0       18    0.6%       1  0.001   12.3 KiB  0.34  98.6%
    1      954   31.0%       2  0.0001  23.3 KiB  0.56  38.2%
    2    3,082  100.0%       3  1e-05   48.5 KiB  1.00   0.0%
"""
PHASE = """\
Phase 1 ends at step 12, or earlier by early stopping
  thaws        bert.encoder.layer.([89]|1[01]).*, bert.pooler.*
  group        phase1: 936 parameters at 0.0001
  warm-up      5 steps
  optimizer    AdamW
  memory       weights 12.0 KiB, gradients 3.7 KiB, optimizer state 7.6 KiB
"""


@pytest.fixture
def files(bert: str, here: Path) -> Path:
    """A BERT, a schedule for it, and a module with a network."""
    written(here / "schedule.yaml", SCHEDULE)
    written(here / "small.yaml", "0: {params: ['head.*']}\n1: {params: ['*'], lr: 0.01}\n")
    written(here / "planned_net.py", PROGRAM)
    return here


@pytest.mark.usefixtures("files")
def test_a_table_of_phases_and_each_phase() -> None:
    answer = fts("plan", "schedule.yaml", "bert.safetensors")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith(PLAN)
    assert PHASE in answer.out
    assert "LR scheduler StepLR, new; earlier groups go on from 0.001, 0.0001\n" in answer.out
    assert "estimates from shares of parameters" in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80


@pytest.mark.usefixtures("files")
def test_options_are_those_of_a_run() -> None:
    options = ["--optimizer", "SGD", "--optimizer-init", "momentum=0.9", "--optimizer-init", "weight_decay=0.1"]
    more = ["--lr", "0.5", "--no-decay", "bias", "--base-max-lr", "0.25", "--precision", "bf16-true"]
    answer = fts("plan", "schedule.yaml", "bert.safetensors", "--json", *options, *more)
    report = SHAPES["plan"].model_validate_json(answer.out, strict=True).model_dump()
    groups = [(g["name"], g["learning_rate"], g["options"]) for p in report["phases"] for g in p["new_groups"]]
    spared = {"weight_decay": 0.0}
    assert groups == [
        ("phase0", 0.5, {}),
        ("phase0/no_decay", 0.5, spared),
        ("phase1", 0.0001, {}),
        ("phase1/no_decay", 0.0001, spared),
        ("phase2", 0.25, {}),
        ("phase2/no_decay", 0.25, spared),
    ]
    assert report["full_memory"] == {
        "weights": 2 * 3082,
        "gradients": 2 * 3082,
        "optimizer_state": 2 * 3082,
        "total": 6 * 3082,
    }
    assert fts("plan", "schedule.yaml", "bert.safetensors", "--max-depth", "1").out.count("\nPhase ") == 2


@pytest.mark.usefixtures("files")
def test_operations_are_counted_with_a_batch() -> None:
    answer = fts("plan", "small.yaml", "planned_net:Net", "--init", "width=8", "--batch", "planned_net:batch", "--json")
    report = SHAPES["plan"].model_validate_json(answer.out, strict=True).model_dump()
    assert "a batch is made" in answer.err
    assert report["costs_from"] == "flops"
    forward, head = 3 * 2 * (4 * 8 + 8 * 2), 3 * 2 * 8 * 2
    full = forward + forward + head  # the gradient of the first layer's inputs is not needed
    assert report["phases"][0]["step_cost"] == pytest.approx((forward + head) / full)
    assert report["phases"][0]["reuse_saves"] == pytest.approx((forward - head) / (forward + head))
    buffers = 2 * 8 * 4 + 8
    assert report["full_memory"]["weights"] == 4 * report["parameters"] + buffers


@pytest.mark.usefixtures("files")
def test_a_batch_that_does_not_fit_leaves_estimates_and_says_why() -> None:
    answer = fts("plan", "small.yaml", "planned_net:Net", "--batch", "planned_net:wrong_batch")
    assert answer.status == 0
    assert "The sample batch could not be used: RuntimeError" in answer.out


@pytest.mark.usefixtures("files")
def test_markdown_json_and_a_page_say_the_same() -> None:
    table = fts("plan", "schedule.yaml", "bert.safetensors").out
    markdown = fts("plan", "schedule.yaml", "bert.safetensors", "--format", "markdown").out
    page = fts("plan", "schedule.yaml", "bert.safetensors", "--format", "html").out
    content = json.loads(fts("plan", "schedule.yaml", "bert.safetensors", "--format", "json").out)
    assert content == json.loads(fts("plan", "schedule.yaml", "bert.safetensors", "--json").out)
    for phase in content["phases"]:
        count, cost = f"{phase['trainable_parameters']:,}", f"{phase['step_cost']:.2f}"
        assert re.search(rf"^ +{phase['phase']} +{count} .* {cost} ", table, re.MULTILINE)
        assert re.search(rf"^\| {phase['phase']} \| {count} \|.* {cost} \|", markdown, re.MULTILINE)
        assert f">{count}</td>" in page
        assert f">{cost}</td>" in page
    assert r"`bert.encoder.layer.([89]\|1[01]).*`" in markdown
    assert page.startswith("<!doctype html>")
    assert "prefers" in page or "color-scheme: light dark" in page
    assert re.search(r"https?:|src=|url\(", page) is None


WRONG = {
    "an optimizer": (["--optimizer", "adamm"], "expected a class of PyTorch", "Did you mean `Adam`"),
    "an argument": (["--optimizer-init", "foo=1"], "AdamW does not take the arguments {'foo': 1}", "--optimizer-init"),
    "no pair": (["--optimizer-init", "foo"], "expected --optimizer-init key=value", "weight_decay=0.01"),
    "no optimizer": (["--optimizer", "torch.nn.Linear"], "expected a subclass of Optimizer", ""),
    "a precision": (["--precision", "fp8"], "expected one of 32-true", "the trainer's precision"),
    "a batch": (["--batch", "planned_net:broken"], "got names of tensors only", "names, or"),
    "a rate": (["--base-max-lr", "-1"], "expected `base_max_lr` to be a number above 0", ""),
}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_short(name: str) -> None:
    options, message, fix = WRONG[name]
    answer = fts("plan", "schedule.yaml", "bert.safetensors", *options)
    said = " ".join(answer.err.split())
    assert (answer.status, answer.out) == (2, "")
    assert message in said
    assert (fix in said) or name == "a batch"
    assert "Traceback" not in said


@pytest.mark.usefixtures("files")
def test_a_broken_batch_and_a_wrong_schedule() -> None:
    broken = fts("plan", "small.yaml", "planned_net:Net", "--batch", "planned_net:broken")
    assert broken.status == 2
    assert "ValueError: no data here" in " ".join(broken.err.split())
    wrong = fts("plan", "small.yaml", "bert.safetensors")
    assert wrong.status == 2
    assert "small.yaml" in wrong.err
    assert "head.*" in wrong.err


RATES = """\
bert: learning rates in 5 epochs of 4 steps.
Warm-ups begin at 0, those of phases 1.

epoch  step  phase    phase0  phase1  phase2
    0     0      0     0.001
    1     4      0     0.001
    2     8      1     0.001       0
    3    12      2     0.001   8e-05   1e-05
    4    16      2    0.0005   5e-05   5e-06
"""


@pytest.mark.usefixtures("files")
def test_learning_rates_of_epochs_and_phases() -> None:
    answer = fts("lr", "schedule.yaml", "bert.safetensors", "--epochs", "5", "--steps-per-epoch", "4")
    assert (answer.status, answer.err) == (0, "")
    assert [line.split() for line in answer.out.splitlines()] == [line.split() for line in RATES.splitlines()]


@pytest.mark.usefixtures("files")
def test_learning_rates_of_every_step_with_the_program_s_scheduler() -> None:
    options = ["--lr-scheduler", "ExponentialLR", "--lr-scheduler-init", "gamma=0.5", "--interval", "step"]
    more = ["--frequency", "2", "--every-step", "--optimizer", "sgd", "--lr", "0.8", "--phase-epochs", "2", "--json"]
    answer = fts("lr", "small.yaml", "planned_net:Net", "--epochs", "3", "--steps-per-epoch", "4", *options, *more)
    rates = SHAPES["lr"].model_validate_json(answer.out, strict=True).model_dump()
    assert rates["groups"] == ["phase0", "phase1"]
    assert [step["learning_rates"] for step in rates["steps"]] == [
        *([0.8 / 2 ** (step // 2)] for step in range(8)),
        *([0.8 / 2 ** (4 + step // 2), 0.01 / 2 ** (step // 2)] for step in range(4)),
    ]
    assert rates["notes"] == ["Phases without limits (0) end by early stopping: here each after 2 epochs."]


def test_groups_that_do_not_fit_stand_in_further_tables(here: Path) -> None:
    safetensors(here / "long.safetensors", {f"layers.{number}.weight": (2, 2) for number in range(30)})
    phases = "".join(f"{number}: {{params: [layers.{29 - number}.weight]}}\n" for number in range(30))
    written(here / "long.yaml", phases)
    answer = fts("lr", "long.yaml", "long.safetensors", "--epochs", "40")
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[:3] for line in lines].count(["epoch", "step", "phase"]) > 1
    assert {f"phase{number}" for number in range(30)} <= {*answer.out.split()}
    unreached = fts("lr", "long.yaml", "long.safetensors", "--epochs", "10").out
    assert "The session ends in phase 9: the 20 behind it are not reached." in unreached


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture(suffix: str, files: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["schedule.yaml", "bert.safetensors", "--epochs", "6", "--steps-per-epoch", "4"]
    answer = fts("lr", *arguments, "--picture", f"rates.{suffix}")
    assert answer.out == f"The picture was written to rates.{suffix}.\n"
    assert (files / f"rates.{suffix}").stat().st_size > 5_000
    refused = fts("lr", *arguments, "--picture", "rates.nothing")
    assert refused.status == 2
    assert "name a .png or .svg file" in refused.err.lower()


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr-scheduler", "StepLRR"], "Did you mean `StepLR`"),
        (["--lr-scheduler", "StepLR"], "StepLR does not take the arguments {}"),
        (["--interval", "day"], "expected epoch or step, got 'day'"),
    ],
)
def test_wrong_options_of_lr(options: list[str], message: str) -> None:
    answer = fts("lr", "schedule.yaml", "bert.safetensors", "--epochs", "3", *options)
    assert (answer.status, answer.out) == (2, "")
    assert message in " ".join(answer.err.split())
