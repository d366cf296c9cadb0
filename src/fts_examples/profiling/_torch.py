"""What PyTorch has under private names only. Nothing else in this package names them."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.optim import Optimizer


def start_allocator_history() -> None:
    """Begin to record what CUDA's caching allocator does."""
    torch.cuda.memory._record_memory_history()


def dump_allocator_history(path: Path) -> None:
    """Write what was recorded, as https://pytorch.org/memory_viz reads it, and stop recording."""
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    torch.cuda.memory._record_memory_history(enabled=None)


def version(tensor: Tensor) -> int:
    """How often a tensor's storage was changed in place."""
    return tensor._version


class FSDPTracker:
    """FSDP2's memory tracker around a part of one batch.

    Args:
        model: Whose modules' names are written.
        root: Name of the module under ``fully_shard`` that is tracked, with what is in it.
        optimizer: Its state is told apart from other tensors.
        inputs: Tensors in it are the batch.
        depth: How many levels of modules are written, of which the root is the first.
    """

    def __init__(self, model: nn.Module, root: str, optimizer: Optimizer | None, inputs: Any, depth: int) -> None:
        module = model.get_submodule(root)
        self._paths = {part: path for path, part in module.named_modules(prefix=root)}
        self._root, self._depth = root, depth
        self._tracker = FSDPMemTracker(module, optimizer)
        self._tracker.track_inputs(inputs)

    def __enter__(self) -> FSDPTracker:
        self._tracker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._tracker.__exit__(*error)

    def numbers(self) -> dict[str, Any]:
        """Bytes now and at the peak by device and use, and the totals in each state of the modules."""
        modules = {}
        for module, statistics in dict(self._tracker.memory_tracking).items():
            if self._level(module) <= self._depth:
                states = {state.value: kinds(found[-1]) for state, found in statistics.snapshots.items()}
                modules[self._paths[module]] = {
                    state: {device: uses["Total"] for device, uses in devices.items()}
                    for state, devices in states.items()
                }
        return {
            "now_bytes": kinds(self._tracker.get_tracker_snapshot("current")),
            "peak_bytes": kinds(self._tracker.get_tracker_snapshot("peak")),
            "modules_total_bytes": modules,
        }

    def text(self, units: str, tabulate: bool) -> str:
        """The tracker's own account of the peak and of the modules, which it names as their classes were called."""
        known = dict(self._tracker.memory_tracking).items()
        above = max((each.mod_fqn.count(".") + 1 - self._level(module) for module, each in known), default=0)
        with redirect_stdout(io.StringIO()) as text:
            self._tracker.display_snapshot("peak", units=units, tabulate=tabulate)
            self._tracker.display_modulewise_snapshots(depth=above + self._depth, units=units, tabulate=tabulate)
        return text.getvalue()

    def _level(self, module: nn.Module) -> int:
        below = self._paths[module].removeprefix(self._root)
        return 1 + len([part for part in below.split(".") if part])


def kinds(snapshot: dict[torch.device, dict[Any, int]]) -> dict[str, dict[str, int]]:
    """A snapshot of the tracker with names in place of devices and uses."""
    return {
        str(device): {str(getattr(use, "value", use)): size for use, size in uses.items()}
        for device, uses in snapshot.items()
    }
