"""Check and build the optimizer and the LR scheduler that a phase installs.

Checks make each class on stand-in parameters, so that wrong arguments are found before training. They come in two
parts: what a schedule says by itself, and what depends on the model and its optimizer.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adadelta, Adam, Muon, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..errors import Problem
from .lr_schedulers import KEYS_IN_GROUPS, SUPPORTED_LR_SCHEDULERS, growth_failure
from .schedule import ClassInit, LRSchedulerSpec, OptimizerSpec, Phase

# In a group: the learning rate of its optimizer, until the scheduler that still reads `initial_lr` is replaced.
_NEXT_INITIAL_LR = "next_initial_lr"
_ONE_GROUP = "{} has one parameter group only, but each phase adds one"

OptimizerFactory = Callable[[int], Optimizer]


@dataclass(frozen=True)
class SchedulerSettings:
    """How often an LR scheduler steps and what it waits for: the keys of ``pl_lrs_cfg``, named as Lightning's."""

    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True

    @classmethod
    def of(cls, spec: LRSchedulerSpec) -> SchedulerSettings:
        """Read the settings of a valid specification; a scheduler that waits for a metric is marked as such."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in spec.pl_lrs_cfg.items() if key in known}
        on_plateau = issubclass(import_class(spec.lr_scheduler_init.class_path), ReduceLROnPlateau)
        return cls(**{**values, "reduce_on_plateau": on_plateau})


# --- building ---------------------------------------------------------------------------------------------------------


def build_optimizer(
    spec: OptimizerSpec, old: Optimizer, overrides: Sequence[Mapping[str, Any]], *, keep_initial_lr: bool = False
) -> Optimizer:
    """Make a phase's optimizer over the groups of the one before, without its state.

    Each group keeps its present learning rate; the new optimizer's own learning rate, if it names one, becomes the
    ``initial_lr``, from which an LR scheduler made in this or a later phase starts.

    Args:
        spec: The class and its arguments.
        old: The optimizer to replace.
        overrides: For each group, the options in which it differs from the other groups, such as ``weight_decay``.
        keep_initial_lr: Leave ``initial_lr`` alone, since a scheduler that stays in force reads it at each step.
    """
    arguments = spec.optimizer_init.init_args
    with_names = "param_names" in old.param_groups[0]
    groups = [
        {"params": list(zip(g["param_names"], g["params"], strict=True)) if with_names else g["params"]}
        for g in old.param_groups
    ]
    new: Optimizer = import_class(spec.optimizer_init.class_path)(groups, **arguments)
    for group, old_group, override in zip(new.param_groups, old.param_groups, overrides, strict=True):
        group.update({key: value for key, value in override.items() if key in new.defaults})
        # The scheduler in force goes on with the new groups.
        group.update({key: old_group[key] for key in KEYS_IN_GROUPS if key in old_group})
        group["lr"] = _as_kind_of(group["lr"], old_group["lr"])
        own = "lr" in arguments and not keep_initial_lr
        initial = arguments["lr"] if own else old_group.get("initial_lr", old_group["lr"])
        group["initial_lr"] = _as_kind_of(group["lr"], initial)
        if keep_initial_lr and "lr" in arguments:
            group[_NEXT_INITIAL_LR] = _as_kind_of(group["lr"], arguments["lr"])
    return new


def build_lr_scheduler(spec: LRSchedulerSpec, optimizer: Optimizer) -> LRScheduler:
    """Make a phase's LR scheduler over the existing groups, which first get the learning rates it starts from.

    These are ``init_pg_lrs``, else the present ones if ``use_current_optimizer_pg_lrs``, else the groups'
    ``initial_lr``, else the present ones.
    """
    for index, group in enumerate(optimizer.param_groups):
        if spec.init_pg_lrs is not None:
            lr = spec.init_pg_lrs[index]
        elif spec.use_current_optimizer_pg_lrs:
            lr = group["lr"]
        else:
            lr = group.get(_NEXT_INITIAL_LR, group.get("initial_lr", group["lr"]))
        group.pop(_NEXT_INITIAL_LR, None)
        group["initial_lr"] = _as_kind_of(group["lr"], lr)
        group["lr"] = _as_kind_of(group["lr"], lr)
    arguments = {key: value for key, value in spec.lr_scheduler_init.init_args.items() if key != "optimizer"}
    scheduler: LRScheduler = import_class(spec.lr_scheduler_init.class_path)(optimizer, **arguments)
    return scheduler


def import_class(class_path: str) -> Any:
    """Import a class by its path.

    Raises:
        ImportError: There is no such module, or nothing of that name in it.
    """
    module_name, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:
        # A module can raise anything when it is imported.
        raise ImportError(f"{type(error).__name__}: {error}" if not str(error) else str(error)) from error


def _as_kind_of(reference: object, lr: Any) -> Any:
    """Hold a learning rate in a tensor of its own if the optimizer does."""
    return torch.full_like(reference, float(lr)) if isinstance(reference, torch.Tensor) else float(lr)


# --- what a schedule says by itself -----------------------------------------------------------------------------------


def check_phases(
    phases: Mapping[int, Phase],
    *,
    source: str | None = None,
    lines: Mapping[tuple[int, str], int] | None = None,
) -> tuple[list[Problem], list[str]]:
    """Check the re-initialisations of each phase without knowing the model.

    Args:
        phases: Phases by number.
        source: Name of the schedule file, for messages.
        lines: The file's lines of ``new_optimizer`` and ``new_lr_scheduler`` by phase and key.

    Returns:
        The problems, and what is only worth a warning.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    optimizer_factory: OptimizerFactory = _adam
    for number, phase in sorted(phases.items()):
        if (new_optimizer := phase.new_optimizer) is not None:
            complaints = list(_optimizer_complaints(new_optimizer))
            problems += _located(complaints, number, source, (lines or {}).get((number, "new_optimizer")))
            optimizer_factory = _adam if complaints else _factory_of(new_optimizer)
        if phase.new_lr_scheduler is not None:
            complaints = list(_scheduler_complaints(phase.new_lr_scheduler, optimizer_factory))
            problems += _located(complaints, number, source, (lines or {}).get((number, "new_lr_scheduler")))
            notes += _scheduler_notes(phase.new_lr_scheduler, number)
    return problems, notes


Complaint = tuple[str, str]  # what is wrong, what to do about it


def _located(
    complaints: Iterable[Complaint], phase: int, source: str | None = None, line: int | None = None
) -> list[Problem]:
    return [Problem(message, fix, source, line, phase) for message, fix in complaints]


def _class_complaint(init: ClassInit, key: str, base: type[Any]) -> Complaint | None:
    try:
        found = import_class(init.class_path)
    except ImportError as error:
        return f"expected `{key}` to name a class, got {init.class_path!r}, which cannot be imported ({error})", (
            "Give the full import path of an installed class."
        )
    if not (isinstance(found, type) and issubclass(found, base)):
        return f"expected `{key}` to name a subclass of {base.__module__}.{base.__name__}, got {init.class_path!r}", (
            "Name a class of that kind."
        )
    return None


def _optimizer_complaints(spec: OptimizerSpec) -> Iterator[Complaint]:
    init = spec.optimizer_init
    if (complaint := _class_complaint(init, "new_optimizer", Optimizer)) is not None:
        yield complaint
        return
    kind = import_class(init.class_path)
    if (refusal := refused_optimizer(kind)) is not None:
        yield refusal, "Choose another optimizer."
        return
    try:
        _factory_of(spec)(1)
    except Exception as error:  # noqa: BLE001  # whatever a foreign constructor raises is what is wrong
        yield f"{init.class_path} does not take `init_args` {init.init_args}: {error}", "Correct its `init_args`."


def refused_optimizer(kind: type[Optimizer]) -> str | None:
    """Say why an optimizer class cannot be installed during a session, or return ``None``."""
    if issubclass(kind, LBFGS):
        return _ONE_GROUP.format(kind.__name__)
    if kind.__name__ == "ZeroRedundancyOptimizer":
        return "ZeroRedundancyOptimizer spreads its state over ranks when it is made and cannot take over groups"
    return None


def _scheduler_complaints(spec: LRSchedulerSpec, optimizer_factory: OptimizerFactory) -> Iterator[Complaint]:
    init = spec.lr_scheduler_init
    if (complaint := _class_complaint(init, "new_lr_scheduler", LRScheduler)) is not None:
        yield complaint
        return
    kind = import_class(init.class_path)
    if not issubclass(kind, SUPPORTED_LR_SCHEDULERS):
        names = ", ".join(each.__name__ for each in SUPPORTED_LR_SCHEDULERS)
        yield f"expected a supported LR scheduler, got {init.class_path!r}", f"Use one of {names} or a subclass."
        return
    interval = spec.pl_lrs_cfg.get("interval", "epoch")
    if interval not in ("step", "epoch"):
        yield f"expected `interval` to be 'step' or 'epoch', got {interval!r}", "Correct `pl_lrs_cfg`."
    frequency = spec.pl_lrs_cfg.get("frequency", 1)
    if not isinstance(frequency, int) or isinstance(frequency, bool) or frequency < 1:
        yield f"expected `frequency` to be an integer above 0, got {frequency!r}", "Correct `pl_lrs_cfg`."
    if issubclass(kind, ReduceLROnPlateau) and not spec.pl_lrs_cfg.get("monitor"):
        yield (
            f"expected {init.class_path} to have a metric to wait for, got no `monitor`",
            ("Name a logged metric as `monitor` in `pl_lrs_cfg`."),
        )
    groups = len(spec.init_pg_lrs) if spec.init_pg_lrs is not None else _listed_groups(init.init_args)
    yield from _construction_complaint(spec, optimizer_factory(groups))


def _listed_groups(arguments: Mapping[str, Any]) -> int:
    """Guess the number of groups from arguments that have one value for each."""
    return max((len(value) for value in arguments.values() if isinstance(value, list)), default=1)


def _construction_complaint(spec: LRSchedulerSpec, optimizer: Optimizer) -> Iterator[Complaint]:
    init = spec.lr_scheduler_init
    arguments = {key: value for key, value in init.init_args.items() if key != "optimizer"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = import_class(init.class_path)(optimizer, **arguments)
    except Exception as error:  # noqa: BLE001  # whatever a foreign constructor raises is what is wrong
        yield f"{init.class_path} does not take `init_args` {arguments}: {error}", "Correct its `init_args`."
        return
    if (failure := growth_failure(scheduler)) is not None:
        yield (
            f"{init.class_path} cannot follow a new parameter group ({failure})",
            "Use one of PyTorch's LR schedulers.",
        )


def _scheduler_notes(spec: LRSchedulerSpec, phase: int) -> Iterator[str]:
    if "optimizer" in spec.lr_scheduler_init.init_args:
        yield f"phase {phase}: `optimizer` among the LR scheduler's `init_args` is dropped; it gets the one in force."
    known = [field.name for field in fields(SchedulerSettings)]
    for key in spec.pl_lrs_cfg:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield f"phase {phase}: unknown key {key!r} in `pl_lrs_cfg` is ignored{hint}"


# --- what depends on the model and its optimizer ----------------------------------------------------------------------


def check_against_model(
    phases: Sequence[Phase],
    group_counts: Sequence[int],
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    sparse: frozenset[str] = frozenset(),
) -> list[Problem]:
    """Check numbers of groups, and optimizers that suit only some parameters.

    Args:
        phases: The phases to execute, with full parameter names.
        group_counts: How many parameter groups exist when each phase is entered, before its own are added.
        optimizer: The optimizer of phase 0.
        parameters: The model's parameters by name.
        sparse: Names of parameters whose gradients are sparse.
    """
    problems: list[Problem] = []
    kind: type[Optimizer] = type(optimizer)
    factory = _factory_like(optimizer)
    held: list[str] = []
    for number, (phase, groups) in enumerate(zip(phases, group_counts, strict=True)):
        held += phase.params
        if phase.new_optimizer is not None:
            kind = import_class(phase.new_optimizer.optimizer_init.class_path)
            factory = _factory_of(phase.new_optimizer)
        if issubclass(kind, (Muon, SparseAdam)):
            concerned = held if phase.new_optimizer is not None else list(phase.params)
            problems += _located(_parameter_complaints(kind, concerned, parameters, sparse), number)
        if number > 0 and kind is type(optimizer) and issubclass(kind, LBFGS):
            problems += _located([(_ONE_GROUP.format(kind.__name__), "Choose another optimizer.")], number)
        if phase.new_lr_scheduler is not None:
            complaints = list(_count_complaints(phase.new_lr_scheduler, groups))
            complaints = complaints or list(_construction_complaint(phase.new_lr_scheduler, factory(groups)))
            problems += _located(complaints, number)
    return problems


def _parameter_complaints(
    kind: type[Optimizer], names: Sequence[str], parameters: Mapping[str, nn.Parameter], sparse: frozenset[str]
) -> Iterator[Complaint]:
    if issubclass(kind, Muon):
        others = [name for name in names if parameters[name].dim() != 2]
        if others:
            yield (
                f"Muon optimizes matrices only, but this phase gives it {_some(others)}",
                ("Thaw these with another optimizer."),
            )
    if issubclass(kind, SparseAdam):
        dense = [name for name in names if name not in sparse]
        if dense:
            yield (
                f"SparseAdam needs sparse gradients, but this phase gives it the dense {_some(dense)}",
                ("Use Adam, or thaw embeddings with sparse=True only."),
            )


def _count_complaints(spec: LRSchedulerSpec, groups: int) -> Iterator[Complaint]:
    if spec.init_pg_lrs is not None and len(spec.init_pg_lrs) != groups:
        yield (
            f"expected `init_pg_lrs` to have {groups} values, one per existing group, got {len(spec.init_pg_lrs)}",
            (f"Give {groups} learning rates."),
        )
    minima = spec.lr_scheduler_init.init_args.get("min_lr")
    if isinstance(minima, list) and len(minima) != groups:
        yield (
            f"expected `min_lr` to be a number or {groups} values, one per existing group, got {len(minima)}",
            (f"Give a number or {groups} values."),
        )


SPARSE_MODULES = (nn.Embedding, nn.EmbeddingBag)  # modules whose parameters can have sparse gradients


def sparse_parameters(model: nn.Module) -> frozenset[str]:
    """Name the parameters whose gradients are sparse: the weights of embeddings made with ``sparse=True``."""
    return frozenset(
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, SPARSE_MODULES) and module.sparse
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


# --- stand-ins --------------------------------------------------------------------------------------------------------


def _stand_in_groups(count: int) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.zeros(2, 2))]} for _ in range(count)]


def _adam(count: int) -> Optimizer:
    return Adam(_stand_in_groups(count), lr=0.1)


def _factory_of(spec: OptimizerSpec) -> OptimizerFactory:
    def make(count: int) -> Optimizer:
        optimizer: Optimizer = import_class(spec.optimizer_init.class_path)(
            _stand_in_groups(count), **spec.optimizer_init.init_args
        )
        return optimizer

    return make


def _factory_like(optimizer: Optimizer) -> OptimizerFactory:
    """Stand in for a user's optimizer, of which a scheduler only asks whether it has momentum or betas."""
    if "betas" in optimizer.defaults:
        return _adam
    kind = SGD if "momentum" in optimizer.defaults else Adadelta
    return lambda count: kind(_stand_in_groups(count), lr=0.1)
