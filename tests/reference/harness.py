"""Runs a function on several ranks: real processes, forked from a server that has imported torch and Lightning once.

The server starts with a test process's first call (about 2 s); after that a rank starts in some hundredths of a second.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# What ranks import, directly or while they train; a name that cannot be imported is passed over.
PRELOAD = [
    "omegaconf",  # by Lightning, where it is installed
    "torch._dynamo",
    "torch.distributed._tensor",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "torch.distributed.fsdp.sharded_grad_scaler",
    "torch.distributed.optim",
    "finetuning_scheduler.fts",
    "tests.reference.cases",
]
GRACE = 1.0  # seconds that the other ranks get after one has failed
LOG_LINES = 30
PORTS = range(12000, 32000)  # below the range from which Linux picks ports for outgoing connections


def rank() -> int:
    """The rank of this process."""
    return int(os.environ["RANK"])


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes at once and return what each returned, in rank order.

    Each rank has one thread, the caller's environment and working directory, and the variables by which Lightning knows
    that its processes are running already.

    Args:
        function: An importable module's function, or a `partial` of one; it and its arguments are pickled, and so is
            what it returns.
        world_size: Number of processes.
        *args: Arguments of the function, the same on every rank.
        timeout: Seconds after which ranks that have not returned are killed.
        environment: Further environment variables of the ranks.

    Raises:
        AssertionError: A rank has raised, died or not finished in time. The message has tracebacks and ends of logs.
    """
    with tempfile.TemporaryDirectory(prefix="ranks") as logs:
        deadline = time.monotonic() + timeout
        ranks: list[_Rank] = []
        try:
            for job in _jobs(function, args, world_size, timeout, dict(environment or {}), Path(logs)):
                ranks.append(_start(job))
            _collect(ranks, deadline)
            if not all(rank.done and rank.failure is None for rank in ranks):
                raise AssertionError(_report(function, ranks, timeout))
        finally:
            _end(ranks)
        return [pickle.loads(rank.result) for rank in ranks]


@dataclass
class _Job:
    """All that a rank's process needs to know."""

    payload: bytes
    path: list[str]
    directory: str
    environment: dict[str, str]
    log: Path
    timeout: float


@dataclass
class _Rank:
    """A rank as the caller sees it."""

    process: Any
    connection: Connection
    log: Path
    result: bytes = b""
    failure: str | None = None
    done: bool = False


def _jobs(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    world_size: int,
    timeout: float,
    environment: dict[str, str],
    logs: Path,
) -> list[_Job]:
    shared = {
        **os.environ,
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return [
        _Job(
            payload=pickle.dumps((function, args)),
            path=list(sys.path),
            directory=str(Path.cwd()),
            environment=shared | {"RANK": str(number), "LOCAL_RANK": str(number)},
            log=logs / f"{number}.log",
            timeout=timeout,
        )
        for number in range(world_size)
    ]


def _without_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _free_port() -> int:
    """A port that nothing listens on; drawn by chance, so that parallel test processes do not draw the same one."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port


def _start(job: _Job) -> _Rank:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_rank_main, args=(job, theirs))
    process.start()
    theirs.close()
    return _Rank(process, ours, job.log)


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Wait until every rank has reported, one has failed and the others have had their time, or all time is up."""
    while waiting := [rank for rank in ranks if not rank.done]:
        ready = wait([rank.connection for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in waiting:
            if rank.connection in ready:
                _read(rank)
                if rank.failure is not None:
                    deadline = min(deadline, time.monotonic() + GRACE)


def _read(rank: _Rank) -> None:
    rank.done = True
    try:
        succeeded, content = pickle.loads(rank.connection.recv_bytes())
    except EOFError:
        rank.process.join(GRACE)
        rank.failure = f"died without a report, exit code {rank.process.exitcode}"
        return
    if succeeded:
        rank.result = content
    else:
        rank.failure = content


def _end(ranks: list[_Rank]) -> None:
    """Let ranks that have finished go and kill the others, with what they have started."""
    for rank in ranks:
        if rank.done and rank.failure is None:
            with contextlib.suppress(OSError):
                rank.connection.send_bytes(b"go")
    for rank in ranks:
        if rank.done and rank.failure is None:
            rank.process.join(GRACE)
        if rank.process.exitcode != 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.kill()  # if it had no time to make a group of its own
            rank.process.join()
        rank.connection.close()


def _report(function: Callable[..., Any], ranks: list[_Rank], timeout: float) -> str:
    """Say how each rank ended that did not return; after a failure the others may have waited for the failed one."""
    lines = [f"{_without_arguments(function).__name__} on {len(ranks)} ranks:"]
    for number, rank in enumerate(ranks):
        if rank.done and rank.failure is None:
            lines.append(f"--- rank {number} returned")
            continue
        outcome = f"did not return within {timeout} s or {GRACE} s after another's failure; killed"
        lines.append(f"--- rank {number}: {rank.failure or outcome}")
        log = rank.log.read_text(errors="replace").splitlines() if rank.log.exists() else []
        lines += [f"    log of rank {number}: {line}" for line in log[-LOG_LINES:]]
    return "\n".join(lines)


# --- in the rank's process -------------------------------------------------------------------------------------------


def _rank_main(job: _Job, connection: Connection) -> None:
    """Run the job, report, wait for leave and go, without the clean-up of the interpreter, which can abort."""
    os.setsid()  # the rank and what it starts can be killed together
    _enter(job)
    report = _call(job)
    sys.stdout.flush()
    sys.stderr.flush()
    faulthandler.cancel_dump_traceback_later()
    with contextlib.suppress(OSError, EOFError):
        connection.send_bytes(report)
        connection.recv_bytes()  # the other ranks may still need the store that rank 0 serves
    os._exit(0)


def _enter(job: _Job) -> None:
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # A rank that hangs says where, shortly before the caller kills it; it also ends should the caller be gone.
    faulthandler.dump_traceback_later(job.timeout * 0.95, exit=True)
    os.environ.clear()
    os.environ.update(job.environment)
    os.chdir(job.directory)
    sys.path[:] = job.path


def _call(job: _Job) -> bytes:
    """Call the function; return whether it succeeded and its result or traceback, pickled."""
    try:
        import torch

        torch.set_num_threads(1)
        function, args = pickle.loads(job.payload)
        return pickle.dumps((True, pickle.dumps(function(*args))))
    except BaseException:  # noqa: BLE001 - a SystemExit is reported like any other
        return pickle.dumps((False, "raised\n" + traceback.format_exc()))
