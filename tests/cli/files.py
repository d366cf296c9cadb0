"""Files of models for the tests of the command, and the command itself."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from finetuning_scheduler.cli.app import app

INSTALLED = shutil.which("fts", path=str(Path(sys.executable).parent))
COMMAND = [INSTALLED] if INSTALLED else [sys.executable, "-m", "finetuning_scheduler"]


@dataclass(frozen=True)
class Answer:
    """What a command has said."""

    status: int
    out: str
    err: str
    seconds: float = 0.0  # of the processor

    def json(self) -> dict[str, object]:
        content = json.loads(self.out)
        assert isinstance(content, dict)
        return content


def fts(*arguments: str | Path, columns: int = 80) -> Answer:
    """Run the command in this process, as for a terminal without colours."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], prog_name="fts", env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)


def installed(*arguments: str | Path, cwd: Path) -> Answer:
    """Run the installed command in a process of its own, piped."""
    environment = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=110,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Answer(done.returncode, done.stdout, done.stderr, seconds)


def safetensors(path: Path, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file without the weights: its header says where they would be."""
    end, header = 0, {}
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        dtype = (dtypes or {}).get(name, "F32")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    return path


def bert_shapes(layers: int = 12, width: int = 8) -> dict[str, tuple[int, ...]]:
    """Names as of a BERT, in alphabetical order as such files have them."""
    shapes: dict[str, tuple[int, ...]] = {"bert.embeddings.word_embeddings.weight": (50, width)}
    for layer in range(layers):
        for part in ("attention.self.query", "attention.output.dense", "intermediate.dense"):
            shapes[f"bert.encoder.layer.{layer}.{part}.weight"] = (width, width)
            shapes[f"bert.encoder.layer.{layer}.{part}.bias"] = (width,)
    shapes |= {"bert.pooler.dense.weight": (width, width), "bert.pooler.dense.bias": (width,)}
    shapes |= {"classifier.weight": (2, width), "classifier.bias": (2,)}
    return dict(sorted(shapes.items()))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
