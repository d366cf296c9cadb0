"""Hooks of an adapter around set-up and validation of the schedule: called in order, and what they do holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from finetuning_scheduler import FinetuningScheduler, ScheduleImplMixin
from finetuning_scheduler.strategy_adapters import StrategyAdapter
from tests.reference.history import assert_same_run
from tests.reference.networks import HEAD, SECOND, THIRD
from tests.reference.recipe import schedule_of, simple_recipe
from tests.reference.toys import Session

RECIPE = simple_recipe(epochs=5)
GIVEN = schedule_of(RECIPE)


def session(root: Path, adapter: Any, scheduler: type[FinetuningScheduler] | None = None, **options: Any) -> Session:
    options = {"custom_strategy_adapters": {"single_device": adapter}} | options
    return Session(RECIPE, root, scheduler_options=options, scheduler_class=scheduler)


def trainable(module: nn.Module) -> list[str]:
    return sorted(name for name, parameter in module.named_parameters() if parameter.requires_grad)


class Notes(StrategyAdapter):
    """Notes what is called, and what can be seen then."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, Any] = {}

    def connect(self, fts_parent: Any) -> None:
        super().connect(fts_parent)
        own = (fts_parent.trainer, fts_parent.pl_module, fts_parent) == (self.trainer, self.pl_module, self.fts_handle)
        self.noted["connect"] = (own, fts_parent.strategy_adapter is self)

    def on_before_init_fts(self) -> None:
        super().on_before_init_fts()
        self.noted["before"] = (self.fts_handle.ft_schedule, len(trainable(self.pl_module)))

    def get_named_params_for_schedule_validation(self) -> Mapping[str, nn.Parameter]:
        self.noted["named"] = None
        return super().get_named_params_for_schedule_validation()

    def validate_ft_sched(self) -> Any:
        found = super().validate_ft_sched()
        self.noted["validate"] = (found, [len(each["params"]) for each in self.fts_handle.ft_schedule.values()])
        return found

    def on_after_init_fts(self) -> None:
        super().on_after_init_fts()
        self.noted["after"] = (trainable(self.pl_module), len(self.trainer.optimizers))

    def on_before_fts_fit_start(self) -> None:
        super().on_before_fts_fit_start()
        self.noted["fit start"] = (len(self.trainer.optimizers), self.fts_handle.curr_depth)

    def on_phase_thawed(self) -> None:
        super().on_phase_thawed()
        self.noted.setdefault("thawed", type(self.pls_handle).__name__)


def test_hooks_are_called_in_order_with_what_is_there_by_then(tmp_path: Path) -> None:
    fitted = session(tmp_path / "noted", Notes).fit()
    assert [*fitted.scheduler.strategy_adapter.noted.items()] == [
        ("connect", (True, True)),
        ("before", (GIVEN, 8)),
        ("named", None),
        ("validate", ((2, 4), [2, 2, 2])),
        ("after", ([*HEAD], 0)),
        ("fit start", (1, 0)),
        ("thawed", "SingleDeviceStrategy"),
    ]
    assert_same_run(fitted.history, Session(RECIPE, tmp_path / "plain").fit().history)


class KeepsItsParent(StrategyAdapter):
    """Overrides hooks without a call of the base class."""

    def __init__(self) -> None:
        self.parents: list[Any] = []

    def connect(self, fts_parent: Any) -> None:
        self.parents.append(fts_parent)


def test_the_hooks_of_the_base_class_need_not_be_called(tmp_path: Path) -> None:
    fitted = session(tmp_path, KeepsItsParent).fit()
    adapter = fitted.scheduler.strategy_adapter
    assert adapter.parents == [fitted.scheduler]  # type: ignore[attr-defined]
    assert adapter.trainer is fitted.trainer


class Mixin:
    """Hooks need not stand in the adapter's own class."""

    def on_after_init_fts(self) -> None:
        self.told = True


class Inherits(Mixin, StrategyAdapter):
    told = False


class OnTheObject(StrategyAdapter):
    told = False

    def __init__(self) -> None:
        super().__init__()
        self.on_after_init_fts = partial(setattr, self, "told", True)  # type: ignore[method-assign]


@pytest.mark.parametrize("adapter", [Inherits, OnTheObject, type("Below", (Inherits,), {})])
def test_hooks_count_wherever_they_are_set(adapter: type[StrategyAdapter], tmp_path: Path) -> None:
    fitted = session(tmp_path, adapter).fit()
    assert fitted.scheduler.strategy_adapter.told  # type: ignore[attr-defined]


class SetsArguments(StrategyAdapter):
    def on_before_init_fts(self) -> None:
        self.fts_handle.ft_schedule = GIVEN
        self.fts_handle.max_depth = 1


def test_what_a_hook_sets_before_the_schedule_is_read_counts(tmp_path: Path) -> None:
    fitted = session(tmp_path, SetsArguments, ft_schedule=None).fit()
    assert [epoch.phase for epoch in fitted.history.epochs] == [0, 0, 1, 1]  # the last phase has a limit of its own


def renamed(name: str) -> str:
    layer, kind = name.removeprefix("network.").split(".")
    return f"{layer}_{kind}s.forward"  # a name that modules have an attribute of


class Renames(StrategyAdapter):
    """Calls parameters by names of its own; leaves the first layer out."""

    def get_named_params_for_schedule_validation(self) -> Mapping[str, nn.Parameter]:
        named = self.pl_module.named_parameters()
        return {renamed(name): parameter for name, parameter in named if "first" not in name}


RENAMED = {number: {**phase, "params": [renamed(name) for name in phase["params"]]} for number, phase in GIVEN.items()}
EXPRESSIONS = {
    number: {**phase, "params": [f"{layer}_.*"]}
    for (number, phase), layer in zip(GIVEN.items(), ("head", "third", "second"), strict=True)
}


@pytest.mark.parametrize("schedule", [RENAMED, EXPRESSIONS], ids=["names", "expressions"])
def test_a_schedule_in_an_adapters_names_trains_the_same_parameters(
    schedule: Any, tmp_path: Path, messages: Callable[[], list[str]]
) -> None:
    fitted = session(tmp_path / "renamed", Renames, ft_schedule=schedule).fit()
    assert_same_run(fitted.history, Session(RECIPE, tmp_path / "plain").fit().history)
    assert messages().count("2 parameters are in no phase and stay frozen.") == 2  # of this run and of the plain one
    in_force = {number: {*phase["params"]} for number, phase in fitted.scheduler.ft_schedule.items()}
    assert in_force == {number: {*phase["params"]} for number, phase in RENAMED.items()}
    saved = ScheduleImplMixin.load_yaml_schedule(tmp_path / "renamed" / "Toy_ft_schedule.yaml")
    assert {number: {*phase["params"]} for number, phase in saved.items()} == in_force


def test_a_run_in_an_adapters_names_resumes_and_restores(tmp_path: Path) -> None:
    scores = (3.0, 1.0, 2.0, 2.5, 0.5)  # the best of the first phase is not its last
    recipe = simple_recipe(epochs=5, scores=scores)

    def fit(name: str, adapter: Any, **arguments: Any) -> Session:
        options = {"custom_strategy_adapters": {"single_device": adapter}} if adapter else {}
        options |= {"ft_schedule": RENAMED if adapter is Renames else GIVEN}
        limits = {"max_epochs": 3} if name == "begun" else {}
        checkpoint = {"save_last": True}
        made = Session(recipe, tmp_path / name, checkpoint=checkpoint, scheduler_options=options, **limits)
        return made.fit(**arguments)

    whole = fit("plain", None)
    fit("begun", Renames)
    resumed = fit("resumed", Renames, ckpt_path=tmp_path / "begun" / "checkpoints" / "last.ckpt")
    assert_same_run(fit("renamed", Renames).history, whole.history)
    assert_same_weights_at_the_end(resumed, whole)


def assert_same_weights_at_the_end(mine: Session, theirs: Session) -> None:
    from tests.reference.history import assert_same_weights

    assert_same_weights(mine.history.epochs[-1], theirs.history.epochs[-1])


def test_a_generated_schedule_is_in_an_adapters_names(tmp_path: Path) -> None:
    fitted = session(tmp_path, Renames, ft_schedule=None).fit()
    names = [phase["params"] for phase in fitted.scheduler.ft_schedule.values()]
    assert names == [[renamed(name) for name in pair] for pair in (HEAD, THIRD, SECOND)]


NO_NAMES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "other tensors": (lambda _: {"mine": nn.Parameter(nn.Linear(1, 1).weight)}, "got something else under mine"),
    "no names": (lambda _: {}, "got none"),
    "numbers": (lambda module: dict(enumerate(module.parameters())), "got something else under 0"),
    "an empty name": (lambda module: {"": next(module.parameters())}, "got something else under"),
}


@pytest.mark.parametrize(("names", "message"), NO_NAMES.values(), ids=NO_NAMES)
def test_names_have_to_be_of_the_modules_parameters(names: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    method = {"get_named_params_for_schedule_validation": lambda self: names(self.pl_module)}
    with pytest.raises(MisconfigurationException, match="expected the parameters of the module, each under") as error:
        session(tmp_path, type("Wrong", (StrategyAdapter,), method)).fit()
    assert message in str(error.value)


@pytest.mark.parametrize("given", [None, 3, ["network.head.weight"], [nn.Linear(1, 1)]], ids=str)
def test_what_is_returned_has_to_be_a_mapping_of_names(given: Any, tmp_path: Path) -> None:
    method = {"get_named_params_for_schedule_validation": lambda _: given}
    message = f"`get_named_params_for_schedule_validation` to return parameters by name, got {type(given).__name__} "
    with pytest.raises(MisconfigurationException, match=message):
        session(tmp_path, type("Wrong", (StrategyAdapter,), method)).fit()


class Holder(ScheduleImplMixin):
    def __init__(self, schedule: Any) -> None:
        self.ft_schedule = schedule


def generated_in_one_phase(path: Any) -> Any:
    """Make two phases of the default schedule that lies there: all but the last pair, then that."""
    *first, last = ScheduleImplMixin.load_yaml_schedule(path).values()
    names = [name for phase in first for name in phase["params"]]
    return Holder({0: {"params": names, "max_transition_epoch": 2}, 1: last}).save_schedule(path)


class Generates(StrategyAdapter):
    def gen_ft_schedule(self, dump_loc: Any) -> Any:
        return generated_in_one_phase(super().gen_ft_schedule(dump_loc))


class GeneratesInTheCallback(FinetuningScheduler):
    @staticmethod
    def gen_ft_schedule(module: nn.Module, dump_loc: Any) -> Any:  # type: ignore[override]
        return generated_in_one_phase(ScheduleImplMixin.gen_ft_schedule(module, dump_loc))


GENERATING: dict[str, tuple[Any, type[FinetuningScheduler] | None]] = {
    "adapter": (Generates, None),
    "callback": (StrategyAdapter, GeneratesInTheCallback),
    "adapter before callback": (Generates, GeneratesInTheCallback),
}


@pytest.mark.parametrize(("adapter", "scheduler"), GENERATING.values(), ids=GENERATING)
@pytest.mark.parametrize("installs", [False, True], ids=["plain", "installing"])
def test_a_schedule_of_ones_own_making_is_executed(
    adapter: Any, scheduler: Any, installs: bool, tmp_path: Path
) -> None:
    sgd = {"optimizer_init": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.5}}}
    options = {"ft_schedule": None, "reinit_optim_cfg": sgd if installs else None}
    fitted = session(tmp_path, adapter, scheduler, **options).fit()
    assert [epoch.phase for epoch in fitted.history.epochs] == [0, 0, 1, 1, 1]
    assert [len(phase["params"]) for phase in fitted.scheduler.ft_schedule.values()] == [6, 2]
    assert [("new_optimizer" in phase) for phase in fitted.scheduler.ft_schedule.values()] == [False, installs]
    assert type(fitted.trainer.optimizers[0]).__name__ == ("Adam" if installs else "SGD")
    written = ScheduleImplMixin.load_yaml_schedule(tmp_path / "Toy_ft_schedule.yaml")
    assert [len(phase["params"]) for phase in written.values()] == [6, 2]
    assert (tmp_path / "Toy_ft_schedule_expanded.yaml").exists()


def test_a_schedule_of_ones_own_making_is_written_without_training(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        session(tmp_path, Generates, ft_schedule=None, gen_ft_sched_only=True).fit()
    assert ended.value.code == 0
    written = ScheduleImplMixin.load_yaml_schedule(tmp_path / "Toy_ft_schedule.yaml")
    assert [len(phase["params"]) for phase in written.values()] == [6, 2]


def test_what_is_written_is_checked_like_a_file_of_the_users(tmp_path: Path) -> None:
    def wrong(_: Any, dump_loc: str) -> Path:
        path = Path(dump_loc) / "mine.yaml"
        path.write_text("0:\n  params: [nowhere]\n", encoding="utf-8")
        return path

    adapter = type("Wrong", (StrategyAdapter,), {"gen_ft_schedule": wrong})
    with pytest.raises(MisconfigurationException, match=r"mine\.yaml:2, phase 0, selector 'nowhere'"):
        session(tmp_path, adapter, ft_schedule=None).fit()
    adapter = type("Nothing", (StrategyAdapter,), {"gen_ft_schedule": lambda *_: None})
    with pytest.raises(MisconfigurationException, match="expected `gen_ft_schedule` to return the path"):
        session(tmp_path, adapter, ft_schedule=None).fit()


def refuses(self: StrategyAdapter) -> None:
    if any(len(phase["params"]) < 3 for phase in self.fts_handle.ft_schedule.values()):
        raise MisconfigurationException("too few tensors for me")


VALIDATIONS: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "raises": (refuses, "too few tensors for me"),
    "none": (lambda _: None, None),
    "same": (lambda _: (2, -1), None),
    "fewer phases": (lambda _: (1, 4), r"expected `validate_ft_sched` to return 2 as the deepest phase, got \(1, 4\)"),
    "no depth": (lambda _: "fine", "expected `validate_ft_sched` to return 2 as the deepest phase, got 'fine'"),
}


@pytest.mark.parametrize(("validate", "message"), VALIDATIONS.values(), ids=VALIDATIONS)
def test_a_validation_of_ones_own_is_heard(validate: Any, message: str | None, tmp_path: Path) -> None:
    tried = session(tmp_path, type("Validates", (StrategyAdapter,), {"validate_ft_sched": validate}))
    if message is None:
        assert tried.fit().scheduler.curr_depth == 2
        return
    with pytest.raises(MisconfigurationException, match=message):
        tried.fit()
    assert len(trainable(tried.module)) == 8
    assert tried.history.epochs == []


@pytest.mark.parametrize("hook", ["on_before_init_fts", "on_after_init_fts", "on_before_fts_fit_start"])
def test_what_a_hook_raises_ends_the_fit_and_leaves_the_module_as_it_came(hook: str, tmp_path: Path) -> None:
    def fails(_: StrategyAdapter) -> None:
        raise RuntimeError(hook)

    tried = session(tmp_path, type("Fails", (StrategyAdapter,), {hook: fails}))
    with pytest.raises(RuntimeError, match=hook):
        tried.fit()
    assert len(trainable(tried.module)) == 8


def test_hooks_are_not_called_for_a_schedule_that_is_wrong(tmp_path: Path) -> None:
    noted: list[str] = []
    hooks = ("on_before_init_fts", "validate_ft_sched", "on_after_init_fts", "on_before_fts_fit_start")
    methods = {name: lambda _, name=name: noted.append(name) for name in hooks}
    with pytest.raises(MisconfigurationException, match="nowhere"):
        session(tmp_path, type("Notes", (StrategyAdapter,), methods), ft_schedule={0: {"params": ["nowhere"]}}).fit()
    assert noted == ["on_before_init_fts"]
