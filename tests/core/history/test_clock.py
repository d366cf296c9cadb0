"""Each second counts for the innermost activity that is running."""

from __future__ import annotations

import pytest

from finetuning_scheduler.core.history.clock import Activity, Clock

TRAINING, VALIDATION, SAVING, RESTORING = Activity


class Watch:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def clock(watch: Watch) -> Clock:
    return Clock(watch)


def test_seconds_count_once_for_the_innermost_activity(clock: Clock, watch: Watch) -> None:
    watch.time += 1.0  # before anything has begun
    clock.begin(TRAINING)
    watch.time += 2.0
    with clock.during(VALIDATION):
        watch.time += 4.0
        with clock.during(SAVING):
            watch.time += 8.0
        watch.time += 16.0
    watch.time += 32.0
    assert clock.lap() == {TRAINING: 34.0, VALIDATION: 20.0, SAVING: 8.0, RESTORING: 0.0}


def test_a_lap_begins_where_the_last_one_ended(clock: Clock, watch: Watch) -> None:
    clock.begin(TRAINING)
    watch.time += 1.0
    clock.lap()
    watch.time += 2.0
    assert clock.lap()[TRAINING] == 2.0


def test_what_was_left_running_ends_with_what_is_around_it(clock: Clock, watch: Watch) -> None:
    clock.begin(TRAINING)
    for activity in (RESTORING, VALIDATION):
        clock.begin(activity)
    clock.end(RESTORING)
    watch.time += 1.0
    assert clock.lap() == {TRAINING: 1.0, VALIDATION: 0.0, SAVING: 0.0, RESTORING: 0.0}


def test_nothing_counts_after_the_end(clock: Clock, watch: Watch) -> None:
    clock.begin(TRAINING)
    clock.stop()
    watch.time += 1.0
    assert set(clock.lap().values()) == {0.0}
