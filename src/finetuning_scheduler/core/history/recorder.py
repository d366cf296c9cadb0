"""Keeps the history of a run: told of transitions by its session, and of epochs by the loop that drives it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..drafts import draft_of, publish, remove_leftovers
from ..gradients import GradientWatch
from ..optim.param_groups import learning_rates
from ..session import Report, Session
from ..transitions import Listener, Moment, Transition
from .clock import Activity, Clock
from .document import (
    FORMAT,
    EndRecord,
    EpochRecord,
    GroupRecord,
    JudgementRecord,
    MomentRecord,
    PhaseRecord,
    PrefixRecord,
    RunHistory,
    Seconds,
    TransitionRecord,
)
from .memory import peak_memory

FILE_NAME = "fts_history.json"
# The file is written at ends of epochs if the time since it was written last is this many times what that took.
_PATIENCE = 100


class Recorder(Listener):
    """Keep the history of a run, and write it where told.

    The driver calls :meth:`begin`, :meth:`end_epoch` and :meth:`end`, and says what else than training it does. Nothing
    is done in a step. All ranks may keep a history; one of them writes it.

    Args:
        session: Executes the schedule.
        gradients: What it has judged stands in the history.
        accounts: Returns what frozen-prefix reuse has done, with the fields of a :class:`.PrefixRecord` and the phase.
        clock: Counts the seconds.
        report: Where messages go: ``report(logging level, text)``; the package's logger if not given.
    """

    def __init__(
        self,
        session: Session,
        gradients: GradientWatch,
        *,
        accounts: Callable[[], Iterable[Any]] = tuple,
        clock: Clock | None = None,
        report: Report | None = None,
    ) -> None:
        self._session = session
        self._gradients = gradients
        self._accounts = accounts
        self._clock = clock or Clock()
        self._report = report or logging.getLogger("finetuning_scheduler").log
        self._history = RunHistory()
        self._judged = 0  # how many judgements stand in the history
        self._before: dict[tuple[int, str], PrefixRecord] = {}  # what reuse has done before this process
        self._path: Path | None = None
        self._next_write = 0.0
        self._told_of_failure = False

    @property
    def history(self) -> RunHistory:
        """The history up to now."""
        self._bring_up_to_date()
        return self._history

    @property
    def begun(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self._history.phases)

    def begin(self, moment: Moment, state: Mapping[str, Any] | None = None) -> None:
        """Begin with the present phase, or go on with a history, and start the clock.

        Args:
            moment: Where the loop is.
            state: What :meth:`state_dict` returned. One that cannot be read is left out, with a warning.
        """
        self._history = self._read(state) if state else RunHistory()
        self._before = {(phase.phase, each.stage): each for phase in self._history.phases for each in phase.prefix}
        if self._history.phases:
            self._history.resumed.append(_record(moment))
            self._history.ended = None
        if not self._history.phases or self._history.phases[-1].phase != self._session.phase:
            self._history.phases.append(self._phase_record(_record(moment)))
        self._clock.stop()
        self._clock.lap()
        self._clock.begin(Activity.TRAINING)

    def during(self, activity: Activity | str) -> AbstractContextManager[None]:
        """Count what a block takes as ``"validation"``, ``"saving"`` or ``"restoring"``; the rest is training."""
        return self._clock.during(Activity(activity))

    def begin_validation(self) -> None:
        """Count what comes as validation, until :meth:`end_validation`."""
        self._clock.begin(Activity.VALIDATION)

    def end_validation(self) -> None:
        """Count what comes as training again."""
        self._clock.end(Activity.VALIDATION)

    def on_transition(self, transition: Transition) -> None:
        """Record a transition."""
        if not self.begun:
            return
        self._bring_up_to_date()
        moment = _record(Moment(transition.epoch, transition.step))
        left, entered, reason = transition.left, transition.entered, transition.reason.value
        self._end_phase(transition.step)
        self._history.transitions.append(TransitionRecord(left=left, entered=entered, reason=reason, moment=moment))
        self._history.phases.append(self._phase_record(moment, transition.new_groups))

    def end_epoch(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Record an epoch that has ended, before the transition that it may bring.

        Args:
            epoch: The epoch that has ended.
            step: Optimizer steps taken so far.
            metrics: What is known of the model.
        """
        if not self.begun:
            return
        self._bring_up_to_date()
        rates = [(rate, len(list(same))) for rate, same in groupby(learning_rates(self._session.optimizer))]
        self._end_phase(step)
        self._history.epochs.append(
            EpochRecord(
                epoch=epoch,
                phase=self._session.phase,
                step=step,
                at=_now(),
                metrics=dict(metrics),
                learning_rates=rates,
                seconds=self._history.running,
            )
        )
        self._history.running = Seconds()
        if self._history.ended is not None or time.perf_counter() >= self._next_write:
            self.write()

    def add_metrics(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Complete the metrics of an epoch by those that came after its end; do nothing if it is not recorded."""
        if self._history.epochs and self._history.epochs[-1].epoch == epoch:
            self._history.epochs[-1].metrics.update(metrics)

    def has_recorded(self, epoch: int) -> bool:
        """Whether an epoch stands in the history, or lies before its beginning."""
        if self._history.epochs:
            return self._history.epochs[-1].epoch >= epoch
        return not self.begun or self._history.phases[0].began.epoch > epoch

    def end(self, reason: str, epoch: int, step: int) -> None:
        """Record why the run has ended, once, and stop the clock."""
        if not self.begun or self._history.ended is not None:
            return
        self._bring_up_to_date()
        self._end_phase(step)
        self._clock.stop()
        self._history.ended = EndRecord(reason=reason, moment=_record(Moment(epoch, step)))
        self.write()

    def write_to(self, directory: str | PathLike[str]) -> None:
        """Write ``fts_history.json`` in a directory: now, at ends of epochs, and at the end; one of several ranks does.

        It is written whole or not at all, and at most a hundredth of the time is spent on it. Where it cannot be
        written there is one warning.
        """
        self._path = Path(directory) / FILE_NAME
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._path.parent)
        except OSError as error:
            self._tell_of_failure(error)
        self.write()

    def write(self) -> None:
        """Write the file now, if it is to be written."""
        if self._path is None:
            return
        began = time.perf_counter()
        try:
            with draft_of(self._path) as file:
                file.write(self.history.model_dump_json(indent=1).encode())
                publish(file, self._path)
        except OSError as error:
            self._tell_of_failure(error)
        ended = time.perf_counter()
        self._next_write = ended + _PATIENCE * (ended - began)

    def state_dict(self) -> dict[str, Any]:
        """Return the history up to now in plain Python values; nothing before it has begun."""
        return self.history.model_dump(mode="json") if self.begun else {}

    def _read(self, state: object) -> RunHistory:
        try:
            history = RunHistory.model_validate(state)
            if history.format <= FORMAT:
                return history
            problem = f"it is of format {history.format}, this release reads format {FORMAT}"
        except ValidationError as error:
            problem = str(error.errors(include_url=False)[0]["msg"])
        self._report(logging.WARNING, f"The run history in the checkpoint cannot be read: {problem}. A new one begins.")
        return RunHistory()

    def _phase_record(self, moment: MomentRecord, new_groups: int | None = None) -> PhaseRecord:
        session = self._session
        state = session.plan.phases[session.phase]
        rates, names = learning_rates(session.optimizer), session.group_names
        first = 0 if new_groups is None else len(rates) - new_groups
        added = zip(rates[first:], names[first:], strict=False)
        return PhaseRecord(
            phase=session.phase,
            began=moment,
            trainable=state.trainable_count,
            share=state.trainable_count / max(session.plan.model_parameter_count, 1),
            groups=[GroupRecord(learning_rate=rate, tensors=len(held)) for rate, held in added],
        )

    def _end_phase(self, step: int) -> None:
        phase = self._history.phases[-1]
        phase.steps = step - phase.began.step

    def _bring_up_to_date(self) -> None:
        """Bring in what the clock, the process, the watch of gradients and prefix reuse know by now."""
        if not self.begun or self._history.ended is not None:
            return
        phase = self._history.phases[-1]
        spent = Seconds(**{activity.value: seconds for activity, seconds in self._clock.lap().items()})
        phase.seconds += spent
        self._history.running += spent
        if (peak := peak_memory(self._session.parameters.values())) is not None:
            phase.peak_memory_bytes = max(peak, phase.peak_memory_bytes or 0)
        found, self._judged = self._gradients.judgements[self._judged :], len(self._gradients.judgements)
        by_number = {each.phase: each for each in self._history.phases[-len(found) - 1 :]} if found else {}
        for judgement in found:
            if judgement.phase in by_number:
                by_number[judgement.phase].judgement = JudgementRecord.model_validate(judgement)
        self._take_accounts()

    def _take_accounts(self) -> None:
        """Bring in the accounts of prefix reuse; a phase in which the run was resumed has some from before."""
        found = dict(self._before)
        for account in self._accounts():
            key, record = (account.phase, account.stage), _prefix_record(account)
            found[key] = found[key] + record if key in found else record
        by_phase: dict[int, list[PrefixRecord]] = {}
        for (number, _), record in found.items():
            by_phase.setdefault(number, []).append(record)
        for phase in self._history.phases if by_phase else ():
            phase.prefix = by_phase.get(phase.phase, [])

    def _tell_of_failure(self, error: OSError) -> None:
        if not self._told_of_failure:
            self._told_of_failure = True
            reason = f"{type(error).__name__}: {error}"
            message = f"The run history cannot be written as {self._path} ({reason}). Training goes on without it."
            self._report(logging.WARNING, message)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _record(moment: Moment) -> MomentRecord:
    return MomentRecord(epoch=moment.epoch, step=moment.step, at=_now())


def _prefix_record(account: Any) -> PrefixRecord:
    return PrefixRecord(**{name: getattr(account, name) for name in PrefixRecord.model_fields})
