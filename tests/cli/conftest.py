from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.files import bert_shapes, safetensors


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bert(here: Path) -> str:
    """A file with the names of a BERT of twelve layers: 77 tensors."""
    return safetensors(here / "bert.safetensors", bert_shapes()).name
