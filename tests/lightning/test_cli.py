"""The callback in a LightningCLI configuration."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ruamel.yaml import YAML

from finetuning_scheduler import FinetuningScheduler
from tests.reference.networks import HEAD, THIRD
from tests.reference.toys import Toy

if TYPE_CHECKING:
    from pathlib import Path

# Every parameter of the constructor; ``reinit_*`` belong to implicit mode, ``ft_schedule`` to explicit mode.
COMMON: dict[str, Any] = {
    "max_depth": 1,
    "base_max_lr": 0.001,
    "restore_best": True,
    "gen_ft_sched_only": False,
    "epoch_transitions_only": False,
    "strategy_adapter_cfg": None,
    "custom_strategy_adapters": None,
    "allow_untested": True,
    "apply_lambdas_new_pgs": True,
    "logging_level": 20,
    "enforce_phase0_params": True,
    "frozen_bn_track_running_stats": True,
    "frozen_modules_mode": "train",
    "intra_epoch_transitions": False,
    "frozen_prefix": "validation",
    "prefix_budget": 1_000_000,
    "prefix_dir": None,
    "prefix_dtype": None,
}
OPTIMIZER = {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02, "momentum": 0.9}}}
LR_SCHEDULER = {
    "lr_scheduler_init": {
        "class_path": "torch.optim.lr_scheduler.StepLR",
        "init_args": {"step_size": 1, "gamma": 0.7},
    },
    "pl_lrs_cfg": {"interval": "epoch", "frequency": 1, "name": "Explicit"},
    "use_current_optimizer_pg_lrs": True,
}


class CliToy(Toy):
    """A module whose constructor takes nothing."""

    def __init__(self) -> None:
        super().__init__()


def arguments(mode: str, tmp_path: Path) -> dict[str, Any]:
    implicit = {"ft_schedule": None, "reinit_optim_cfg": OPTIMIZER, "reinit_lr_cfg": LR_SCHEDULER}
    explicit = {"ft_schedule": str(tmp_path / "schedule.yaml"), "reinit_optim_cfg": None, "reinit_lr_cfg": None}
    return COMMON | {"log_dir": str(tmp_path / "artifacts")} | (implicit if mode == "implicit" else explicit)


def command_line(monkeypatch: pytest.MonkeyPatch, *words: str) -> LightningCLI:
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse
    return LightningCLI(CliToy, args=list(words), save_config_callback=None, seed_everything_default=False)


def test_the_configurations_set_every_argument(tmp_path: Path) -> None:
    parameters = set(inspect.signature(FinetuningScheduler.__init__).parameters) - {"self"}
    assert arguments("explicit", tmp_path).keys() == parameters


@pytest.mark.parametrize("mode", ["implicit", "explicit"])
def test_fit_from_a_configuration(mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    yaml = YAML(typ="safe")
    schedule = {0: {"params": list(HEAD), "max_transition_epoch": 1}, 1: {"params": list(THIRD), "lr": 0.05}}
    yaml.dump(schedule, tmp_path / "schedule.yaml")
    callbacks = [
        {"class_path": "finetuning_scheduler.FinetuningScheduler", "init_args": arguments(mode, tmp_path)},
        {"class_path": "finetuning_scheduler.FTSEarlyStopping", "init_args": {"monitor": "val_loss", "patience": 1}},
        {"class_path": "finetuning_scheduler.FTSCheckpoint", "init_args": {"monitor": "val_loss"}},
    ]
    trainer = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 3,
        "default_root_dir": str(tmp_path),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": callbacks,
    }
    yaml.dump({"trainer": trainer}, tmp_path / "config.yaml")

    command = command_line(monkeypatch, "fit", "--config", str(tmp_path / "config.yaml"))
    (scheduler,) = (c for c in command.trainer.callbacks if isinstance(c, FinetuningScheduler))
    assert scheduler.max_depth == 1
    assert (tmp_path / "artifacts" / "CliToy_ft_schedule.yaml").exists()
    assert scheduler.curr_depth == (1 if mode == "explicit" else scheduler.curr_depth)


def test_arguments_given_as_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = command_line(
        monkeypatch,
        "fit",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.callbacks+=finetuning_scheduler.FinetuningScheduler",
        "--trainer.callbacks.max_depth=2",
        "--trainer.callbacks.base_max_lr=null",
    )
    (scheduler,) = (c for c in command.trainer.callbacks if isinstance(c, FinetuningScheduler))
    assert scheduler.max_depth == 2


def test_a_schedules_file_is_not_read_by_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("0:\n  params: [network.hed.weight]\n", encoding="utf-8")
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(str(path))}:2, phase 0, selector "):
        command_line(
            monkeypatch,
            "fit",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.max_epochs=1",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.callbacks+=finetuning_scheduler.FinetuningScheduler",
            f"--trainer.callbacks.ft_schedule={path}",
        )


@pytest.mark.parametrize("words", [["fit", "--help"], ["--help"]])
def test_help(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        command_line(monkeypatch, *words)
    assert leave.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_help_of_the_callback_explains_its_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leave:
        command_line(monkeypatch, "fit", "--trainer.callbacks.help", "finetuning_scheduler.FinetuningScheduler")
    assert leave.value.code == 0
    printed = capsys.readouterr().out
    for name in inspect.signature(FinetuningScheduler.__init__).parameters:
        assert name == "self" or name in printed
