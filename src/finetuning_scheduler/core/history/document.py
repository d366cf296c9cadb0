"""The shape of a run history: what ``fts_history.json`` holds."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True, ser_json_inf_nan="strings")


class Seconds(_Record):
    """Seconds by activity, as the host sees them. Each second counts once; other work between epochs is training's."""

    training: float = 0.0
    validation: float = Field(default=0.0, description="Validation inside the fit; no sanity check before it.")
    saving: float = Field(default=0.0, description="Writing checkpoints; of asynchronous writers, what blocks.")
    restoring: float = Field(default=0.0, description="Going back to the best state, which ends a phase.")

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(**{name: getattr(self, name) + getattr(other, name) for name in Seconds.model_fields})


class MomentRecord(_Record):
    """A moment of the run."""

    epoch: int = Field(description="The epoch about to start or, inside one, the one that is running; from 0.")
    step: int = Field(description="Optimizer steps taken so far.")
    at: datetime = Field(description="When, in UTC.")


class GroupRecord(_Record):
    """A parameter group that a phase has added."""

    learning_rate: float | None = Field(description="At the beginning; `null` under an optimizer that has none.")
    tensors: int = Field(description="How many tensors it holds.")


class JudgementRecord(_Record):
    """What became of the parameters in the first steps of a phase, by full name."""

    steps: int = Field(description="How many steps the phase had made.")
    trained: list[str] = Field(description="Parameters, thawed when it began, that a gradient has reached.")
    untrained: list[str] = Field(description="Those that none has reached.")
    moved: list[str] = Field(description="Frozen parameters that the optimizer holds and has changed.")


class PrefixRecord(_Record):
    """What frozen-prefix reuse has done in a stage of a phase."""

    stage: str = Field(description="`train` or `validation`.")
    rows: int = Field(default=0, description="How many rows have entered the skipped modules.")
    hits: int = Field(default=0, description="For how many of these the outputs were there.")
    bytes: int = Field(default=0, description="What was kept at the end.")
    seconds_recording: float = 0.0
    seconds_saved: float = 0.0
    reason: str | None = Field(default=None, description="Why there was no reuse, or no more.")

    def __add__(self, later: PrefixRecord) -> PrefixRecord:
        summed = ("rows", "hits", "seconds_recording", "seconds_saved")
        sums = {name: getattr(self, name) + getattr(later, name) for name in summed}
        kept = later.bytes if later.rows else self.bytes
        return PrefixRecord(stage=self.stage, bytes=kept, reason=later.reason or self.reason, **sums)


class PhaseRecord(_Record):
    """A phase that was entered, up to its end or up to now."""

    phase: int
    began: MomentRecord
    steps: int = Field(default=0, description="Optimizer steps made in it.")
    trainable: int = Field(description="How many values are trainable.")
    share: float = Field(description="Their share of the model's.")
    groups: list[GroupRecord] = Field(description="The parameter groups that it has added.")
    seconds: Seconds = Seconds()
    peak_memory_bytes: int | None = Field(
        default=None, description="The most that this process had needed by the end: on its GPU if it has one."
    )
    judgement: JudgementRecord | None = None
    prefix: list[PrefixRecord] = Field(default=[], description="By stage, if reuse is on.")


class TransitionRecord(_Record):
    """A transition from one phase to another."""

    left: int
    entered: int
    reason: str
    moment: MomentRecord


class EpochRecord(_Record):
    """An epoch that has ended."""

    epoch: int = Field(description="Its number, from 0.")
    phase: int = Field(description="The phase at its end.")
    step: int = Field(description="Optimizer steps taken by its end.")
    at: datetime = Field(description="When it ended, in UTC.")
    metrics: dict[str, float]
    learning_rates: list[tuple[float | None, int]] = Field(
        description="At its end, in the order of the groups: a rate and how many groups in a row have it."
    )
    seconds: Seconds


class EndRecord(_Record):
    """How the run has ended."""

    reason: str = Field(
        description="As of a transition; `trainer` for a limit of the trainer, or the exception's name."
    )
    moment: MomentRecord


class RunHistory(_Record):
    """All that a run has gone through; a resumed run goes on with what its checkpoint knows of it."""

    format: int = Field(default=FORMAT, description="Format of the file.")
    phases: list[PhaseRecord] = []
    transitions: list[TransitionRecord] = []
    epochs: list[EpochRecord] = []
    resumed: list[MomentRecord] = Field(default=[], description="Where later processes or fits have gone on.")
    ended: EndRecord | None = Field(default=None, description="`null` while it runs, and if its process was killed.")
    running: Seconds = Field(default=Seconds(), description="Of the epoch that has not ended.")
