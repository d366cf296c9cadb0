"""A store of rows leaves no files behind and gives no wrong row, whenever its process is killed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetuning_scheduler.core.prefix import tiers
from finetuning_scheduler.core.prefix.store import PrefixStore

from .kill_loop import started, status_of

ROWS, SPLIT, KILLS = 6, "train", 12


def key(row: int) -> bytes:
    return row.to_bytes(16, "big")


def content(row: int, width: int = 3000) -> Tensor:
    """What a row consists of: larger than a page, so that a row that is half written shows."""
    return torch.arange(row, row + width, dtype=torch.float32)


def record(directory: Path, shared: str | None, seed: int) -> None:
    """Add batches of random rows, drop them now and then, and never stop."""
    tiers._PREALLOCATED = 1 << 16
    draw = random.Random(seed)
    store = PrefixStore(budget=0, directory=directory, shared=shared)
    for batch in range(1_000_000_000):
        rows = [1000 * seed + draw.randrange(1000) for _ in range(ROWS)]
        if batch % 2:
            lengths = [1 + row % 7 for row in rows]
            hidden = torch.stack([content(row, 7 * 50).view(7, 50) for row in rows])
            keys = [key(row) for row in rows]
            store.add("padded", keys, [hidden], [0], position_dims=[1], lengths=lengths)
        else:
            store.add(SPLIT, [key(row) for row in rows], [torch.stack([content(row) for row in rows])], [0])
        if store.failure is not None:
            raise RuntimeError(store.failure)
        if shared is None and batch % 50 == 49:
            store.drop(SPLIT)


def hold(directory: Path, shared: str | None) -> None:
    """Have a row in a file, and live on."""
    store = PrefixStore(budget=0, directory=directory, shared=shared)
    store.add(SPLIT, [key(1)], [content(1)[None]], [0])
    (directory.parent / "there").touch()
    signal.pause()


@contextmanager
def process(function: Callable[..., None], *arguments: object, log: Path) -> Iterator[int]:
    """Run a function in a process of its own, which is killed at the end."""
    child = started(function, *arguments, log=log)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL, log.read_text()


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def recorded(directory: Path) -> bool:
    return any(path.suffix == ".rows" and path.stat().st_size for path in directory.rglob("*.rows"))


def assert_right(store: PrefixStore, seed: int) -> int:
    """Compare every row that a process has recorded; return how many there are."""
    keys = [key(row) for row in range(1000 * seed, 1000 * seed + 1000)]
    whole, padded = (
        [row for row, there in enumerate(store.has(split, keys), start=1000 * seed) if there]
        for split in (SPLIT, "padded")
    )
    for row in whole:
        found = store.get(SPLIT, [key(row)])
        assert found is not None
        assert torch.equal(found[0][0], content(row))
    for row in padded:
        found = store.get("padded", [key(row)], width=7)
        assert found is not None
        expected = content(row, 7 * 50).view(7, 50).clone()
        expected[1 + row % 7 :] = 0
        assert torch.equal(found[0][0], expected)
    return len(whole) + len(padded)


@pytest.mark.parametrize("shared", [None, "us"])
def test_what_a_killed_process_leaves_is_removed_by_the_next_store(shared: str | None, tmp_path: Path) -> None:
    draw, directory = random.Random(0), tmp_path / "stores"
    directory.mkdir()
    for seed in range(KILLS):
        with process(record, directory, shared, seed, log=tmp_path / "log"):
            wait_for(lambda: recorded(directory))
            time.sleep(draw.uniform(0, 0.05))
        assert recorded(directory)
        store = PrefixStore(budget=0, directory=directory)
        assert list(directory.iterdir()) == []
        assert store.failure is None
        assert store.has(SPLIT, [key(row) for row in range(1000)]) == [False] * 1000


def test_no_row_of_a_killed_process_is_wrong_in_another(tmp_path: Path) -> None:
    draw, directory = random.Random(1), tmp_path / "stores"
    directory.mkdir()
    store = PrefixStore(directory=directory, shared="us")
    there = 0
    for seed in range(KILLS):
        before = len(list(directory.rglob("*.rows")))
        with process(record, directory, "us", seed, log=tmp_path / "log"):
            wait_for(lambda before=before: len(list(directory.rglob("*.rows"))) > before)
            time.sleep(draw.uniform(0, 0.03))
            now = assert_right(store, seed)  # while the other one writes
        later = assert_right(store, seed)
        assert later >= now
        there += later
    assert there > 100
    assert store.failure is None
    store.close()
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("shared", [None, "us"])
def test_the_files_of_a_living_process_stay(shared: str | None, tmp_path: Path) -> None:
    directory = tmp_path / "stores"
    directory.mkdir()
    with process(hold, directory, shared, log=tmp_path / "log"):
        wait_for((tmp_path / "there").exists)
        files = sorted(directory.rglob("*"))
        PrefixStore(budget=0, directory=directory).close()
        assert sorted(directory.rglob("*")) == files
        assert len(files) > 2


def test_the_last_process_to_end_removes_what_was_shared(tmp_path: Path) -> None:
    directory = tmp_path / "stores"
    directory.mkdir()
    store = PrefixStore(directory=directory, shared="us")
    with process(hold, directory, "us", log=tmp_path / "log"):
        wait_for((tmp_path / "there").exists)
        found = store.get(SPLIT, [key(1)])
        assert found is not None
        assert torch.equal(found[0][0], content(1))
    assert list(directory.iterdir()) != []
    store.close()
    assert list(directory.iterdir()) == []


def end_with_workers(directory: Path) -> None:
    """Fork, as data loaders do, and end while the child lives."""
    store = PrefixStore(budget=0, directory=directory)
    store.add(SPLIT, [key(1)], [content(1)[None]], [0])
    if not (child := os.fork()):
        signal.pause()
        os._exit(0)
    (directory.parent / "child").write_text(str(child))
    store.close()


def test_a_process_that_was_forked_keeps_nothing_from_being_removed(tmp_path: Path) -> None:
    directory = tmp_path / "stores"
    directory.mkdir()
    try:
        assert status_of(started(end_with_workers, directory, log=tmp_path / "log")) == 0
        assert list(directory.iterdir()) == []
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def fork_and_end(directory: Path) -> None:
    store = PrefixStore(budget=0, directory=directory)
    store.add(SPLIT, [key(1)], [content(1)[None]], [0])
    if not (child := os.fork()):
        del store
        sys.exit()  # finalizers run in the child, too
    os.waitpid(child, 0)
    found = store.get(SPLIT, [key(1)])
    if found is None or not list(directory.rglob("*.rows")):
        raise RuntimeError(store.failure)


def test_a_process_that_was_forked_removes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "stores"
    directory.mkdir()
    assert status_of(started(fork_and_end, directory, log=tmp_path / "log")) == 0, (tmp_path / "log").read_text()
