"""A picture of learning rates. Needs matplotlib, which the extra ``plot`` brings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import Problem, ScheduleError
from .shapes import LearningRates

# Told apart by people who do not see all colours (Okabe and Ito), and by their dashes.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_MOST_NAMES = 14


def draw(rates: LearningRates, path: Path) -> None:
    """Draw learning rates over steps, with the phases as bands, and write them to a file.

    Args:
        rates: Those of all steps.
        path: The picture; its suffix says the format.

    Raises:
        ScheduleError: There is no matplotlib, or it writes no such format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = 'install it: pip install "finetuning-scheduler[plot]"'
        raise ScheduleError(Problem("expected matplotlib, which draws pictures, got none", fix)) from error
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, (names, curve) in enumerate(_curves(rates)):
        colour, dashes = _COLOURS[place % len(_COLOURS)], _DASHES[place // len(_COLOURS) % len(_DASHES)]
        label = names if place < _MOST_NAMES else None
        steps, shown = [step for step, _ in curve], [value for _, value in curve]
        axes.plot(steps, shown, dashes, color=colour, label=label, drawstyle="steps-post")
    for phase in sorted({row.phase for row in rates.steps}):
        steps = [row.step for row in rates.steps if row.phase == phase]
        axes.axvspan(steps[0], steps[-1] + 1, color="#888888", alpha=0.16 if phase % 2 else 0.04, linewidth=0)
        axes.annotate(f"{phase}", (steps[0], 1.0), xycoords=("data", "axes fraction"), va="bottom", fontsize=9)
    axes.set(xlabel="optimizer step (phases above)", ylabel="learning rate")
    if floor := _floor(rates):
        axes.set_yscale("symlog", linthresh=floor)
    if rates.groups:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    try:
        figure.savefig(path, dpi=144)
    except (OSError, ValueError) as error:
        message = f"expected a picture to write to, got {path} ({error})"
        raise ScheduleError(Problem(message, "name a .png or .svg file")) from error


def _curves(rates: LearningRates) -> Iterator[tuple[str, tuple[tuple[int, float], ...]]]:
    """Yield the rates by step that groups have, with the names of all that have the same."""
    names: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for place, name in enumerate(rates.groups):
        there = (row for row in rates.steps if place < len(row.learning_rates))
        known = ((row.step, row.learning_rates[place]) for row in there)
        names.setdefault(tuple((step, rate) for step, rate in known if rate is not None), []).append(name)
    for curve, alike in names.items():
        yield "\n".join(alike) if len(alike) < 4 else f"{alike[0]} to {alike[-1]}", curve


def _floor(rates: LearningRates) -> float | None:
    """Tell the smallest rate if rates are so far apart that it would lie on the axis."""
    values = [value for row in rates.steps for value in row.learning_rates if value]
    return min(values) if values and max(values) > 100 * min(values) else None
