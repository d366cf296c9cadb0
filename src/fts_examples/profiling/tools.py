"""What can be at work only once at a time: FSDP2's memory tracker and the history of CUDA's allocator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from . import _torch
from .checks import sharded_module
from .config import MemProfilerCfg


class Tools:
    """Starts what the configuration asks for and the trainer's device has.

    Args:
        cfg: The configuration.
        trainer: Its first optimizer's state is told apart.
        module: The model.
        stem: The beginning of the files' paths.
    """

    def __init__(self, cfg: MemProfilerCfg, trainer: Trainer, module: LightningModule, stem: Path) -> None:
        self._cfg, self._trainer, self._module, self._stem = cfg, trainer, module, stem
        self._history = cfg.cuda_allocator_history and trainer.strategy.root_device.type == "cuda"
        self._sharded: str | None = None
        self._busy = False

    def find_sharded_module(self) -> None:
        """Find what the tracker follows, when the model is complete and no batch has come yet.

        Raises:
            ValueError: There is no such module.
        """
        if self._cfg.track_fsdp_mem and self._sharded is None:
            self._sharded = sharded_module(self._module, self._cfg.fsdp_mem_tracker_root_module)

    def start(self, name: str, key: str, inputs: Any) -> Callable[[], dict[str, Any]] | None:
        """Begin what is measured in a method, unless something is at work already.

        Returns:
            A function that ends it and returns what is to be written; None if nothing has begun.
        """
        tracked: dict[str, Any] = {}
        stack = ExitStack()
        funcs = self._cfg.collect_funcs
        if self._busy:
            return None
        if self._sharded is not None and funcs.collects("fsdp", name):
            optimizer = next(iter(self._trainer.optimizers), None)
            depth = self._cfg.fsdp_mem_track_module_depth
            tracker = _torch.FSDPTracker(self._module, self._sharded, optimizer, inputs, depth)
            stack.callback(self._keep, key, tracker, tracked)
            stack.enter_context(tracker)
            self._busy = True
        if self._history and funcs.collects("cuda_allocator_history", name):
            _torch.start_allocator_history()
            stack.callback(_torch.dump_allocator_history, self._path(f"_{key}_allocator_history.pickle"))
            self._busy = True

        def stop() -> dict[str, Any]:
            self._busy = False
            stack.close()
            return tracked

        return stop if self._busy else None

    def _path(self, ending: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}{ending}")

    def _keep(self, key: str, tracker: _torch.FSDPTracker, tracked: dict[str, Any]) -> None:
        tracked["fsdp"] = tracker.numbers()
        text = tracker.text(self._cfg.fsdp_mem_tracker_units, self._cfg.fsdp_mem_tracker_tabulate)
        with self._path("_fsdp.txt").open("a", encoding="utf-8") as file:
            file.write(f"{key}\n{text}\n")
