"""The schedule files a run leaves behind."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from finetuning_scheduler.core import drafts
from finetuning_scheduler.core.drafts import draft_of
from finetuning_scheduler.core.prepare import resolve
from finetuning_scheduler.core.schedule import Schedule
from finetuning_scheduler.core.schedule.files import ScheduleImplMixin, save_renumbered, save_schedule, schedule_path
from finetuning_scheduler.core.schedule.generate import generate


class Toy(nn.Sequential):
    """Two layers, so that the default schedule has two phases."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), nn.Linear(2, 1))


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in directory.iterdir()}


def test_a_saved_schedule_reads_back_the_same(tmp_path: Path) -> None:
    limits = {"max_transition_epoch": 3, "max_transition_step": 7}
    given = {0: {"params": ["1.*"], **limits}, 1: {"params": [r"0\..*"], "lr": 1e-6}}
    schedule = resolve(given, Toy()).schedule
    path = save_schedule(schedule, Toy(), tmp_path / "made" / "here")
    assert path == tmp_path / "made" / "here" / "Toy_ft_schedule.yaml"
    assert Schedule.parse(path) == schedule
    assert schedule[1].params == ("0.weight", "0.bias")


def test_the_saved_file_comments_each_phase_with_its_size(tmp_path: Path) -> None:
    text = save_schedule(generate(Toy()), Toy(), tmp_path).read_text(encoding="utf-8")
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert comments == [
        "# 2 tensors, 3 parameters (33.33 % of the model)",
        "# 2 tensors, 6 parameters (66.67 % of the model)",
    ]


def test_saving_twice_leaves_one_file(tmp_path: Path) -> None:
    first, second = (save_schedule(generate(Toy()), Toy(), tmp_path) for _ in range(2))
    assert first == second
    assert set(contents(tmp_path)) == {"Toy_ft_schedule.yaml"}


def test_hand_edited_files_are_kept_under_numbered_names(tmp_path: Path) -> None:
    path = schedule_path(Toy(), tmp_path)
    for edited in ("first edit", "second edit"):
        path.write_text(edited, encoding="utf-8")
        assert save_schedule(generate(Toy()), Toy(), tmp_path) == path
    files = contents(tmp_path)
    assert Schedule.parse(path) == generate(Toy())
    assert files.pop("Toy_ft_schedule.yaml")
    assert files == {"Toy_ft_schedule_1.yaml": "first edit", "Toy_ft_schedule_2.yaml": "second edit"}


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_the_file_a_schedule_was_read_from_is_left_untouched(tmp_path: Path, through: str) -> None:
    target = schedule_path(Toy(), tmp_path)
    text = "0:\n  params: [1.*]  # mine\n1:\n  params: [0.*]\n"
    target.write_text(text, encoding="utf-8")
    source = target
    if through == "a link":
        source = tmp_path / "elsewhere.yaml"
        source.symlink_to(target)
    schedule = resolve(str(source), Toy()).schedule
    path = save_schedule(schedule, Toy(), tmp_path, source=source)
    assert target.read_text(encoding="utf-8") == text
    assert path == tmp_path / "Toy_ft_schedule_expanded.yaml"
    assert Schedule.parse(path) == schedule


def test_a_source_elsewhere_does_not_change_where_the_schedule_goes(tmp_path: Path) -> None:
    source = tmp_path / "mine.yaml"
    source.write_text("0: {params: [1.*]}\n", encoding="utf-8")
    path = save_schedule(resolve(source, Toy()).schedule, Toy(), tmp_path / "logs", source=source)
    assert path == schedule_path(Toy(), tmp_path / "logs")
    assert source.read_text(encoding="utf-8") == "0: {params: [1.*]}\n"


def test_a_renumbered_copy_reads_back_as_a_valid_schedule(tmp_path: Path) -> None:
    path = save_renumbered({0: {"params": ["1.bias"]}, 1: {"params": ["0.bias"]}}, Toy(), tmp_path / "logs")
    assert path == tmp_path / "logs" / "Toy_ft_schedule_valid.yaml"
    assert [phase.params for phase in Schedule.parse(path).phases] == [("1.bias",), ("0.bias",)]


def test_a_renumbered_copy_replaces_no_hand_edited_one(tmp_path: Path) -> None:
    mine = tmp_path / "Toy_ft_schedule_valid.yaml"
    mine.write_text("0: {params: [1.*]}\n2: {params: [0.*]}  # mine\n", encoding="utf-8")
    save_renumbered({0: {"params": ["1.*"]}, 1: {"params": ["0.*"]}}, Toy(), tmp_path)
    assert any("# mine" in text for text in contents(tmp_path).values())


def test_gen_ft_schedule_writes_the_default_schedule_and_returns_its_path(tmp_path: Path) -> None:
    path = ScheduleImplMixin.gen_ft_schedule(Toy(), str(tmp_path / "new"))
    assert path == tmp_path / "new" / "Toy_ft_schedule.yaml"
    assert Schedule.parse(path) == generate(Toy())


def test_gen_ft_schedule_takes_a_heuristic(tmp_path: Path) -> None:
    path = ScheduleImplMixin.gen_ft_schedule(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), tmp_path, "blocks")
    assert [phase.params for phase in Schedule.parse(path).phases] == [
        (f"{block}.bias", f"{block}.weight") for block in (2, 1, 0)
    ]


def saved_often(directory: Path, number: int) -> None:
    model = Toy()
    schedule = resolve({0: {"params": ["1.*"], "max_transition_epoch": number}, 1: {"params": ["0.*"]}}, model).schedule
    for _ in range(100):
        assert save_schedule(schedule, model, directory) == schedule_path(model, directory)


def test_several_runs_in_one_directory_lose_nothing_and_do_not_fail(tmp_path: Path) -> None:
    numbers = (1, 2, 3)
    with ProcessPoolExecutor(len(numbers), mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(saved_often, tmp_path, number) for number in numbers]:
            done.result()
    assert all(path.suffix == ".yaml" for path in tmp_path.iterdir())
    found = {Schedule.parse(path)[0].max_transition_epoch for path in tmp_path.iterdir()}
    assert found == set(numbers)


KILLED = """
import os, signal, sys
from pathlib import Path
from finetuning_scheduler.core import drafts
from finetuning_scheduler.core.drafts import draft_of
with draft_of(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_draft_of_a_killed_run_is_removed_by_the_next_and_one_in_use_is_not(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "x.yaml")], check=False)
    assert done.returncode == -signal.SIGKILL
    [leftover] = tmp_path.iterdir()
    with draft_of(tmp_path / "y.yaml") as in_use:
        save_schedule(generate(Toy()), Toy(), tmp_path)
        assert not leftover.exists()
        assert Path(in_use.name).exists()
    assert set(contents(tmp_path)) == {"Toy_ft_schedule.yaml"}


@pytest.mark.skipif(drafts.fcntl is None, reason="there are no locks of this kind")
def test_a_draft_that_is_about_to_be_taken_for_a_leftover_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run holds the lock on it, and is about to remove it, before its writer does."""
    others: list[threading.Thread] = []

    def taken_first(file: Any, how: int) -> None:
        if not others:
            taken = Path(file.name).open("rb")  # noqa: SIM115 - closed by the thread
            fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
            others.append(threading.Thread(target=remove_later, args=(taken,)))
            others[0].start()
        fcntl.flock(file, how)

    def remove_later(taken: Any) -> None:
        time.sleep(0.1)
        Path(taken.name).unlink()
        taken.close()

    fcntl = drafts.fcntl
    monkeypatch.setattr(drafts, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": taken_first}))
    with draft_of(tmp_path / "x.yaml") as file:
        others[0].join()
        file.write(b"whole")
        drafts.publish(file, tmp_path / "x.yaml")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x.yaml": b"whole"}


@pytest.mark.parametrize("name", ["../../evil", "a/b", "a\\b", ".", "..", "", "x" * 400, "Größe", "a b\nc", "C:evil"])
def test_a_class_of_any_name_writes_inside_the_directory(name: str, tmp_path: Path) -> None:
    model = type("Named", (Toy,), {})()
    type(model).__name__ = name
    inside = tmp_path / "some" / "where" / "deep"
    path = save_schedule(generate(model), model, inside)
    assert path.parent == inside
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]
    assert save_renumbered({0: {"params": ["x"]}}, model, inside).parent == inside
