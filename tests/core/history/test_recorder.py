"""A run history has every phase, transition and epoch, and a resumed run goes on with it."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from finetuning_scheduler.core import PhaseRunner
from finetuning_scheduler.core.history import recorder as recording
from finetuning_scheduler.core.history.document import FORMAT, RunHistory
from finetuning_scheduler.core.history.recorder import FILE_NAME, Recorder

SCHEDULE = {
    0: {"params": ["head.weight", "spare.weight"], "max_transition_epoch": 2},
    1: {"params": ["body.weight"], "lr": 0.01, "max_transition_step": 10},
    2: {"params": ["head.bias", "body.bias"], "lr": 0.02},
}
BATCHES = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.spare = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Run:
    def __init__(self, **options: Any) -> None:
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1)
        self.scheduler = StepLR(optimizer, 1, 0.5)
        messages: list[str] = []
        self.messages = messages
        options = {"report": lambda level, text: messages.append(text) if level >= logging.WARNING else None} | options
        self.runner = PhaseRunner(model, optimizer, SCHEDULE, lr_schedulers=[self.scheduler], **options)

    def epoch(self, metric: float | None = None, steps: int = BATCHES) -> Run:
        for _ in range(steps):
            self.runner.optimizer.zero_grad()
            self.runner.model(torch.ones(2, 3)).square().sum().backward()
            self.runner.optimizer.step()
            self.runner.step()
        self.scheduler.step()
        self.runner.epoch_end(metric)
        return self

    @property
    def history(self) -> RunHistory:
        return self.runner.history.history


def written(directory: Path) -> RunHistory:
    return RunHistory.model_validate_json((directory / FILE_NAME).read_bytes())


def without_times(history: RunHistory | dict[str, Any]) -> dict[str, Any]:
    """A history as values, without what differs between two runs that do the same."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            left_out = ("seconds", "at", "running", "peak_memory_bytes")
            return {key: timeless(each) for key, each in value.items() if key not in left_out}
        return [timeless(each) for each in value] if isinstance(value, list) else value

    values: dict[str, Any] = timeless(history.model_dump(mode="json") if isinstance(history, RunHistory) else history)
    return values


def test_the_whole_of_a_run() -> None:
    run = Run()
    for metric in (3.0, 2.0, 1.0):
        run.epoch(metric)
    found = without_times(run.history)
    assert found["transitions"] == [
        {"left": 0, "entered": 1, "reason": "max_transition_epoch", "moment": {"epoch": 2, "step": 8}},
        {"left": 1, "entered": 2, "reason": "max_transition_step", "moment": {"epoch": 2, "step": 10}},
    ]
    assert [(each["epoch"], each["phase"], each["step"], each["metrics"]) for each in found["epochs"]] == [
        (0, 0, 4, {"metric": 3.0}),
        (1, 0, 8, {"metric": 2.0}),
        (2, 2, 12, {"metric": 1.0}),
    ]
    assert found["epochs"][0]["learning_rates"] == [[0.05, 1]]
    assert [(each["phase"], each["steps"], each["trainable"], each["groups"]) for each in found["phases"]] == [
        (0, 8, 18, [{"learning_rate": 0.1, "tensors": 2}]),
        (1, 2, 27, [{"learning_rate": 0.01, "tensors": 1}]),
        (2, 2, 33, [{"learning_rate": 0.02, "tensors": 2}]),
    ]
    assert found["phases"][0]["judgement"] == {
        "steps": 4, "trained": ["head.weight"], "untrained": ["spare.weight"], "moved": []
    }  # fmt: skip
    assert found["phases"][1]["judgement"]["trained"] == ["body.weight"]
    assert found["phases"][2]["judgement"] is None  # it has not seen a whole epoch
    assert (found["resumed"], found["ended"], found["format"]) == ([], None, FORMAT)


def test_groups_in_a_row_with_one_learning_rate_are_counted() -> None:
    optimizer_groups = {
        0: {"params": ["head.weight"]},
        **{i + 1: {"params": [p]} for i, p in enumerate(("head.bias",))},
    }
    model = Net()
    runner = PhaseRunner(model, SGD(model.parameters(), lr=0.1), optimizer_groups, base_max_lr=None)
    runner.thaw_to(1)
    runner.epoch_end()
    assert runner.history.history.epochs[0].learning_rates == [(0.1, 2)]


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_resumed_run_has_the_history_of_one_that_was_not_interrupted(epochs: int) -> None:
    whole, run = Run(), Run()
    for _ in range(5):
        whole.epoch(1.0)
    for _ in range(epochs):
        run.epoch(1.0)
    state = json.loads(json.dumps({**run.runner.state_dict(), "loop": None}))  # plain values
    state["loop"] = run.runner.state_dict()["loop"]
    scheduler_state = run.scheduler.state_dict()
    run.epoch(0.5)  # lost: it comes after the checkpoint
    resumed = Run()
    resumed.runner.load_state_dict(state)
    resumed.scheduler.load_state_dict(scheduler_state)
    resumed.runner.optimizer.load_state_dict(run.runner.optimizer.state_dict()) if epochs == 3 else None
    for _ in range(epochs, 5):
        resumed.epoch(1.0)
    found, expected = without_times(resumed.history), without_times(whole.history)
    assert found["resumed"] == [{"epoch": epochs, "step": BATCHES * epochs}]
    for part in ("phases", "epochs"):
        for each in (*found[part], *expected[part]):
            each.pop("learning_rates", None)  # of the optimizer's own state, which is not loaded here
            each.pop("judgement", None)  # a resumed phase is judged anew, with all that is thawed
    assert {**found, "resumed": []} == expected


def test_seconds_of_a_resumed_phase_add_up() -> None:
    first = Run().epoch()
    before = first.runner.state_dict()["history"]["phases"][0]["seconds"]["training"]
    resumed = Run()
    resumed.runner.load_state_dict(first.runner.state_dict())
    resumed.epoch()
    phase, (one, two) = resumed.history.phases[0], resumed.history.epochs
    assert 0 < before < one.seconds.training + two.seconds.training <= phase.seconds.training


def test_blocks_that_are_no_training_are_counted_apart() -> None:
    run = Run()
    began = time.perf_counter()
    with run.runner.history.during("validation"):
        time.sleep(0.02)
    with run.runner.history.during("saving"):
        time.sleep(0.01)
    run.epoch()
    passed, (epoch,) = time.perf_counter() - began, run.history.epochs
    assert epoch.seconds.validation >= 0.02
    assert epoch.seconds.saving >= 0.01
    assert epoch.seconds.training <= passed - 0.03
    with pytest.raises(ValueError, match="holidays"):
        run.runner.history.during("holidays")


def test_restoring_counts_for_the_phase_that_it_ends() -> None:
    run = Run()
    run.epoch(1.0).epoch(2.0)
    left, entered = run.history.phases
    assert left.seconds.restoring > 0
    assert entered.seconds.restoring == 0


def test_peak_memory_is_that_of_the_process() -> None:
    (phase,) = Run().history.phases
    resource = pytest.importorskip("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert phase.peak_memory_bytes is not None
    assert 1e7 < phase.peak_memory_bytes <= peak * 1024


@pytest.mark.parametrize("reason", ["request", "early stopping", "metric not finite"])
def test_the_end_stands_in_the_file(reason: str, tmp_path: Path) -> None:
    run = Run(patience=1, restore_best=False)
    run.runner.history.write_to(tmp_path)
    assert written(tmp_path).ended is None
    run.runner.thaw_to(2)
    scores = {"request": [1.0], "early stopping": [1.0, 2.0], "metric not finite": [math.nan]}
    for score in scores[reason]:
        run.epoch(score)
    ended = written(tmp_path).ended
    assert run.runner.finished is (reason != "request")
    assert (None if ended is None else ended.reason) == (None if reason == "request" else reason)
    run.runner.release_module_modes()
    assert written(tmp_path).transitions[0].reason == "request"


def test_a_metric_that_is_no_number_is_standard_json(tmp_path: Path) -> None:
    run = Run(restore_best=False)
    run.runner.history.write_to(tmp_path)
    run.epoch(math.inf)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    text = (tmp_path / FILE_NAME).read_text()
    assert json.loads(text, parse_constant=refuse)["epochs"][0]["metrics"] == {"metric": "Infinity"}
    assert written(tmp_path).epochs[0].metrics == {"metric": math.inf}


def test_little_of_the_time_is_spent_on_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Watch:
        time = 0.0

        def perf_counter(self) -> float:
            return self.time

    watch, publish, times = Watch(), recording.publish, []

    def slow(*arguments: Any) -> None:
        publish(*arguments)
        times.append(watch.time)
        watch.time += 1.0

    monkeypatch.setattr(recording, "time", watch)
    monkeypatch.setattr(recording, "publish", slow)
    run = Run(restore_best=False)
    run.runner.history.write_to(tmp_path)
    for _ in range(500):
        watch.time += 1.0
        run.runner.epoch_end()
    assert len(times) > 4
    assert all(later - earlier >= 101 for earlier, later in pairwise(times))


def test_a_disk_that_refuses_is_told_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run = Run(restore_best=False)
    monkeypatch.setattr(recording, "publish", full)
    monkeypatch.setattr(recording, "_PATIENCE", 0)
    run.runner.history.write_to(tmp_path)
    run.epoch().epoch()
    assert list(tmp_path.iterdir()) == []
    assert [text for text in run.messages if "history" in text] == [
        f"The run history cannot be written as {tmp_path / FILE_NAME} (OSError: [Errno 28] No space left on device). "
        "Training goes on without it."
    ]
    monkeypatch.undo()
    run.runner.history.end("request", 2, 8)
    assert len(written(tmp_path).epochs) == 2  # there is space again


def test_a_directory_that_cannot_be_made_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = Run()
    run.runner.history.write_to(tmp_path / "file")
    run.epoch()
    assert len([text for text in run.messages if "history" in text]) == 1


@pytest.mark.parametrize("state", [{"format": FORMAT + 1}, {"phases": 3}, "text", {"unknown": 1}])
def test_a_saved_history_that_cannot_be_read_begins_anew(state: Any) -> None:
    run = Run()
    saved = {**run.epoch().runner.state_dict(), "history": state}
    resumed = Run()
    resumed.runner.load_state_dict(saved)
    assert [text for text in resumed.messages if "run history" in text]
    assert without_times(resumed.history)["phases"][0]["began"] == {"epoch": 1, "step": 4}


def test_a_state_without_history_begins_one_where_it_is() -> None:
    run = Run()
    saved = run.epoch().epoch().runner.state_dict()
    del saved["history"]
    resumed = Run()
    resumed.runner.load_state_dict(saved)
    assert [(each.phase, each.began.step) for each in resumed.history.phases] == [(1, 8)]
    assert resumed.messages == []


@dataclass
class Account:
    """As frozen-prefix reuse keeps it."""

    phase: int
    stage: str
    rows: int = 0
    hits: int = 0
    bytes: int = 0
    seconds_recording: float = 0.0
    seconds_saved: float = 0.0
    reason: str | None = None
    skipped: tuple[str, ...] = ()


def test_accounts_of_reuse_stand_with_their_phase_and_add_up_over_a_resume() -> None:
    accounts = [Account(0, "train", rows=10, hits=5, bytes=70, seconds_saved=1.5), Account(0, "validation", rows=4)]

    def recorded(run: Run, state: Any = None) -> Recorder:
        recorder = Recorder(run.runner.session, run.runner.gradients, accounts=lambda: accounts)
        recorder.begin(recording.Moment(0, 0), state)
        return recorder

    run = Run()
    first = recorded(run)
    assert [(each.stage, each.rows, each.hits) for each in first.history.phases[0].prefix] == [
        ("train", 10, 5),
        ("validation", 4, 0),
    ]
    state = first.state_dict()
    accounts[:] = [Account(0, "train", rows=1, hits=1, bytes=80, seconds_saved=0.5, reason="why")]
    for _ in range(2):  # reading it does not add anything
        train, validation = recorded(run, state).history.phases[0].prefix
        assert (train.rows, train.hits, train.bytes, train.seconds_saved, train.reason) == (11, 6, 80, 2.0, "why")
        assert validation.rows == 4


def test_a_step_costs_the_history_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    for name in vars(Recorder):
        if callable(getattr(Recorder, name)) and not name.startswith("__"):
            monkeypatch.setattr(Recorder, name, lambda *_, **__: pytest.fail("called"))
    for _ in range(3):
        run.runner.optimizer.step()
        run.runner.step()
