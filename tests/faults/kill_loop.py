"""Kill a small scheduled run at random moments, resume it from each of its checkpoints, compare the final weights.

`python -m tests.faults.kill_loop --kills 100 --seconds 600` is the long form; a short one is in the tests. Each run is
a process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.reference.networks import FIRST, HEAD, SECOND, THIRD
from tests.reference.recipe import PhaseSpec, Recipe, momentum_sgd
from tests.reference.toys import Session

RECIPE = Recipe(
    phases=(
        PhaseSpec(HEAD, max_epoch=2),
        PhaseSpec(THIRD, lr=0.05),
        PhaseSpec(SECOND, lr=0.02, max_epoch=8),
        PhaseSpec(FIRST, lr=0.01),
    ),
    epochs=10,
    optimizer=momentum_sgd,
    patience=1,
    scores=(5.0, 5.5, 4.0, 4.5, 3.5, 3.0, 3.25, 2.5, 2.75, 2.0),
)
SAVING = {"save_top_k": 2, "save_last": True}
SAVES = 14  # of the uninterrupted run
RESUMED_FROM = ("last", "newest", "best")


def train(root: Path, checkpoint: Path | None) -> None:
    """Fit, and leave the final weights in the directory."""
    session = Session(RECIPE, root, checkpoint=SAVING).fit(ckpt_path=checkpoint)
    torch.save(session.module.state_dict(), root / "final.pt")


def started(function: Callable[..., None], *arguments: Any, log: Path) -> int:
    """Call a function in a new process and return the id of it; what it says goes to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    status = 1
    try:
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                function(*arguments)
                status = 0
            except BaseException:  # noqa: BLE001 - the process ends here
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(status)


def status_of(process: int) -> int:
    """Wait for a process: 0 if it ended well, a negative signal if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def checkpoints(root: Path) -> dict[str, Path]:
    """The files that a user may resume from, by what they are to the user."""
    directory = root / "checkpoints"
    found = {"last": directory / "last.ckpt"} if (directory / "last.ckpt").exists() else {}
    kept = sorted(directory.glob("epoch=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    if kept:
        found["newest"] = kept[-1]
        state = torch.load(kept[-1], weights_only=True)["callbacks"]
        (saving,) = (value for key, value in state.items() if key.startswith("ModelCheckpoint"))
        found["best"] = Path(saving["best_model_path"])
    return found


def judged(root: Path, reference: dict[str, torch.Tensor]) -> str:
    """Tell in a word how a resumed run has ended: `same` if its weights are those of the uninterrupted run."""
    if [path for path in (root / "checkpoints").iterdir() if path.suffix != ".ckpt"]:
        return "leftovers"
    final = torch.load(root / "final.pt", weights_only=True)
    return "same" if all(torch.equal(final[name], value) for name, value in reference.items()) else "other weights"


def wait_for_save(directory: Path, number: int, process: int) -> None:
    """Wait until a file is being written, or has been, for the n-th time, or the process has ended."""
    seen = set[tuple[str, int]]()
    while len(seen) < number and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        for path in directory.glob("*"):
            with suppress(FileNotFoundError):
                seen.add((path.name, 0 if path.name.startswith(".") else path.stat().st_mtime_ns))
        time.sleep(0.001)


def attempt(root: Path, draw: random.Random, duration: float, reference: dict[str, torch.Tensor]) -> Counter[str]:
    """Kill one run, between two saves or while it saves, then resume from each kind of checkpoint that it has left."""
    run = root / "run"
    process = started(train, run, None, log=root / "killed.log")
    wait_for_save(run / "checkpoints", draw.randint(1, SAVES), process)
    time.sleep(draw.uniform(0, duration / SAVES) if draw.random() < 0.5 else draw.uniform(0, 0.01))
    os.kill(process, signal.SIGKILL)
    counts: Counter[str] = Counter()
    if status_of(process) != -signal.SIGKILL:
        return Counter({"had ended": 1})
    counts["killed"] += 1
    if (run / "checkpoints").exists():
        counts["drafts left behind"] += len(list((run / "checkpoints").glob(".*")))
    found = checkpoints(run)
    for kind in RESUMED_FROM:
        if kind not in found:
            counts[f"{kind}: none yet"] += 1
            continue
        kept = root / "kept"  # the directory goes on under its own name: paths are part of a checkpoint
        shutil.copytree(run, kept)
        status = status_of(started(train, run, found[kind], log=root / f"{kind}.log"))
        outcome = judged(run, reference) if status == 0 else f"failed, see {root / f'{kind}.log'}"
        counts[f"{kind}: {outcome}"] += 1
        if "best-of-" in " ".join(path.name for path in (run / "checkpoints").iterdir()):
            counts[f"{kind}: was its own best"] += 1
        shutil.rmtree(run)
        kept.rename(run)
    return counts


def kill_loop(root: Path, kills: int, seconds: float, seed: int) -> Counter[str]:
    """Kill and resume until there have been enough kills, or the time is over."""
    draw, total = random.Random(seed), Counter[str]()
    deadline = time.monotonic() + seconds
    whole = root / "whole"
    train(root / "warm", None)  # what is imported in the course of a fit is there when processes are forked
    begun = time.monotonic()
    if status_of(started(train, whole, None, log=root / "whole.log")):
        raise RuntimeError((root / "whole.log").read_text())
    duration = time.monotonic() - begun
    reference = torch.load(whole / "final.pt", weights_only=True)
    while total["killed"] < kills and time.monotonic() < deadline:
        directory = Path(tempfile.mkdtemp(dir=root))
        counts = attempt(directory, draw, duration, reference)
        total += counts
        if not any("failed" in key for key in counts):
            shutil.rmtree(directory)
    return total


def main() -> int:
    """Run the loop and print what has been counted, a line each; 1 if a resumed run did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = options.directory or Path(tempfile.mkdtemp(prefix="kills-"))
    total = kill_loop(root, options.kills, options.seconds, options.seed)
    for key, count in sorted(total.items()):
        print(f"{count:4d} {key}")
    good = ("same", "none yet", "was its own best")
    bad = [key for key in total if ": " in key and not key.endswith(good)]
    if not bad and options.directory is None:
        shutil.rmtree(root)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
