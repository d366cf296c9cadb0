"""What the benchmarks share: runs that alternate in one process, figures with their spread, how they are printed.

A benchmark is a file with a function that yields :class:`Figure` objects, called by :func:`main`:

    def figures(options: Options) -> Iterator[Figure]:
        turns = alternate(partial(plain, options), partial(reused, options), pairs=options.pairs)
        yield Figure.of("head only, 10 epochs", [without / with_it for without, with_it in turns], ">= 7")

    if __name__ == "__main__":
        main(__doc__, figures)

It prints a line for each figure, or with ``--json`` an object for each. ``--tiny`` makes everything as small as can be,
for tests of the benchmarks themselves: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import operator
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

_COMPARISONS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


@dataclass(frozen=True)
class Options:
    """What is given on the command line."""

    pairs: int  # of runs, after one that warms up
    threads: int
    tiny: bool
    device: torch.device


@dataclass(frozen=True)
class Figure:
    """One line of the table: the median of some runs, the quartiles, and what was aimed at."""

    claim: str
    value: float
    low: float
    high: float
    runs: int
    goal: str  # ">= 7", "<= 1.15", "== 0"
    limit: float | None  # what could be reached at best
    unit: str
    note: str

    @classmethod
    def of(
        cls,
        claim: str,
        values: Sequence[float],
        goal: str,
        *,
        limit: float | None = None,
        unit: str = "x",
        note: str = "",
    ) -> Figure:
        """Take median and quartiles.

        Args:
            claim: What the figure is of, as the table shows it.
            values: One of each pair of runs.
            goal: A comparison with a number.
            limit: The value that could be reached at best, in the same unit.
            unit: ``"x"`` for ratios, else a unit such as ``"s"``, or nothing for counts.
            note: What a reader of the table has to know besides.
        """
        low, high = min(values), max(values)
        if len(values) > 2:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(claim, statistics.median(values), low, high, len(values), goal, limit, unit, note)

    @property
    def met(self) -> bool:
        """Whether the median is what was aimed at."""
        comparison, number = self.goal.split()
        return bool(_COMPARISONS[comparison](self.value, float(number)))

    @property
    def measured(self) -> str:
        """Median and quartiles, as text."""
        spread = f" ({shown(self.low)}-{shown(self.high)})" if self.runs > 1 else ""
        return f"{shown(self.value)}{self._unit}{spread}"

    @property
    def aim(self) -> str:
        """The goal, as text."""
        return f"{self.goal}{self._unit}"

    @property
    def best(self) -> str:
        """The limit, as text."""
        return "" if self.limit is None else f"{shown(self.limit)}{self._unit}"

    @property
    def _unit(self) -> str:
        return f" {self.unit}" if self.unit not in ("", "x") else self.unit

    def line(self) -> str:
        """Say it in a line."""
        limit = f", limit {self.best}" if self.best else ""
        verdict = "met" if self.met else "missed"
        note = f"; {self.note}" if self.note else ""
        return f"{self.claim}: {self.measured}, {self.runs} runs{limit}; goal {self.aim} {verdict}{note}"


def shown(number: float) -> str:
    """Write a number with three digits, or more before the point."""
    if number == int(number) and abs(number) < 1e6:
        return str(int(number))
    digits = max(0, 2 - int(f"{number:e}".split("e")[1]))
    return f"{number:.{min(digits, 6)}f}"


def alternate(*kinds: Callable[[], float], pairs: int, warm_up: int = 1) -> list[tuple[float, ...]]:
    """Run several things in turns, another one first each time; return what each has returned, turn by turn."""
    turns = []
    for number in range(warm_up + pairs):
        measured: dict[int, float] = {}
        for place in range(len(kinds)):
            chosen = (number + place) % len(kinds)
            measured[chosen] = kinds[chosen]()
        turns.append(tuple(measured[chosen] for chosen in range(len(kinds))))
    return turns[warm_up:]


def timed(function: Callable[[], object], device: torch.device | None = None, *, wall: bool = False) -> float:
    """Return the seconds of a call.

    On a CPU these are seconds of the processor, which other programs on the machine lengthen less than those of the
    wall. ``wall=True`` takes the wall's all the same, as is right for disks and for several processes.
    """
    cuda = device is not None and device.type == "cuda"
    clock = time.perf_counter if wall or cuda else time.process_time
    begun = clock()
    function()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - begun


def quiet() -> None:
    """Silence what Lightning and this package say of a run."""
    warnings.simplefilter("ignore")
    for name in ("finetuning_scheduler", "lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(description: str | None, figures: Callable[[Options], Iterable[Figure]]) -> None:
    """Read the command line, measure and print; each figure as soon as it is there."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each kind, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiny", action="store_true", help="as small as can be: its figures mean nothing")
    parser.add_argument("--json", action="store_true", help="print an object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet()
    if not arguments.json:
        print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors", file=sys.stderr)
    for figure in figures(Options(arguments.pairs, arguments.threads, arguments.tiny, arguments.device)):
        print(json.dumps(asdict(figure)) if arguments.json else figure.line(), flush=True)
