"""An epoch without end: a phase that could only end between epochs is told of at the start, and when it should have."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from .toy_programs import EVERYTHING, PATIENT, EndlessBatches, Net, Program, phase_of, program, scheduler, scripted

if TYPE_CHECKING:
    from pathlib import Path

    import lightning.pytorch as pl


class ByValidation(Net):
    """Its loss is scripted validation by validation; 1 in the first, then worse."""

    def __init__(self) -> None:
        super().__init__()
        self.validations = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", scripted((1.0, 2.0), self.validations))

    def on_validation_epoch_end(self) -> None:
        self.validations += 1


class ShortStream(EndlessBatches):
    """Ends after four batches."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        yield from self.given


class WithoutLength(ByValidation):
    """Its epochs of four batches end, but nothing tells so."""

    def train_dataloader(self) -> Any:
        return ShortStream(self.seed)


class Endless(ByValidation):
    """As a stream is."""

    def train_dataloader(self) -> Any:
        return EndlessBatches(self.seed)


@dataclass(frozen=True)
class Line:
    level: int
    text: str
    step: int

    @property
    def phases(self) -> set[int]:
        """The phases a line names: "Phase 0", "Phases [0, 1]", "phases 0 and 1"."""
        named = re.findall(r"[Pp]hases? \[?(\d+(?:(?:, | and )\d+)*)", self.text)
        return {int(number) for part in named for number in re.findall(r"\d+", part)}


class Listens(logging.Handler):
    """Writes down what the package says, and at which step."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__()
        self.trainer = trainer
        self.lines: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(Line(record.levelno, record.getMessage(), self.trainer.global_step))

    def on_endlessness(self) -> list[Line]:
        """Warnings that tell how to let a phase end inside an epoch."""
        warnings = [line for line in self.lines if line.level == logging.WARNING]
        return [line for line in warnings if "intra_epoch_transitions" in line.text]


@contextmanager
def listening(trainer: pl.Trainer) -> Iterator[Listens]:
    logger, listens = logging.getLogger("finetuning_scheduler"), Listens(trainer)
    logger.addHandler(listens)
    try:
        yield listens
    finally:
        logger.removeHandler(listens)


@dataclass
class Case:
    schedule: Mapping[int, Any] = field(default_factory=lambda: PATIENT)
    scheduler: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], ByValidation] = Endless
    patience: int = 2

    def program(self, root: Path) -> Program:
        """Validates after each fourth step and ends after 24."""
        defaults = {"max_epochs": -1, "max_steps": 24, "val_check_interval": 4}
        stop = EarlyStopping("val_loss", patience=self.patience)
        callbacks = [scheduler(self.schedule, **self.scheduler), stop]
        return program(root, callbacks, self.model(), **(defaults | self.trainer))


def with_limits(**limits: Any) -> dict[int, Any]:
    """The three phases, with a limit in some: ``phase_0={...}``."""
    return {index: phase | limits.get(f"phase_{index}", {}) for index, phase in PATIENT.items()}


CANNOT_END: dict[str, tuple[Case, set[int]]] = {
    "patience-alone": (Case(), {0, 1}),
    "validations-counted-across-epochs": (Case(trainer={"check_val_every_n_epoch": None}), {0, 1}),
    "epoch-limits": (
        Case(with_limits(phase_0={"max_transition_epoch": 1}, phase_1={"max_transition_epoch": 2})),
        {0, 1},
    ),
    "a-step-limit-in-phase-0": (Case(with_limits(phase_0={"max_transition_step": 40})), {1}),
    "a-step-limit-in-phase-1": (Case(with_limits(phase_1={"max_transition_step": 40})), {0}),
    "max-depth": (Case(scheduler={"max_depth": 1}), {0}),
    "patience-does-not-count": (
        Case(
            with_limits(**{f"phase_{index}": {"max_transition_epoch": index + 1} for index in range(3)}),
            scheduler={"epoch_transitions_only": True, "intra_epoch_transitions": True},
        ),
        {0, 1},
    ),
}


@pytest.mark.parametrize(("case", "phases"), CANNOT_END.values(), ids=CANNOT_END)
def test_phases_that_could_only_end_between_epochs_are_named_at_the_start(
    case: Case, phases: set[int], tmp_path: Path
) -> None:
    case.patience = 1000
    run = case.program(tmp_path)
    with listening(run.trainer) as listens:
        run.fit()
    (warning,) = listens.on_endlessness()
    assert warning.step == 0
    assert warning.phases == phases
    assert run.trainer.global_step == 24


CAN_END: dict[str, Case] = {
    "inside-an-epoch": Case(scheduler={"intra_epoch_transitions": True}),
    "by-step-limits": Case(
        with_limits(phase_0={"max_transition_step": 8}, phase_1={"max_transition_step": 16}), patience=1000
    ),
    "finite-data": Case(model=ByValidation),
    "finite-data-validated-twice-an-epoch": Case(trainer={"val_check_interval": 0.5}, model=ByValidation),
    "finite-data-validated-across-epochs": Case(
        trainer={"val_check_interval": 6, "check_val_every_n_epoch": None}, model=ByValidation
    ),
    "limited-batches": Case(trainer={"limit_train_batches": 8}),
    "one-phase": Case(EVERYTHING),
    "max-depth-0": Case(scheduler={"max_depth": 0}),
}


@pytest.mark.parametrize("case", CAN_END.values(), ids=CAN_END)
def test_no_warning_where_each_phase_can_end(case: Case, tmp_path: Path) -> None:
    run = case.program(tmp_path)
    with listening(run.trainer) as listens:
        run.fit()
    assert listens.on_endlessness() == []
    assert [line for line in listens.lines if "saved as" in line.text], "nothing was heard at all"


ENDLESS_TRAINERS: dict[str, dict[str, Any]] = {
    "in-the-epoch": {},
    "counted-across-epochs": {"check_val_every_n_epoch": None},
    "accumulating": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("options", ENDLESS_TRAINERS.values(), ids=ENDLESS_TRAINERS)
def test_patience_that_runs_out_unheard_is_told_of_once_at_that_moment(options: dict[str, Any], tmp_path: Path) -> None:
    """The first validation is the best; after the third, patience of two has run out, in phase 0 for good."""
    run = Case(trainer=options).program(tmp_path)
    with listening(run.trainer) as listens:
        run.fit()
    start, unheard = listens.on_endlessness()
    assert start.step == 0
    assert unheard.step == 3 * 4 // options.get("accumulate_grad_batches", 1)
    assert unheard.phases >= {0}
    assert phase_of(run.trainer) == 0
    assert run.trainer.global_step == 24


def test_following_the_warning_ends_the_phase_at_that_moment(tmp_path: Path) -> None:
    run = Case(scheduler={"intra_epoch_transitions": True}).program(tmp_path)
    with listening(run.trainer) as listens:
        run.fit()
    moved = [line for line in listens.lines if "0 -> 1" in line.text]
    assert [line.step for line in moved] == [12]
    assert phase_of(run.trainer) == 2


def test_patience_that_the_next_epoch_hears_is_no_warning(tmp_path: Path) -> None:
    """Of two validations an epoch the last in epoch 1 is the one: phase 1 begins with epoch 2."""
    run = Case(trainer={"val_check_interval": 0.5, "max_steps": 12}, model=ByValidation).program(tmp_path)
    with listening(run.trainer) as listens:
        run.fit()
    assert run.phases == [0, 0, 1]
    assert [line for line in listens.lines if line.level >= logging.WARNING] == []


def test_once_an_epoch_has_ended_patience_is_known_to_be_heard(tmp_path: Path) -> None:
    """It runs out in the middle of epoch 1."""
    run = Case(trainer={"val_check_interval": 2}, model=WithoutLength).program(tmp_path)
    with listening(run.trainer) as listens:
        run.fit()
    (start,) = listens.on_endlessness()
    assert start.step == 0
    assert run.phases == [0, 0, 1, 2]
