"""Run a script of this folder as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import finetuning_scheduler

SCRIPTS = Path(__file__).parent / "scripts"
SOURCES = Path(finetuning_scheduler.__file__).parents[1]


def run_script(name: str, *words: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with its output in ``directory``, quietly and with one thread."""
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(SCRIPTS / name), *words],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def outcome_of(name: str, *words: str, directory: Path) -> dict[str, Any]:
    """Run a script that ends well and return what its last line says, in JSON."""
    finished = run_script(name, *words, directory=directory)
    assert finished.returncode == 0, finished.stderr
    outcome: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return outcome
