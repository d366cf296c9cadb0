"""What a plan is, as plain values: for people, for programs, for comparison with a run. Needs no PyTorch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Basis = Literal["flops", "parameters"]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GroupPlan(_Plain):
    """A parameter group that a phase adds."""

    name: str = Field(description="Its name, as in a logger.")
    tensors: int = Field(description="How many tensors it holds.")
    parameters: int = Field(description="How many values they have.")
    learning_rate: float | None = Field(description="Its first; `null` under an optimizer that has none.")
    options: dict[str, Any] = Field(default={}, description="In which it differs from the optimizer's defaults.")


class MemoryPlan(_Plain):
    """Bytes on one device, without activations."""

    weights: int = Field(description="Of all parameters and buffers.")
    gradients: int = Field(description="Of all parameters that are trained.")
    optimizer_state: int | None = Field(description="After the first step; `null` if it cannot be told.")
    total: int = Field(description="Together; without the optimizer's state where that is unknown.")


class PhasePlan(_Plain):
    """A phase."""

    phase: int = Field(description="Its number.")
    thaws: list[str] = Field(description="The parameters that it thaws, as patterns.")
    thawed_tensors: int = Field(description="How many tensors it thaws.")
    thawed_parameters: int = Field(description="How many values it thaws.")
    trainable_parameters: int = Field(description="How many are trained in it, those of earlier phases included.")
    share: float = Field(description="Their share of the model's.")
    new_groups: list[GroupPlan] = Field(description="The parameter groups that it adds.")
    groups: int = Field(description="How many parameter groups there are in it.")
    ends: str = Field(description="When it ends.")
    max_transition_epoch: int = Field(description="As in the schedule; -1 for none.")
    max_transition_step: int = Field(description="As in the schedule; -1 for none.")
    lr_warmup_steps: int = Field(description="As in the schedule; 0 for none.")
    optimizer: str = Field(description="The class in force.")
    new_lr_scheduler: str | None = Field(description="The class that it installs.")
    restart_learning_rates: list[float | None] | None = Field(
        description="At which the groups of earlier phases go on under its LR scheduler; `null` if they keep theirs."
    )
    memory: MemoryPlan = Field(description="What it takes.")
    step_cost: float = Field(description="Relative to a step that trains all parameters.")
    reuse_saves: float = Field(description="The share of a step that frozen-prefix reuse saves once all is recorded.")


class PlanReport(_Plain):
    """What a schedule will do."""

    model: str = Field(description="The class of the model, or the name of its file.")
    parameters: int = Field(description="How many values it has.")
    optimizer: str = Field(description="The class of the user's optimizer.")
    precision: str = Field(description="As the trainer takes it.")
    frozen_parameters: int = Field(description="How many values no phase trains.")
    phases: list[PhasePlan] = Field(description="The phases to execute.")
    costs_from: Basis = Field(description="What step costs were told from.")
    full_memory: MemoryPlan = Field(description="What training all parameters from the start would take.")
    notes: list[str] = Field(default=[], description="What else there is to know, and where costs come from.")

    @property
    def most_memory(self) -> int:
        """The bytes of the phase that takes most."""
        return max(phase.memory.total for phase in self.phases)


class RatesAt(_Plain):
    """An optimizer step."""

    epoch: int = Field(description="Its epoch, from 0.")
    step: int = Field(description="How many steps are made before it.")
    phase: int = Field(description="Its phase.")
    learning_rates: list[float | None] = Field(
        description="Of the groups that there are, in order; `null` under an optimizer that has none."
    )


class LearningRates(_Plain):
    """The learning rates of a session, told without training."""

    model: str = Field(description="The class of the model, or the name of its file.")
    epochs: int = Field(description="How many there are at most.")
    steps_per_epoch: int = Field(description="How many optimizer steps each has.")
    groups: list[str] = Field(description="The names of all groups that the session comes to have.")
    steps: list[RatesAt] = Field(description="The first step of each epoch and of each phase, or all steps.")
    notes: list[str] = Field(default=[], description="What was taken for granted.")
