"""What the callbacks put into checkpoints: read as models, so that a damaged one is told by file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .._lightning import EarlyStoppingReason
from ..core.transitions import Reason

RESTORE = "restore"  # what is owed when the best checkpoint was being restored for its own sake


class SavedFile(BaseModel):
    """A checkpoint that is kept since it is one of the best."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    phase: int = Field(ge=0, description="The phase in which it was written.")
    fingerprint: str | None = Field(description="Hash of its content; `None` if that cannot be read.")


class _State(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, arbitrary_types_allowed=True)


def _is_scalar(score: Any) -> Any:
    if isinstance(score, torch.Tensor) and score.numel() != 1:
        raise ValueError(f"expected one number, got a tensor of shape {tuple(score.shape)}")
    return score


Score = Annotated[torch.Tensor | float, AfterValidator(_is_scalar)]


class SavedCheckpointing(_State):
    """The state of an ``FTSCheckpoint``, or of the ``ModelCheckpoint`` that it stands for."""

    dirpath: str | Path | None
    best_model_path: str
    best_model_score: Score | None
    best_k_models: dict[str, Score] = {}
    kth_best_model_path: str = ""
    kth_value: Score = 0.0
    last_model_path: str = ""
    current_ckpt_depth: int = Field(default=0, ge=0)
    best_ckpt_depth: int = Field(default=0, ge=0)
    score: Score | None = None
    current_score: Score | None = None
    files: dict[str, SavedFile] = {}
    saved_step: int | None = Field(default=None, description="The optimizer step of the last save, if it is known.")


def _is_reason(value: int) -> int:
    EarlyStoppingReason(value)
    return value


class SavedStopping(_State):
    """The state of an ``FTSEarlyStopping``, or of the ``EarlyStopping`` that it stands for."""

    wait_count: int = Field(ge=0)
    stopped_epoch: int = Field(ge=0)
    best_score: Score
    patience: int = Field(ge=0)
    stopping_reason: Annotated[int, AfterValidator(_is_reason)] = 0


class SavedMetric(_State):
    """A metric at the moment of saving."""

    value: float | int | bool
    dtype: str

    @property
    def tensor(self) -> torch.Tensor:
        """The metric as it was."""
        return torch.tensor(self.value, dtype=getattr(torch, self.dtype))


def _has_type(metric: SavedMetric | torch.Tensor) -> SavedMetric | torch.Tensor:
    if isinstance(metric, SavedMetric) and not isinstance(getattr(torch, metric.dtype, None), torch.dtype):
        raise ValueError(f"expected the name of a type of tensors, got {metric.dtype!r}")
    return metric


def _is_owed(owed: str) -> str:
    if owed not in (RESTORE, *Reason):
        raise ValueError(f"expected the reason of a transition, got {owed!r}")
    return owed


class SavedScheduling(_State):
    """What the scheduler saves beside its session's state. Earlier files hold the metrics as tensors."""

    phase_exhausted: bool = False
    owed: Annotated[str, AfterValidator(_is_owed)] | None = Field(
        default=None, description="The transition, or restore, that is to be made again."
    )
    epoch_is_over: bool = Field(default=False, description="Whether the epoch's end was already dealt with.")
    validated_step: int = Field(default=-1, description="The optimizer step after which the last validation was made.")
    judged_step: int = Field(default=-1, description="The optimizer step after which early stopping last judged.")
    judges_validation: bool = Field(default=False, description="Whether early stopping judges after a validation.")
    metrics: dict[str, Annotated[SavedMetric | torch.Tensor, AfterValidator(_has_type)]] = {}
