"""The engine by itself: whole states, nothing touched before success is sure, and a state that survives JSON."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from finetuning_scheduler.core import (
    Listener,
    ModelView,
    Moment,
    PhaseRunner,
    Plan,
    Reason,
    Session,
    Settings,
    Transition,
    prepare,
)
from finetuning_scheduler.errors import CheckpointError, ScheduleError

BATCH = torch.randn(6, 3, generator=torch.Generator().manual_seed(5))
NAMES = {0: ["2.weight", "2.bias"], 1: ["1.weight", "1.bias"], 2: ["0.weight", "0.bias"]}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))


def schedule(**phase_1: Any) -> dict[int, dict[str, Any]]:
    phases: dict[int, dict[str, Any]] = {number: {"params": list(names)} for number, names in NAMES.items()}
    phases[1] |= phase_1
    return phases


def new_optimizer(class_path: str = "torch.optim.SGD", **init_args: Any) -> dict[str, Any]:
    return {"optimizer_init": {"class_path": class_path, "init_args": init_args}}


def new_lr_scheduler(**others: Any) -> dict[str, Any]:
    init = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}
    return {"lr_scheduler_init": init, **others}


def make_session(
    model: nn.Module,
    optimizer: Optimizer,
    phases: Mapping[int, Any],
    change: Callable[[Plan], Plan] = lambda plan: plan,
    **options: Any,
) -> Session:
    view, settings = ModelView.of(model), Settings(base_max_lr=0.05)
    prepared = prepare(phases, view, optimizer, settings)
    session = Session(view, optimizer, replace(prepared, plan=change(prepared.plan)), settings, **options)
    session.begin()
    return session


def train(model: nn.Module, optimizer: Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(BATCH).square().mean().backward()
        optimizer.step()


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def groups_of(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


# --- what a refusal leaves behind ------------------------------------------------------------------------------------


REFUSED: dict[str, dict[str, Any]] = {
    "a wrong selector": {"schedule": schedule() | {1: {"params": ["nowhere"]}}},
    "a wrong class": {"schedule": schedule(new_optimizer=new_optimizer("torch.optim.Nothing"))},
    "a wrong number of learning rates": {
        "schedule": schedule(new_lr_scheduler=new_lr_scheduler(init_pg_lrs=[0.1] * 9))
    },
    "a wrong depth": {"schedule": schedule(), "max_depth": -5},
    "a wrong mode": {"schedule": schedule(), "frozen_modules_mode": "asleep"},
    "a file that is not there": {"schedule": Path("nowhere.yaml")},
}


@pytest.mark.parametrize("over", ["all parameters", "the head"])
@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED.keys())
def test_after_a_refusal_model_and_optimizer_are_as_before(arguments: dict[str, Any], over: str) -> None:
    model = make_model()
    model[1].weight.requires_grad_(False)
    optimizer = AdamW(model.parameters() if over == "all parameters" else model[2].parameters(), lr=0.1)
    train(model, optimizer)
    scheduler = StepLR(optimizer, 1)
    watched = (trainable(model), groups_of(model, optimizer), [p.grad is None for p in model.parameters()])
    before = copy.deepcopy((*watched, optimizer.state_dict(), scheduler.state_dict()))
    with pytest.raises(ScheduleError):
        PhaseRunner(model, optimizer, lr_schedulers=[scheduler], **arguments)
    watched = (trainable(model), groups_of(model, optimizer), [p.grad is None for p in model.parameters()])
    assert str((*watched, optimizer.state_dict(), scheduler.state_dict())) == str(before)


def test_a_state_that_is_refused_leaves_the_session_where_it_is() -> None:
    model = make_model()
    runner = PhaseRunner(model, SGD(model.parameters(), lr=0.1), schedule())
    written = PhaseRunner(make_model(), SGD(make_model().parameters(), lr=0.1), schedule())
    written.thaw_to(2)
    state = written.state_dict()
    state["parameter_groups"][1] = ["0.weight"]
    with pytest.raises(CheckpointError, match="parameter group 1 differs"):
        runner.load_state_dict(state)
    assert trainable(model) == NAMES[0]
    assert runner.phase == 0


class Uneven(StepLR):
    """Of a supported kind, but with a list of its own that no group can be added to."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.factors = tuple(1.0 for _ in optimizer.param_groups)
        super().__init__(optimizer, step_size=1)

    def get_lr(self) -> list[Any]:
        return [lr * factor for lr, factor in zip(super().get_lr(), self.factors, strict=True)]


def test_problems_of_every_kind_are_reported_together() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    phases = schedule(new_lr_scheduler=new_lr_scheduler(init_pg_lrs=[0.1, 0.2, 0.3]))
    phases[2] |= {"lr": -1, "new_optimizer": new_optimizer("torch.optim.Nothing")}
    phases[3] = {"params": ["nowhere"]}
    with pytest.raises(ScheduleError) as error:
        PhaseRunner(
            model,
            optimizer,
            phases,
            lr_schedulers=[Uneven(optimizer)],
            max_depth=-5,
            no_decay="bias",
            base_max_lr="1e-5",  # type: ignore[arg-type]
        )
    parts = {
        "format": "phase 2: `lr`: expected a number greater than 0, got -1",
        "names": "phase 3, selector 'nowhere': expected to match a parameter",
        "classes": "phase 2: expected `new_optimizer` to name a class, got 'torch.optim.Nothing'",
        "groups": "phase 1: expected `init_pg_lrs` to have 1 values, one per existing group, got 3",
        "the user's scheduler": "Uneven cannot follow a new parameter group",
        "depth": "expected `max_depth` to be -1 or a phase, got -5",
        "no_decay": "expected `no_decay` to be a list of name fragments, got 'bias'",
        "learning rate": "expected `base_max_lr` to be a number above 0, got '1e-5'",
    }
    assert [kind for kind, part in parts.items() if part not in str(error.value)] == []
    assert len(error.value.problems) == len(parts)


@pytest.mark.parametrize("fragments", ["bias", True, [1], ["bias", None], ["bias", ""], {"bias": 1}], ids=str)
def test_what_are_no_fragments_of_names_is_told(fragments: Any) -> None:
    model = make_model()
    with pytest.raises(ScheduleError, match="expected `no_decay` to be a list of name fragments, got "):
        PhaseRunner(model, AdamW(model.parameters(), weight_decay=0.1), no_decay=fragments)
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- states ----------------------------------------------------------------------------------------------------------


def refreezing(keeps_frozen_state: bool) -> Callable[[Plan], Plan]:
    """Let phase 2 train what the schedule says of it and phase 0, but not what phase 1 thaws."""

    def change(plan: Plan) -> Plan:
        names = [*NAMES[0], *NAMES[2]]
        last = replace(plan.phases[2], trainable=names, keeps_frozen_state=keeps_frozen_state)
        return replace(plan, phases=(*plan.phases[:2], last))

    return change


@pytest.mark.parametrize("kind", [SGD, AdamW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("keeps", [True, False], ids=["moments kept", "moments reset"])
def test_a_state_may_train_less_than_the_one_before(kind: type[Any], keeps: bool) -> None:
    model = make_model()
    options = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    session = make_session(model, optimizer, schedule(), refreezing(keeps))
    train(model, optimizer)
    session.enter(1, Moment(1, 1), Reason.REQUEST)
    train(model, optimizer, steps=2)
    frozen = {name: model.get_parameter(name) for name in NAMES[1]}
    values = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    moments = {name: copy.deepcopy(dict(optimizer.state[parameter])) for name, parameter in frozen.items()}
    others = {name: model.get_parameter(name).detach().clone() for name in (*NAMES[0], *NAMES[2])}

    session.enter(2, Moment(2, 3), Reason.REQUEST)
    train(model, optimizer, steps=2)

    assert groups_of(model, optimizer) == [NAMES[0], NAMES[1], NAMES[2]]
    assert sorted(trainable(model)) == sorted([*NAMES[0], *NAMES[2]])
    assert [name for name, parameter in frozen.items() if not torch.equal(values[name], parameter)] == []
    assert [name for name, value in others.items() if torch.equal(value, model.get_parameter(name))] == []
    for name, parameter in frozen.items():
        if keeps:
            assert str(dict(optimizer.state[parameter])) == str(moments[name])
        else:
            assert parameter not in optimizer.state


class Watching(Listener):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def before_thaw(self, thawed: Mapping[str, nn.Parameter]) -> None:
        frozen = not any(parameter.requires_grad for parameter in thawed.values())
        self.seen.append(f"before {list(thawed)}, frozen: {frozen}")

    def after_thaw(self) -> None:
        self.seen.append("after")

    def on_transition(self, transition: Transition) -> None:
        self.seen.append(f"{transition.left} -> {transition.entered}")


def test_listeners_are_told_of_every_change_and_of_transitions_only_when_there_is_one() -> None:
    model, listener = make_model(), Watching()
    session = make_session(model, SGD(model.parameters(), lr=0.1), schedule(), listeners=[listener])
    session.enter(2, Moment(1, 1), Reason.REQUEST)
    resumed, after_resume = make_model(), Watching()
    make_session(resumed, SGD(resumed.parameters(), lr=0.1), schedule(), listeners=[after_resume]).resume(
        session.state_dict()
    )
    start = [f"before {NAMES[0]}, frozen: True", "after"]
    later = [f"before {[*NAMES[1], *NAMES[2]]}, frozen: True", "after"]
    assert listener.seen == [*start, *later, "0 -> 2"]
    assert after_resume.seen == [*start, *later]


def test_a_plan_is_a_value_that_can_be_printed() -> None:
    model = make_model()
    phases = schedule(lr=0.01, max_transition_epoch=3, new_optimizer=new_optimizer(lr=0.5))
    session = make_session(model, AdamW(model.parameters(), lr=0.1), phases)
    assert str(session.plan).splitlines() == [
        "Phase 0: 14.29% of the parameters trainable, keeps the initial groups",
        "Phase 1: 57.14% of the parameters trainable, adds groups at learning rates [0.01], optimizer torch.optim.SGD, "
        "until epoch 3",
        "Phase 2: 100.00% of the parameters trainable, adds groups at learning rates [0.05]",
    ]
    states = session.plan.phases
    assert [list(state.trainable) for state in states] == [
        NAMES[0],
        [*NAMES[0], *NAMES[1]],
        [*NAMES[0], *NAMES[1], *NAMES[2]],
    ]
    assert [[list(group.names) for group in state.groups] for state in states] == [
        [NAMES[0]],
        [NAMES[0], NAMES[1]],
        [NAMES[0], NAMES[1], NAMES[2]],
    ]
    assert [state.optimizer_since for state in states] == [0, 1, 1]


# --- on disk ---------------------------------------------------------------------------------------------------------


def warming() -> dict[int, dict[str, Any]]:
    phases = schedule(lr_warmup_steps=6)
    phases[2]["lr_warmup_steps"] = 9
    return phases


def resumable(steps: int, phases: Mapping[int, Any]) -> tuple[nn.Module, PhaseRunner]:
    """A loop that enters phase 1 after two steps and phase 2 after four."""
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    runner = PhaseRunner(model, optimizer, phases, base_max_lr=0.05, restore_best=False)
    advance(model, runner, 0, steps)
    return model, runner


def advance(model: nn.Module, runner: PhaseRunner, first: int, steps: int) -> None:
    for step in range(first, steps):
        if step in (2, 4):
            runner.thaw_to(step // 2)
        train(model, runner.optimizer)
        runner.step()


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_a_state_that_has_been_through_json_resumes_bitwise(steps: int) -> None:
    expected, _ = resumable(10, warming())
    model, runner = resumable(steps, warming())
    state = json.loads(json.dumps(runner.state_dict()))
    weights, optimizer_state = copy.deepcopy((model.state_dict(), runner.optimizer.state_dict()))
    resumed, runner = resumable(0, warming())
    runner.load_state_dict(state)
    resumed.load_state_dict(weights)
    runner.optimizer.load_state_dict(optimizer_state)
    advance(resumed, runner, steps, 10)
    assert [n for n, value in expected.state_dict().items() if not torch.equal(value, resumed.state_dict()[n])] == []


CYCLES = {
    "OneCycleLR": {"max_lr": 0.2, "total_steps": 40},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 5},
}


@pytest.mark.parametrize("later", ["torch.optim.Adagrad", "torch.optim.SGD", "torch.optim.Adam"])
@pytest.mark.parametrize(("cycle", "arguments"), CYCLES.items(), ids=CYCLES)
def test_a_cycle_of_momentum_resumes_under_the_optimizer_of_a_later_phase(
    cycle: str, arguments: dict[str, Any], later: str
) -> None:
    phases = schedule(
        new_optimizer=new_optimizer(lr=0.1, momentum=0.9),
        new_lr_scheduler={
            "lr_scheduler_init": {"class_path": f"torch.optim.lr_scheduler.{cycle}", "init_args": arguments},
            "pl_lrs_cfg": {"interval": "step"},
        },
    )
    phases[2]["new_optimizer"] = new_optimizer(later, lr=0.05)

    def go_on(model: nn.Module, runner: PhaseRunner, first: int, last: int) -> None:
        for step in range(first, last):
            advance(model, runner, step, step + 1)
            for scheduler in runner.lr_schedulers:
                scheduler.step()

    expected, whole = resumable(0, phases)
    go_on(expected, whole, 0, 10)
    model, runner = resumable(0, phases)
    go_on(model, runner, 0, 6)
    resumed, resumed_runner = resumable(0, phases)
    resumed_runner.load_state_dict(runner.state_dict())
    resumed.load_state_dict(model.state_dict())
    resumed_runner.optimizer.load_state_dict(copy.deepcopy(runner.optimizer.state_dict()))
    resumed_runner.lr_schedulers[0].load_state_dict(copy.deepcopy(runner.lr_schedulers[0].state_dict()))
    go_on(resumed, resumed_runner, 6, 10)
    assert [n for n, value in expected.state_dict().items() if not torch.equal(value, resumed.state_dict()[n])] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phse": 1}, "`phse`: Extra inputs are not permitted"),
        ({"phase": "one"}, "`phase`: Input should be a valid integer"),
        ({"phase": -1}, "`phase`: Input should be greater than or equal to 0"),
        ({"parameter_groups": None}, "`parameter_groups`: Input should be a valid list"),
        ({"loop": {"epoch": 0}}, "`step`: Field required"),
        ({"loop": {"epoch": 0, "step": 0, "finished": False, "patience": {}, "snapshot": None, "x": 1}}, "`x`: Extra"),
    ],
)
def test_a_state_of_no_known_form_is_an_error_that_names_the_key(change: dict[str, Any], message: str) -> None:
    _, runner = resumable(1, schedule())
    state = runner.state_dict() | change
    with pytest.raises(CheckpointError, match=message):
        resumable(0, schedule())[1].load_state_dict(state)


def test_a_state_without_its_keys_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="`phase`: Field required"):
        resumable(0, schedule())[1].load_state_dict({"version": 1})


def test_asking_for_the_state_changes_nothing() -> None:
    _, runner = resumable(5, warming())
    before = copy.deepcopy((vars(runner.progress), runner.session.group_names))
    first, second = runner.state_dict(), runner.state_dict()
    assert first == second
    assert (vars(runner.progress), runner.session.group_names) == before


# --- entering many phases at once -------------------------------------------------------------------------------------


class Counted(nn.Parameter):
    """Counts how often it is looked up in a set or a dictionary, over all instances."""

    lookups = 0

    def __hash__(self) -> int:
        Counted.lookups += 1
        return id(self)


def lookups_of(
    tensors: int, enter: Callable[[PhaseRunner, dict[str, Any]], None], make_scheduler: Callable[[Any], LRScheduler]
) -> int:
    def runner() -> PhaseRunner:
        model = nn.ParameterList([Counted(torch.zeros(1)) for _ in range(tensors)])
        optimizer = SGD(model.parameters(), lr=0.1)
        phases = {number: {"params": [str(number)]} for number in range(tensors)}
        schedulers = [make_scheduler(optimizer)]
        return PhaseRunner(model, optimizer, phases, lr_schedulers=schedulers, report=lambda *_: None)

    written = runner()
    written.thaw_to(tensors - 1)
    state, fresh = written.state_dict(), runner()
    Counted.lookups = 0
    enter(fresh, state)
    assert len(fresh.optimizer.param_groups) == tensors
    return Counted.lookups


@pytest.mark.parametrize(
    "enter",
    [
        pytest.param(lambda runner, state: runner.load_state_dict(state), id="resume"),
        pytest.param(lambda runner, state: runner.thaw_to(state["phase"]), id="thaw_to"),
    ],
)
@pytest.mark.parametrize("make_scheduler", [lambda o: StepLR(o, 1), lambda o: LambdaLR(o, lambda _: 1.0)])
def test_entering_many_phases_at_once_is_linear(
    enter: Callable[[PhaseRunner, dict[str, Any]], None], make_scheduler: Callable[[Any], LRScheduler]
) -> None:
    few, many = lookups_of(50, enter, make_scheduler), lookups_of(200, enter, make_scheduler)
    assert few > 0
    assert many <= 5 * few


def test_a_resumed_run_does_not_tell_of_what_happened_before() -> None:
    told: list[str] = []
    phases = schedule(new_optimizer=new_optimizer(lr=0.1), new_lr_scheduler=new_lr_scheduler())

    def runner() -> PhaseRunner:
        model = make_model()
        optimizer = AdamW(model.parameters(), lr=0.1)
        return PhaseRunner(model, optimizer, phases, report=lambda level, text: told.append(f"{level} {text}"))

    written = runner()
    written.thaw_to(2)
    assert len([text for text in told if text.startswith(f"{logging.INFO} ") and "replaces" in text]) == 2
    told.clear()
    resumed = runner()
    resumed.load_state_dict(written.state_dict())
    assert told == []
    assert type(resumed.optimizer).__name__ == "SGD"
    assert [type(scheduler).__name__ for scheduler in resumed.lr_schedulers] == ["StepLR"]


class AnotherEnds:
    """Two ranks, of which the other one has got a metric that is not finite."""

    def any(self, flag: bool) -> bool:
        return True

    def every(self, flag: bool) -> bool:
        return flag

    def from_zero(self, function: Callable[[], Any]) -> Any:
        return function()


def test_ranks_end_together() -> None:
    model = make_model()
    runner = PhaseRunner(model, SGD(model.parameters(), lr=0.1), schedule(), ranks=AnotherEnds())
    assert runner.epoch_end(1.0) is None
    assert runner.finished


# --- many phases, one after the other --------------------------------------------------------------------------------


def test_each_transition_tells_and_looks_up_what_it_changes_however_many_groups_there_are() -> None:
    phases = 120
    model = nn.ParameterList([Counted(torch.zeros(1)) for _ in range(phases)])
    optimizer = SGD(model.parameters(), lr=0.1)
    schedule = {number: {"params": [str(number)], "lr": 0.1 + number} for number in range(phases)}
    lines: list[str] = []
    schedulers = [LambdaLR(optimizer, lambda _: 1.0)]
    runner = PhaseRunner(
        model,
        optimizer,
        schedule,
        lr_schedulers=schedulers,
        restore_best=False,
        report=lambda _, text: lines.append(text),
    )
    lookups: list[int] = []
    for phase in range(1, phases):
        Counted.lookups = 0
        runner.thaw_to(phase)
        lookups.append(Counted.lookups)
    assert max(len(line) for line in lines) < 200
    assert lines[-1].endswith(
        "120 parameters trainable (100.00%), learning rates [119.1] in new groups, 0.1 to 118.1 in 119 others"
    )
    assert max(lookups) == lookups[0]
