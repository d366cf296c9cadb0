"""Runs a page's Python blocks from top to bottom, as somebody who tries them out would, on a quiet trainer."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.docs.pages import ROOT, Block, tokens_of

Names = Mapping[str, Any]
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "log_every_n_steps": 1,
    "logger": False,
    "num_sanity_val_steps": 0,
}


@contextmanager
def somewhere_quiet(folder: Path) -> Iterator[None]:
    """Work in a folder, with trainers that are quiet where a page does not say otherwise, and leave no traces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "environ", os.environ.copy())
        make = pl.Trainer.__init__
        patch.setattr(pl.Trainer, "__init__", lambda self, **options: make(self, **QUIET | options))
        yield


def run(
    blocks: list[Block], given: Names, check: Callable[[Block, Names], None] = lambda block, names: None
) -> dict[str, Any]:
    """Run blocks in one namespace; ``check`` gets each with the names, with what it has ``said`` and ``written``."""
    names: dict[str, Any] = {"__name__": "__main__", **given}
    for block in blocks:
        torch.manual_seed(0)
        before = set(Path().rglob("*"))
        with heard() as output:
            # With empty lines before it, so that a traceback has the page's lines.
            exec(compile("\n" * block.line + block.text, ROOT / block.page, "exec"), names)  # the pages are ours
        said = output.getvalue()
        check(block, {**names, "said": said.splitlines(), "written": set(Path().rglob("*")) - before})
    return names


@contextmanager
def heard() -> Iterator[StringIO]:
    """Hear what is printed and what the package logs, in order."""
    output, logger = StringIO(), logging.getLogger("finetuning_scheduler")
    handler, level = logging.StreamHandler(output), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with redirect_stdout(output):
            yield output
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def shown(block: Block) -> list[str]:
    """The lines of the ``text`` block that follows a block before any other; the page says that these come out."""
    fences = [token for token in tokens_of(block.page) if token.type == "fence"]
    for token, after in pairwise(fences):
        if (token.map or [0])[0] + 1 == block.line and after.info == "text":
            return [line for line in after.content.splitlines() if line.strip()]
    return []


def missing(expected: list[str], said: list[str]) -> list[str]:
    """The lines that were not said, or not in this order; ``...`` in a line stands for anything."""
    rest, not_said = iter(line.strip() for line in said), []
    for line in expected:
        pattern = ".*".join(re.escape(part) for part in line.strip().split("..."))
        if not any(re.fullmatch(pattern, each) for each in rest):
            not_said.append(line)
            rest = iter(line.strip() for line in said)
    return not_said
