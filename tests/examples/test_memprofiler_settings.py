"""The memory profiler's settings: in Python, in a LightningCLI configuration, and what is said about wrong ones."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from ruamel.yaml import YAML
from torch import nn

from fts_examples.profiling import (
    MemoryHooks,
    MemProfiler,
    MemProfilerCfg,
    MemProfilerFuncs,
    MemProfilerSchedule,
    SavedTensorsFuncs,
)
from fts_examples.profiling.memprofiler import MemProfiler as FromItsModule
from fts_examples.profiling.memprofiler import MemProfilerCfg as CfgFromItsModule
from tests.examples.memprofiled import Measured, read, trainer

FIELDS = """
    enabled collect_funcs cuda_allocator_history track_fsdp_mem fsdp_mem_track_module_depth fsdp_mem_tracker_tabulate
    fsdp_mem_tracker_units fsdp_mem_tracker_root_module dump_memorystats_pickle dump_memorystats_yaml schedule save_dir
    enable_memory_hooks enable_saved_tensors_hooks memory_hooks saved_tensors_funcs save_hook_attrs
    retain_hooks_for_funcs
"""


def names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_the_settings_are_those_that_are_documented() -> None:
    assert names(MemProfilerCfg) == FIELDS.split()
    assert names(MemProfilerFuncs) == ["default", "cpu", "cuda", "cuda_allocator_history", "fsdp"]
    assert names(MemProfilerSchedule) == ["warmup_iters", "max_iter"]
    assert (FromItsModule, CfgFromItsModule) == (MemProfiler, MemProfilerCfg)


def hook(*_: Any) -> None: ...


PREFIX = "expected methods under @MemProfiler.memprofilable, got"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dictionary": (
        {"collect_funcs": {"cpu": {"part"}}},
        "collect_funcs: expected a MemProfilerFuncs, got {'cpu'",
    ),
    "none": ({"retain_hooks_for_funcs": None}, "retain_hooks_for_funcs: expected a list of names, got None."),
    "number": (
        {"collect_funcs": MemProfilerFuncs(default=5)},
        "collect_funcs.default: expected a list of names, got 5.",
    ),
    "word": ({"enable_memory_hooks": "no"}, "enable_memory_hooks: expected a bool, got 'no'."),
    "negative": (
        {"schedule": MemProfilerSchedule(-1, -2)},
        "schedule.warmup_iters: expected a whole number of at least 0, got -1.\nschedule.max_iter: expected a whole ",
    ),
    "fraction": ({"schedule": MemProfilerSchedule(0.5)}, "schedule.warmup_iters: expected a whole number"),
    "truth": ({"schedule": MemProfilerSchedule(max_iter=True)}, "schedule.max_iter: expected a whole number"),
    "depth": ({"fsdp_mem_track_module_depth": "2"}, "fsdp_mem_track_module_depth: expected a whole number of at least"),
    "no call": ({"schedule": MemProfilerSchedule(3, 3)}, "expected max_iter above warmup_iters, got 3 and 3: no call"),
    "unit": ({"fsdp_mem_tracker_units": "MB"}, "expected one of B, KiB, MiB, GiB, got 'MB'."),
    "misspelt": (
        {"collect_funcs": MemProfilerFuncs(cpu={"train_step"})},
        f"collect_funcs.cpu: {PREFIX} 'train_step', no method of Measured. Did you mean 'training_step'?",
    ),
    "not decorated": (
        {"collect_funcs": MemProfilerFuncs(default={"forward"})},
        f"collect_funcs.default: {PREFIX} 'forward', a method that is not decorated. "
        "Decorated: part, training_step, validation_step.",
    ),
    "retained": (
        {"retain_hooks_for_funcs": {"training_stp"}},
        f"retain_hooks_for_funcs: {PREFIX} 'training_stp', no method of Measured. Did you mean 'training_step'?",
    ),
    "no list": ({"collect_funcs": MemProfilerFuncs(fsdp="part")}, "collect_funcs.fsdp: expected a list of names, got"),
    "no module": (
        {"memory_hooks": MemoryHooks("no_such.pre", hook)},
        "memory_hooks.pre_forward: expected a function or its import path, got 'no_such.pre': No module named",
    ),
    "no dot": ({"memory_hooks": MemoryHooks("pre", hook)}, "memory_hooks.pre_forward: expected a function or its"),
    "no function": ({"saved_tensors_funcs": SavedTensorsFuncs("math.pi", hook)}, "got 'math.pi', a float."),
    "half": (
        {"saved_tensors_funcs": SavedTensorsFuncs(pack=hook)},
        "saved_tensors_funcs: expected both pack and unpack, got one of them.",
    ),
    "taken": (
        {"enable_memory_hooks": True, "save_hook_attrs": ("in_features",)},
        "save_hook_attrs: expected attributes that only hooks set, got 'in_features', which body has already.",
    ),
    "plain module": ({"track_fsdp_mem": True}, "track_fsdp_mem: expected a module under `torch.distributed.fsdp.fully"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_told_before_the_first_batch(case: str, tmp_path: Path) -> None:
    arguments, message = WRONG[case]
    module = Measured()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared here
        trainer(tmp_path, MemProfiler(MemProfilerCfg(**arguments))).fit(module)
    assert message in str(caught.value)
    assert module.batches == 0
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in module.modules())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{}, {"num_sanity_val_steps": 2}], ids=["training", "sanity check"])
@pytest.mark.parametrize("run", ["fit", "validate"])
def test_a_module_that_is_not_sharded_is_told_before_any_kind_of_batch(
    run: str, arguments: Any, tmp_path: Path
) -> None:
    module = Measured()
    runner = trainer(tmp_path, MemProfiler(MemProfilerCfg(track_fsdp_mem=True)), **arguments)
    with pytest.raises(ValueError, match="Fix: use ModelParallelStrategy"):
        getattr(runner, run)(module)
    assert module.batches == 0


def test_a_folder_that_cannot_be_written_to_is_told_before_the_first_batch(tmp_path: Path) -> None:
    module, file = Measured(), tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"save_dir: expected a folder that can be written to, got '.*file/memory'"):
        trainer(tmp_path, MemProfiler(MemProfilerCfg(save_dir=str(file / "memory")))).fit(module)
    assert module.batches == 0


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    cfg = MemProfilerCfg(schedule=MemProfilerSchedule(-1), fsdp_mem_tracker_units="bytes", save_hook_attrs="rss")
    with pytest.raises(ValueError, match=r"warmup_iters(.|\n)*units(.|\n)*save_hook_attrs"):
        trainer(tmp_path, MemProfiler(cfg)).fit(Measured())


class Undecorated(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch)

    def predict_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(2, 1))


def test_a_module_without_decorated_methods_is_told_unless_the_profiler_is_off(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Undecorated: expected methods under @MemProfiler\.memprofilable, got none"):
        trainer(tmp_path, MemProfiler()).predict(Undecorated())
    trainer(tmp_path, MemProfiler(MemProfilerCfg(enabled=False))).predict(Undecorated())


@pytest.mark.parametrize("wrong", [property(hook), 3])
def test_only_methods_are_decorated(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"@MemProfiler\.memprofilable: expected a method, got"):
        MemProfiler.memprofilable(wrong)


def test_a_static_method_is_called_and_is_not_taken_for_a_measured_one(tmp_path: Path) -> None:
    class Static(Undecorated):
        @staticmethod
        @MemProfiler.memprofilable
        def part(x: int = 1) -> int:
            return x + 1

    assert (Static.part(), Static.part(2), Static().part(x=3)) == (2, 3, 4)
    with pytest.raises(ValueError, match=r"Static: expected methods under @MemProfiler\.memprofilable, got none"):
        trainer(tmp_path, MemProfiler()).predict(Static())


def test_self_can_be_named() -> None:
    assert Measured.part(self=Measured(), batch=torch.ones(1, 3)).ndim == 0


def test_a_second_profiler_is_told_unless_it_is_off(tmp_path: Path) -> None:
    first, off = MemProfiler(), MemProfiler(MemProfilerCfg(enabled=False))
    trainer(tmp_path, off, first).fit(Measured())
    assert first.snapshots
    module = Measured()
    with pytest.raises(ValueError, match="expected one profiler that is enabled, got a second one"):
        trainer(tmp_path, first, MemProfiler()).fit(module)
    trainer(tmp_path, first).fit(module)
    assert first.snapshots


def test_a_configuration_of_another_kind_is_told() -> None:
    with pytest.raises(TypeError, match="expected a MemProfilerCfg, got dict"):
        MemProfiler({"enabled": True})


CONFIG = {
    "enabled": True,
    "collect_funcs": {"default": ["training_step"], "cpu": ["part", "training_step"], "fsdp": []},
    "cuda_allocator_history": True,
    "track_fsdp_mem": False,
    "fsdp_mem_track_module_depth": 3,
    "fsdp_mem_tracker_tabulate": True,
    "fsdp_mem_tracker_units": "KiB",
    "fsdp_mem_tracker_root_module": "body",
    "dump_memorystats_pickle": True,
    "dump_memorystats_yaml": True,
    "schedule": {"warmup_iters": 1, "max_iter": 2},
    "enable_memory_hooks": True,
    "enable_saved_tensors_hooks": True,
    "memory_hooks": {
        "pre_forward": "fts_examples.profiling.module_hooks.rss_before_forward",
        "post_forward": "fts_examples.profiling.module_hooks.rss_after_forward",
    },
    "saved_tensors_funcs": {
        "pack": "fts_examples.profiling.saved_tensors.keep",
        "unpack": "fts_examples.profiling.saved_tensors.unchanged",
    },
    "save_hook_attrs": ["forward_calls"],
    "retain_hooks_for_funcs": ["part"],
}


def test_every_setting_can_be_written_in_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*CONFIG, "save_dir"} == set(names(MemProfilerCfg))
    cfg = CONFIG | {"save_dir": str(tmp_path / "memory")}
    quiet = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    config = {
        "trainer": {
            **dict.fromkeys(quiet, False),
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(tmp_path),
            "callbacks": [{"class_path": "fts_examples.profiling.MemProfiler", "init_args": {"cfg": cfg}}],
        }
    }
    path = tmp_path / "given.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(config, file)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(path)])
    cli = LightningCLI(Measured, seed_everything_default=1)
    profiler = next(each for each in cli.trainer.callbacks if isinstance(each, MemProfiler))
    assert profiler.cfg.schedule == MemProfilerSchedule(1, 2)
    assert profiler.cfg.collect_funcs.cpu == {"part", "training_step"}
    snapshots = read(tmp_path / "memory" / "memory_fit_rank_0.yaml")["snapshots"]
    assert list(snapshots) == [
        f"rank_0.epoch_0.iter_1.{name}.{at}"
        for name, at in [
            ("training_step", "start"),
            ("training_step-part", "start"),
            ("training_step-part", "end"),
            ("training_step", "end"),
            ("validation_step-part", "start"),
            ("validation_step-part", "end"),
            ("validation_step-part", "batch_end"),
        ]
    ]
    assert snapshots["rank_0.epoch_0.iter_1.training_step.end"]["modules"]["body"] == {"forward_calls": 1}
    kept = read(tmp_path / "config.yaml")["trainer"]["callbacks"][0]["init_args"]["cfg"]
    assert {key: kept[key] for key in ("schedule", "memory_hooks", "save_hook_attrs")} == {
        key: CONFIG[key] for key in ("schedule", "memory_hooks", "save_hook_attrs")
    }
