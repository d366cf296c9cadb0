"""What ``--json`` prints: one model a command, from which the JSON Schemas that are shipped are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import Problem
from ..report.shapes import LearningRates, PlanReport

Kind = Literal["error", "warning", "notice"]


class Shape(BaseModel):
    """Immutable, with all its keys known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(Shape):
    """Something that was found, and where."""

    kind: Kind = Field(default="error", description="How much it matters.")
    message: str = Field(description="What is wrong: what was expected, and what there is.")
    fix: str | None = Field(default=None, description="What to do about it.")
    file: str | None = Field(default=None, description="The file, as it was given.")
    line: int | None = Field(default=None, description="The line, counted from 1.")
    column: int | None = Field(default=None, description="The column, counted from 1.")
    phase: int | None = Field(default=None, description="The phase.")
    selector: str | None = Field(default=None, description="The selector among the phase's `params`.")

    @classmethod
    def of(cls, problem: Problem, kind: Kind = "error") -> Finding:
        """Say a problem."""
        return cls(
            kind=kind,
            message=problem.message,
            fix=problem.fix,
            file=problem.source,
            line=problem.line,
            column=problem.column,
            phase=problem.phase,
            selector=problem.selector,
        )


class Failure(Shape):
    """Of any command: there is no answer; the exit status is 2."""

    problems: list[Finding] = Field(description="Why there is none.")


class ModelSummary(Shape):
    """A model as far as it is known without its weights."""

    name: str = Field(description="The name of its class, or of its file.")
    source: str = Field(description="MODEL, as it was given.")
    tensors: int = Field(description="How many parameters it has, tied ones counted once.")
    parameters: int = Field(description="How many values these have.")
    notes: list[str] = Field(description="What is guessed about it.")


class CheckAnswer(Shape):
    """Of `fts check`: exit status 0 if `ok`, else 1."""

    ok: bool = Field(description="Whether there is no error among the findings.")
    schedule: str = Field(description="SCHEDULE, as it was given.")
    model: ModelSummary = Field(description="The model.")
    phases: int | None = Field(description="How many phases there are; null if there are errors.")
    thawed_tensors: int | None = Field(description="How many parameters some phase thaws; null if there are errors.")
    thawed_parameters: int | None = Field(description="How many values these have; null if there are errors.")
    findings: list[Finding] = Field(description="Everything that was found, errors first.")


class Tensor(Shape):
    """A parameter."""

    name: str = Field(description="Its full name.")
    shape: list[int] = Field(description="Its shape.")
    dtype: str = Field(description="PyTorch's name of its type, such as `float32`.")
    parameters: int = Field(description="How many values it has.")
    selected: bool = Field(description="Whether the pattern selects it; true if there is none.")
    aliases: list[str] = Field(description="Its other names, if it is tied.")


class ParamsAnswer(Shape):
    """Of `fts params`: exit status 0, or 1 if the pattern selects nothing."""

    model: ModelSummary = Field(description="The model.")
    pattern: str | None = Field(description="PATTERN, as it was given.")
    selected_tensors: int = Field(description="How many parameters the pattern selects.")
    selected_parameters: int = Field(description="How many values these have.")
    tensors: list[Tensor] = Field(description="All parameters.")
    buffers: list[str] = Field(description="Names of the buffers.")
    findings: list[Finding] = Field(description="What is to be said about the pattern.")


class Setting(Shape):
    """A key of a phase that the two schedules do not agree on."""

    phase: int = Field(description="The phase.")
    key: str = Field(description="The key, such as `lr`; `phase` if only one schedule has it.")
    a: Any = Field(description="Its value in A; null if it has none.")
    b: Any = Field(description="Its value in B; null if it has none.")


class Move(Shape):
    """Parameters that the two schedules thaw in different phases."""

    a: int | None = Field(description="The phase in A; null if they stay frozen.")
    b: int | None = Field(description="The phase in B; null if they stay frozen.")
    selectors: list[str] = Field(description="Full names with MODEL, else the selectors that differ.")
    parameters: int | None = Field(description="How many values these have; null without MODEL.")


class DiffAnswer(Shape):
    """Of `fts diff`: exit status 0 if `same`, else 1."""

    same: bool = Field(description="Whether both do the same.")
    a: str = Field(description="A, as it was given.")
    b: str = Field(description="B, as it was given.")
    model: ModelSummary | None = Field(description="The model, if one was given.")
    moves: list[Move] = Field(description="What is thawed at another time.")
    settings: list[Setting] = Field(description="What else differs, by phase.")


class NewPhase(Shape):
    """A phase of a schedule that was made."""

    selectors: list[str] = Field(description="Its `params`.")
    tensors: int = Field(description="How many parameters it thaws.")
    parameters: int = Field(description="How many values these have.")


class NewAnswer(Shape):
    """Of `fts new`: exit status 0."""

    model: ModelSummary = Field(description="The model.")
    heuristic: str | None = Field(description="What it was made by; null with --phase.")
    file: str | None = Field(description="The file that was written, if any.")
    yaml: str = Field(description="Its text.")
    phases: list[NewPhase] = Field(description="Its phases, in order.")


class MergeAnswer(Shape):
    """Of `fts merge`: exit status 0."""

    checkpoint: str = Field(description="CKPT, as it was given.")
    file: str = Field(description="The whole file that was written.")
    bytes_before: int = Field(description="The size of CKPT.")
    bytes_after: int = Field(description="The size of the whole file.")


SHAPES: dict[str, type[BaseModel]] = {
    "check": CheckAnswer,
    "diff": DiffAnswer,
    "failure": Failure,
    "lr": LearningRates,
    "merge": MergeAnswer,
    "new": NewAnswer,
    "params": ParamsAnswer,
    "plan": PlanReport,
}
SCHEMAS = Path(__file__).parent / "schemas"


def schema_text(command: str) -> str:
    """Return what stands in a command's file in ``schemas/``."""
    return json.dumps(schema_of(SHAPES[command]), indent=2) + "\n"


def schema_of(shape: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of what a command prints."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **shape.model_json_schema(mode="serialization")}
