"""Every strategy: what comes before optimizers are made, and a schedule that is written without any."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from finetuning_scheduler.fts_supporters import ScheduleImplMixin
from tests.reference import cases, harness
from tests.reference.cases import AN_EPOCH_EACH, Classifier, names_in
from tests.reference.networks import HEAD
from tests.reference.recipe import momentum_sgd

from .test_strategies import STRATEGIES, Case

NAMES = (
    "ddp adamw",
    "ddp static_graph",
    "ddp zero",
    "fsdp",
    "fsdp one unit",
    "fsdp wrapped by the module",
    "fsdp use_orig_params=False",
    "fsdp use_orig_params=False, wrapped by the module",
    "fsdp2 adamw",
    "fsdp2 plan",
    "tensor parallel",
    "2-d mesh",
)


def met(module: Classifier) -> set[str]:
    """The one-device names of what is trained."""
    found = [names_in(name, each) for name, each in module.named_parameters() if each.requires_grad]
    return {name for names in found for name in names}


def module_of(case: Case, **methods: Any) -> Classifier:
    """The module of a case, of a class with other methods."""
    make = case.module
    kind, options = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    return type(kind.__name__, (kind,), methods)(case.optimizer, **options)  # type: ignore[call-overload]


# --- the state of phase 0 --------------------------------------------------------------------------------------------


def fit_and_resume(root: Path, name: str) -> list[set[str]]:
    """What `configure_optimizers` meets in a fit that goes through all phases, and when its end is resumed from.

    The optimizer is made of what is trained, and is not to be corrected.
    """
    from finetuning_scheduler import FinetuningScheduler

    case, seen, found = STRATEGIES[name], [], []

    def configure_optimizers(self: Classifier) -> Any:
        seen.append(met(self))
        return case.optimizer([each for each in self.parameters() if each.requires_grad])

    for epochs, path in ((3, None), (4, root / "saved.ckpt")):
        scheduler = FinetuningScheduler(
            AN_EPOCH_EACH, restore_best=False, enforce_phase0_params=False, strategy_adapter_cfg=case.adapter
        )
        trainer = cases.make_trainer(root, case.ranks, case.strategy(), callbacks=[scheduler], max_epochs=epochs)
        module = module_of(case, configure_optimizers=configure_optimizers)
        trainer.fit(module, ckpt_path=path)
        found.append(scheduler.curr_depth)
        trainer.save_checkpoint(root / "saved.ckpt")
        assert len(met(module)) == 10
    assert found == [2, 2]
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_is_made_in_phase_0(name: str, tmp_path: Path) -> None:
    for seen in harness.run_ranks(fit_and_resume, STRATEGIES[name].ranks, tmp_path, name):
        assert seen == 2 * [set(HEAD)]


def fit_twice(root: Path, name: str) -> list[set[str]]:
    from finetuning_scheduler import FinetuningScheduler

    case, seen = STRATEGIES[name], []

    def configure_optimizers(self: Classifier) -> Any:
        seen.append(met(self))
        return case.optimizer([each for each in self.parameters() if each.requires_grad])

    module = module_of(case, configure_optimizers=configure_optimizers)
    scheduler = FinetuningScheduler(AN_EPOCH_EACH, restore_best=False, strategy_adapter_cfg=case.adapter)
    trainer = cases.make_trainer(root, case.ranks, case.strategy(), callbacks=[scheduler], max_epochs=3)
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module)
    return seen


@pytest.mark.parametrize("name", ["ddp adamw", "fsdp", "fsdp use_orig_params=False", "fsdp2 plan"])
def test_it_is_in_a_second_fit(name: str, tmp_path: Path) -> None:
    for seen in harness.run_ranks(fit_twice, 2, tmp_path, name):
        assert seen == 2 * [set(HEAD)]


class Frozen(Classifier):
    """Comes with nothing that requires gradients, which DDP refuses to wrap."""

    def __init__(self, optimizer: Any = momentum_sgd) -> None:
        super().__init__(optimizer)
        self.requires_grad_(False)


def test_a_module_frozen_by_its_author_trains_under_ddp(tmp_path: Path) -> None:
    for epochs in harness.run_ranks(cases.fit, 2, tmp_path, 2, cases.ddp, Frozen):
        cases.assert_same_epochs(epochs, cases.on_one_device())


def fit_frozen_with_nothing_to_thaw(root: Path) -> tuple[str, set[str]]:
    from finetuning_scheduler import FinetuningScheduler

    module = Frozen()
    with pytest.raises(MisconfigurationException) as error:
        cases.make_trainer(root, 2, cases.ddp(), callbacks=[FinetuningScheduler()]).fit(module)
    return str(error.value), met(module)


def test_what_ddp_was_lent_is_frozen_again(tmp_path: Path) -> None:
    for message, trained in harness.run_ranks(fit_frozen_with_nothing_to_thaw, 2, tmp_path):
        assert "got one of which all are frozen" in message
        assert trained == set()


# --- a schedule that is written without an optimizer -----------------------------------------------------------------


class Told(Callback):
    """Notes how its run ends."""

    def __init__(self) -> None:
        self.hooks: list[str] = []

    def on_exception(self, *_: Any) -> None:
        self.hooks.append("exception")

    def teardown(self, *_: Any, **__: Any) -> None:
        self.hooks.append("teardown")


def no_data(self: Classifier) -> Any:
    raise AssertionError("no data is to be loaded")


def no_optimizer(self: Classifier) -> Any:
    raise AssertionError("no optimizer is to be made")


def generate_only(root: Path, name: str) -> tuple[object, list[str], int]:
    """The exit status, what a callback was told, and how many files this rank has written."""
    from finetuning_scheduler import FinetuningScheduler, _source

    write, written = _source.save_schedule, []
    _source.save_schedule = lambda *arguments, **options: (written.append(1), write(*arguments, **options))[1]
    case, told = STRATEGIES[name], Told()
    module = module_of(case, configure_optimizers=no_optimizer, train_dataloader=no_data)
    scheduler = FinetuningScheduler(gen_ft_sched_only=True, log_dir=root, strategy_adapter_cfg=case.adapter)
    trainer = cases.make_trainer(root, case.ranks, case.strategy(), callbacks=[told, scheduler])
    with pytest.raises(SystemExit) as leave:
        trainer.fit(module, ckpt_path=root / "none.ckpt")
    return leave.value.code, told.hooks, len(written)


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_leaves_with_one_file_written(name: str, tmp_path: Path) -> None:
    ranks = STRATEGIES[name].ranks
    results = harness.run_ranks(generate_only, ranks, tmp_path, name)
    assert results == [(0, ["teardown"], 1), *(ranks - 1) * [(0, ["teardown"], 0)]]
    (path,) = tmp_path.iterdir()
    expected = ScheduleImplMixin.gen_ft_schedule(Classifier(), tmp_path / "alone")
    assert path.name.endswith("_ft_schedule.yaml")
    assert path.read_text(encoding="utf-8") == Path(expected).read_text(encoding="utf-8")
