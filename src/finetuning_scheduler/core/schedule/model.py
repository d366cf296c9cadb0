"""The parts of a schedule as immutable values: phases, and the classes that they install. JSON Schema of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .values import plain


def _tuple_from_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Selector = Annotated[str, Field(min_length=1)]
Selectors = Annotated[tuple[Selector, ...], BeforeValidator(_tuple_from_list)]
LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LearningRates = Annotated[
    tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...],
    Field(min_length=1),
    BeforeValidator(_tuple_from_list),
]
Scale = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Model(BaseModel):
    """Immutable; unknown keys and values of another type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ClassInit(Model):
    """A class and the arguments to make an instance with."""

    class_path: str = Field(min_length=1, description="Import path of the class, such as `torch.optim.SGD`.")
    init_args: dict[str, Any] = Field(default={}, description="Keyword arguments of its constructor.")


class OptimizerSpec(Model):
    """The optimizer to install when a phase starts."""

    optimizer_init: ClassInit = Field(description="The optimizer's class and arguments.")


class LRSchedulerSpec(Model):
    """The learning rate scheduler to install when a phase starts."""

    lr_scheduler_init: ClassInit = Field(description="The scheduler's class and arguments.")
    pl_lrs_cfg: dict[str, Any] = Field(
        default={}, description="Keys of Lightning's LRSchedulerConfig, such as `interval` and `frequency`."
    )
    init_pg_lrs: LearningRates | None = Field(
        default=None, description="Learning rates of the existing parameter groups, one for each."
    )
    use_current_optimizer_pg_lrs: bool = Field(
        default=False, description="Start from the groups' current learning rates, not from their `initial_lr`."
    )


class Phase(Model, Mapping[str, Any]):
    """The parameters to thaw, when to go on, and what to train them with."""

    params: Selectors = Field(
        min_length=1,
        description='Parameter names or regular expressions; "*" is every parameter that no phase selects otherwise.',
    )
    max_transition_epoch: int = Field(
        default=-1, ge=-1, description="Epoch at which the next phase begins at the latest; -1: no such limit."
    )
    max_transition_step: int = Field(
        default=-1, ge=-1, description="Optimizer step at which the next phase begins at the latest; -1: no such limit."
    )
    lr: LearningRate | None = Field(
        default=None, description="Learning rate of the parameters this phase thaws; not in phase 0."
    )
    lr_decay: Annotated[LearningRate, Field(le=1)] | None = Field(
        default=None,
        description="Factor on the learning rate for each block further from the output; not in phase 0.",
    )
    lr_decay_min_scale: Scale = Field(default=0.0, description="What `lr_decay` scales the learning rate by at least.")
    lr_warmup_steps: int = Field(
        default=0, ge=0, description="Optimizer steps in which the learning rates of this phase's groups rise from 0."
    )
    new_optimizer: OptimizerSpec | None = Field(
        default=None, description="Optimizer to install when this phase starts; not in phase 0."
    )
    new_lr_scheduler: LRSchedulerSpec | None = Field(
        default=None, description="LR scheduler to install when this phase starts; not in phase 0."
    )

    # It reads like the mapping that stands in a file, as plain values, with the defaults that are not `None`.

    def __getitem__(self, key: str) -> Any:
        """Return a value as it stands in a file: ``phase["params"]`` is a list; ``None`` for a key that is not set."""
        if key not in Phase.model_fields:
            raise KeyError(key)
        value = getattr(self, key)
        return plain(value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value)

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]  # pydantic's yields pairs of names and values
        return (key for key in Phase.model_fields if getattr(self, key) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return any(key == own for own in self)

    def __eq__(self, other: object) -> bool:
        """Compare with a phase, or with a mapping such as one in a file, in which defaults may stand or be left out."""
        if not isinstance(other, Mapping) or isinstance(other, Phase):
            return super().__eq__(other)
        defaults = {key: field.default for key, field in Phase.model_fields.items() if not field.is_required()}
        return {**defaults, **self} == {**defaults, **other}

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key that is set, else the default."""
        return dict(self).get(key, default)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a schedule file, for editors."""
    phase = Phase.model_json_schema(ref_template="#/$defs/{model}")
    definitions = phase.pop("$defs", {})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Fine-tuning schedule",
        "description": "Phases by number, from 0 without gaps.",
        "type": "object",
        "patternProperties": {r"^\d+$": {"$ref": "#/$defs/Phase"}},
        "additionalProperties": False,
        "minProperties": 1,
        "$defs": {**definitions, "Phase": phase},
    }
