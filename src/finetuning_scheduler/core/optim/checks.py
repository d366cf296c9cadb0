"""Do these optimizer and LR scheduler classes take these arguments?

Each class is made on stand-in parameters, so that wrong arguments are found before training. Here is what a schedule
says by itself; what depends on the model and its optimizer is in :mod:`.fitting`.
"""

from __future__ import annotations

import collections.abc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ...errors import Problem
from ..schedule.model import ClassInit, LRSchedulerSpec, OptimizerSpec, Phase
from ..schedule.wording import closest, did_you_mean
from .build import SchedulerSettings, import_class, is_imported
from .growth import growth_failure
from .schedulers import SUPPORTED_LR_SCHEDULERS
from .stand_ins import OptimizerFactory, adam, factory_of, step_scheduler, step_stand_in

ONE_GROUP = "{} has one parameter group only, but each phase adds one"

_BASES: Mapping[str, type[Any]] = {"new_optimizer": Optimizer, "new_lr_scheduler": LRScheduler}
_LONGEST_ARGUMENTS = 1_000
_MOST_GROUPS = 256  # of a trial before the model is known
Complaint = tuple[str, str]  # what is wrong, what to do about it


@dataclass
class Checked:
    """What a check of the classes that phases install has found.

    Attributes:
        problems: What is wrong.
        warnings: What is only worth a warning.
        unusable: By phase, the keys whose class cannot be installed.
    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unusable: dict[int, list[str]] = field(default_factory=dict)


def check_phases(
    phases: Mapping[int, Phase],
    *,
    source: str | None = None,
    lines: Mapping[tuple[int, str], int] | None = None,
    device: torch.device | None = None,
    may_import: bool = True,
) -> Checked:
    """Check the re-initialisations of each phase without knowing more of the model than where it is.

    Args:
        phases: Phases by number.
        source: Name of the schedule file, for messages.
        lines: The file's lines of ``new_optimizer`` and ``new_lr_scheduler`` by phase and key.
        device: Where the model is.
        may_import: Import classes; else those that no module loaded so far has are left unchecked and not usable.
    """
    checked = Checked()
    optimizer_factory: OptimizerFactory = adam
    for number, phase in sorted(phases.items()):
        complaints: dict[str, list[Complaint]] = {}
        if not may_import:
            phase = _without_unknown(phase, checked.unusable.setdefault(number, []))
        if (new_optimizer := phase.new_optimizer) is not None:
            complaints["new_optimizer"] = list(_optimizer_complaints(new_optimizer, device))
            optimizer_factory = adam if complaints["new_optimizer"] else factory_of(new_optimizer, device)
        if phase.new_lr_scheduler is not None:
            complaints["new_lr_scheduler"] = list(_scheduler_complaints(phase.new_lr_scheduler, optimizer_factory))
            checked.warnings += _scheduler_notes(phase.new_lr_scheduler, number)
        for key, found in complaints.items():
            checked.problems += located(found, number, source, (lines or {}).get((number, key)))
            if found:
                checked.unusable.setdefault(number, []).append(key)
    return checked


def _without_unknown(phase: Phase, unusable: list[str]) -> Phase:
    """Leave out the classes that would have to be imported."""
    unknown = [key for key, init in _inits(phase).items() if not is_imported(init.class_path)]
    unusable += unknown
    return phase.model_copy(update=dict.fromkeys(unknown))


def _inits(phase: Phase) -> dict[str, ClassInit]:
    """The classes that a phase installs, by its keys."""
    optimizer, scheduler = phase.new_optimizer, phase.new_lr_scheduler
    inits = {} if optimizer is None else {"new_optimizer": optimizer.optimizer_init}
    return inits if scheduler is None else {**inits, "new_lr_scheduler": scheduler.lr_scheduler_init}


def located(
    complaints: Iterable[Complaint], phase: int, source: str | None = None, line: int | None = None
) -> list[Problem]:
    """Make problems of complaints about a phase."""
    return [Problem(message, fix, source, line, phase) for message, fix in complaints]


def _class_complaint(init: ClassInit, key: str) -> Complaint | None:
    base = _BASES[key]
    try:
        found = import_class(init.class_path)
    except ImportError as error:
        return f"expected `{key}` to name a class, got {init.class_path!r}, which cannot be imported ({error})", (
            "Give the full import path of an installed class."
        )
    if not (isinstance(found, type) and issubclass(found, base)) or found is Optimizer:
        return f"expected `{key}` to name a subclass of {base.__module__}.{base.__name__}, got {init.class_path!r}", (
            "Name a class of that kind."
        )
    return None


def _optimizer_complaints(spec: OptimizerSpec, device: torch.device | None) -> Iterator[Complaint]:
    init = spec.optimizer_init
    if (complaint := _class_complaint(init, "new_optimizer")) is not None:
        yield complaint
        return
    kind = import_class(init.class_path)
    if (refusal := refused_optimizer(kind)) is not None:
        yield refusal, "Choose another optimizer."
        return
    wrong = list(_text_for_numbers(kind, init))
    yield from wrong or _trial_complaint(init, lambda: _step_often(factory_of(spec, device)(2)))


def _step_often(optimizer: Optimizer) -> None:
    for _ in range(3):
        step_stand_in(optimizer)


def _text_for_numbers(kind: type[Any], init: ClassInit) -> Iterator[Complaint]:
    """Find text where a class says that it takes numbers or truth values, also in a list of these.

    The class might find out only after thousands of steps, or never: a milestone in quotes is none, `no` is true.
    """
    try:
        # PyTorch imports these names for type checkers only
        hints = get_type_hints(kind.__init__, localns=vars(collections.abc))
    except Exception:  # noqa: BLE001  # annotations that cannot be resolved say nothing
        return
    for name, value in init.init_args.items():
        takes = set(_kinds_in(hints.get(name)))
        text = next((each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)), None)
        if text is None or not takes & {int, float, bool} or any(_takes_text(each) for each in takes):
            continue
        wanted, fix = ("a number", "Write a number") if takes & {int, float} else ("true or false", "Write one of them")
        yield f"expected `{name}` of {init.class_path} to be {wanted}, got {text!r}", f"{fix} without quotes."


def _kinds_in(hint: Any) -> Iterator[Any]:
    """Give an annotation and those it is made of: of a list, what it holds; of a function, nothing more."""
    yield hint
    if get_origin(hint) not in (Literal, Callable):
        for inner in get_args(hint):
            yield from _kinds_in(inner)


def _takes_text(kind: object) -> bool:
    return kind in (str, object, Any) or get_origin(kind) is Literal


def _trial_complaint(init: ClassInit, trial: Callable[[], object]) -> Iterator[Complaint]:
    """Say why a class cannot be made with its arguments, or cannot step."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial()
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a foreign class raises is what is wrong
        reason = str(error) or type(error).__name__
        yield f"{init.class_path} does not take `init_args` {_arguments(init)}: {reason}", "Correct its `init_args`."


def _arguments(init: ClassInit) -> str:
    text = repr({key: value for key, value in init.init_args.items() if key != "optimizer"})
    return text if len(text) <= _LONGEST_ARGUMENTS else f"{text[:_LONGEST_ARGUMENTS]}...}}"


def refused_optimizer(kind: type[Optimizer]) -> str | None:
    """Say why an optimizer class cannot be installed during a session, or return ``None``."""
    if issubclass(kind, LBFGS):
        return ONE_GROUP.format(kind.__name__)
    if kind.__name__ == "ZeroRedundancyOptimizer":
        return "ZeroRedundancyOptimizer spreads its state over ranks when it is made and cannot take over groups"
    return None


def _scheduler_complaints(spec: LRSchedulerSpec, optimizer_factory: OptimizerFactory) -> Iterator[Complaint]:
    init = spec.lr_scheduler_init
    if (complaint := _class_complaint(init, "new_lr_scheduler")) is not None:
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
    groups = _listed_groups(init.init_args)
    yield from construction_complaints(spec, lambda: optimizer_factory(groups))


def _listed_groups(arguments: Mapping[str, Any]) -> int:
    """Guess the number of groups from arguments that have one value for each."""
    lists = [value for name, value in arguments.items() if isinstance(value, list) and name != "milestones"]
    return min(max(map(len, lists), default=1), _MOST_GROUPS) or 1


def construction_complaints(spec: LRSchedulerSpec, make: Callable[[], Optimizer]) -> Iterator[Complaint]:
    """Say why an LR scheduler cannot be made over a stand-in, cannot step, or cannot follow new groups."""
    init = spec.lr_scheduler_init
    kind = import_class(init.class_path)
    arguments = {key: value for key, value in init.init_args.items() if key != "optimizer"}
    made: list[LRScheduler] = []

    def trial() -> None:
        made.append(kind(make(), **arguments))
        step_scheduler(kind(make(), **arguments))

    wrong = [*_text_for_numbers(kind, init)] or [*_trial_complaint(init, trial)]
    yield from wrong
    if not wrong and (failure := growth_failure(made[0])) is not None:
        yield (
            f"{init.class_path} cannot follow a new parameter group ({failure})",
            "Use one of PyTorch's LR schedulers.",
        )


def _scheduler_notes(spec: LRSchedulerSpec, phase: int) -> Iterator[str]:
    if "optimizer" in spec.lr_scheduler_init.init_args:
        yield f"phase {phase}: `optimizer` among the LR scheduler's `init_args` is dropped; it gets the one in force."
    known = [each.name for each in fields(SchedulerSettings)]
    for key in spec.pl_lrs_cfg:
        if key not in known:
            hint = did_you_mean(closest(key, known), otherwise="")
            yield f"phase {phase}: unknown key {key!r} in `pl_lrs_cfg` is ignored{hint and f'. {hint}'}"


def import_problems(phases: Iterable[Phase]) -> list[Problem]:
    """Find classes that this process cannot import, though another one has checked them."""
    problems: list[Problem] = []
    for number, phase in enumerate(phases):
        for key, init in _inits(phase).items():
            if (complaint := _class_complaint(init, key)) is not None:
                problems += located([complaint], number)
    return problems
