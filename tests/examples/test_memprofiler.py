"""What the memory profiler measures, compared with counts by hand, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import sys
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetuning_scheduler import FinetuningScheduler
from fts_examples.profiling import (
    MemoryHooks,
    MemProfiler,
    MemProfilerCfg,
    MemProfilerFuncs,
    MemProfilerSchedule,
    SavedTensorsFuncs,
    memprofiler,
)
from fts_examples.profiling.saved_tensors import Count, SavedTensors, keep, unchanged
from tests.examples.memprofiled import BATCH_BYTES, FLOAT, HIDDEN_BYTES, ROWS, Measured, fit, read, saved, trainer

MEGABYTE = 2**20
STEP_BYTES = BATCH_BYTES + HIDDEN_BYTES
ONLY_TRAINING = MemProfilerFuncs(default={"training_step"})


# --- bytes kept for the backward pass --------------------------------------------------------------------------------


def test_bytes_kept_for_the_backward_pass_are_those_counted_by_hand(tmp_path: Path) -> None:
    assert saved(fit(tmp_path)) == {
        **{f"epoch_0.iter_{i}.training_step.{at}": STEP_BYTES for i in range(2) for at in ("end", "batch_end")},
        **{f"epoch_0.iter_{i}.training_step-part.end": STEP_BYTES for i in range(2)},
        **{f"epoch_0.iter_{i}.validation_step.end": 0 for i in range(2)},
        **{f"epoch_0.iter_{i}.validation_step-part.end": 0 for i in range(2)},
    }


def test_what_a_frozen_layer_would_need_is_not_kept(tmp_path: Path) -> None:
    module = Measured()
    module.body.requires_grad_(False)
    assert saved(fit(tmp_path, module=module))["epoch_0.iter_0.training_step.end"] == HIDDEN_BYTES


def test_each_phase_of_a_schedule_is_measured_from_its_first_batch(tmp_path: Path) -> None:
    schedule = {
        0: {"params": ["head.*"], "max_transition_epoch": 1},
        1: {"params": ["body.*"], "max_transition_epoch": 2},
    }
    profiler = MemProfiler(MemProfilerCfg(collect_funcs=ONLY_TRAINING, schedule=MemProfilerSchedule(1, 2)))
    scheduler = FinetuningScheduler(schedule)
    trainer(tmp_path, scheduler, profiler, max_epochs=3, enable_checkpointing=True).fit(Measured())
    assert saved(profiler.snapshots) == {
        **{f"phase_0.epoch_0.iter_1.training_step.{at}": HIDDEN_BYTES for at in ("end", "batch_end")},
        **{f"phase_1.epoch_1.iter_1.training_step.{at}": STEP_BYTES for at in ("end", "batch_end")},
    }


def counted(function: Any, model: nn.Module) -> int:
    tensors = SavedTensors(model, keep, unchanged)
    tensors.counts.append(Count())
    with tensors.on():
        function()
    return tensors.counts[0].bytes


def test_a_storage_counts_once_and_whole_and_a_parameter_not_at_all() -> None:
    model = nn.Linear(6, 6)
    x = torch.ones(10, requires_grad=True)
    # All of x, for a part of it that sin keeps; the results of exp and sin, which their product keeps.
    assert counted(lambda: x[:2].exp() * x[2:4].sin(), model) == 10 * FLOAT + 2 * 2 * FLOAT
    assert counted(lambda: model.weight.t() * model.weight.view(6, 6), model) == 0


def test_memory_that_is_used_again_counts_again() -> None:
    """A graph that is gone may leave its addresses to the next one."""
    x = torch.ones(1000, requires_grad=True)

    def twice() -> None:
        for _ in range(2):
            x.exp().sum().backward()

    assert counted(twice, nn.Module()) == 2 * 1000 * FLOAT


def test_inputs_of_checkpointed_layers_count_and_their_inside_does_not() -> None:
    model = nn.Sequential(nn.Linear(3, 300), nn.Linear(300, 3))
    x = torch.ones(ROWS, 3, requires_grad=True)
    assert counted(lambda: checkpoint(model, x, use_reentrant=False), model) == x.nbytes


def test_sparse_tensors_do_not_count() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    assert counted(lambda: torch.sparse.mm(torch.eye(3).to_sparse(), weight), nn.Module()) == 0


def test_what_is_changed_in_place_is_still_noticed(tmp_path: Path) -> None:
    class InPlace(Measured):
        @MemProfiler.memprofilable
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self(batch).exp().mul_(2).sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fit(tmp_path, module=InPlace())


def test_a_graph_that_nobody_needs_is_freed_at_once() -> None:
    x = torch.ones(3, requires_grad=True)
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, unchanged):
            y = x.exp()
        reference = weakref.ref(y)
        del y
        assert reference() is None
    finally:
        gc.enable()


def test_training_under_the_profiler_changes_no_weight(tmp_path: Path) -> None:
    plain = Measured()
    measured = copy.deepcopy(plain)
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2).fit(plain)
    fit(tmp_path, MemProfilerCfg(enable_memory_hooks=True), measured, max_epochs=2, accumulate_grad_batches=2)
    for one, other in zip(plain.parameters(), measured.parameters(), strict=True):
        assert torch.equal(one, other)


PACKED: list[torch.Size] = []


def pack(tensor: Tensor) -> Tensor:
    PACKED.append(tensor.shape)
    return tensor.detach().clone()


def unpack(packed: Tensor) -> Tensor:
    return packed


def test_functions_of_ones_own_keep_tensors_after_they_were_counted(tmp_path: Path) -> None:
    PACKED.clear()
    funcs = SavedTensorsFuncs(pack=f"{__name__}.pack", unpack=unpack)
    sys.modules.setdefault(__name__, sys.modules[pack.__module__])
    snapshots = fit(tmp_path, MemProfilerCfg(collect_funcs=ONLY_TRAINING, saved_tensors_funcs=funcs))
    assert saved(snapshots)["epoch_0.iter_0.training_step.end"] == STEP_BYTES
    assert torch.Size([ROWS, 3]) in PACKED


# --- memory of the process, hooks ------------------------------------------------------------------------------------


class Hoarder(Measured):
    """Keeps memory that it has touched: of two sizes in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.big, self.small = Hoard(64), Hoard(0)

    @MemProfiler.memprofilable
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(self.small(self.big(batch)), batch_idx)


class Hoard(nn.Module):
    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.megabytes = megabytes
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(torch.ones(self.megabytes * MEGABYTE // 4))
        return x


def test_memory_of_the_process_grows_by_what_a_method_keeps(tmp_path: Path) -> None:
    snapshots = fit(tmp_path, MemProfilerCfg(enable_memory_hooks=True), Hoarder())
    for iteration in range(2):
        start, end = (snapshots[f"rank_0.epoch_0.iter_{iteration}.training_step.{at}"] for at in ("start", "end"))
        for kind in ("rss_bytes", "vms_bytes"):
            assert type(start[kind]) is int
            assert end[kind] - start[kind] > 60 * MEGABYTE
        assert 0 < start["rss_bytes"] < start["vms_bytes"]
        modules = end["modules"]
        assert modules["big"]["rss_diff_bytes"] > 60 * MEGABYTE > 4 * MEGABYTE > modules["small"]["rss_diff_bytes"]
        assert {name: record["forward_calls"] for name, record in modules.items()} == dict.fromkeys(
            ["big", "small", "Hoarder", "body", "head"], 1
        )


def note_rows(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    module.rows_seen = len(args[0])


def note_nothing(module: nn.Module, args: Any, output: Any) -> None:
    module.other = object()


def test_hooks_of_ones_own_and_the_attributes_that_are_written(tmp_path: Path) -> None:
    hooks = MemoryHooks(pre_forward=note_rows, post_forward=note_nothing)
    cfg = MemProfilerCfg(enable_memory_hooks=True, memory_hooks=hooks, save_hook_attrs=("rows_seen",))
    modules = fit(tmp_path, cfg)["rank_0.epoch_0.iter_0.training_step.end"]["modules"]
    assert modules == {name: {"rows_seen": ROWS} for name in ("Measured", "body", "head")}


def hooks_on(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


class HooksInBackward(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(hooks_on(pl_module))


@pytest.mark.parametrize(("retained", "hooks"), [({"training_step"}, 6), (set(), 0)], ids=["retained", "not"])
def test_hooks_stay_on_after_the_methods_for_which_they_are_retained(
    retained: set[str], hooks: int, tmp_path: Path
) -> None:
    backward, module = HooksInBackward(), Measured()
    profiler = MemProfiler(MemProfilerCfg(enable_memory_hooks=True, retain_hooks_for_funcs=retained))
    trainer(tmp_path, profiler, backward).fit(module)
    assert backward.seen == [hooks, hooks]
    assert any(key.endswith("batch_end") for key in profiler.snapshots) == bool(retained)
    assert hooks_on(module) == 0


# --- what is measured when --------------------------------------------------------------------------------------------


def test_each_kind_is_measured_in_its_methods(tmp_path: Path) -> None:
    cfg = MemProfilerCfg(
        collect_funcs=MemProfilerFuncs(default={"part"}, cpu={"training_step"}), enable_saved_tensors_hooks=False
    )
    snapshots = fit(tmp_path, cfg, limit_train_batches=1, limit_val_batches=0)
    assert {key.partition(".")[2]: set(record) for key, record in snapshots.items()} == {
        **{f"epoch_0.iter_0.training_step.{at}": {"rss_bytes", "vms_bytes"} for at in ("start", "end", "batch_end")},
        **{f"epoch_0.iter_0.training_step-part.{at}": set() for at in ("start", "end")},
    }


def test_without_an_end_every_call_after_the_warm_up_is_measured(tmp_path: Path) -> None:
    cfg = MemProfilerCfg(collect_funcs=ONLY_TRAINING, schedule=MemProfilerSchedule(warmup_iters=3, max_iter=None))
    keys = [key for key in fit(tmp_path, cfg, max_epochs=7) if key.endswith(".end")]
    assert keys == [f"rank_0.epoch_{i // 2}.iter_{i}.training_step.end" for i in range(3, 14)]


def test_what_never_came_to_be_measured_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert fit(tmp_path, MemProfilerCfg(schedule=MemProfilerSchedule(warmup_iters=9))) == {}
    assert "nothing was measured in fit. Decorated methods: part, training_step, validation_step." in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_manual_optimization_and_calls_in_a_closure_are_measured(tmp_path: Path) -> None:
    class Closure(Measured):
        @MemProfiler.memprofilable
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), max_iter=2)

    kept = saved(fit(tmp_path, module=Closure(), limit_train_batches=1, limit_val_batches=0))
    assert {key for key in kept if key.endswith("training_step.end")} == {
        f"epoch_0.iter_{i}.optimizer_step-training_step.end" for i in range(2)
    }
    assert kept["epoch_0.iter_0.optimizer_step.end"] == BATCH_BYTES + 2 * HIDDEN_BYTES


@pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule will be overridden")
def test_beside_lightnings_profiler_of_pytorch(tmp_path: Path) -> None:
    profiler = pl.profilers.PyTorchProfiler(dirpath=tmp_path, filename="profile", export_to_chrome=False)
    assert fit(tmp_path, profiler=profiler)["rank_0.epoch_0.iter_0.training_step.end"]["rss_bytes"] > 0
    assert "aten::addmm" in (tmp_path / "fit-profile.txt").read_text(encoding="utf-8")


# --- files and runs --------------------------------------------------------------------------------------------------


def test_the_files_hold_the_snapshots_and_no_run_overwrites_another(tmp_path: Path) -> None:
    profiler = MemProfiler(MemProfilerCfg(dump_memorystats_pickle=True, save_dir=str(tmp_path / "memory")))
    module, runner = Measured(), trainer(tmp_path, profiler)
    written = []
    for run in (runner.fit, runner.validate, runner.fit):
        run(module)
        runner.fit_loop.max_epochs += 1
        written.append(profiler.snapshots)
    names = ["memory_fit_rank_0", "memory_validate_rank_0", "memory_fit_2_rank_0"]
    folder = tmp_path / "memory"
    assert {path.name for path in folder.iterdir()} == {f"{name}.{end}" for name in names for end in ("yaml", "pickle")}
    for name, snapshots in zip(names, written, strict=True):
        content = read(folder / f"{name}.yaml")
        assert content["snapshots"] == snapshots
        assert content["about"] == {"stage": name.split("_")[1], "rank": 0, "world_size": 1}
        assert pickle.loads((folder / f"{name}.pickle").read_bytes()) == content
    assert {key.split(".")[3] for key in written[1]} == {"validation_step", "validation_step-part"}


def test_the_files_are_in_the_log_directory_unless_told_otherwise(tmp_path: Path) -> None:
    fit(tmp_path, logger=pl.loggers.CSVLogger(tmp_path, name="runs"))
    assert (tmp_path / "runs" / "version_0" / "memory_fit_rank_0.yaml").exists()


def test_an_exception_leaves_files_and_no_hooks(tmp_path: Path) -> None:
    class Fails(Measured):
        @MemProfiler.memprofilable
        def part(self, batch: Tensor) -> Tensor:
            if self.batches == 2:
                raise RuntimeError("of the user's own")
            return super().part(batch)

    module = Fails()
    with pytest.raises(RuntimeError, match="of the user's own"):
        fit(tmp_path, MemProfilerCfg(enable_memory_hooks=True), module)
    keys = list(read(tmp_path / "memory_fit_rank_0.yaml")["snapshots"])
    assert keys[-2:] == [f"rank_0.epoch_0.iter_1.training_step{part}.start" for part in ("", "-part")]
    assert hooks_on(module) == 0
    assert memprofiler.SESSION not in vars(module)
    with pytest.raises(RuntimeError, match="is at version 1"):  # PyTorch's own words: no hooks see what it keeps
        torch.ones(1, requires_grad=True).exp().mul_(2).backward()


class CopiesTheModule(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.copy = copy.deepcopy(pl_module)


def test_a_copy_of_the_module_made_meanwhile_is_not_measured(tmp_path: Path) -> None:
    copies = CopiesTheModule()
    profiler = MemProfiler()
    trainer(tmp_path, profiler, copies).fit(Measured())
    before = len(profiler.snapshots)
    copies.copy.part(torch.ones(ROWS, 3))
    assert len(profiler.snapshots) == before > 0


# --- off --------------------------------------------------------------------------------------------------------------


class Calls:
    """Notes every call of a function while it is at work, those of Python's own written in C included."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __enter__(self) -> Calls:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            self.names.append(frame.f_code.co_name)
        elif event == "c_call" and argument is not sys.setprofile:
            self.names.append(argument.__name__)


class Bare(pl.LightningModule):
    @MemProfiler.memprofilable
    def method(self) -> None: ...


def test_off_a_decorated_method_costs_one_look_at_the_modules_attributes() -> None:
    module = Bare()
    with Calls() as calls:
        module.method()
    assert [name for name in calls.names if name != "__exit__"] == ["measured", "vars", "get", "method"]


def test_off_nothing_is_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoSession:
        def __init__(self, *_: Any) -> None:
            raise AssertionError("a session")

    monkeypatch.setattr(memprofiler, "Session", NoSession)
    backward, module = HooksInBackward(), Measured()
    trainer(tmp_path, MemProfiler(MemProfilerCfg(enabled=False, enable_memory_hooks=True)), backward).fit(module)
    assert backward.seen == [0, 0]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="a session"):  # which the profiler would have made
        trainer(tmp_path, MemProfiler()).fit(module)


# --- CUDA, by stand-ins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "level"),
    [
        (MemProfilerCfg(), logging.INFO),
        (MemProfilerCfg(cuda_allocator_history=True), logging.WARNING),
        (MemProfilerCfg(collect_funcs=MemProfilerFuncs(cuda={"part"})), logging.WARNING),
    ],
    ids=["by default", "history", "statistics"],
)
def test_without_cuda_nothing_of_it_is_collected_and_that_is_said_once(
    cfg: MemProfilerCfg, level: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fts_examples")
    assert not any("cuda" in record for record in fit(tmp_path, cfg).values())
    said = [(record.levelno, record.getMessage()) for record in caplog.records if "CUDA" in record.getMessage()]
    assert said == [(level, "MemProfiler: no CUDA statistics, the trainer's device is cpu.")]
    assert not list(tmp_path.glob("*history*"))


def test_with_cuda_statistics_are_read_and_history_is_recorded_to_the_end_of_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's functions are replaced: no test has a GPU."""
    events: list[Any] = []

    class Device(pl.strategies.SingleDeviceStrategy):
        """Names a GPU while the profiler asks."""

        asked = False

        @property
        def root_device(self) -> torch.device:
            return torch.device("cuda", 0) if self.asked else torch.device("cpu")

    class Asked(pl.Callback):
        def __init__(self, asked: bool) -> None:
            self.asked = asked

        def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            trainer.strategy.asked = self.asked

    class Order(pl.Callback):
        def on_before_zero_grad(self, *_: Any) -> None:
            events.append("optimizer")

    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"allocated_bytes.all.current": device.index + 7})
    names = ("_record_memory_history", "_dump_snapshot")
    monkeypatch.setattr(torch.cuda.memory, names[0], lambda enabled="all": events.append(enabled))
    monkeypatch.setattr(torch.cuda.memory, names[1], lambda path: events.append(Path(path).name))
    profiler = MemProfiler(MemProfilerCfg(collect_funcs=ONLY_TRAINING, cuda_allocator_history=True))
    callbacks = (Asked(True), profiler, Asked(False), Order())
    trainer(tmp_path, *callbacks, strategy=Device("cpu"), limit_train_batches=1, limit_val_batches=0).fit(Measured())
    assert profiler.snapshots["rank_0.epoch_0.iter_0.training_step.end"]["cuda"] == {"allocated_bytes.all.current": 7}
    name = "memory_fit_rank_0_rank_0.epoch_0.iter_0.training_step_allocator_history.pickle"
    assert events == ["all", "optimizer", name, None]
