"""The default schedule, written by processes that Lightning starts itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from .processes import SCRIPTS, SOURCES

pytestmark = pytest.mark.slow


def alive(group: int) -> list[psutil.Process]:
    """The processes of a group that have not ended, with those that nobody has asked about left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
def test_every_process_ends_well(strategy: str, tmp_path: Path) -> None:
    """By fork, as by spawn, the first process waits for what the fit returns, and the fit ends the others instead."""
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    program = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "generate_only.py"), strategy],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = program.communicate(timeout=90)
        left = psutil.wait_procs(alive(program.pid), timeout=10)[1]
        assert not left
    finally:
        for process in alive(program.pid):
            process.kill()
    assert program.returncode == 0, errors
    assert "Traceback" not in errors
    assert printed == ""
    assert errors.count("The default schedule was written to ") == 1
    assert [file.name for file in tmp_path.glob("*.yaml")] == ["Module_ft_schedule.yaml"]
