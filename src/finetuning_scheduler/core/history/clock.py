"""What a session spends its time on, as a host sees it: a device is never waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum


class Activity(str, Enum):
    """What a session does. The value is the name a reader of the history knows it by."""

    TRAINING = "training"
    VALIDATION = "validation"
    SAVING = "saving"
    RESTORING = "restoring"


class Clock:
    """Add up seconds by activity, each second to one: the innermost of those that are running.

    Args:
        now: Tells seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._running: list[Activity] = []
        self._since = now()
        self._seconds = dict.fromkeys(Activity, 0.0)

    @contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Count what this block takes as time of an activity."""
        self.begin(activity)
        try:
            yield
        finally:
            self.end(activity)

    def begin(self, activity: Activity) -> None:
        """Begin an activity inside of what is running."""
        self._count()
        self._running.append(activity)

    def end(self, activity: Activity) -> None:
        """End an activity, with what an exception may have left running inside of it."""
        self._count()
        if activity in self._running:
            innermost = len(self._running) - 1 - self._running[::-1].index(activity)
            del self._running[innermost:]

    def stop(self) -> None:
        """End all activities."""
        self._count()
        self._running.clear()

    def lap(self) -> dict[Activity, float]:
        """Return the seconds by activity since the last lap."""
        self._count()
        lap, self._seconds = self._seconds, dict.fromkeys(Activity, 0.0)
        return lap

    def _count(self) -> None:
        now = self._now()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now
