"""The learning rates of every group over a session that is simulated, as values and as text."""

from __future__ import annotations

from collections.abc import Iterator

from ..core.schedule.wording import listed
from ..core.simulation import Pace, SimulatedStep, Simulation
from .shapes import LearningRates, RatesAt
from .tables import WIDTH, aligned, wrapped

_PLATEAU = "ReduceLROnPlateau"


def learning_rates(simulation: Simulation, pace: Pace, model: str, *, every_step: bool = False) -> LearningRates:
    """Go through a session and note learning rates.

    Args:
        simulation: The session.
        pace: How long it lasts.
        model: What the model is called.
        every_step: Note all steps, and not only the first of each epoch and each phase.
    """
    rows, last = [], (-1, -1)
    for step in simulation.run(pace):
        if every_step or (step.epoch, step.phase) != last:
            rows.append(_row(step))
        last = (step.epoch, step.phase)
    return LearningRates(
        model=model,
        epochs=pace.epochs,
        steps_per_epoch=pace.steps_per_epoch,
        groups=simulation.labels[: len(rows[-1].learning_rates)] if rows else [],
        steps=rows,
        notes=list(_notes(simulation, pace, last[1])),
    )


def _row(step: SimulatedStep) -> RatesAt:
    return RatesAt(epoch=step.epoch, step=step.step, phase=step.phase, learning_rates=list(step.learning_rates))


def _notes(simulation: Simulation, pace: Pace, reached: int) -> Iterator[str]:
    """Say what was taken for granted."""
    phases = simulation.prepared.plan.phases
    endless = [
        str(state.index)
        for state in phases[:-1]
        if state.limits.max_transition_epoch < 0 and state.limits.max_transition_step < 0
    ]
    if endless and pace.epochs_per_phase is not None:
        lasting = _counted(pace.epochs_per_phase, "epoch")
        yield f"Phases without limits ({listed(endless, limit=8)}) end by early stopping: here each after {lasting}."
    if reached < len(phases) - 1:
        yield f"The session ends in phase {reached}: the {len(phases) - 1 - reached} behind it are not reached."
    warming = [str(state.index) for state in phases if state.limits.lr_warmup_steps]
    if warming:
        yield f"Warm-ups begin at 0, those of phases {listed(warming, limit=8)}."
    installed = [state.limits.new_lr_scheduler for state in phases]
    classes = [each.lr_scheduler_init.class_path for each in installed if each is not None]
    if any(_PLATEAU in path for path in (*classes, *simulation.scheduler_names)):
        yield f"{_PLATEAU} waits for a metric, which is taken to improve: it leaves rates alone here."


def rates_table(rates: LearningRates, width: int = WIDTH) -> Iterator[str]:
    """Say learning rates in lines of plain text; groups that do not fit stand in further tables."""
    epochs, steps = _counted(rates.epochs, "epoch"), _counted(rates.steps_per_epoch, "step")
    said = f"{rates.model}: learning rates in {epochs} of {steps}."
    yield from wrapped(said, width)
    for note in rates.notes:
        yield from wrapped(note, width)
    columns = [_column(rates, place) for place in range(len(rates.groups))]
    first = [["epoch", *(str(row.epoch) for row in rates.steps)]]
    first += [["step", *(str(row.step) for row in rates.steps)], ["phase", *(str(row.phase) for row in rates.steps)]]
    taken = sum(max(map(len, column)) + 2 for column in first) - 2
    while columns:
        fitting = _fitting(columns, width - taken)
        yield ""
        yield from aligned(list(zip(*first, *columns[:fitting], strict=True)))
        columns = columns[fitting:]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _column(rates: LearningRates, place: int) -> list[str]:
    said = [rates.groups[place]]
    for row in rates.steps:
        there = place < len(row.learning_rates)
        rate = row.learning_rates[place] if there else None
        said.append("" if not there else "none" if rate is None else f"{rate:.4g}")
    return said


def _fitting(columns: list[list[str]], width: int) -> int:
    """Tell how many columns fit, at least one."""
    taken = 0
    for number, column in enumerate(columns):
        taken += max(map(len, column)) + 2
        if taken > width and number:
            return number
    return len(columns)
