"""What importing the package loads, told by processes that import nothing else."""

import json
import re
import subprocess
import sys
import typing

import pytest

import finetuning_scheduler
from finetuning_scheduler import core, fts, fts_supporters, strategy_adapters, types

pytestmark = pytest.mark.quick

LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")
BLOCK_LIGHTNING = f"import sys; sys.modules.update(dict.fromkeys({LIGHTNING!r}))"
TRAIN_IN_PHASES = """
import torch
from finetuning_scheduler.core import PhaseRunner
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
schedule = {0: {"params": ["1.*"], "max_transition_epoch": 1}, 1: {"params": ["0.*"], "max_transition_epoch": 2}}
runner = PhaseRunner(model, optimizer, schedule)
while not runner.finished:
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    runner.step()
    runner.epoch_end(1.0)
print(runner.phase)
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# What importing each module must not load; all are imported in one process, the lightest first.
KEPT_OUT: dict[str, set[str]] = {
    "finetuning_scheduler": {*LIGHTNING, "pydantic", "ruamel", "ruamel.yaml", "rich", "typer", "torch"},
    "finetuning_scheduler.errors": {*LIGHTNING},
    "finetuning_scheduler.types": {*LIGHTNING, "rich", "typer", "matplotlib", "torchmetrics"},
    "finetuning_scheduler.core": {*LIGHTNING, "rich", "typer", "matplotlib", "torchmetrics"},
    "finetuning_scheduler.core.loop": {*LIGHTNING, "rich", "typer", "matplotlib", "torchmetrics"},
}
OF_THE_COMMAND: dict[str, set[str]] = {
    "finetuning_scheduler.cli.app": {*LIGHTNING, "pydantic", "ruamel", "rich.table", "torch", "transformers"},
    "finetuning_scheduler.cli.tensor_files": {*LIGHTNING, "torch"},
    "finetuning_scheduler.cli.findings": {*LIGHTNING, "torch"},
}
LIST_LOADED = """
import importlib, json, sys
loaded = {}
for module in sys.argv[1:]:
    importlib.import_module(module)
    loaded[module] = list(sys.modules)
print(json.dumps(loaded))
"""


@pytest.mark.parametrize("kept_out", [KEPT_OUT, OF_THE_COMMAND], ids=["package", "command"])
def test_an_import_loads_nothing_heavier_than_it_needs(kept_out: dict[str, set[str]]) -> None:
    loaded = json.loads(run(LIST_LOADED, *kept_out))
    assert loaded.keys() == kept_out.keys()
    too_heavy = {module: kept_out[module] & {*names} for module, names in loaded.items()}
    assert too_heavy == {module: set() for module in kept_out}


def test_core_trains_and_public_names_resolve_where_lightning_cannot_be_imported() -> None:
    names = "import finetuning_scheduler as f; print(f.Schedule.__module__, f.Phase.__name__, f.PhaseRunner.__name__)"
    phase, resolved = run(f"{BLOCK_LIGHTNING}\n{TRAIN_IN_PHASES}\n{names}").splitlines()
    assert phase == "1"
    assert re.fullmatch(r"finetuning_scheduler\.core\..* Phase PhaseRunner", resolved)


@pytest.mark.parametrize("name", finetuning_scheduler.__all__)
def test_every_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(finetuning_scheduler, name).__name__ == name
    assert name in dir(finetuning_scheduler)


def test_public_names_have_one_home_each() -> None:
    assert fts.FinetuningScheduler is finetuning_scheduler.FinetuningScheduler
    assert fts_supporters.FTSEarlyStopping is finetuning_scheduler.FTSEarlyStopping
    assert fts_supporters.FTSCheckpoint is finetuning_scheduler.FTSCheckpoint
    assert callable(fts_supporters.ScheduleImplMixin.gen_ft_schedule)
    assert {"FinetuningScheduler", "FTSEarlyStopping", "FTSCheckpoint", "Schedule", "Phase"} <= {
        *finetuning_scheduler.__all__
    }
    assert strategy_adapters.StrategyAdapter.__name__ == "StrategyAdapter"


def test_types_are_those_of_the_signatures() -> None:
    hints = typing.get_type_hints(finetuning_scheduler.FinetuningScheduler.__init__)
    of_a_loop = typing.get_type_hints(core.PhaseRunner.__init__)
    assert hints["ft_schedule"] == of_a_loop["schedule"] == types.ScheduleSource | None
    assert hints["frozen_modules_mode"] == of_a_loop["frozen_modules_mode"] == types.FrozenModulesMode
    assert of_a_loop["mode"] == types.Mode
    assert of_a_loop["report"] == types.Report | None
    generation = typing.get_type_hints(fts_supporters.ScheduleImplMixin.gen_ft_schedule)
    assert generation["heuristic"] == types.Heuristic
    assert {*types.__all__} == {"FrozenModulesMode", "Heuristic", "Mode", "Report", "ScheduleSource"}


def test_a_module_takes_no_public_name_of_its_package_away() -> None:
    code = (
        "from finetuning_scheduler import core; import finetuning_scheduler.core.session; print(core.prepare.__name__)"
    )
    assert run(code) == "prepare"
    assert run(code.replace("core.prepare.__name__", "type(core.prepare).__name__")) == "function"


def test_every_name_of_core_resolves() -> None:
    assert [name for name in core.__all__ if getattr(core, name).__name__ != name] == []


@pytest.mark.parametrize("name", ["FinetuningSchedular", "core2", "_private"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"^module 'finetuning_scheduler' has no attribute '{name}'$"):
        getattr(finetuning_scheduler, name)
