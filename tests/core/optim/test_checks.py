"""Every way in which a phase's optimizer or LR scheduler cannot be used, with the whole message a user reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Muon, Optimizer, SparseAdam
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

from finetuning_scheduler.core import PhaseRunner, resolve
from finetuning_scheduler.core.optim.schedulers import ROWS
from finetuning_scheduler.core.schedule.generate import PER_GROUP_ARGUMENTS
from finetuning_scheduler.core.schedule.yaml_writer import write_schedule
from finetuning_scheduler.errors import OptimizerError, ScheduleError, ScheduleFormatError, SelectorError

SUPPORTED = (
    "StepLR, MultiStepLR, CosineAnnealingWarmRestarts, ReduceLROnPlateau, LambdaLR, ConstantLR, LinearLR, "
    "ExponentialLR, CosineAnnealingLR, MultiplicativeLR, PolynomialLR, OneCycleLR, CyclicLR, SequentialLR, "
    "ChainedScheduler, SWALR"
)
STEP_LR = "torch.optim.lr_scheduler.StepLR"
PLATEAU = "torch.optim.lr_scheduler.ReduceLROnPlateau"
ONE_CYCLE = "torch.optim.lr_scheduler.OneCycleLR"
CYCLIC = "torch.optim.lr_scheduler.CyclicLR"


class Model(nn.Module):
    """Dense layers with biases, and an embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3, sparse=True)
        self.lower = nn.Linear(3, 3)
        self.upper = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)


class PerGroup(LRScheduler):
    """Keeps a list of its own with an entry for each group, which nobody knows of."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.factors = [1.0 for _ in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [lr * factor for lr, factor in zip(self.base_lrs, self.factors, strict=True)]


class PerGroupExponential(ExponentialLR):
    """Of a supported kind, but with a list of its own all the same."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.factors = [1.0 for _ in optimizer.param_groups]
        super().__init__(optimizer, gamma=0.5)

    def get_lr(self) -> list[Any]:
        return [lr * factor for lr, factor in zip(super().get_lr(), self.factors, strict=True)]


class Weighted(ExponentialLR):
    """Takes a list with an entry for each group, and hands it on to new ones."""

    def __init__(self, optimizer: Optimizer, weights: list[float]) -> None:
        if len(weights) != len(optimizer.param_groups):
            raise ValueError(f"expected {len(optimizer.param_groups)} weights")
        super().__init__(optimizer, gamma=min(weights))


class Halving(LRScheduler):
    """Not known either, but keeps nothing for each group."""

    def get_lr(self) -> list[Any]:
        return [group["lr"] * 0.5 for group in self.optimizer.param_groups]


def new_optimizer(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"new_optimizer": {"optimizer_init": {"class_path": class_path, "init_args": init_args}}}


def new_lr_scheduler(class_path: str, init_args: Mapping[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    init = {"class_path": class_path, "init_args": dict(init_args or {})}
    return {"new_lr_scheduler": {"lr_scheduler_init": init, **others}}


def step_lr(**others: Any) -> dict[str, Any]:
    return new_lr_scheduler(STEP_LR, {"step_size": 1}, **others)


def schedule_of(phase_1: Mapping[str, Any], phase_2: Mapping[str, Any] | None = None) -> dict[int, dict[str, Any]]:
    return {
        0: {"params": ["head.weight", "head.bias"]},
        1: {"params": ["upper.weight", "upper.bias"], **phase_1},
        2: {"params": ["lower.weight", "lower.bias"], **(phase_2 or {})},
    }


def runner_of(
    schedule: Any,
    optimizer: type[Optimizer] = SGD,
    schedulers: Sequence[type[LRScheduler]] = (),
    messages: list[str] | None = None,
    **options: Any,
) -> PhaseRunner:
    model = Model()
    made = optimizer(list(model.head.parameters()), lr=0.1)  # type: ignore[call-arg]

    def report(level: int, text: str) -> None:
        if messages is not None and level >= logging.WARNING:
            messages.append(text)

    return PhaseRunner(
        model, made, schedule, lr_schedulers=[kind(made) for kind in schedulers], report=report, **options
    )


# --- what a schedule says by itself: found without the optimizer ------------------------------------------------------

BY_ITSELF = [
    pytest.param(
        new_optimizer("torch.optim.Sgd"),
        "phase 1: expected `new_optimizer` to name a class, got 'torch.optim.Sgd', which cannot be imported "
        "(module 'torch.optim' has no attribute 'Sgd'). Fix: Give the full import path of an installed class.",
        id="optimizer-unknown-name",
    ),
    pytest.param(
        new_optimizer("no_such_package.SGD"),
        "phase 1: expected `new_optimizer` to name a class, got 'no_such_package.SGD', which cannot be imported "
        "(No module named 'no_such_package'). Fix: Give the full import path of an installed class.",
        id="optimizer-unknown-module",
    ),
    pytest.param(
        new_optimizer("SGD"),
        "phase 1: expected `new_optimizer` to name a class, got 'SGD', which cannot be imported "
        "(Empty module name). Fix: Give the full import path of an installed class.",
        id="optimizer-without-module",
    ),
    pytest.param(
        new_optimizer("torch.nn.Linear"),
        "phase 1: expected `new_optimizer` to name a subclass of torch.optim.optimizer.Optimizer, got "
        "'torch.nn.Linear'. Fix: Name a class of that kind.",
        id="not-an-optimizer",
    ),
    pytest.param(
        new_optimizer("torch.optim.lr_scheduler"),
        "phase 1: expected `new_optimizer` to name a subclass of torch.optim.optimizer.Optimizer, got "
        "'torch.optim.lr_scheduler'. Fix: Name a class of that kind.",
        id="not-a-class",
    ),
    pytest.param(
        new_optimizer(STEP_LR, step_size=1),
        "phase 1: expected `new_optimizer` to name a subclass of torch.optim.optimizer.Optimizer, got "
        "'torch.optim.lr_scheduler.StepLR'. Fix: Name a class of that kind.",
        id="scheduler-as-optimizer",
    ),
    pytest.param(
        new_optimizer("torch.optim.SGD", speed=1),
        "phase 1: torch.optim.SGD does not take `init_args` {'speed': 1}: SGD.__init__() got an unexpected keyword "
        "argument 'speed'. Fix: Correct its `init_args`.",
        id="optimizer-unknown-argument",
    ),
    pytest.param(
        new_optimizer("torch.optim.SGD", lr=-1.0),
        "phase 1: torch.optim.SGD does not take `init_args` {'lr': -1.0}: Invalid learning rate: -1.0. "
        "Fix: Correct its `init_args`.",
        id="optimizer-bad-argument",
    ),
    pytest.param(
        new_optimizer("torch.optim.LBFGS"),
        "phase 1: LBFGS has one parameter group only, but each phase adds one. Fix: Choose another optimizer.",
        id="lbfgs",
    ),
    pytest.param(
        new_optimizer("torch.distributed.optim.ZeroRedundancyOptimizer", optimizer_class="SGD"),
        "phase 1: ZeroRedundancyOptimizer spreads its state over ranks when it is made and cannot take over groups. "
        "Fix: Choose another optimizer.",
        id="zero-redundancy",
    ),
    pytest.param(
        new_lr_scheduler("torch.optim.lr_scheduler.StepLr"),
        "phase 1: expected `new_lr_scheduler` to name a class, got 'torch.optim.lr_scheduler.StepLr', which cannot be "
        "imported (module 'torch.optim.lr_scheduler' has no attribute 'StepLr'). "
        "Fix: Give the full import path of an installed class.",
        id="scheduler-unknown-name",
    ),
    pytest.param(
        new_lr_scheduler("torch.optim.SGD"),
        "phase 1: expected `new_lr_scheduler` to name a subclass of torch.optim.lr_scheduler.LRScheduler, got "
        "'torch.optim.SGD'. Fix: Name a class of that kind.",
        id="not-a-scheduler",
    ),
    pytest.param(
        new_lr_scheduler("torch.optim.lr_scheduler.LRScheduler"),
        "phase 1: expected a supported LR scheduler, got 'torch.optim.lr_scheduler.LRScheduler'. "
        f"Fix: Use one of {SUPPORTED} or a subclass.",
        id="scheduler-not-supported",
    ),
    pytest.param(
        new_lr_scheduler(STEP_LR, {"size": 1}),
        "phase 1: torch.optim.lr_scheduler.StepLR does not take `init_args` {'size': 1}: StepLR.__init__() got an "
        "unexpected keyword argument 'size'. Fix: Correct its `init_args`.",
        id="scheduler-unknown-argument",
    ),
    pytest.param(
        new_lr_scheduler(STEP_LR),
        "phase 1: torch.optim.lr_scheduler.StepLR does not take `init_args` {}: StepLR.__init__() missing 1 required "
        "positional argument: 'step_size'. Fix: Correct its `init_args`.",
        id="scheduler-missing-argument",
    ),
    pytest.param(
        new_lr_scheduler("torch.optim.lr_scheduler.LinearLR", {"start_factor": 2.0}),
        "phase 1: torch.optim.lr_scheduler.LinearLR does not take `init_args` {'start_factor': 2.0}: Starting "
        "multiplicative factor expected to be greater than 0 and less or equal to 1. Fix: Correct its `init_args`.",
        id="scheduler-bad-argument",
    ),
    pytest.param(
        {
            **new_optimizer("torch.optim.Adadelta"),
            **new_lr_scheduler("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 1.0, "total_steps": 9}),
        },
        "phase 1: torch.optim.lr_scheduler.OneCycleLR does not take `init_args` {'max_lr': 1.0, 'total_steps': 9}: "
        "optimizer must support momentum or beta1 with `cycle_momentum` option enabled. Fix: Correct its `init_args`.",
        id="scheduler-does-not-suit-the-new-optimizer",
    ),
    pytest.param(
        step_lr(pl_lrs_cfg={"interval": "batch"}),
        "phase 1: expected `interval` to be 'step' or 'epoch', got 'batch'. Fix: Correct `pl_lrs_cfg`.",
        id="interval",
    ),
    pytest.param(
        step_lr(pl_lrs_cfg={"interval": None}),
        "phase 1: expected `interval` to be 'step' or 'epoch', got None. Fix: Correct `pl_lrs_cfg`.",
        id="no-interval",
    ),
    *(
        pytest.param(
            step_lr(pl_lrs_cfg={"frequency": frequency}),
            f"phase 1: expected `frequency` to be an integer above 0, got {frequency!r}. Fix: Correct `pl_lrs_cfg`.",
            id=f"frequency-{frequency}",
        )
        for frequency in (0, -1, 1.5, True, "2")
    ),
    *(
        pytest.param(
            new_lr_scheduler(PLATEAU, pl_lrs_cfg=settings),
            "phase 1: expected torch.optim.lr_scheduler.ReduceLROnPlateau to have a metric to wait for, got no "
            "`monitor`. Fix: Name a logged metric as `monitor` in `pl_lrs_cfg`.",
            id=f"plateau-without-monitor-{settings}",
        )
        for settings in ({}, {"interval": "epoch"}, {"monitor": None}, {"monitor": ""})
    ),
]


# PyTorch's own distributed optimizers use what it has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("phase", "message"), BY_ITSELF)
def test_a_problem_of_the_schedule_by_itself(phase: dict[str, Any], message: str) -> None:
    with pytest.raises(OptimizerError) as by_resolve:
        resolve(schedule_of(phase), Model())
    assert str(by_resolve.value) == message
    with pytest.raises(OptimizerError) as by_runner:
        runner_of(schedule_of(phase))
    assert str(by_runner.value) == message


ADAMW = "torch.optim.AdamW"
# wrong arguments that a constructor takes; without a trial they would end a run long after its start
FOUND_BY_STEPPING = [
    (new_lr_scheduler(STEP_LR, {"step_size": 0}), "integer modulo by zero"),
    (
        new_lr_scheduler(STEP_LR, {"step_size": 1, "gamma": "0.5x"}),
        "expected `gamma` of torch.optim.lr_scheduler.StepLR to be a number, got '0.5x'",
    ),
    (
        new_lr_scheduler("torch.optim.lr_scheduler.CosineAnnealingLR", {"T_max": "4 epochs"}),
        "expected `T_max` of torch.optim.lr_scheduler.CosineAnnealingLR to be a number, got '4 epochs'",
    ),
    (
        new_lr_scheduler("torch.optim.lr_scheduler.CosineAnnealingLR", {"T_max": "4"}),
        "expected `T_max` of torch.optim.lr_scheduler.CosineAnnealingLR to be a number, got '4'",
    ),
    (new_lr_scheduler("torch.optim.lr_scheduler.CosineAnnealingLR", {"T_max": 0}), "modulo by zero"),
    (  # it would never come
        new_lr_scheduler("torch.optim.lr_scheduler.MultiStepLR", {"milestones": [2, "3"]}),
        "expected `milestones` of torch.optim.lr_scheduler.MultiStepLR to be a number, got '3'",
    ),
    (
        new_lr_scheduler("torch.optim.lr_scheduler.CyclicLR", {"base_lr": 0.1, "max_lr": "0.2"}),
        "expected `max_lr` of torch.optim.lr_scheduler.CyclicLR to be a number, got '0.2'",
    ),
    (new_lr_scheduler("torch.optim.lr_scheduler.MultiStepLR", {"milestones": 3}), "not iterable"),
    # what is only used after many steps
    (new_lr_scheduler(STEP_LR, {"step_size": 1_000, "gamma": None}), "unsupported operand"),
    (
        new_lr_scheduler("torch.optim.lr_scheduler.MultiStepLR", {"milestones": [1_000], "gamma": [1]}),
        "unsupported operand",
    ),
    (new_lr_scheduler("torch.optim.lr_scheduler.PolynomialLR", {"power": [1]}), "unsupported operand"),
    (new_lr_scheduler("torch.optim.lr_scheduler.ExponentialLR", {"gamma": [0.5]}), "can't multiply sequence"),
    (
        new_lr_scheduler(PLATEAU, {"patience": "a"}, pl_lrs_cfg={"monitor": "val_loss"}),
        "expected `patience` of torch.optim.lr_scheduler.ReduceLROnPlateau to be a number, got 'a'",
    ),
    (new_lr_scheduler(PLATEAU, {"patience": [1]}, pl_lrs_cfg={"monitor": "val_loss"}), "not supported between"),
    (new_lr_scheduler(PLATEAU, {"cooldown": [1]}, pl_lrs_cfg={"monitor": "val_loss"}), "not supported between"),
    (new_lr_scheduler(PLATEAU, {"eps": [1]}, pl_lrs_cfg={"monitor": "val_loss"}), "not supported between"),
    (new_optimizer(ADAMW, betas=[0.9, 0.99, 0.999]), "too many values to unpack"),
    (new_optimizer(ADAMW, capturable=True), "capturable"),
    (new_optimizer(ADAMW, eps=[1.0e-8]), "not supported between"),
    (
        new_optimizer(ADAMW, weight_decay="none"),
        "expected `weight_decay` of torch.optim.AdamW to be a number, got 'none'",
    ),
    (  # it would be taken for true
        new_optimizer(ADAMW, amsgrad="no"),
        "expected `amsgrad` of torch.optim.AdamW to be true or false, got 'no'",
    ),
    (new_optimizer("torch.optim.Optimizer"), "to name a subclass of torch.optim.optimizer.Optimizer, got"),
    (new_optimizer(f"{__name__}.Abstract"), "NotImplementedError"),
    (new_optimizer(f"{__name__}.Leaving"), "5"),
]


class Abstract(Optimizer):
    """Has no step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})


class Leaving(SGD):
    """Leaves the program when it steps."""

    def step(self, closure: Any = None) -> None:
        raise SystemExit(5)


@pytest.mark.parametrize(("phase", "message"), FOUND_BY_STEPPING, ids=str)
def test_what_only_a_step_shows_is_found_before_training_with_its_line(
    phase: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "schedule.yaml"
    write_schedule(schedule_of(phase), path)
    lines = path.read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.strip().startswith("new_"))
    with pytest.raises(OptimizerError) as error:
        resolve(path, Model())
    [problem] = error.value.problems
    assert message in problem.message
    assert (problem.source, problem.line, problem.phase) == (str(path), line, 1)


class NeedsClosure(SGD):
    """Steps with a closure only, as Lightning always gives one."""

    def step(self, closure: Callable[[], torch.Tensor]) -> None:  # type: ignore[override]
        """Ask for the loss."""
        assert closure().item() >= 0
        super().step()


class TakesNoClosure(SGD):
    """Steps in a loop written by hand."""

    def step(self) -> None:  # type: ignore[override]
        """Make a step."""
        super().step()


class Limited(ExponentialLR):
    """Goes no further than it was made for."""

    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        self.total_steps = total_steps
        super().__init__(optimizer, gamma=0.5)

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch >= self.total_steps:
            raise ValueError("too many steps")
        super().step(epoch)


@pytest.mark.parametrize(
    "phase",
    [
        new_lr_scheduler(ONE_CYCLE, {"max_lr": 0.1, "total_steps": 2}),
        new_lr_scheduler(f"{__name__}.Limited", {"total_steps": 2}),
        new_optimizer(f"{__name__}.NeedsClosure", lr=0.1),
        new_optimizer(f"{__name__}.TakesNoClosure", lr=0.1),
        new_lr_scheduler("torch.optim.lr_scheduler.MultiStepLR", {"milestones": [1, 2]}),
        new_lr_scheduler("torch.optim.lr_scheduler.CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "mode": "exp_range"}),
        new_lr_scheduler(PLATEAU, {"patience": 10_000}, pl_lrs_cfg={"monitor": "val_loss"}),
        new_optimizer("torch.optim.Muon", lr=0.1),
        new_optimizer(ADAMW, betas=[0.9, 0.99], fused=True),
    ],
    ids=str,
)
def test_what_can_step_is_taken(phase: dict[str, Any]) -> None:
    assert resolve({0: {"params": ["head.bias"]}, 1: {"params": ["upper.weight"], **phase}}, Model()).schedule[1]


def test_many_milestones_are_taken_in_little_time() -> None:
    """Also where the model is known."""
    phase = new_lr_scheduler("torch.optim.lr_scheduler.MultiStepLR", {"milestones": list(range(10_000))})
    start = time.thread_time()
    runner = runner_of(schedule_of(phase))
    runner.thaw_to(1)
    assert time.thread_time() - start < 3.0
    assert len(runner.lr_schedulers[0].milestones) == 10_000  # type: ignore[attr-defined]


def test_a_module_that_leaves_the_program_is_a_problem_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves_on_import.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OptimizerError, match=r"cannot be imported \(it calls sys.exit\(3\)\)"):
        resolve(schedule_of(new_optimizer("leaves_on_import.Fast")), Model())


@pytest.mark.parametrize(
    "wrong", [{"params": ["nothing.at.all"]}, {"params": ["lower"], "unknown": 1}], ids=["selector", "key"]
)
def test_no_module_is_imported_for_a_schedule_that_is_wrong_anyway(
    wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves_a_trace.py").write_text("import pathlib\npathlib.Path(__file__ + '.ran').touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    phases = schedule_of(new_optimizer("leaves_a_trace.Fast"), wrong)
    with pytest.raises(ScheduleError):
        resolve(phases, Model())
    assert not (tmp_path / "leaves_a_trace.py.ran").exists()


def test_what_is_no_class_of_the_right_kind_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import pathlib\ndef Fast(*args, **kwargs):\n    pathlib.Path(__file__ + '.ran').touch()\n"
    (tmp_path / "is_a_function.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OptimizerError, match="to name a subclass of"):
        resolve(schedule_of(new_optimizer("is_a_function.Fast")), Model())
    assert not (tmp_path / "is_a_function.py.ran").exists()


IN_PHASE_0 = [
    pytest.param(
        new_optimizer("torch.optim.SGD"),
        "phase 0: expected `new_optimizer` in later phases only. Fix: Remove it, or move it to a later phase",
        id="new_optimizer",
    ),
    pytest.param(
        step_lr(),
        "phase 0: expected `new_lr_scheduler` in later phases only. Fix: Remove it, or move it to a later phase",
        id="new_lr_scheduler",
    ),
]


@pytest.mark.parametrize(("phase", "message"), IN_PHASE_0)
def test_not_in_phase_0(phase: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleFormatError) as error:
        resolve({0: {"params": ["head"], **phase}}, Model())
    assert str(error.value) == message


IN_A_FILE = [
    pytest.param(
        "  new_optimizer:\n    optimizer_init:\n      class_path: torch.optim.Sgd\n",
        "schedule.yaml:5, phase 1: expected `new_optimizer` to name a class, got 'torch.optim.Sgd', which cannot be "
        "imported (module 'torch.optim' has no attribute 'Sgd'). Fix: Give the full import path of an installed class.",
        id="optimizer",
    ),
    pytest.param(
        "  lr: 1.0e-3\n  new_lr_scheduler:\n    lr_scheduler_init: {class_path: torch.optim.SGD}\n",
        "schedule.yaml:6, phase 1: expected `new_lr_scheduler` to name a subclass of "
        "torch.optim.lr_scheduler.LRScheduler, got 'torch.optim.SGD'. Fix: Name a class of that kind.",
        id="scheduler",
    ),
]


@pytest.mark.parametrize(("phase", "message"), IN_A_FILE)
def test_a_problem_in_a_file_names_its_line(
    phase: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("schedule.yaml").write_text(f"0:\n  params: [head]\n1:\n  params: [upper]\n{phase}")
    with pytest.raises(OptimizerError) as error:
        resolve("schedule.yaml", Model())
    assert str(error.value) == message


WITH_THE_MODEL_IN_A_FILE = [
    pytest.param(
        "    init_pg_lrs:\n    - 0.1\n    - 0.2\n"
        f"    lr_scheduler_init: {{class_path: {STEP_LR}, init_args: {{step_size: 1}}}}\n",
        "schedule.yaml:6, phase 1: expected `init_pg_lrs` to have 1 values, one per existing group, got 2. Fix: Leave "
        "out the last one: the new group starts at the phase's own rate.",
        id="init_pg_lrs",
    ),
    pytest.param(
        f"    lr_scheduler_init:\n      class_path: {ONE_CYCLE}\n"
        "      init_args:\n        total_steps: 9\n        max_lr: [0.1]\n",
        "schedule.yaml:10, phase 1: expected `max_lr` to be one value or a list of 2, one per group (1 existing, 1 "
        "new), got 1. Fix: Add one for the new group.",
        id="max_lr",
    ),
    pytest.param(
        "    lr_scheduler_init: {class_path: tests.core.optim.test_checks.Weighted, init_args: {weights: [0.5]}}\n",
        "schedule.yaml:5, phase 1: tests.core.optim.test_checks.Weighted does not take `init_args` {'weights': [0.5]}: "
        "expected 2 weights. Fix: Add one for the new group.",
        id="a-list-of-the-users-own",
    ),
]


@pytest.mark.parametrize(("new_lr_scheduler", "message"), WITH_THE_MODEL_IN_A_FILE)
def test_a_wrong_number_of_values_in_a_file_names_its_line(
    new_lr_scheduler: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phases = f"0:\n  params: [head]\n1:\n  params: [upper]\n  new_lr_scheduler:\n{new_lr_scheduler}"
    Path("schedule.yaml").write_text(phases)
    with pytest.raises(OptimizerError) as error:
        runner_of("schedule.yaml")
    assert str(error.value) == message


def test_the_arguments_that_a_generated_schedule_refuses_are_those_of_all_classes() -> None:
    assert set(PER_GROUP_ARGUMENTS) == {name for row in ROWS for name in row.arguments}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('no device')", "no device"),
        ("x = (", "'(' was never closed (broken_on_import.py, line 1)"),
    ],
    ids=["raises", "syntax-error"],
)
def test_a_module_that_breaks_when_imported(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_on_import.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OptimizerError) as error:
        resolve(schedule_of(new_optimizer("broken_on_import.Fast")), Model())
    assert str(error.value) == (
        "phase 1: expected `new_optimizer` to name a class, got 'broken_on_import.Fast', which cannot be imported "
        f"({reason}). Fix: Give the full import path of an installed class."
    )


def test_all_problems_are_reported_together() -> None:
    phases = schedule_of(
        {**new_optimizer("torch.optim.Sgd"), **new_lr_scheduler(PLATEAU, pl_lrs_cfg={"interval": "batch"})},
        new_optimizer("torch.optim.LBFGS"),
    )
    with pytest.raises(OptimizerError) as error:
        resolve(phases, Model())
    assert str(error.value) == "\n".join(
        [
            "4 problems found:",
            "1. phase 1: expected `new_optimizer` to name a class, got 'torch.optim.Sgd', which cannot be imported "
            "(module 'torch.optim' has no attribute 'Sgd'). Fix: Give the full import path of an installed class.",
            "2. phase 1: expected `interval` to be 'step' or 'epoch', got 'batch'. Fix: Correct `pl_lrs_cfg`.",
            "3. phase 1: expected torch.optim.lr_scheduler.ReduceLROnPlateau to have a metric to wait for, got no "
            "`monitor`. Fix: Name a logged metric as `monitor` in `pl_lrs_cfg`.",
            "4. phase 2: LBFGS has one parameter group only, but each phase adds one. Fix: Choose another optimizer.",
        ]
    )


def test_problems_of_several_kinds_are_reported_together() -> None:
    phases = schedule_of(new_optimizer("torch.optim.LBFGS"), {"params": ["nothing.at.all"]})
    with pytest.raises(ScheduleError) as error:
        resolve(phases, Model())
    assert not isinstance(error.value, (OptimizerError, SelectorError))
    assert str(error.value) == "\n".join(
        [
            "2 problems found:",
            "1. phase 2, selector 'nothing.at.all': expected to match a parameter, but matches none. "
            "Fix: Use names of the model's named_parameters()",
            "2. phase 1: LBFGS has one parameter group only, but each phase adds one. Fix: Choose another optimizer.",
        ]
    )


# --- what is only worth a warning -------------------------------------------------------------------------------------

WARNINGS = [
    pytest.param(
        new_lr_scheduler(STEP_LR, {"step_size": 1, "optimizer": "mine"}),
        ["phase 1: `optimizer` among the LR scheduler's `init_args` is dropped; it gets the one in force."],
        id="optimizer-argument",
    ),
    pytest.param(
        new_lr_scheduler(STEP_LR, {"step_size": 1, "optimizer": None}),
        ["phase 1: `optimizer` among the LR scheduler's `init_args` is dropped; it gets the one in force."],
        id="optimizer-argument-without-value",
    ),
    pytest.param(
        step_lr(pl_lrs_cfg={"intervall": "step"}),
        ["phase 1: unknown key 'intervall' in `pl_lrs_cfg` is ignored. Did you mean `interval`?"],
        id="similar-key",
    ),
    pytest.param(
        step_lr(pl_lrs_cfg={"xyz": 1, "frequenzy": 2}),
        [
            "phase 1: unknown key 'xyz' in `pl_lrs_cfg` is ignored",
            "phase 1: unknown key 'frequenzy' in `pl_lrs_cfg` is ignored. Did you mean `frequency`?",
        ],
        id="several-keys",
    ),
    pytest.param(
        step_lr(pl_lrs_cfg={"interval": "step", "frequency": 2, "name": "mine", "monitor": "m", "strict": False}),
        [],
        id="all-keys-known",
    ),
    pytest.param(new_optimizer("torch.optim.AdamW"), [], id="optimizer"),
]


@pytest.mark.parametrize(("phase", "warnings"), WARNINGS)
def test_a_warning_and_the_phase_can_be_entered(phase: dict[str, Any], warnings: list[str]) -> None:
    assert list(resolve(schedule_of(phase), Model()).warnings) == warnings
    messages: list[str] = []
    runner_of(schedule_of(phase), messages=messages).thaw_to(2)
    assert messages == warnings


# --- what depends on the model and its optimizer ----------------------------------------------------------------------


@dataclass(frozen=True)
class AgainstModel:
    message: str
    phase_1: dict[str, Any] = field(default_factory=dict)
    phase_2: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


AGAINST_MODEL = {
    "init_pg_lrs-too-many": AgainstModel(
        "phase 1: expected `init_pg_lrs` to have 1 values, one per existing group, got 3. Fix: Give 1 learning rates.",
        step_lr(init_pg_lrs=[0.1, 0.2, 0.3]),
    ),
    "init_pg_lrs-with-the-new-group": AgainstModel(
        "phase 1: expected `init_pg_lrs` to have 1 values, one per existing group, got 2. Fix: Leave out the last one: "
        "the new group starts at the phase's own rate.",
        step_lr(init_pg_lrs=[0.1, 0.2]),
    ),
    "init_pg_lrs-with-the-new-groups": AgainstModel(
        "phase 1: expected `init_pg_lrs` to have 2 values, one per existing group, got 4. Fix: Leave out the last 2: "
        "the new groups start at the phase's own rate.",
        step_lr(init_pg_lrs=[0.1, 0.2, 0.3, 0.4]),
        options={"no_decay": ["bias"]},
    ),
    "init_pg_lrs-too-few": AgainstModel(
        "phase 2: expected `init_pg_lrs` to have 2 values, one per existing group, got 1. Fix: Give 2 learning rates.",
        phase_2=step_lr(init_pg_lrs=[0.1]),
    ),
    "init_pg_lrs-with-no_decay": AgainstModel(
        "phase 2: expected `init_pg_lrs` to have 4 values, one per existing group, got 2. Fix: Give 4 learning rates.",
        phase_2=step_lr(init_pg_lrs=[0.1, 0.2]),
        options={"no_decay": ["bias"]},
    ),
    "init_pg_lrs-with-lr_decay": AgainstModel(
        "phase 2: expected `init_pg_lrs` to have 3 values, one per existing group, got 2. Fix: Give 3 learning rates.",
        {"params": ["upper.weight", "upper.bias", "embedding.weight"], "lr_decay": 0.5},
        step_lr(init_pg_lrs=[0.1, 0.2]),
    ),
    "min_lr": AgainstModel(
        "phase 2: expected `min_lr` to be one value or a list of 3, one per group (2 existing, 1 new), "
        "got 4. Fix: Give one value or a list of 3.",
        phase_2=new_lr_scheduler(PLATEAU, {"min_lr": [0.1, 0.2, 0.3, 0.4]}, pl_lrs_cfg={"monitor": "m"}),
    ),
    "min_lr-without-the-new-groups": AgainstModel(
        "phase 1: expected `min_lr` to be one value or a list of 4, one per group (2 existing, 2 new), "
        "got 2. Fix: Add 2 for the new groups.",
        new_lr_scheduler(PLATEAU, {"min_lr": [0.1, 0.2]}, pl_lrs_cfg={"monitor": "m"}),
        options={"no_decay": ["bias"]},
    ),
    **{
        f"{class_path.rpartition('.')[2]}-{name}-without-the-new-group": AgainstModel(
            f"phase 2: expected `{name}` to be one value or a list of 3, one per group (2 existing, 1 new), "
            "got 2. Fix: Add one for the new group.",
            phase_2=new_lr_scheduler(class_path, {**others, name: [0.1, 0.2]}),
        )
        for class_path, others, name in (
            (ONE_CYCLE, {"total_steps": 9}, "max_lr"),
            (ONE_CYCLE, {"total_steps": 9, "max_lr": 0.1}, "base_momentum"),
            (ONE_CYCLE, {"total_steps": 9, "max_lr": 0.1}, "max_momentum"),
            (CYCLIC, {"max_lr": 0.1}, "base_lr"),
            (CYCLIC, {"base_lr": 0.1}, "max_lr"),
            (CYCLIC, {"base_lr": 0.1, "max_lr": 0.2}, "base_momentum"),
            (CYCLIC, {"base_lr": 0.1, "max_lr": 0.2}, "max_momentum"),
            ("torch.optim.swa_utils.SWALR", {}, "swa_lr"),
        )
    },
    "lr_lambda-without-the-new-group": AgainstModel(
        "phase 2: expected `lr_lambda` to be one value or a list of 3, one per group (2 existing, 1 new), "
        "got 2. Fix: Add one for the new group.",
        phase_2=new_lr_scheduler("torch.optim.lr_scheduler.LambdaLR", {"lr_lambda": [float, float]}),
    ),
    "a-list-of-the-users-own": AgainstModel(
        "phase 2: tests.core.optim.test_checks.Weighted does not take `init_args` {'weights': [1.0, 0.5]}: "
        "expected 3 weights. Fix: Add one for the new group.",
        phase_2=new_lr_scheduler("tests.core.optim.test_checks.Weighted", {"weights": [1.0, 0.5]}),
    ),
    "a-list-of-the-users-own-that-never-fits": AgainstModel(
        "phase 2: tests.core.optim.test_checks.Weighted does not take `init_args` {'weights': [1.0]}: "
        "expected 3 weights. Fix: Correct its `init_args`.",
        phase_2=new_lr_scheduler("tests.core.optim.test_checks.Weighted", {"weights": [1.0]}),
    ),
    "both": AgainstModel(
        "2 problems found:\n"
        "1. phase 1: expected `init_pg_lrs` to have 1 values, one per existing group, got 2. Fix: Leave out the last "
        "one: the new group starts at the phase's own rate.\n"
        "2. phase 1: expected `min_lr` to be one value or a list of 2, one per group (1 existing, 1 new), "
        "got 1. Fix: Add one for the new group.",
        new_lr_scheduler(PLATEAU, {"min_lr": [0.1]}, pl_lrs_cfg={"monitor": "m"}, init_pg_lrs=[0.1, 0.2]),
    ),
    "muon": AgainstModel(
        "phase 1: Muon optimizes matrices only, but this phase gives it head.bias, upper.bias. "
        "Fix: Thaw these with another optimizer.",
        new_optimizer("torch.optim.Muon"),
        new_optimizer("torch.optim.SGD"),
    ),
    "sparse-adam": AgainstModel(
        "phase 1: SparseAdam needs sparse gradients, but this phase gives it the dense head.weight, head.bias, "
        "upper.weight and 1 more. Fix: Use Adam, or thaw embeddings with sparse=True only.",
        new_optimizer("torch.optim.SparseAdam"),
        new_optimizer("torch.optim.SGD"),
    ),
}


@pytest.mark.parametrize("case", AGAINST_MODEL.values(), ids=AGAINST_MODEL.keys())
def test_a_problem_with_the_model(case: AgainstModel) -> None:
    schedule = schedule_of(case.phase_1, case.phase_2)
    assert resolve(schedule, Model()).schedule, "the schedule by itself is right"
    with pytest.raises(OptimizerError) as error:
        runner_of(schedule, **case.options)
    assert str(error.value) == case.message


def test_phases_beyond_max_depth_are_not_checked() -> None:
    runner_of(schedule_of({}, step_lr(init_pg_lrs=[0.1])), max_depth=1).thaw_to(1)


RIGHT_NUMBERS = [
    pytest.param(step_lr(init_pg_lrs=[0.1]), step_lr(init_pg_lrs=[0.1, 0.2]), {}, id="plain"),
    pytest.param(step_lr(init_pg_lrs=[0.1] * 2), step_lr(init_pg_lrs=[0.1] * 4), {"no_decay": ["bias"]}, id="no_decay"),
    pytest.param(
        {},
        new_lr_scheduler(PLATEAU, {"min_lr": [0.1, 0.2, 0.3]}, pl_lrs_cfg={"monitor": "m"}),
        {},
        id="min_lr",
    ),
    pytest.param(
        {},
        new_lr_scheduler(PLATEAU, {"min_lr": [0.1] * 6}, pl_lrs_cfg={"monitor": "m"}, init_pg_lrs=[0.1] * 4),
        {"no_decay": ["bias"]},
        id="both-with-no_decay",
    ),
    pytest.param(
        {},
        new_lr_scheduler("tests.core.optim.test_checks.Weighted", {"weights": [1.0, 0.5, 0.25]}),
        {},
        id="a-list-of-the-users-own",
    ),
]


@pytest.mark.parametrize(("phase_1", "phase_2", "options"), RIGHT_NUMBERS)
def test_lists_of_the_right_length_are_accepted(
    phase_1: dict[str, Any], phase_2: dict[str, Any], options: dict[str, Any]
) -> None:
    runner = runner_of(schedule_of(phase_1, phase_2), **options)
    runner.thaw_to(2)
    assert runner.phase == 2


# --- the user's own optimizer and schedulers --------------------------------------------------------------------------


@dataclass(frozen=True)
class UsersOptimizer:
    kind: type[Optimizer]
    phase_0: str
    message: str


USERS_OPTIMIZERS = {
    "lbfgs": UsersOptimizer(
        LBFGS,
        "head.weight",
        "phase 1: LBFGS has one parameter group only, but each phase adds one. Fix: Choose another optimizer.",
    ),
    "muon": UsersOptimizer(
        Muon,
        "head.weight",
        "phase 1: Muon optimizes matrices only, but this phase gives it upper.bias. "
        "Fix: Thaw these with another optimizer.",
    ),
    "sparse-adam": UsersOptimizer(
        SparseAdam,
        "embedding.weight",
        "phase 1: SparseAdam needs sparse gradients, but this phase gives it the dense upper.weight, upper.bias. "
        "Fix: Use Adam, or thaw embeddings with sparse=True only.",
    ),
}


@pytest.mark.parametrize("case", USERS_OPTIMIZERS.values(), ids=USERS_OPTIMIZERS.keys())
def test_an_optimizer_that_does_not_suit_later_phases(case: UsersOptimizer) -> None:
    model = Model()
    optimizer = case.kind([model.get_parameter(case.phase_0)], lr=0.1)  # type: ignore[call-arg]
    with pytest.raises(OptimizerError) as error:
        PhaseRunner(model, optimizer, {0: {"params": [case.phase_0]}, 1: {"params": ["upper"]}})
    assert str(error.value) == case.message


@pytest.mark.parametrize("case", USERS_OPTIMIZERS.values(), ids=USERS_OPTIMIZERS.keys())
def test_the_same_optimizer_suits_a_phase_of_its_own_kind(case: UsersOptimizer) -> None:
    model = Model()
    optimizer = case.kind([model.get_parameter(case.phase_0)], lr=0.1)  # type: ignore[call-arg]
    phases = {0: {"params": [case.phase_0]}, 1: {"params": ["upper"], **new_optimizer("torch.optim.SGD", lr=0.1)}}
    PhaseRunner(model, optimizer, phases).thaw_to(1)


@pytest.mark.parametrize("kind", [PerGroup, PerGroupExponential])
def test_a_scheduler_that_cannot_follow_a_new_group_is_refused(kind: type[LRScheduler]) -> None:
    with pytest.raises(OptimizerError) as error:
        runner_of(schedule_of({}), schedulers=[kind])
    assert str(error.value) == (
        f"{kind.__name__} cannot follow a new parameter group "
        "(ValueError: zip() argument 2 is shorter than argument 1). Fix: Use one of PyTorch's LR schedulers."
    )


def test_a_scheduler_that_can_follow_is_left_as_it_was_by_the_trial() -> None:
    runner = runner_of(schedule_of({}), schedulers=[Halving])
    (scheduler,) = runner.lr_schedulers
    assert scheduler.last_epoch == 0
    assert runner.optimizer.param_groups[0]["lr"] == 0.05
    runner.thaw_to(1)
    for parameter in runner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    runner.optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in runner.optimizer.param_groups] == [0.025, 0.5e-5]
