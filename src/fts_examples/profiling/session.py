"""What lives from a trainer's ``setup`` to its ``teardown``: the measurements of one ``fit``, ``validate``, ..."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from finetuning_scheduler import FinetuningScheduler

from .checks import check_folder
from .config import MemProfilerCfg, imported
from .files import free_stem, write
from .module_hooks import ModuleHooks
from .saved_tensors import Count, SavedTensors
from .tools import Tools

logger = logging.getLogger(__name__)


@dataclass
class Window:
    """One measured call; ``outermost``: it is not inside another one, and the hooks were put on for it."""

    name: str
    key: str
    outermost: bool
    count: Count = field(default_factory=Count)
    hooks: ExitStack = field(default_factory=ExitStack)
    stop_tools: Callable[[], dict[str, Any]] | None = None


class Session:
    """Measures decorated methods' calls.

    Args:
        cfg: A configuration that has been checked for the module.
        trainer: Whose run it is.
        module: Whose methods are measured.

    Raises:
        ValueError: The folder of the files cannot be written to.
    """

    def __init__(self, cfg: MemProfilerCfg, trainer: Trainer, module: LightningModule) -> None:
        self.cfg, self.module = cfg, module
        self.snapshots: dict[str, dict[str, Any]] = {}
        self._trainer = trainer
        self.stage = "run" if trainer.state.fn is None else trainer.state.fn.value  # fit, validate, test, predict
        self._process = psutil.Process()
        self._device = trainer.strategy.root_device
        self._stem = self._make_stem()
        self._tools = Tools(cfg, trainer, module, self._stem)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning sets
        self._scheduler = next((each for each in callbacks if isinstance(each, FinetuningScheduler)), None)
        self._calls: Counter[tuple[int | None, str]] = Counter()
        self._inside: list[str] = []
        self._open: list[Window] = []
        self._lasting: list[Window] = []
        self._module_hooks, self._saved_tensors = self._make_hooks()
        self._say_what_cannot_be_collected()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the module is not measured."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @contextmanager
    def measured(self, name: str, inputs: Any) -> Iterator[None]:
        """Measure a call, unless the schedule or the configuration leaves it out or it is inside one of its name."""
        if name in self._inside:
            yield
            return
        self._inside.append(name)
        try:
            key = self._next_key(name)
            if key is None:
                yield
                return
            window = self._begin(name, key, inputs)
            try:
                yield
            except BaseException:
                self._open.remove(window)
                self._close(window)
                raise
            self._finish(window)
        finally:
            self._inside.remove(name)

    def release(self) -> None:
        """Write and end what lasts longer than the call that began it."""
        while self._lasting:
            window = self._lasting.pop()
            record = self._read(window)
            self.snapshots[f"{window.key}.batch_end"] = record | self._close(window)

    def find_sharded_module(self) -> None:
        """Find what FSDP2's tracker follows, when the model is complete and no batch has come yet."""
        self._tools.find_sharded_module()

    def end(self) -> None:
        """Take everything off and write the files."""
        for window in [*self._open, *self._lasting]:
            self._close(window)
        self._open, self._lasting = [], []
        if not self.snapshots:
            return
        rank = self._trainer.global_rank
        about = {"stage": self.stage, "rank": rank, "world_size": self._trainer.world_size}
        content = {"about": about, "snapshots": self.snapshots}
        as_yaml, as_pickle = self.cfg.dump_memorystats_yaml, self.cfg.dump_memorystats_pickle
        for path in write(self._stem, content, as_yaml=as_yaml, as_pickle=as_pickle):
            rank_zero_info(f"MemProfiler has written {path}.")

    def _next_key(self, name: str) -> str | None:
        """Count the call; name it if it is measured."""
        if not self.cfg.collect_funcs.any(name):
            return None
        phase, path = self._phase(), "-".join(self._inside)
        iteration = self._calls[phase, path]
        self._calls[phase, path] += 1
        if not self.cfg.schedule.includes(iteration):
            return None
        parts = [f"rank_{self._trainer.global_rank}", *([] if phase is None else [f"phase_{phase}"])]
        return ".".join([*parts, f"epoch_{self._trainer.current_epoch}", f"iter_{iteration}", path])

    def _phase(self) -> int | None:
        if self._scheduler is None or self._trainer.state.fn is not TrainerFn.FITTING:
            return None
        return self._scheduler.curr_depth

    def _begin(self, name: str, key: str, inputs: Any) -> Window:
        if not self._open:
            self.release()
        window = Window(name, key, outermost=not self._open)
        self.snapshots[f"{key}.start"] = self._statistics(name)
        self._saved_tensors.counts.append(window.count)
        if window.outermost and self.cfg.enable_memory_hooks:
            window.hooks.enter_context(self._module_hooks.on())
        if window.outermost and self.cfg.enable_saved_tensors_hooks:
            window.hooks.enter_context(self._saved_tensors.on())
        window.stop_tools = self._tools.start(name, key, inputs)
        self._open.append(window)
        return window

    def _finish(self, window: Window) -> None:
        self._open.remove(window)
        record = self._read(window)
        if not (window.outermost and window.name in self.cfg.retain_hooks_for_funcs):
            window.hooks.close()
            if window.stop_tools is None or window.name != "training_step":  # whose backward pass is still to come
                self.snapshots[f"{window.key}.end"] = record | self._close(window)
                return
        self.snapshots[f"{window.key}.end"] = record
        self._lasting.append(window)

    def _close(self, window: Window) -> dict[str, Any]:
        """Take off what a call has put on; return what the tools have found."""
        found = {} if window.stop_tools is None else window.stop_tools()
        window.hooks.close()
        self._saved_tensors.counts.remove(window.count)
        return found

    def _read(self, window: Window) -> dict[str, Any]:
        record = self._statistics(window.name)
        if self.cfg.enable_saved_tensors_hooks:
            record["saved_for_backward_bytes"] = window.count.bytes
        if window.outermost and self.cfg.enable_memory_hooks:
            record["modules"] = self._module_hooks.records()
        return record

    def _statistics(self, name: str) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if self.cfg.collect_funcs.collects("cpu", name):
            memory = self._process.memory_info()
            record |= {"rss_bytes": memory.rss, "vms_bytes": memory.vms}
        if self._device.type == "cuda" and self.cfg.collect_funcs.collects("cuda", name):
            record["cuda"] = dict(torch.cuda.memory_stats(self._device))
        return record

    def _make_stem(self) -> Path:
        cfg, trainer = self.cfg, self._trainer
        folder = Path(cfg.save_dir or trainer.log_dir or trainer.default_root_dir)
        if cfg.dump_memorystats_yaml or cfg.dump_memorystats_pickle or cfg.track_fsdp_mem or cfg.cuda_allocator_history:
            check_folder(folder)
        return free_stem(folder, self.stage, trainer.global_rank)

    def _make_hooks(self) -> tuple[ModuleHooks, SavedTensors]:
        memory, saved = self.cfg.memory_hooks, self.cfg.saved_tensors_funcs
        recorded = self.cfg.save_hook_attrs
        module_hooks = ModuleHooks(self.module, imported(memory.pre_forward), imported(memory.post_forward), recorded)
        return module_hooks, SavedTensors(self.module, imported(saved.pack), imported(saved.unpack))

    def _say_what_cannot_be_collected(self) -> None:
        asked = self.cfg.cuda_allocator_history or self.cfg.collect_funcs.cuda is not None
        if self._device.type != "cuda" and self._trainer.is_global_zero:
            level = logging.WARNING if asked else logging.INFO
            logger.log(level, "MemProfiler: no CUDA statistics, the trainer's device is %s.", self._device)
