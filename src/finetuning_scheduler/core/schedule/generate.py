"""Default schedules of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import groupby
from typing import Any, Literal, get_args

from torch import nn

from ...errors import OptimizerError, Problem, ScheduleError
from .blocks import blocks_of, parameter_size
from .model import Phase
from .schedule import Schedule
from .validation import with_key_name
from .values import Unreadable, leaves, plain

Heuristic = Literal["pairs", "blocks"]

# arguments of PyTorch's LR schedulers that can be a list with one entry for each parameter group
PER_GROUP_ARGUMENTS = ("min_lr", "lr_lambda", "base_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr")


def generate(model: nn.Module, heuristic: Heuristic = "pairs", *, frozen: Collection[str] = ()) -> Schedule:
    """Make the default schedule of a model.

    Both heuristics walk the parameters from the last to the first, tied ones once under their registered name, and
    leave out those whose dtype has no gradient, and those named in `frozen`.

    - `pairs`: two parameters to a phase; an odd one left makes a phase of its own.
    - `blocks`: one phase for each repeated block, last block first; what comes after the blocks (the head), between
      them, and before them (the embeddings) makes phases of its own. The blocks are those of :func:`.blocks_of`. A
      model with no repeated block gets the schedule of `pairs`.

    Raises:
        ScheduleError: The model has nothing to thaw, or there is no such heuristic.
    """
    names = [
        name
        for name, parameter in model.named_parameters()
        if (parameter.is_floating_point() or parameter.is_complex()) and name not in frozen
    ]
    if not names and frozen:
        message = "expected a model with parameters to thaw, got one of which all are frozen"
        raise ScheduleError(Problem(message, "thaw what is to be trained before, or name it in a schedule"))
    if not names:
        raise ScheduleError(
            Problem(
                "expected a model with floating point or complex parameters, got one without",
                "give the model its layers before the schedule is made",
            )
        )
    if str(heuristic) not in get_args(Heuristic):
        raise ScheduleError(Problem(f"expected the heuristic 'pairs' or 'blocks', got {heuristic!r}"))
    names.reverse()
    groups = _in_blocks(names, model) if heuristic == "blocks" else []
    return Schedule(phases=tuple(Phase(params=tuple(group)) for group in groups or _in_pairs(names)))


def implicit(
    model: nn.Module,
    reinit_optim_cfg: Mapping[str, Any] | None,
    reinit_lr_cfg: Mapping[str, Any] | None,
    *,
    frozen: Collection[str] = (),
) -> dict[int, dict[str, Any]]:
    """Generate a schedule in which every phase after the first installs the given optimizer and LR scheduler.

    Args:
        model: The model to generate the schedule for.
        reinit_optim_cfg: What ``new_optimizer`` of a phase would be.
        reinit_lr_cfg: What ``new_lr_scheduler`` of a phase would be, without lists that depend on the number of groups.
        frozen: Names to leave out.

    Raises:
        OptimizerError: A list depends on the number of groups, which differs from phase to phase, or a value cannot be
            read.
    """
    phases = generate(model, frozen=frozen).to_dict()
    return reinitialised(phases, reinit_optim_cfg, reinit_lr_cfg)


def reinitialised(
    phases: dict[int, dict[str, Any]],
    reinit_optim_cfg: Mapping[str, Any] | None,
    reinit_lr_cfg: Mapping[str, Any] | None,
) -> dict[int, dict[str, Any]]:
    """Let every phase of a generated schedule after the first install the given optimizer and LR scheduler.

    Raises:
        OptimizerError: As :func:`implicit` does.
    """
    reinit_optim_cfg, reinit_lr_cfg = plain(reinit_optim_cfg), plain(reinit_lr_cfg)
    problems = _unreadable({"reinit_optim_cfg": reinit_optim_cfg, "reinit_lr_cfg": reinit_lr_cfg})
    if isinstance(reinit_lr_cfg, Mapping):
        problems += _per_group_lists(reinit_lr_cfg)
    if problems:
        raise OptimizerError(problems)
    for number, phase in phases.items():
        if number > 0 and reinit_optim_cfg is not None:
            phase["new_optimizer"] = reinit_optim_cfg
        if number > 0 and reinit_lr_cfg is not None:
            phase["new_lr_scheduler"] = reinit_lr_cfg
    return phases


def phase_comments(schedule: Schedule, model: nn.Module) -> list[str]:
    """One line for each phase of a schedule in full names: how much it thaws, and its share of the model."""
    sizes = {name: parameter_size(parameter) for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    comments = []
    for phase in schedule.phases:
        size = sum(sizes[name] for name in phase.params)
        tensors = "1 tensor" if len(phase.params) == 1 else f"{len(phase.params):,} tensors"
        comments.append(f"{tensors}, {size:,} parameters ({_percent(size, total)} of the model)")
    return comments


def _percent(part: int, total: int) -> str:
    share = 100 * part / total if total else 0.0
    return "< 0.01 %" if 0 < share < 0.01 else f"{share:.2f} %"


def _in_pairs(names: list[str]) -> list[list[str]]:
    return [names[start : start + 2] for start in range(0, len(names), 2)]


def _in_blocks(names: list[str], model: nn.Module) -> list[list[str]]:
    """Cut the walk over the names wherever it enters or leaves a block; no cut at all if there are no blocks."""
    blocks = blocks_of(model)
    return [list(group) for _, group in groupby(names, key=blocks.get)] if blocks else []


def _unreadable(settings: Mapping[str, Any]) -> list[Problem]:
    found = [(path, leaf) for path, leaf in leaves(settings) if isinstance(leaf, Unreadable)]
    return [Problem(with_key_name(path, leaf.message), leaf.fix) for path, leaf in found]


def _per_group_lists(reinit_lr_cfg: Mapping[str, Any]) -> list[Problem]:
    problems = []
    fix = "Leave it out, or give it in the phases of an explicit schedule."
    if reinit_lr_cfg.get("init_pg_lrs") is not None:
        message = "expected `reinit_lr_cfg` to suit any number of parameter groups, got `init_pg_lrs`"
        problems.append(Problem(message, fix=fix))
    init = reinit_lr_cfg.get("lr_scheduler_init")
    arguments = init.get("init_args") if isinstance(init, Mapping) else None
    for name in PER_GROUP_ARGUMENTS:
        if isinstance(arguments, Mapping) and isinstance(arguments.get(name), (list, tuple)):
            message = f"expected `reinit_lr_cfg` to suit any number of parameter groups, got a list as `{name}`"
            problems.append(Problem(message, fix="Give one value."))
    return problems
