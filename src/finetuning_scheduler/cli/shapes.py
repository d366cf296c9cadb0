"""What ``--json`` prints: one model a command, from which the JSON Schemas that are shipped are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import Problem


class Shape(BaseModel):
    """Immutable, with all its keys known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(Shape):
    """Something that was found, and where."""

    kind: Literal["error", "warning", "notice"] = Field(default="error", description="How much it matters.")
    message: str = Field(description="What is wrong: what was expected, and what there is.")
    fix: str | None = Field(default=None, description="What to do about it.")
    file: str | None = Field(default=None, description="The file, as it was given.")
    line: int | None = Field(default=None, description="The line, counted from 1.")
    column: int | None = Field(default=None, description="The column, counted from 1.")
    phase: int | None = Field(default=None, description="The phase.")
    selector: str | None = Field(default=None, description="The selector among the phase's `params`.")

    @classmethod
    def of(cls, problem: Problem, kind: Literal["error", "warning", "notice"] = "error") -> Finding:
        """Say a problem."""
        return cls(
            kind=kind,
            message=problem.message,
            fix=problem.fix,
            file=problem.source,
            line=None if problem.line is None else int(problem.line),
            column=getattr(problem.line, "column", None),
            phase=problem.phase,
            selector=problem.selector,
        )


class Failure(Shape):
    """There is no answer; the exit status is 2."""

    problems: list[Finding] = Field(description="Why there is none.")


SHAPES: dict[str, type[Shape]] = {"failure": Failure}
SCHEMAS = Path(__file__).parent / "schemas"


def schema_of(shape: type[Shape]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of what a command prints."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **shape.model_json_schema(mode="serialization")}
