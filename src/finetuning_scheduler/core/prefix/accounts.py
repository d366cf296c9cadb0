"""What reuse has brought, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefixAccount:
    """What reuse has done in one phase.

    Attributes:
        phase: The phase.
        stage: ``"train"`` or ``"validation"``.
        skipped: The modules that are skipped.
        left_out: Frozen modules that could not be skipped as a whole, and why.
        rows: How many rows have entered them.
        hits: For how many of these the outputs were there.
        bytes: What is kept, in memory and in files, of all stages, at the end of the phase or at present.
        seconds_recording: Time spent in watching, keeping and comparing.
        seconds_saved: Time that the skipped calls would have taken, by the plain ones, less that of finding results.
        reason: Why there is no reuse, if there is none or no more.
    """

    phase: int
    stage: str
    skipped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    rows: int = 0
    hits: int = 0
    bytes: int = 0
    seconds_recording: float = 0.0
    seconds_saved: float = 0.0
    reason: str | None = None

    @property
    def hit_rate(self) -> float:
        """Share of rows whose outputs were there."""
        return self.hits / self.rows if self.rows else 0.0
