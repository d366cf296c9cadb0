"""Whole programs, each in a process of its own: what a user would write, and what it prints of itself at its end."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import finetuning_scheduler

pytestmark = pytest.mark.slow  # a process imports torch, Lightning and more

SOURCES = Path(finetuning_scheduler.__file__).parents[1]
SCRIPTS = Path(__file__).parent / "scripts"


def facts_of(script: str, *arguments: object) -> dict[str, Any]:
    """Run a script and return what its last line says."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def test_slim_checkpoints_restore_what_whole_ones_do(tmp_path: Path) -> None:
    facts = facts_of("slim_checkpoints", tmp_path)
    slim, whole = facts["slim"], facts["whole"]
    assert slim["first file"] == ["head.bias", "head.weight"]
    assert len(whole["first file"]) == 6
    assert whole["phase"] == 2
    assert whole["restored"] == [True, True]
    assert {key: slim[key] for key in ("phase", "restored", "weights")} == {
        key: whole[key] for key in ("phase", "restored", "weights")
    }


@needs("transformers")
def test_a_layer_thawed_under_a_warm_up_of_transformers_follows_it(tmp_path: Path) -> None:
    facts = facts_of("transformers_schedule", tmp_path)

    def share(step: int) -> float:
        """The lambda of a linear warm-up over 10 steps of 24."""
        return step / 10 if step < 10 else (24 - step) / 14

    assert facts["decay"] == [0.01, 0.0, 0.01, 0.0]
    entered = 8
    for step, rates in enumerate(facts["rates"]):
        later = 4e-3 if step == entered else 4e-3 * share(step)
        expected = [1e-2 * share(step)] * 2 + ([later] * 2 if step >= entered else [])
        assert rates == pytest.approx(expected, rel=1e-12), f"step {step}"


@needs("omegaconf")
def test_a_schedule_that_omegaconf_has_put_together_is_taken_for_what_it_means(tmp_path: Path) -> None:
    assert facts_of("omegaconf_schedule", tmp_path) == {
        "phase": 2,
        "optimizer": "AdamW",
        "betas": [0.8, 0.9],
        "rates": [0.1, 0.03, 0.001],
        "groups": [["head.bias", "head.weight"], ["body.0.bias", "body.0.weight"], ["body.2.weight"]],
        "config untouched": True,
    }


@needs("peft")
def test_a_generated_schedule_of_a_model_with_adapters_trains_the_adapters_alone(tmp_path: Path) -> None:
    facts = facts_of("peft_lora", tmp_path)
    assert facts["scheduled"] == facts["came"]
    assert facts["changed"] == facts["came"]
    assert facts["trainable"] == facts["came"]
    assert facts["phase"] == facts["phases"] - 1
    assert len(facts["came"]) == 9, "two matrices for each of four layers, and the classifier"
    assert [name for name in facts["scheduled"] if "base_layer" in name or "original_module" in name] == []
    notices = [
        text for text in facts["said"] if re.search(rf"\b{len(facts['frozen'])}\b", text) and "base_layer" in text
    ]
    assert len(notices) == 1, facts["said"]
