"""What a subclass defines and nothing would call: refused with what to use instead, or named in a warning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from finetuning_scheduler import FinetuningScheduler
from finetuning_scheduler.strategy_adapters import StrategyAdapter
from tests.reference.recipe import simple_recipe
from tests.reference.toys import Session

# By method, a part of what to use instead.
CALLBACK = {
    "add_optimizer_groups": "`lr_decay`",
    "finetune_function": "`should_transition`",
    "freeze_before_training": "in no phase stays frozen",
    "init_fts": "`on_before_init_fts`",
    "init_ft_sched": "`ft_schedule`",
    "reinit_lr_scheduler": "`reinit_lr_cfg`",
    "reinit_optimizer": "`new_optimizer`",
    "step_pg": "`super().step()`",
}
ADAPTER = {
    "before_restore_model": "`restore`",
    "fts_handle": "`self.fts_handle` is the callback",
    "fts_optim_transform": "`view`",
    "load_optimizer_state_dict": "`resume`",
    "logical_param_translation": "`view`",
    "pls_handle": "`self.pls_handle` is the strategy",
}


def method(self: object, *_: Any, **__: Any) -> None:
    raise AssertionError("it is called after all")


LINE = f"{__file__}:{method.__code__.co_firstlineno}"


def session(root: Path, scheduler: type[Any] = FinetuningScheduler, adapter: type[Any] | None = None) -> Session:
    options = {} if adapter is None else {"custom_strategy_adapters": {"single_device": adapter}}
    return Session(simple_recipe(epochs=3), root, scheduler_class=scheduler, scheduler_options=options)


def refused(tried: Session) -> str:
    with pytest.raises(MisconfigurationException) as error:
        tried.fit()
    assert tried.history.steps == []
    assert all(parameter.requires_grad for parameter in tried.module.parameters())
    return str(error.value)


@pytest.mark.parametrize(("name", "instead"), CALLBACK.items())
def test_methods_of_the_callback(name: str, instead: str, tmp_path: Path) -> None:
    text = refused(session(tmp_path, type("Mine", (FinetuningScheduler,), {name: method})))
    assert text.startswith(f"{LINE}: expected no `{name}`, which is never called here, got one in Mine. Fix: ")
    assert instead in text


@pytest.mark.parametrize(("name", "instead"), ADAPTER.items())
def test_methods_of_an_adapter(name: str, instead: str, tmp_path: Path) -> None:
    text = refused(session(tmp_path, adapter=type("Mine", (StrategyAdapter,), {name: method})))
    assert text.startswith(f"{LINE}: expected no `{name}`, which is never called here, got one in Mine. Fix: ")
    assert instead in text


def by_hand(scheduler: FinetuningScheduler) -> None:
    vars(scheduler)["step_pg"] = MethodType(method, scheduler)


def below(*parents: type[Any], **content: Any) -> type[Any]:
    return type("Mine", (*parents, FinetuningScheduler), content)


@functools.wraps(method)
def wrapping(*arguments: Any) -> None:
    method(*arguments)


Mixin = type("Mixin", (), {"step_pg": method})
Parent = type("Parent", (FinetuningScheduler,), {"step_pg": method})
# A class, and where its `step_pg` is.
PLACES: dict[str, tuple[type[Any], str]] = {
    "mixin": (below(Mixin), "Mixin"),
    "parent": (type("Mine", (Parent,), {}), "Parent"),
    "grandparent": (type("Mine", (type("Between", (Parent,), {}),), {}), "Parent"),
    "static method": (below(step_pg=staticmethod(method)), "Mine"),
    "class method": (below(step_pg=classmethod(method)), "Mine"),
    "property": (below(step_pg=property(method)), "Mine"),
    "cached property": (below(step_pg=functools.cached_property(method)), "Mine"),
    "wrapped": (below(step_pg=wrapping), "Mine"),
    "partial": (below(step_pg=functools.partial(method)), "Mine"),
    "partial method": (below(step_pg=functools.partialmethod(method, 1)), "Mine"),
    "dispatching method": (below(step_pg=functools.singledispatchmethod(method)), "Mine"),
}


@pytest.mark.parametrize(("scheduler", "place"), PLACES.values(), ids=PLACES)
def test_a_method_counts_wherever_it_is_set(scheduler: type[Any], place: str, tmp_path: Path) -> None:
    assert refused(session(tmp_path, scheduler)).startswith(
        f"{LINE}: expected no `step_pg`, which is never called here, got one in {place}. Fix: "
    )


def test_a_method_set_on_the_object_counts(tmp_path: Path) -> None:
    tried = session(tmp_path)
    by_hand(tried.scheduler)
    assert "got one in this FinetuningScheduler. Fix: " in refused(tried)


def test_everything_is_told_in_one_message(tmp_path: Path) -> None:
    adapter = type("Other", (StrategyAdapter,), dict.fromkeys(ADAPTER, method))
    tried = session(tmp_path, below(**dict.fromkeys(CALLBACK, method)), adapter)
    tried.scheduler.base_max_lr = -1.0
    text = refused(tried)
    assert text.startswith(f"{len(CALLBACK) + len(ADAPTER) + 1} problems found:")
    assert [name for name in (*CALLBACK, *ADAPTER) if f"expected no `{name}`" not in text] == []
    assert "expected `base_max_lr` to be a number above 0, got -1.0" in text


def test_a_schedule_is_not_written_either(tmp_path: Path) -> None:
    tried = session(tmp_path, below(init_ft_sched=method))
    tried.scheduler.gen_ft_sched_only = True
    assert "expected no `init_ft_sched`" in refused(tried)
    assert [*tmp_path.glob("*.yaml")] == []


def helper(self: Any) -> str:
    return "mine"


class WithHelpers(FinetuningScheduler):
    """Has methods of its own, a value under a documented name, and overrides what is called."""

    step_pg = None
    init_fts = 3

    def on_train_epoch_end(self, *arguments: Any) -> None:
        super().on_train_epoch_end(*arguments)
        self.told = self.helper()

    def helper(self) -> str:
        return "mine"

    def save_schedule(self, path: Any) -> Path:
        return super().save_schedule(path)


class AdapterWithHelpers(StrategyAdapter):
    """Has methods of its own."""

    def thaw_hook(self) -> None:
        """Called by nobody, and by no name of a hook."""

    def on_phase_thawed(self) -> None:
        self.thaw_hook()


def test_helpers_are_the_users_own(tmp_path: Path, messages: Callable[[], list[str]]) -> None:
    fitted = session(tmp_path, WithHelpers, AdapterWithHelpers).fit()
    assert fitted.scheduler.told == "mine"
    assert [text for text in messages() if "never called" in text] == []


def test_methods_that_are_called_like_hooks_are_named_in_a_warning(
    tmp_path: Path, messages: Callable[[], list[str]]
) -> None:
    scheduler = below(on_train_epoch_begin=method, on_my_own_account=method)
    adapter = type("Other", (StrategyAdapter,), {"on_phase_thawd": method})
    assert session(tmp_path, scheduler, adapter).fit().scheduler.curr_depth == 1
    told = [text for text in messages() if "never called" in text]
    assert len(told) == 3
    assert "expected no `on_my_own_account`, which" in told[0]
    assert ". Fix: The hooks are on_" in told[0]
    assert "`on_train_epoch_begin`" in told[1]
    assert "Did you mean `on_train_epoch_end`?" in told[1] or "Did you mean `on_train_epoch_start`?" in told[1]
    assert f"{LINE}: expected no `on_phase_thawd`" in told[2]
    assert "Did you mean `on_phase_thawed`?" in told[2]


@pytest.mark.parametrize("name", ["on_phase_thawed", "on_after_init_fts", "view"])
def test_a_method_of_an_adapter_has_to_be_one(name: str, tmp_path: Path) -> None:
    text = refused(session(tmp_path, adapter=type("Mine", (StrategyAdapter,), {name: property(helper)})))
    assert f"expected `{name}` of Mine to be methods" in text


def notes(self: StrategyAdapter, told: str = "called") -> None:
    self.trainer.told = told


@pytest.mark.parametrize(
    ("hook", "told"),
    [(notes, "called"), (functools.partialmethod(notes, "partial"), "partial"), (staticmethod(lambda: None), None)],
    ids=["method", "partial method", "static method"],
)
def test_a_method_of_an_adapter_may_be_made_of_another(hook: Any, told: str | None, tmp_path: Path) -> None:
    fitted = session(tmp_path, adapter=type("Mine", (StrategyAdapter,), {"on_after_init_fts": hook})).fit()
    assert getattr(fitted.trainer, "told", None) == told


UNUSED: dict[str, tuple[Any, str]] = {
    "another strategy": ({"ddp": StrategyAdapter}, "the strategy in use (SingleDeviceStrategy, single_device) in"),
    "not to be imported": (
        {"ddp": "nowhere:All", "fsdp": "nowhere:Too"},
        "strategy_adapters`, got ddp, fsdp. Fix: ",
    ),
    "no mapping": ([StrategyAdapter], "expected `custom_strategy_adapters` to be adapters by strategy, got ["),
    "no adapter": ({"single_device": FinetuningScheduler}, "expected a subclass of StrategyAdapter, got <class"),
    "no name": ({"single_device": 3}, "expected a subclass of StrategyAdapter, got 3"),
}


@pytest.mark.parametrize(("adapters", "message"), UNUSED.values(), ids=UNUSED)
def test_adapters_have_to_be_for_the_strategy_in_use(adapters: Any, message: str, tmp_path: Path) -> None:
    tried = session(tmp_path)
    tried.scheduler.custom_strategy_adapters = adapters
    assert message in refused(tried)


def test_adapters_of_several_strategies_may_be_named_together(tmp_path: Path) -> None:
    tried = session(tmp_path, adapter=AdapterWithHelpers)
    tried.scheduler.custom_strategy_adapters |= {"ddp": "nowhere:All"}
    assert type(tried.fit().scheduler.strategy_adapter) is AdapterWithHelpers
