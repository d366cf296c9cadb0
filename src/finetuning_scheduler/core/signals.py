"""Signals wait while something must not be interrupted halfway."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class _Waiting:
    """Stands for handlers, which it calls when the wait is over; a second Ctrl+C does not wait."""

    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}
        self.arrived: dict[int, None] = {}
        self.is_over = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.is_over or (signum == signal.SIGINT and signum in self.arrived):
            self.handlers[signum](signum, frame)
        else:
            self.arrived[signum] = None


@contextmanager
def signals_wait() -> Iterator[None]:
    """Run handlers of signals that are written in Python after this block instead of inside it, each once.

    They run in the main thread, whichever thread of the process gets the signal, so that blocking signals in one thread
    would not keep them away. In other threads there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting = _Waiting()
    try:
        for signum in signal.valid_signals():
            handler = signal.getsignal(signum)
            if callable(handler):
                waiting.handlers[signum] = handler
                signal.signal(signum, waiting)
        yield
    finally:
        waiting.is_over = True  # from here on, what arrives is handled, also where a handler is not back in place yet
        for number, usual in waiting.handlers.items():
            if signal.getsignal(number) is waiting:  # else the block has set another one
                signal.signal(number, usual)
        for number in waiting.arrived:
            signal.raise_signal(number)
